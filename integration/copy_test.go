package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// copySource is a cluster of several backups and all WAL in a plain repository. Its server is down.
type copySource struct {
	*thawSource
	marks []moment // behind the first and second backup
}

// repoCopy is what these tests read of repo copy --json.
type repoCopy struct {
	Backups []struct {
		ID          string `json:"id"`
		SizeBytes   int64  `json:"size_bytes"`
		StoredBytes int64  `json:"stored_bytes"`
	} `json:"backups"`
	Present    int   `json:"backups_present"`
	WALFiles   int   `json:"wal_files"`
	WALBytes   int64 `json:"wal_bytes"`
	WALPresent int   `json:"wal_files_present"`
	ReadBytes  int64 `json:"read_bytes"`
	NotCopied  []struct {
		Backup string `json:"backup"`
		WAL    string `json:"wal"`
		Error  string `json:"error"`
	} `json:"not_copied"`
}

func newCopySource(t *testing.T) *copySource {
	t.Helper()
	s := &copySource{thawSource: &thawSource{archived: newArchived(t, postgresql(t, 17), clusterOptions{walSegmentMB: 1, checksums: true,
		pgbenchScale: 3, tablespaces: []string{"fast", "slow"}, conf: []string{"fsync = off", "max_wal_size = 64MB"}})}}
	s.l = startLedger(t, s.cluster, 2)
	for i := range 2 {
		s.l.waitCommits(50)
		s.backup(t)
		s.cluster.pgbench("--client", "2", "--transactions", "200")
		s.l.waitCommits(50)
		s.marks = append(s.marks, s.l.Mark(fmt.Sprintf("after %d", i)))
	}
	s.SQL("CREATE TABLE more TABLESPACE fast AS SELECT i, md5(i::text) AS x FROM generate_series(1, 20000) i")
	s.backup(t)
	return s
}

// destination is a repository to copy to, and the key that opens it.
type destination struct{ dir, key string }

func newDestination(t *testing.T) destination {
	t.Helper()
	dir := postgresDir(t)
	d := destination{filepath.Join(dir, "repo"), filepath.Join(dir, "key")}
	asPostgres.run(t, "repo", "init", d.dir, "--key-file", d.key).ok(t)
	return d
}

func (d destination) as() invocation {
	return invocation{postgres: true, env: []string{"PGTHAW_REPO=" + d.dir, "PGTHAW_KEY_FILE=" + d.key}}
}

// copyFrom copies all there is, as the server's user.
func (d destination) copyFrom(t *testing.T, from invocation, codes ...int) (c repoCopy) {
	t.Helper()
	from.run(t, "repo", "copy", d.dir, "--to-key-file", d.key, "--json").exits(t, codes...).into(t, &c)
	return c
}

// proved fails the test unless every byte is whole and nothing is missing.
func (d destination) proved(t *testing.T) {
	t.Helper()
	d.as().run(t, "repo", "check", "--read-data").ok(t)
}

// TestRepoCopy copies a repository to one that is encrypted, and that to another; what is restored and thawed from there
// is what the source gives.
func TestRepoCopy(t *testing.T) {
	t.Parallel()
	s := newCopySource(t)
	plain := invocation{postgres: true, env: []string{"PGTHAW_REPO=" + s.repo}}
	first, second := newDestination(t), newDestination(t)
	plain.run(t, "repo", "copy", first.dir).exits(t, 12)
	plain.run(t, "repo", "copy", first.dir, "--to-key-file", second.key).exits(t, 12)
	if c := first.copyFrom(t, plain, 0); len(c.Backups) != 3 || c.WALFiles == 0 {
		t.Errorf("copied %+v", c)
	}
	t.Run("again", func(t *testing.T) { s.testIncrement(t, plain, first) })
	s.l.Stop()
	s.sums = s.SQL(contentSums)
	s.Stop() // archives the last segment
	if c := first.copyFrom(t, plain, 0); len(c.Backups) != 0 || c.WALFiles == 0 {
		t.Errorf("the rest of the WAL: %+v", c)
	}
	if c := second.copyFrom(t, first.as(), 0); len(c.Backups) != 4 {
		t.Errorf("copied onwards %+v", c)
	}
	if c := second.copyFrom(t, plain, 0); len(c.Backups) != 0 || c.Present != 4 || c.WALFiles != 0 {
		t.Errorf("from the origin, what is there from the copy: %+v", c)
	}
	for _, d := range []destination{first, second} {
		d.proved(t)
		room, source := repositorySize(t, d.dir), repositorySize(t, s.repo)
		t.Logf("the copy takes %d bytes, the source %d", room, source)
		if room > source*11/10 {
			t.Errorf("the copy takes %d bytes, the source %d", room, source)
		}
	}
	t.Run("same", func(t *testing.T) { s.testSameRestore(t, second) })
	t.Run("recovery", func(t *testing.T) { s.testRecovery(t, second) })
	t.Run("killed", func(t *testing.T) { s.testKilled(t, plain) })
	t.Run("damaged", s.testDamaged)
}

// testIncrement: what is copied again is read no more than it has to be, and then there is nothing to do.
func (s *copySource) testIncrement(t *testing.T, from invocation, to destination) {
	s.SQL("UPDATE pgbench_accounts SET filler = 'changed' WHERE aid IN (1, 100000, 200000); CHECKPOINT")
	s.backup(t)
	s.waitArchived()
	c := to.copyFrom(t, from, 0)
	if len(c.Backups) != 1 || c.Present != 3 || c.WALFiles == 0 {
		t.Fatalf("copied %+v", c)
	}
	added := c.Backups[0].StoredBytes + c.WALBytes
	t.Logf("%d bytes read, for a backup of %d bytes that stores %d, and %d bytes of WAL", c.ReadBytes, c.Backups[0].SizeBytes, c.Backups[0].StoredBytes, c.WALBytes)
	if c.ReadBytes > 2*added {
		t.Errorf("%d bytes were read for %d that were added", c.ReadBytes, added)
	}
}

