package integration

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// seen is what a state file holds.
type seen map[string]struct {
	Backup string            `json:"backup"`
	WAL    map[string]string `json:"wal"`
}

// rolledBack is a cluster whose repository was put back from a copy that lacks a backup and some WAL. The server's user has
// seen those, root on this host has not.
type rolledBack struct {
	archived
	newer     string // the repository as it was
	id        string
	kept      string // the backup that the copy has
	lost      string // the backup that it lacks
	last, end string // the last segment of the copy; the last there was
	copies    string // directory of all segments
}

func newRolledBack(t *testing.T) rolledBack {
	t.Helper()
	a, copies := keepingCopies(t, postgresql(t, 15), smallSegments)
	a.fillSegments(3)
	a.backup(t)
	a.waitArchived()
	r := rolledBack{archived: a, newer: a.repo + ".newer", copies: copies, id: a.repositoryID(t)}
	wal := a.walObjects(t)
	r.last = wal[len(wal)-1]
	shell(t, "cp -a "+a.repo+" "+a.repo+".older")
	a.fillSegments(3)
	a.backup(t)
	a.waitArchived()
	all := a.backups(t)
	r.kept, r.lost = all[0].ID, all[1].ID
	wal = a.walObjects(t)
	r.end = wal[len(wal)-1]
	a.appendSetting("archive_command", "/bin/false") // what is pushed from here on, the test pushes
	r.swap(t, a.repo+".older")
	return r
}

func (a archived) repositoryID(t *testing.T) string {
	t.Helper()
	var info struct{ ID string }
	a.pgthaw(t, "repo", "info", "--json").into(t, &info)
	return info.ID
}

// swap puts another repository in the place of the one that is there, which becomes the newer one.
func (r rolledBack) swap(t *testing.T, other string) {
	t.Helper()
	shell(t, "mv "+r.repo+" "+r.repo+".aside && mv "+other+" "+r.repo+" && mv "+r.repo+".aside "+r.newer)
}

// alarms fails the test unless a run ended with code, and said what is lost and how to go on.
func (r rolledBack) alarms(t *testing.T, got result, code int, names ...string) result {
	t.Helper()
	got.exits(t, code)
	for _, name := range append(names, "than this host has seen", "pgthaw repo accept") {
		if !strings.Contains(got.stderr, name) {
			t.Errorf("pgthaw %q did not say %q:\n%s", got.args, name, got.stderr)
		}
	}
	return got
}

func TestRollback(t *testing.T) {
	t.Parallel()
	r := newRolledBack(t)
	t.Run("looks", r.testLooks)
	t.Run("check", r.testCheck)
	t.Run("mount", r.testMount)
	t.Run("refused", r.testRefused)
	t.Run("fetch", r.testFetch)
	t.Run("without state", r.testWithoutState)
	t.Run("as it was", func(t *testing.T) {
		older := r.repo + ".older"
		shell(t, "mv "+r.repo+" "+older+" && mv "+r.newer+" "+r.repo)
		r.pgthaw(t, "list").ok(t)
		r.pgthaw(t, "repo", "check").ok(t)
		data := newTarget(t)
		r.copyTo(t, asPostgres, "thaw", "latest", data, "--hydrate", "off").ok(t)
		r.swap(t, older)
		r.testOverlay(t, data)
	})
	t.Run("accept", r.testAccept)
}

// Both are shown what there is, with the loss behind.
func (r rolledBack) testLooks(t *testing.T) {
	for _, args := range [][]string{{"list"}, {"list", "main"}, {"show", "main", "latest"}, {"show", "main", r.kept}, {"wal", "list", "main"}, {"repo", "info"}} {
		got := r.alarms(t, r.pgthaw(t, args...), 16, r.lost, r.end, r.last)
		if len(got.stdout) == 0 {
			t.Errorf("pgthaw %q showed nothing", args)
		}
		got = r.alarms(t, r.pgthaw(t, append(args, "--json")...), 16, r.lost, r.end)
		if !json.Valid([]byte(got.stdout)) {
			t.Errorf("pgthaw %q --json printed\n%s", args, got.stdout)
		}
		if args[0] == "list" { // an array of backups, and no place for anything else
			continue
		}
		var out struct {
			Older []string `json:"older_than_seen"`
		}
		got.into(t, &out)
		if text := strings.Join(out.Older, "\n"); len(out.Older) != 2 || !strings.Contains(text, r.lost) || !strings.Contains(text, r.end) {
			t.Errorf("pgthaw %q --json has older_than_seen %q", args, out.Older)
		}
	}
	r.alarms(t, r.pgthaw(t, "show", "main", r.lost), 16, r.lost)
}

