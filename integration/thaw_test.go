package integration

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hydrateLimit is ample for what these tests thaw.
const hydrateLimit = 2 * time.Minute

// thawed is what these tests read of overlay status --json.
type thawed struct {
	State      string `json:"state"`
	Mounted    bool   `json:"mounted"`
	BytesTotal int64  `json:"bytes_total"`
	Waiting    *struct {
		For string `json:"for"`
	} `json:"waiting"`
	BytesHydrated       int64 `json:"bytes_hydrated"`
	RepositoryBytesRead int64 `json:"repository_bytes_read"`
	PID                 int   `json:"pid"`
}

// overlayStatus asks as whoever thawed.
func overlayStatus(t *testing.T, v invocation, data string) (s thawed) {
	t.Helper()
	v.run(t, "--json", "overlay", "status", data).ok(t).into(t, &s)
	return s
}

// thawSource is a cluster that is down, with a backup and WAL, and what a copy of it must hold.
type thawSource struct {
	archived
	l    *ledger
	sums string
}

const contentSums = `SELECT (SELECT count(*) FROM in_fast), (SELECT md5(string_agg(x, ',' ORDER BY i)) FROM in_slow),
	(SELECT sum(abalance) FROM pgbench_accounts), (SELECT count(*) FROM pgbench_history)`

func newThawSource(t *testing.T, p installation) *thawSource {
	t.Helper()
	s := &thawSource{archived: newArchived(t, p, clusterOptions{checksums: true, pgbenchScale: 3, tablespaces: []string{"fast", "slow"}})}
	s.l = startLedger(t, s.cluster, 2)
	s.l.waitCommits(50)
	s.backup(t)
	s.cluster.pgbench("--client", "2", "--transactions", "200")
	s.l.waitCommits(50)
	s.l.Stop()
	s.sums = s.SQL(contentSums)
	s.Stop() // archives the last segment
	return s
}

// copy thaws or restores to a new directory, its tablespaces beside it.
func (s *thawSource) copy(t *testing.T, v invocation, path string, args ...string) (data string, r copied) {
	t.Helper()
	data = newTarget(t)
	s.copyTo(t, v, path, "latest", data, append(s.mapping(filepath.Dir(data)), args...)...).ok(t).into(t, &r)
	return data, r
}

func (s *thawSource) mapping(dir string) (args []string) {
	for _, name := range []string{"fast", "slow"} {
		args = append(args, "--tablespace-mapping", filepath.Join(s.dir, "tablespace "+name)+"="+filepath.Join(dir, name))
	}
	return args
}

// check compares a recovered copy with the source.
func (s *thawSource) check(t *testing.T, c *cluster) {
	t.Helper()
	s.l.check(c, len(s.l.commits), len(s.l.commits))
	if got := c.SQL(contentSums); got != s.sums {
		t.Errorf("the copy holds %s, want %s", got, s.sums)
	}
	c.amcheck()
}

// TestThaw thaws, uses the copy while it is lazy, and makes an ordinary directory of it.
func TestThaw(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			s := newThawSource(t, p)
			t.Run("root", func(t *testing.T) { s.testThaw(t, invocation{}, "auto") })
			t.Run("postgres", func(t *testing.T) { s.testThaw(t, asPostgres, "off") })
			t.Run("identical", s.testIdentical)
			t.Run("discard", s.testDiscard)
		})
	}
}

func (s *thawSource) testThaw(t *testing.T, v invocation, hydrate string) {
	data, r := s.copy(t, v, "thaw", "--start", "--hydrate", hydrate)
	c := r.server(t, s.installation, data)
	s.check(t, c)
	c.SQL("CREATE TABLE late AS SELECT i, md5(i::text) AS x FROM generate_series(1, 50000) i; UPDATE pgbench_accounts SET filler = 'late' WHERE aid % 50 = 0")
	late := c.SQL("SELECT sum(hashtext(x)) FROM late")
	v.run(t, "overlay", "resume", data).ok(t) // it runs: nothing to do
	if hydrate == "off" {
		if st := overlayStatus(t, v, data); st.State != "hydrating" || !st.Mounted {
			t.Errorf("status is %+v", st)
		}
	} else {
		waitFor(t, hydrateLimit, "hydration", func() bool { return overlayStatus(t, v, data).State == "hydrated" })
		finish := v.run(t, "overlay", "finish", data).exits(t, 1, 17, 19)
		if !strings.Contains(finish.stderr, "PID") {
			t.Errorf("overlay finish does not say that a server runs:\n%s", finish.stderr)
		}
		s.run(t, "pg_ctl", "restart", "--wait", "--pgdata", data, "--log", filepath.Join(filepath.Dir(data), "restarted.log"))
		if got := c.SQL("SELECT sum(hashtext(x)) FROM late"); got != late {
			t.Errorf("after a restart late holds %s, want %s", got, late)
		}
	}
	c.Stop()
	s.finish(t, v, data)
	s.checkOrdinary(t, data, late)
}

