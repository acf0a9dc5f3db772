package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// checkFinding is what these tests read of a finding of repo check --json.
type checkFinding struct {
	Object  string `json:"object"`
	Error   string `json:"error"`
	Cost    string `json:"cost"`
	Backups []struct {
		Backup     string   `json:"backup"`
		Files      []string `json:"files"`
		FilesTotal int      `json:"files_total"`
	} `json:"backups"`
	Window *struct {
		FromLSN  string     `json:"from_lsn"`
		FromTime *time.Time `json:"from_time"`
		ToLSN    string     `json:"to_lsn"`
		Backups  []string   `json:"backups"`
	} `json:"lost_window"`
}

// repository is a copy of one that a test may damage.
type repository struct {
	t   *testing.T
	dir string
}

// checked is a cluster's repository of three backups, with WAL all along, whose server is down. The second and third back
// up much the same data, so they share packs.
type checked struct {
	archived
	backups  [3]manifest
	segments []string        // between the first backup's last and the second's first
	early    map[string]bool // packs of the first backup
}

// manifest is what these tests read of one.
type manifest struct {
	ID       string `json:"id"`
	StopLSN  string `json:"stop_lsn"`
	WALFirst string `json:"wal_first"`
	WALLast  string `json:"wal_last"`
	Size     int64  `json:"size_bytes"`
}

func newChecked(t *testing.T) *checked {
	t.Helper()
	a := newArchived(t, postgresql(t, 15), clusterOptions{walSegmentMB: 1, checksums: true, pgbenchScale: 1, conf: []string{"fsync = off"}},
		"--no-encryption") // its documents are read, and its bytes changed with care
	c := &checked{archived: a}
	c.backups[0] = c.backUp(t)
	c.early = map[string]bool{}
	for key := range objects(t, a.repo) {
		c.early[key] = true
	}
	a.pgbench("--client", "2", "--transactions", "500")
	a.fillSegments(5)
	a.SQL("CREATE TABLE unshared AS SELECT md5(i::text) AS x FROM generate_series(1, 20000) i")
	c.backups[1] = c.backUp(t)
	a.fillSegments(3)
	c.backups[2] = c.backUp(t)
	a.fillSegments(3)
	a.waitArchived()
	a.Stop()
	for _, name := range a.walObjects(t) {
		if name > c.backups[0].WALLast && name < c.backups[1].WALFirst && len(name) == 24 {
			c.segments = append(c.segments, name)
		}
	}
	if len(c.segments) < 4 {
		t.Fatalf("there are segments %v between the backups", c.segments)
	}
	return c
}