func (r rolledBack) testCheck(t *testing.T) {
	var out struct {
		Findings []struct{ Object, Cluster string }
	}
	r.pgthaw(t, "repo", "check", "--json").exits(t, 16).into(t, &out)
	got := map[string]bool{}
	for _, f := range out.Findings {
		got[f.Object] = f.Cluster == "main"
	}
	want := map[string]bool{"backups/main/" + r.lost + ".json": true, "wal/main/" + r.end[:8] + "/" + r.end: true}
	if !maps.Equal(got, want) {
		t.Errorf("findings are %v, want %v", got, want)
	}
	if text := r.pgthaw(t, "repo", "check").exits(t, 16).stdout; !strings.Contains(text, "it had backup "+r.lost) || !strings.Contains(text, "2 findings") {
		t.Errorf("repo check says\n%s", text)
	}
}

// A mount comes up, for whoever looks what has happened.
func (r rolledBack) testMount(t *testing.T) {
	dir := postgresDir(t)
	got := r.alarms(t, r.pgthaw(t, "mount", dir), 0, r.lost, r.end)
	if !strings.Contains(got.stderr, "pgthaw: warning: ") {
		t.Errorf("it is no warning:\n%s", got.stderr)
	}
	r.pgthaw(t, "umount", dir).ok(t)
}

func (r rolledBack) testRefused(t *testing.T) {
	before := objects(t, r.repo)
	r.alarms(t, r.pgthaw(t, "backup", "main", "--pg-connection", r.dsn("postgres")), 16, r.lost, r.end)
	for _, path := range paths {
		for _, args := range [][]string{{"latest"}, {"latest", "--to-immediate"}} {
			data := newTarget(t)
			r.alarms(t, r.copyTo(t, asPostgres, path, args[0], data, args[1:]...), 16, r.lost, r.end)
			absent(t, data)
		}
	}
	if after := objects(t, r.repo); !maps.Equal(before, after) {
		t.Error("the repository has changed")
	}
	data := newTarget(t) // who names a backup gets it
	got := r.alarms(t, r.copyTo(t, asPostgres, "restore", r.kept, data, "--to-immediate"), 0, r.lost, r.end)
	if !strings.Contains(got.stderr, "pgthaw: warning: ") {
		t.Errorf("it is no warning:\n%s", got.stderr)
	}
}

// segmentsAfter are the names of the n segments behind one, of the same log.
func segmentsAfter(t *testing.T, name string, n uint64) (names []string) {
	t.Helper()
	no, err := strconv.ParseUint(name[16:], 16, 32)
	if err != nil {
		t.Fatal(err)
	}
	for i := uint64(1); i <= n; i++ {
		names = append(names, fmt.Sprintf("%s%08X", name[:16], no+i))
	}
	return names
}

// testFetch: what was there is no end of WAL.
func (r rolledBack) testFetch(t *testing.T) {
	got, path := r.fetch(t, r.repo, "main", r.last)
	got.ok(t)
	sameAs(t, path, filepath.Join(r.copies, r.last))
	missing := segmentsAfter(t, r.last, 20)
	at := slices.Index(missing, r.end)
	if at < 0 {
		t.Fatalf("%s is not behind %s", r.end, r.last)
	}
	for _, name := range missing[:at+1] {
		r.fetchRefused(t, r.repo, "main", name, 200)
	}
	r.fetchRefused(t, r.repo, "main", missing[at+1], 1)
	r.fetchRefused(t, r.repo, "main", "00000001.history", 200)
	r.fetchRefused(t, r.repo, "main", "00000002.history", 1)
}