// finish has the overlay finished, twice, and asks for everything else of it.
func (s *thawSource) finish(t *testing.T, v invocation, data string) {
	t.Helper()
	v.run(t, "overlay", "finish", data).ok(t)
	if mounted(data) {
		t.Error("still mounted")
	}
	for range 2 {
		if st := overlayStatus(t, v, data); st.State != "hydrated" || st.Mounted {
			t.Errorf("status of an ordinary directory is %+v", st)
		}
	}
	for range 2 {
		v.run(t, "overlay", "finish", data).exits(t, 0, 17)
		v.run(t, "overlay", "resume", data).exits(t, 0, 17)
		v.run(t, "overlay", "discard", data).exits(t, 17)
	}
	awaitNoDaemon(t, data)
}

// checkOrdinary: nothing of pgthaw is left, the server runs natively and has what was written on the mount.
func (s *thawSource) checkOrdinary(t *testing.T, data, late string) {
	t.Helper()
	for _, dir := range []string{data, filepath.Join(filepath.Dir(data), "fast"), filepath.Join(filepath.Dir(data), "slow")} {
		checkNothingOfOurs(t, dir)
	}
	c := adopt(t, s.installation, data)
	s.checkWritten(t, c, late)
	c.Stop()
	s.checksums(t, data)
}

// checkWritten is check with what was written on the mount.
func (s *thawSource) checkWritten(t *testing.T, c *cluster, late string) {
	t.Helper()
	s.check(t, c)
	if got := c.SQL("SELECT sum(hashtext(x)) FROM late"); got != late {
		t.Errorf("late holds %s, want %s", got, late)
	}
	if got := c.SQL("SELECT count(*) FROM pgbench_accounts WHERE filler = 'late'"); got != "6000" {
		t.Errorf("%s accounts are changed, want 6000", got)
	}
}