// backUp makes a backup and reads its manifest, once the archiver has caught up with it.
func (c *checked) backUp(t *testing.T) (m manifest) {
	t.Helper()
	id := c.newest(t).ID
	c.waitArchived()
	text, err := os.ReadFile(filepath.Join(c.repo, "backups", "main", id+".json"))
	if err == nil {
		err = json.Unmarshal(text, &m)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// copied gives a copy of the repository.
func (c *checked) copied(t *testing.T) repository {
	t.Helper()
	dir := filepath.Join(tempDir(t), "repo")
	shell(t, "cp -a "+c.repo+" "+dir)
	return repository{t, dir}
}

func (r repository) path(key string) string { return filepath.Join(r.dir, key) }

func (r repository) remove(key string) {
	r.t.Helper()
	if err := os.Remove(r.path(key)); err != nil {
		r.t.Fatal(err)
	}
}

// rewrite replaces an object's bytes.
func (r repository) rewrite(key string, change func([]byte) []byte) {
	r.t.Helper()
	was, err := os.ReadFile(r.path(key))
	if err == nil {
		err = os.WriteFile(r.path(key), change(was), 0o644)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func flipMiddle(b []byte) []byte {
	b[len(b)/2] ^= 0x55
	return b
}

// check runs repo check, which has to find something, and nothing but something of object.
func (r repository) check(object string, args ...string) checkFinding {
	r.t.Helper()
	v := invocation{env: unseen(r.dir)}
	var out struct{ Findings, Notes []checkFinding }
	v.run(r.t, append([]string{"repo", "check", "--json"}, args...)...).exits(r.t, 16).into(r.t, &out)
	if len(out.Findings) != 1 || len(out.Notes) != 0 || out.Findings[0].Object != object {
		r.t.Fatalf("repo check %v finds %+v, notes %+v, want %s alone", args, out.Findings, out.Notes, object)
	}
	text := v.run(r.t, append([]string{"repo", "check"}, args...)...).exits(r.t, 16)
	for _, b := range out.Findings[0].Backups {
		if !strings.Contains(text.stdout, b.Backup) {
			r.t.Errorf("for a person it does not name backup %s:\n%s", b.Backup, text.stdout)
		}
	}
	return out.Findings[0]
}

// sound fails the test if repo check finds anything.
func (r repository) sound(args ...string) {
	r.t.Helper()
	invocation{env: unseen(r.dir)}.run(r.t, append([]string{"repo", "check"}, args...)...).ok(r.t)
}

// names fails the test unless a finding names just these backups.
func (f checkFinding) names(t *testing.T, want ...manifest) {
	t.Helper()
	var got, ids []string
	for _, b := range f.Backups {
		got = append(got, b.Backup)
	}
	for _, m := range want {
		ids = append(ids, m.ID)
	}
	if !slices.Equal(got, ids) {
		t.Errorf("%s: names backups %q, want %q", f.Object, got, ids)
	}
}

// ends fails the test unless recovery from just these backups ends before segment first, and goes on at to's end.
func (f checkFinding) ends(t *testing.T, first string, to manifest, want ...manifest) {
	t.Helper()
	if f.Window == nil {
		t.Fatalf("%+v names no window", f)
	}
	var ids []string
	for _, m := range want {
		ids = append(ids, m.ID)
	}
	if from := segmentStart(t, first, 1<<20).String(); f.Window.FromLSN != from || f.Window.ToLSN != to.StopLSN || !slices.Equal(f.Window.Backups, ids) {
		t.Errorf("window %+v, want from %s to %q of %q", *f.Window, from, to.StopLSN, ids)
	}
}

// TestCheckNamesWhatIsHit damages a real cluster's repository in one way at a time.
func TestCheckNamesWhatIsHit(t *testing.T) {
	t.Parallel()
	c := newChecked(t)
	whole := repository{t, c.repo}
	whole.sound()
	whole.sound("--maps")
	whole.sound("--read-data")
	first, second, third := c.backups[0], c.backups[1], c.backups[2]
	wal := func(name string) string { return "wal/main/" + name[:8] + "/" + name }
	for name, test := range map[string]func(*testing.T, repository){
		"missing cluster document": func(t *testing.T, r repository) {
			r.remove("clusters/main")
			r.check("clusters/main").names(t, first, second, third)
			r.check("clusters/main", "--read-data").names(t, first, second, third)
		},
		"missing manifest": func(t *testing.T, r repository) {
			key := "backups/main/" + second.ID + ".json"
			r.remove(key)
			r.check(key).names(t, second)
		},
		"missing pack list": func(t *testing.T, r repository) {
			key := "backups/main/" + second.ID + ".packs"
			r.remove(key)
			r.check(key).names(t, second)
			r.check(key, "--read-data").names(t, second)
		},
		"missing segment between backups": func(t *testing.T, r repository) {
			r.remove(wal(c.segments[2]))
			f := r.check(wal(c.segments[2]))
			f.names(t)
			f.ends(t, c.segments[2], second, first)
			if f.Window.FromTime == nil {
				t.Error("it does not say up to which time recovery gets")
			}
		},
		"missing segments between backups": func(t *testing.T, r repository) {
			r.remove(wal(c.segments[1]))
			r.remove(wal(c.segments[2]))
			f := r.check(wal(c.segments[1]))
			f.ends(t, c.segments[1], second, first)
			if !strings.Contains(f.Error, c.segments[2]) {
				t.Errorf("%q does not say where the gap ends", f.Error)
			}
		},
		"missing segment of a backup": func(t *testing.T, r repository) {
			r.remove(wal(second.WALLast))
			f := r.check(wal(second.WALLast), "--maps")
			f.names(t, second)
			f.ends(t, second.WALLast, third, first)
			if got := f.Backups[0].Files; !slices.Equal(got, []string{"pgdata/pg_wal/" + second.WALLast}) {
				t.Errorf("it names the files %q", got)
			}
		},
		"flipped byte of a segment": func(t *testing.T, r repository) {
			full := c.segments[0] // of pgbench: in one of zeros a match elsewhere gives the same bytes
			r.rewrite(wal(full), flipMiddle)
			r.sound()
			r.check(wal(full), "--read-data").ends(t, full, second, first)
		},
		"missing pack": func(t *testing.T, r repository) {
			key := c.largestPack(t, func(string) bool { return true })
			r.remove(key)
			r.check(key).names(t, c.hit(t, r, checkFinding{})...)
			c.hit(t, r, r.check(key, "--maps"))
		},
		"missing pack of later backups": func(t *testing.T, r repository) {
			key := c.largestPack(t, func(key string) bool { return !c.early[key] })
			r.remove(key)
			f := r.check(key)
			f.names(t, c.hit(t, r, checkFinding{})...)
			if f.Backups[0].Backup == first.ID {
				t.Error("it names a backup that was made before the pack")
			}
			c.hit(t, r, r.check(key, "--maps"))
		},
		"truncated pack": func(t *testing.T, r repository) {
			key := c.largestPack(t, func(string) bool { return true })
			r.rewrite(key, func(b []byte) []byte { return b[:len(b)/2] })
			r.check(key).names(t, first, second, third)
			c.hit(t, r, r.check(key, "--read-data"))
		},
		"flipped byte of a chunk": func(t *testing.T, r repository) {
			key := c.largestPack(t, func(string) bool { return true })
			r.rewrite(key, flipMiddle)
			r.sound("--maps")
			c.hit(t, r, r.check(key, "--read-data"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := c.copied(t)
			r.t = t
			test(t, r)
		})
	}
}

// largestPack is the largest of the packs that are wanted.
func (c *checked) largestPack(t *testing.T, wanted func(key string) bool) (largest string) {
	t.Helper()
	size := int64(0)
	for key, n := range objects(t, c.repo) {
		if strings.HasPrefix(key, "packs/") && wanted(key) && n > size {
			largest, size = key, n
		}
	}
	return largest
}

// hit reads all backups through a mount, and gives those of which it cannot read a file. If the finding names files, they
// have to be these.
func (c *checked) hit(t *testing.T, r repository, f checkFinding) (hit []manifest) {
	t.Helper()
	dir := archived{c.cluster, r.dir}.mount(t, invocation{})
	defer checkUmount(t, dir)
	for _, m := range c.backups {
		unreadable := unreadableBelow(t, filepath.Join(dir, "main", m.ID))
		if len(unreadable) > 0 {
			hit = append(hit, m)
		}
		named, total := f.files(m)
		if f.Object == "" {
			continue
		}
		if total != len(unreadable) {
			t.Errorf("backup %s: %d files named, %d cannot be read", m.ID, total, len(unreadable))
		}
		for _, name := range named {
			if !slices.Contains(unreadable, name) {
				t.Errorf("backup %s: %s is named and can be read", m.ID, name)
			}
		}
	}
	if len(hit) == 0 {
		t.Fatal("all files of all backups can be read")
	}
	return hit
}

// files are those of a backup that a finding names.
func (f checkFinding) files(m manifest) (named []string, total int) {
	for _, b := range f.Backups {
		if b.Backup == m.ID {
			return b.Files, b.FilesTotal
		}
	}
	return nil, 0
}

// unreadableBelow gives the files below a backup that cannot be read, with their paths in it.
func unreadableBelow(t *testing.T, backup string) (names []string) {
	t.Helper()
	for _, path := range filesBelow(t, filepath.Join(backup, "pgdata")) {
		if _, err := os.ReadFile(path); err != nil {
			name, _ := filepath.Rel(backup, path)
			names = append(names, name)
		}
	}
	return names
}

// TestInfoOfCluster compares repo info with the repository on disk.
func TestInfoOfCluster(t *testing.T) {
	t.Parallel()
	c := newChecked(t)
	var info struct {
		Stored        int64 `json:"stored_bytes"`
		NotReferenced *struct{ Packs int }
		Clusters      []struct {
			Segments int `json:"wal_segments"`
			Backups  []struct {
				ID     string
				Size   int64 `json:"size_bytes"`
				Live   int64 `json:"live_bytes"`
				Shared int64 `json:"shared_bytes"`
				Unique struct{ Bytes int64 }
			}
		}
	}
	c.pgthaw(t, "repo", "info", "--json").ok(t).into(t, &info)
	var stored int64
	for _, n := range objects(t, c.repo) {
		stored += n
	}
	t.Log(c.pgthaw(t, "repo", "info").ok(t).stdout)
	if info.Stored <= stored || len(info.Clusters) != 1 || len(info.Clusters[0].Backups) != 3 || info.Clusters[0].Segments < 10 {
		t.Fatalf("%+v; objects that are not WAL have %d bytes", info, stored)
	}
	for i, b := range info.Clusters[0].Backups {
		if b.ID != c.backups[i].ID || b.Size != c.backups[i].Size || b.Shared > b.Live || b.Live == 0 {
			t.Errorf("backup %d is %+v, the manifest says %+v", i, b, c.backups[i])
		}
	}
}