// testOverlay: the daemon of a directory that was thawed before gives the same answers.
func (r rolledBack) testOverlay(t *testing.T, data string) {
	r.overlayRefuses(t, asPostgres, data, "main", r.end, 200)
	r.overlayRefuses(t, asPostgres, data, "main", segmentsAfter(t, r.end, 1)[0], 1)
}

// testWithoutState: who has seen nothing has nothing to compare with.
func (r rolledBack) testWithoutState(t *testing.T) {
	root := invocation{env: []string{"PGTHAW_REPO=" + r.repo}}
	root.run(t, "list").ok(t)
	root.run(t, "repo", "check").ok(t)
	root.run(t, "wal", "fetch", "main", r.end, filepath.Join(tempDir(t), "RECOVERYXLOG")).exits(t, 1)
}

func (r rolledBack) testAccept(t *testing.T) {
	var out struct {
		ID    string   `json:"id"`
		Older []string `json:"older_than_seen"`
	}
	r.alarms(t, r.pgthaw(t, "list"), 16)
	// The archiver goes on, or the server's disk would fill.
	r.pgthaw(t, "wal", "push", "main", filepath.Join(r.copies, segmentsAfter(t, r.last, 1)[0])).ok(t)
	r.alarms(t, r.pgthaw(t, "list"), 16)
	r.pgthaw(t, "repo", "accept", "--json").ok(t).into(t, &out)
	if text := strings.Join(out.Older, "\n"); out.ID != r.id || len(out.Older) != 2 || !strings.Contains(text, r.lost) || !strings.Contains(text, r.end) {
		t.Errorf("repo accept --json gives %+v", out)
	}
	if text := r.pgthaw(t, "repo", "accept").ok(t).stdout; !strings.Contains(text, "holds all that this host has seen") {
		t.Errorf("repo accept, once more, says %s", text)
	}
	r.pgthaw(t, "list").ok(t)
	r.fetchRefused(t, r.repo, "main", r.end, 1)
	r.appendSetting("archive_command", filepath.Join(scratch, "bin", "pgthaw")+" --repo "+r.repo+" wal push main \"%p\"")
	r.backup(t)
	r.pgthaw(t, "list").ok(t)
	data := newTarget(t)
	r.copyTo(t, asPostgres, "restore", "latest", data, "--to-immediate").ok(t)
}

// TestClusterGone: its name is not known any more, and that is worse than a name mistyped.
func TestClusterGone(t *testing.T) {
	t.Parallel()
	r := newRolledBack(t)
	shell(t, "cd "+r.repo+" && rm -r clusters/main backups/main wal/main")
	for _, args := range [][]string{{"list"}, {"list", "main"}, {"show", "main", "latest"}, {"wal", "list", "main"}, {"repo", "info"},
		{"backup", "main", "--pg-connection", r.dsn("postgres")}, {"restore", "main", "latest", "--target", newTarget(t)}} {
		r.alarms(t, r.pgthaw(t, args...), 16, r.lost, r.end)
	}
	r.fetchRefused(t, r.repo, "main", r.end, 200)
	r.pgthaw(t, "list", "mian").exits(t, 14)
}

// TestReplacedRepository: another one lies at the URL. Nothing is given to it.
func TestReplacedRepository(t *testing.T) {
	t.Parallel()
	r := newRolledBack(t)
	shell(t, "mv "+r.repo+" "+r.repo+".own")
	pgthaw(t, "repo", "init", "--no-encryption", r.repo).ok(t) // root's memory is another
	shell(t, "chown -R postgres "+r.repo)
	empty := objects(t, r.repo)
	segment := filepath.Join(r.copies, r.end)
	for _, args := range [][]string{{"list"}, {"repo", "info"}, {"wal", "push", "main", segment}, {"wal", "stream", "main", "--create-slot", "--pg-connection", r.dsn("postgres")},
		{"repo", "key", "list"}, {"backup", "main", "--pg-connection", r.dsn("postgres")}, {"restore", "main", "latest", "--target", newTarget(t)}} {
		r.alarms(t, r.pgthaw(t, args...), 16, "another repository is at", r.id)
	}
	r.fetchRefused(t, r.repo, "main", r.end, 200)
	var out struct {
		Findings []struct{ Object string }
	}
	r.pgthaw(t, "repo", "check", "--json").exits(t, 16).into(t, &out)
	if len(out.Findings) != 1 || out.Findings[0].Object != "config" {
		t.Errorf("findings are %v", out.Findings)
	}
	if now := objects(t, r.repo); !maps.Equal(now, empty) {
		t.Errorf("something was put there: %v", now)
	}
	if text := r.pgthaw(t, "repo", "accept").ok(t).stdout; !strings.Contains(text, r.id) {
		t.Errorf("repo accept says %s", text)
	}
	r.pgthaw(t, "wal", "push", "main", segment).ok(t)
	r.pgthaw(t, "list").ok(t)

	// Who makes one at the URL means to.
	shell(t, "rm -r "+r.repo)
	r.pgthaw(t, "repo", "init", "--no-encryption").ok(t)
	r.pgthaw(t, "list").ok(t)
}