// testSameRestore compares restores of each backup from both repositories, not started.
func (s *copySource) testSameRestore(t *testing.T, d destination) {
	for _, b := range s.backups(t) {
		var trees [2]string
		for i, from := range []archived{s.archived, {s.cluster, d.dir}} {
			v := asPostgres
			if i == 1 {
				v = d.as()
			}
			trees[i] = newTarget(t)
			from.copyTo(t, v, "restore", b.ID, trees[i], append(s.mapping(filepath.Dir(trees[i])), "--to-immediate")...).ok(t)
		}
		for _, name := range []string{"data", "fast", "slow"} {
			got, want := tree(t, filepath.Join(filepath.Dir(trees[1]), name)), tree(t, filepath.Join(filepath.Dir(trees[0]), name))
			for _, files := range []map[string]fileState{got, want} {
				delete(files, autoConf) // names the repository
				for path, state := range files {
					state.link = strings.Replace(state.link, filepath.Dir(trees[1]), filepath.Dir(trees[0]), 1)
					files[path] = state
				}
			}
			sameTrees(t, timeless(got), timeless(want))
		}
	}
}

// testRecovery recovers from the copy alone: the source is out of the way.
func (s *copySource) testRecovery(t *testing.T, d destination) {
	if err := os.Rename(s.repo, s.repo+".away"); err != nil {
		t.Fatal(err)
	}
	defer os.Rename(s.repo+".away", s.repo)
	there := thawSource{archived: archived{s.cluster, d.dir}, l: s.l, sums: s.sums}
	for _, path := range paths {
		data, r := there.copy(t, d.as(), path, "--start")
		c := r.server(t, s.installation, data)
		there.check(t, c)
		c.StopImmediate()
		for _, m := range s.marks {
			data, r := there.copy(t, d.as(), path, "--start", "--to-name", m.name)
			c := r.server(t, s.installation, data)
			s.l.check(c, m.n, m.n)
			c.StopImmediate()
		}
	}
}

// testKilled kills copies at many moments: what is there is whole each time, and in the end it is all there.
func (s *copySource) testKilled(t *testing.T, from invocation) {
	to := newDestination(t)
	killed := 0
	for n := 1; ; n++ {
		r := from.start(t, "repo", "copy", to.dir, "--to-key-file", to.key, "--jobs", "1")
		before := objectsIn(to.dir)
		if !poll(runLimit, func() bool { return r.down() || objectsIn(to.dir) >= before+5*n }) {
			t.Fatalf("the copy does not go on:\n%s", r.text())
		}
		code := r.end(syscall.SIGKILL)
		to.proved(t)
		if code == 0 {
			break
		}
		if code != 128+int(syscall.SIGKILL) {
			t.Fatalf("exit code %d:\n%s", code, r.text())
		}
		killed++
	}
	t.Logf("killed %d times", killed)
	if killed < 2 {
		t.Errorf("killed %d times", killed)
	}
	if c := to.copyFrom(t, from, 0); len(c.Backups) != 0 || c.Present != 4 || c.WALFiles != 0 {
		t.Errorf("then there was left %+v", c)
	}
	s.testSameRestore(t, to)
}

// objectsIn counts the files of a repository that others write to.
func objectsIn(dir string) (n int) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			n++
		}
		return nil
	})
	return n
}

// testDamaged damages a pack of the source that only its last backups need, and a WAL file that none does.
func (s *copySource) testDamaged(t *testing.T) {
	dir := filepath.Join(tempDir(t), "repo")
	shell(t, "cp -a "+s.repo+" "+dir)
	r := repository{t, dir}
	backups := s.backups(t)
	pack, wal := s.lastPack(t, r, backups[len(backups)-1].ID), ""
	for _, name := range s.walObjects(t) { // the last one, behind all backups
		if len(name) == 24 {
			wal = name
		}
	}
	r.rewrite(pack, flipMiddle)
	r.rewrite("wal/main/"+wal[:8]+"/"+wal, flipMiddle)
	from := invocation{postgres: true, env: []string{"PGTHAW_REPO=" + dir}}
	shell(t, "chown -R postgres "+dir)
	to := newDestination(t)
	c := to.copyFrom(t, from, 16)
	if len(c.Backups) != 3 || len(c.NotCopied) != 2 {
		t.Fatalf("copied %+v", c)
	}
	if c.NotCopied[0].Backup != backups[3].ID || c.NotCopied[1].WAL != wal || !strings.Contains(c.NotCopied[0].Error, filepath.Base(pack)) {
		t.Errorf("not copied: %+v", c.NotCopied)
	}
	to.proved(t)
	plain := invocation{postgres: true, env: []string{"PGTHAW_REPO=" + s.repo}}
	if c := to.copyFrom(t, plain, 0); len(c.Backups) != 1 || c.WALFiles != 1 {
		t.Errorf("from a whole source it copied %+v", c)
	}
	to.proved(t)
	s.testSameRestore(t, to)
}

// lastPack is the largest pack that repo info counts for the last backup alone.
func (s *copySource) lastPack(t *testing.T, r repository, id string) (key string) {
	t.Helper()
	made := func(path string) int64 {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.ModTime().UnixNano()
	}
	var at int64
	listed := r.path("backups/main/" + id + ".json")
	for _, path := range filesBelow(t, r.path("packs")) {
		if when := made(path); when <= made(listed) && when > at {
			key, at = strings.TrimPrefix(path, r.dir+"/"), when
		}
	}
	return key
}