// checkNothingOfOurs looks for our directory and our attributes.
func checkNothingOfOurs(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.Name() == ".pgthaw" {
			t.Errorf("%s is left", path)
		}
		list := make([]byte, 4096)
		n, err := unix.Llistxattr(path, list)
		if err == nil && strings.Contains(string(list[:n]), "pgthaw") {
			t.Errorf("%s has the attributes %q", path, list[:n])
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

const autoConf = "postgresql.auto.conf"

// testIdentical compares a thaw that was hydrated and finished with a restore, neither of them started. Only the thawed
// server asks the overlay's daemon for WAL.
func (s *thawSource) testIdentical(t *testing.T) {
	restored, _ := s.copy(t, invocation{}, "restore")
	data, _ := s.copy(t, invocation{}, "thaw")
	pgthaw(t, "overlay", "finish", data).ok(t)
	for _, name := range []string{"data", "fast", "slow"} {
		got, want := tree(t, filepath.Join(filepath.Dir(data), name)), tree(t, filepath.Join(filepath.Dir(restored), name))
		for _, files := range []map[string]fileState{got, want} {
			for path, state := range files {
				state.link = strings.Replace(state.link, filepath.Dir(data), filepath.Dir(restored), 1)
				files[path] = state
			}
		}
		delete(got, autoConf)
		delete(want, autoConf)
		sameTrees(t, timeless(got), timeless(want))
	}
	conf, err1 := os.ReadFile(filepath.Join(data, autoConf))
	want, err2 := os.ReadFile(filepath.Join(restored, autoConf))
	if got := strings.Replace(string(conf), " --overlay "+data, "", 1); err1 != nil || err2 != nil || got != string(want) {
		t.Errorf("%s is\n%s, want\n%s (%v, %v)", autoConf, got, want, err1, err2)
	}
	checkNothingOfOurs(t, data)
	s.verifyBackup(t, restored, "--ignore=postgresql.auto.conf", "--ignore=recovery.signal")
	s.verifyBackup(t, data, "--ignore=postgresql.auto.conf", "--ignore=recovery.signal")
}

// timeless leaves out the times of what is written afresh: what recovery needs, and the directory that this changes.
func timeless(files map[string]fileState) map[string]fileState {
	for _, name := range []string{".", "postgresql.auto.conf", "recovery.signal", "tablespace_map", "backup_label"} {
		if s, there := files[name]; there {
			s.modified = time.Time{}
			files[name] = s
		}
	}
	return files
}

func (s *thawSource) testDiscard(t *testing.T) {
	announced := filepath.Join(s.repo, "sessions")
	before := filesBelow(t, announced)
	data, r := s.copy(t, invocation{}, "thaw", "--start", "--hydrate", "off")
	c := r.server(t, s.installation, data)
	if during := filesBelow(t, announced); slices.Equal(during, before) {
		t.Error("the overlay announces nothing to the repository")
	}
	refused := pgthaw(t, "overlay", "discard", data).exits(t, 1, 17, 19)
	if !strings.Contains(refused.stderr, "PID") {
		t.Errorf("overlay discard does not say that a server runs:\n%s", refused.stderr)
	}
	if got := c.SQL("SELECT 1"); got != "1" {
		t.Errorf("the server says %s", got)
	}
	c.Stop()
	pgthaw(t, "overlay", "discard", data).ok(t)
	for _, name := range []string{"data", "fast", "slow"} {
		absent(t, filepath.Join(filepath.Dir(data), name))
	}
	if after := filesBelow(t, announced); !slices.Equal(after, before) {
		t.Errorf("the repository still keeps the backup for the overlay: %s, before it %s", after, before)
	}
	pgthaw(t, "overlay", "discard", data).exits(t, 1, 17)
	pgthaw(t, "overlay", "status", data).exits(t, 1, 17)
	pgthaw(t, "overlay", "resume", data).exits(t, 1, 17)
	pgthaw(t, "overlay", "finish", data).exits(t, 1, 17)
}

// TestThawIsLazy counts the bytes that a start and a query need.
func TestThawIsLazy(t *testing.T) {
	t.Parallel()
	p := postgresql(t, 15)
	a := newArchived(t, p, clusterOptions{conf: []string{"fsync = off", "max_wal_size = 2GB"}, pgbenchScale: 15})
	a.SQL("CREATE TABLE noise AS SELECT i, md5(i::text) || md5((i * 7)::text) || md5((i * 11)::text) AS x FROM generate_series(1, 2000000) i; CHECKPOINT")
	b := a.newest(t)
	a.Stop()
	stored := repositorySize(t, a.repo)
	data := newTarget(t)
	var r struct {
		copied
		SizeBytes           int64 `json:"size_bytes"`
		RepositoryBytesRead int64 `json:"repository_bytes_read"`
	}
	a.copyTo(t, invocation{}, "thaw", b.ID, data, "--start", "--to-immediate", "--hydrate", "off").ok(t).into(t, &r)
	c := r.server(t, p, data)
	ready := overlayStatus(t, invocation{}, data)
	read := ready.RepositoryBytesRead + r.RepositoryBytesRead
	t.Logf("%d MB, %d MB stored; %d kB of the repository read until ready, %d MB on disk", r.SizeBytes>>20, stored>>20, read>>10, ready.BytesHydrated>>20)
	if r.SizeBytes < 500<<20 {
		t.Errorf("the backup has only %d bytes", r.SizeBytes)
	}
	if read > stored*15/100 || ready.BytesHydrated > r.SizeBytes*15/100 {
		t.Errorf("a start reads %d bytes of %d stored, and leaves %d of %d on disk", read, stored, ready.BytesHydrated, r.SizeBytes)
	}
	c.SQL("SELECT count(*) FROM noise WHERE ctid >= '(1000,0)' AND ctid < '(1100,0)'") // a range of 100 pages
	c.SQL("SELECT abalance FROM pgbench_accounts WHERE aid = 777777")
	after := overlayStatus(t, invocation{}, data)
	const little = 16 << 20 // the pages, with read-ahead, and catalogs
	if grown := after.BytesHydrated - ready.BytesHydrated; grown > little {
		t.Errorf("small queries brought %d bytes to disk", grown)
	}
	if grown := after.RepositoryBytesRead - ready.RepositoryBytesRead; grown > little {
		t.Errorf("small queries read %d bytes of the repository", grown)
	}
	c.SQL("SELECT count(*) FROM noise")
	if all := overlayStatus(t, invocation{}, data); all.RepositoryBytesRead < stored/4 {
		t.Errorf("reading the whole table read only %d bytes of the repository: they are not counted", all.RepositoryBytesRead)
	}
	c.StopImmediate()
	pgthaw(t, "overlay", "discard", data).ok(t)
}

// repositorySize adds up all objects.
func repositorySize(t *testing.T, repo string) (size int64) {
	t.Helper()
	err := filepath.WalkDir(repo, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := os.Lstat(path)
		if err == nil {
			size += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return size
}