// TestStateDirectory: what cannot be remembered is no error, and what many processes have seen comes together.
func TestStateDirectory(t *testing.T) {
	t.Parallel()
	r := newRolledBack(t)
	with := func(dir string) invocation {
		return invocation{postgres: true, env: []string{"PGTHAW_REPO=" + r.repo, "XDG_STATE_HOME=" + dir, "HOME=/nonexistent"}}
	}
	t.Run("unwritable", func(t *testing.T) {
		for _, dir := range []string{"/proc/self", "", "relative", tempDir(t)} { // the last is root's
			got := with(dir).run(t, "list").ok(t)
			if !strings.Contains(got.stderr, "cannot remember") {
				t.Errorf("%q: it did not say so:\n%s", dir, got.stderr)
			}
			with(dir).run(t, "repo", "check").ok(t)
			if got := with(dir).run(t, "wal", "push", "main", filepath.Join(r.copies, r.last)).ok(t); got.stderr != "" {
				t.Errorf("%q: wal push says\n%s", dir, got.stderr)
			}
		}
	})
	t.Run("damaged", func(t *testing.T) {
		dir, file := r.stateFile(t)
		for _, junk := range []string{"", "{", "null", "[]", `{"main": null, "x/y": {"backup": "z"}}`, `{"main": {"wal": {"1": "0"}}}`} {
			if err := os.MkdirAll(filepath.Dir(file), 0o777); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(junk), 0o666); err != nil {
				t.Fatal(err)
			}
			ownedByPostgres(t, filepath.Dir(file))
			ownedByPostgres(t, file)
			with(dir).run(t, "list").ok(t)
			r.sees(t, file, r.kept, r.last)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		dir, file := r.stateFile(t)
		files, _ := os.ReadDir(r.copies)
		var all sync.WaitGroup
		results := make([]result, 2*len(files))
		for i := range results {
			all.Go(func() {
				if i%2 == 0 {
					results[i] = with(dir).run(t, "list")
				} else {
					results[i] = with(dir).run(t, "wal", "push", "main", filepath.Join(r.copies, files[i/2].Name()))
				}
			})
		}
		all.Wait()
		for _, got := range results {
			got.ok(t)
		}
		r.sees(t, file, r.kept, r.end)
		names, _ := filepath.Glob(filepath.Join(dir, "pgthaw", "*"))
		if len(names) != 3 {
			t.Errorf("the state directory holds %v", names)
		}
	})
}

// stateFile is that of the repository in a new state directory of the server's user.
func (r rolledBack) stateFile(t *testing.T) (dir, file string) {
	t.Helper()
	dir = postgresDir(t)
	hash := sha256.Sum256([]byte("file://" + r.repo))
	return dir, filepath.Join(dir, "pgthaw", fmt.Sprintf("%s-%x.json", r.id, hash[:16]))
}

// sees fails the test unless a state file has these as the newest of main.
func (r rolledBack) sees(t *testing.T, file, backup, segment string) {
	t.Helper()
	var s seen
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if got := s["main"]; err != nil || got.Backup != backup || got.WAL["1"] != segment {
		t.Errorf("%s holds %s (%v), want %s and %s", file, b, err, backup, segment)
	}
}
