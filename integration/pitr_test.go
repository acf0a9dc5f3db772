package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// copied is what these tests read of restore --json and thaw --json.
type copied struct {
	Backup    string `json:"backup"`
	Target    string `json:"target"`
	Port      int    `json:"port"`
	PID       int    `json:"pid"`
	SocketDir string `json:"socket_dir"`
	Recovery  *struct {
		State    string `json:"state"`
		LSN      string `json:"lsn"`
		Timeline uint32 `json:"timeline"`
	} `json:"recovery"`
}

// paths are the two ways from a backup to a data directory.
var paths = []string{"restore", "thaw"}

// copyTo runs restore or thaw of cluster main. Whatever comes of it, no mount is left when the test ends.
func (a archived) copyTo(t *testing.T, v invocation, path, backup, data string, args ...string) result {
	t.Helper()
	v.env = append(v.env, "PGTHAW_REPO="+a.repo)
	t.Cleanup(func() { discard(t, data) })
	args = append([]string{"--json", path, "main", backup, "--target", data, "--bindir", a.bin}, args...)
	return v.run(t, args...)
}

// discard throws a thawed directory away. One that is none, or is whole by now, is left alone. The mounts of its
// tablespaces, which are beside it, go after its own.
func discard(t *testing.T, data string) {
	t.Helper()
	if len(mountsBelow(data)) > 0 {
		if r := pgthaw(t, "overlay", "discard", data); len(mountsBelow(data)) > 0 {
			r.ok(t)
		}
	}
	waitFor(t, stopLimit, "end of the mounts of "+data, func() bool { return len(mountsBelow(filepath.Dir(data))) == 0 })
	awaitNoDaemon(t, data)
}

// server describes the server that a restore or a thaw started. Its postmaster.pid may lie in a mount of user postgres,
// where root does not see it.
func (r copied) server(t *testing.T, p installation, data string) *cluster {
	t.Helper()
	c := attach(t, p, data, 0)
	c.port, c.lastPID = r.Port, r.PID
	return c
}

// awaitNoDaemon waits for the end of the one that serves a thawed directory: it ends after its mounts.
func awaitNoDaemon(t *testing.T, data string) {
	t.Helper()
	waitFor(t, stopLimit, "end of the daemon of "+data, func() bool {
		for _, line := range processesNaming("\x00" + data + "\x00") {
			if strings.Contains(line, " overlay serve ") {
				return false
			}
		}
		return true
	})
}

// newTarget is a path for a data directory that its user may make.
func newTarget(t *testing.T) string {
	t.Helper()
	dir := postgresDir(t)
	return filepath.Join(dir, "data")
}

// absent fails the test if a path is there.
func absent(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("%s is there: %v", path, err)
	}
}

// point is a recovery target and how many commits of the ledger a recovery to it shows.
type point struct {
	args        []string
	least, most int
}

// targetTime spells a time with the microseconds of a commit record.
func targetTime(at time.Time) string { return at.UTC().Format("2006-01-02T15:04:05.000000Z") }

// pointKinds make a target at commit i, which is behind the backup. exact is the number of commits where there is one.
var pointKinds = []struct {
	name string
	at   func(s *pitrSource, r *rand.Rand, i int) point
}{
	{"time", func(s *pitrSource, r *rand.Rand, i int) point {
		at := s.l.commits[i].at
		if room := s.l.commits[i+1].at.Sub(at).Microseconds(); r.IntN(2) == 0 && room > 1 {
			at = at.Add(time.Duration(r.Int64N(room)) * time.Microsecond)
		}
		return exact(s.l.atTime(at, true), "--to", targetTime(at))
	}},
	{"time, exclusive", func(s *pitrSource, _ *rand.Rand, i int) point {
		at := s.l.commits[i].at
		return exact(s.l.atTime(at, false), "--to", targetTime(at), "--exclusive")
	}},
	{"LSN", func(s *pitrSource, r *rand.Rand, i int) point { return s.atLSN(r, i, true) }},
	{"LSN, exclusive", func(s *pitrSource, r *rand.Rand, i int) point { return s.atLSN(r, i, false) }},
	{"xid", func(s *pitrSource, _ *rand.Rand, i int) point {
		xid := s.l.commits[i].xid
		return exact(s.l.atXID(xid, true), "--to-xid", strconv.FormatUint(xid, 10))
	}},
	{"xid, exclusive", func(s *pitrSource, _ *rand.Rand, i int) point {
		xid := s.l.commits[i].xid
		return exact(s.l.atXID(xid, false), "--to-xid", strconv.FormatUint(xid, 10), "--exclusive")
	}},
	{"name", func(s *pitrSource, r *rand.Rand, _ int) point {
		m := s.marks[r.IntN(len(s.marks))]
		return exact(m.n, "--to-name", m.name)
	}},
	{"immediate", func(s *pitrSource, _ *rand.Rand, _ int) point {
		least, most := s.l.atLSN(s.stop, true)
		return point{[]string{"--to-immediate"}, least, most}
	}},
}

func exact(n int, args ...string) point { return point{args, n, n} }

// pitrSource is a backup and the WAL behind it, whose server is down.
type pitrSource struct {
	archived
	l     *ledger
	from  int // first commit behind the backup
	stop  lsn // of the backup
	marks []moment
}

func (s *pitrSource) atLSN(r *rand.Rand, i int, inclusive bool) point {
	c := s.l.commits[i]
	at := c.before + lsn(r.Uint64N(uint64(c.after-c.before)+1))
	least, most := s.l.atLSN(at, inclusive)
	args := []string{"--to-lsn", at.String()}
	if !inclusive {
		args = append(args, "--exclusive")
	}
	return point{args, least, most}
}

// smallSegments make a small cluster whose WAL is many files. It does not fsync: nothing here pulls a plug.
var smallSegments = clusterOptions{walSegmentMB: 1, checksums: true, conf: []string{"fsync = off", "max_wal_size = 64MB"}}

// newPITRSource backs up while three writers write, and archives five marked stretches of their WAL.
func newPITRSource(t *testing.T, p installation) *pitrSource {
	t.Helper()
	s := &pitrSource{archived: newArchived(t, p, smallSegments)}
	s.l = startLedger(t, s.cluster, 3)
	s.l.waitCommits(50)
	s.backup(t)
	s.from = s.l.acknowledged()
	for i := range 5 {
		s.l.waitCommits(100)
		s.marks = append(s.marks, s.l.Mark(fmt.Sprintf("mark %d", i)))
		s.SQL("SELECT pg_switch_wal()")
	}
	s.l.waitCommits(20)
	s.l.Stop()
	s.Stop() // archives the last segment
	var err error
	if s.stop, err = parseLSN(s.backups(t)[0].StopLSN); err != nil {
		t.Fatal(err)
	}
	return s
}

// backup makes a backup of the cluster as main.
func (a archived) backup(t *testing.T, args ...string) {
	t.Helper()
	a.pgthaw(t, append([]string{"backup", "main", "--pg-connection", a.dsn("postgres")}, args...)...).ok(t)
}

// backups lists those of main, oldest first.
func (a archived) backups(t *testing.T) []listed {
	t.Helper()
	var all []listed
	a.pgthaw(t, "list", "main", "--json").ok(t).into(t, &all)
	return all
}

// TestPITR recovers to random points on both paths: the content is the ledger's at that point.
func TestPITR(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	if given := os.Getenv("PGTHAW_SEED"); given != "" {
		seed, _ = strconv.ParseUint(given, 10, 64)
	}
	t.Logf("PGTHAW_SEED=%d", seed)
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			s := newPITRSource(t, p)
			r := rand.New(rand.NewPCG(seed, uint64(p.major)))
			order := r.Perm(len(pointKinds))
			points := 5
			if p.major == 15 {
				points = 20
			}
			for i := range points {
				kind := pointKinds[order[i%len(order)]]
				path := paths[(i+i/len(order))%2]
				at := s.from + 1 + r.IntN(len(s.l.commits)-s.from-15)
				to := kind.at(s, r, at)
				v, state := invocation{postgres: r.IntN(2) == 0}, "promoted"
				if r.IntN(4) == 0 {
					to.args, state = append(to.args, "--action", "pause"), "paused"
				}
				t.Run(fmt.Sprintf("%s to %s", path, kind.name), func(t *testing.T) { s.recoverAndCheck(t, v, path, to, state) })
			}
		})
	}
}

// recoverAndCheck makes a copy, has it recover to a point, and compares it with the ledger.
func (s *pitrSource) recoverAndCheck(t *testing.T, v invocation, path string, to point, state string) {
	t.Helper()
	t.Logf("%v: %d to %d of %d commits", to.args, to.least, to.most, len(s.l.commits))
	data := newTarget(t)
	var got copied
	s.copyTo(t, v, path, "latest", data, append(to.args, "--start")...).ok(t).into(t, &got)
	c := got.server(t, s.installation, data)
	if got.Recovery == nil || got.Recovery.State != state {
		t.Fatalf("recovery is %+v, want %s", got.Recovery, state)
	}
	if wants := map[string]string{"promoted": "f", "paused": "t"}[state]; c.SQL("SELECT pg_is_in_recovery()") != wants {
		t.Errorf("pg_is_in_recovery is not %s", wants)
	}
	s.l.check(c, to.least, to.most)
	c.StopImmediate()
	discard(t, data)
}

// reachSource has three backups, with commits and a restore point before, between and behind them.
type reachSource struct {
	archived
	l       *ledger
	ids     []string // of the backups
	stretch []moment // [0] is before the first backup, [3] behind the last
	sub     string   // id of a subtransaction behind the last backup
}

func newReachSource(t *testing.T, p installation) *reachSource {
	t.Helper()
	s := &reachSource{archived: newArchived(t, p, smallSegments)}
	s.l = startLedger(t, s.cluster, 2)
	for i := range 4 {
		s.l.waitCommits(30)
		s.stretch = append(s.stretch, s.l.Mark(fmt.Sprintf("stretch %d", i)))
		s.l.waitCommits(30)
		s.SQL("SELECT pg_switch_wal()")
		if i < 3 {
			s.backup(t)
		}
	}
	for range 3 {
		s.l.waitCommits(10)
		s.SQL("SELECT pg_switch_wal()")
	}
	s.sub = s.subtransaction()
	s.l.waitCommits(30)
	s.l.Stop()
	s.Stop()
	for _, b := range s.backups(t) {
		s.ids = append(s.ids, b.ID)
	}
	return s
}

// subtransaction commits a row within a savepoint, and gives the id that it had there: no commit record is of that id.
func (s *reachSource) subtransaction() string {
	return s.SQL("CREATE TABLE sub (i int); BEGIN; SAVEPOINT s; INSERT INTO sub VALUES (1); RELEASE s; COMMIT; SELECT xmin FROM sub")
}

// commitAt is the first commit behind a stretch's mark.
func (s *reachSource) commitAt(i int) commit { return s.l.commits[s.stretch[i].n] }

// TestTargetOutOfReach asks for what cannot be reached: refused, by the code for it, before the target directory is made.
func TestTargetOutOfReach(t *testing.T) {
	t.Parallel()
	s := newReachSource(t, postgresql(t, 15))
	first, last := s.commitAt(0), s.l.commits[len(s.l.commits)-1]
	const far = "FFFF/0"
	for _, c := range []struct {
		name, backup string
		args         []string
		code         int
	}{
		{"time before the first backup", "latest", []string{"--to", targetTime(first.at)}, 15},
		{"LSN before the first backup", "latest", []string{"--to-lsn", first.after.String()}, 15},
		{"xid before the first backup", "latest", []string{"--to-xid", strconv.FormatUint(first.xid, 10)}, 15},
		{"name before the first backup", "latest", []string{"--to-name", s.stretch[0].name}, 15},
		{"time before this backup", s.ids[2], []string{"--to", targetTime(s.commitAt(1).at)}, 15},
		{"LSN before this backup", s.ids[2], []string{"--to-lsn", s.commitAt(2).after.String()}, 15},
		{"xid before this backup", s.ids[1], []string{"--to-xid", strconv.FormatUint(s.commitAt(1).xid, 10)}, 15},
		{"name before this backup", s.ids[2], []string{"--to-name", s.stretch[2].name}, 15},
		{"time behind the WAL", "latest", []string{"--to", targetTime(last.at.Add(time.Hour))}, 15},
		{"now", "latest", []string{"--to", "now"}, 15},
		{"LSN behind the WAL", "latest", []string{"--to-lsn", far}, 15},
		{"xid behind the WAL", "latest", []string{"--to-xid", strconv.FormatUint(last.xid+100000, 10)}, 15},
		{"unknown name", "latest", []string{"--to-name", "never"}, 15},
		{"unknown timeline", "latest", []string{"--timeline", "7"}, 15},
		{"malformed time", "latest", []string{"--to", "half past nine"}, 2},
		{"malformed LSN", "latest", []string{"--to-lsn", "0-1"}, 2},
		{"malformed xid", "latest", []string{"--to-xid", "x"}, 2},
		{"malformed timeline", "latest", []string{"--timeline", "new"}, 2},
		{"malformed action", "latest", []string{"--action", "stop"}, 2},
		{"two targets", "latest", []string{"--to-lsn", far, "--to-immediate"}, 2},
		{"unknown backup", "20010101T000000Z", nil, 14},
	} {
		for _, path := range paths {
			t.Run(path+" to "+c.name, func(t *testing.T) { s.refuses(t, path, c.backup, c.code, c.args...) })
		}
	}
	t.Run("chooses", s.testChoice)
	t.Run("subtransaction", s.testSubtransaction)
	t.Run("shutdown", s.testShutdown)
	t.Run("gap", s.testGap)
}

// refuses fails the test unless a copy is refused with this code, and a hint, before anything is made.
func (s *reachSource) refuses(t *testing.T, path, backup string, code int, args ...string) {
	t.Helper()
	data := newTarget(t)
	r := s.copyTo(t, asPostgres, path, backup, data, append(args, "--start")...).exits(t, code)
	if !strings.Contains(r.stderr, "HINT: ") || r.stdout != "" {
		t.Errorf("no hint on stderr, or something on stdout:\n%s%s", r.stderr, r.stdout)
	}
	absent(t, data)
	absent(t, data+".startup.log")
}

// testChoice: with a target, latest is the newest backup that leads there.
func (s *reachSource) testChoice(t *testing.T) {
	for i, want := range s.ids {
		m, c := s.stretch[i+1], s.commitAt(i+1)
		for _, args := range [][]string{
			{"--to", targetTime(c.at)}, {"--to-lsn", c.after.String()}, {"--to-xid", strconv.FormatUint(c.xid, 10)}, {"--to-name", m.name},
		} {
			data := newTarget(t)
			var got copied
			s.copyTo(t, asPostgres, "restore", "latest", data, args...).ok(t).into(t, &got)
			if got.Backup != want {
				t.Errorf("%v: backup %s was chosen, want %s of %s", args, got.Backup, want, s.ids)
			}
		}
	}
}

// testSubtransaction: that a transaction has no end of its own only PostgreSQL finds out, and it must not promote then.
func (s *reachSource) testSubtransaction(t *testing.T) {
	for _, path := range paths {
		data := newTarget(t)
		r := s.copyTo(t, asPostgres, path, "latest", data, "--to-xid", s.sub, "--start")
		if r.exits(t, 15, 18); r.code == 18 && !strings.Contains(r.stderr, "before configured recovery target was reached") {
			t.Errorf("%s says nothing of the target:\n%s", path, r.stderr)
		}
		if left := processesNaming(data); path == "restore" && len(left) > 0 {
			t.Errorf("it left %v", left)
		}
		discard(t, data)
	}
}

// testShutdown: the server ends at the target, and that is success. It may then be started for good.
func (s *reachSource) testShutdown(t *testing.T) {
	for _, path := range paths {
		data := newTarget(t)
		m := s.stretch[2]
		var got copied
		s.copyTo(t, asPostgres, path, "latest", data, "--to-name", m.name, "--action", "shutdown", "--start").ok(t).into(t, &got)
		if got.Recovery == nil || got.Recovery.State != "shutdown" {
			t.Errorf("%s: recovery is %+v, want shutdown", path, got.Recovery)
		}
		c := got.server(t, s.installation, data)
		waitFor(t, stopLimit, "end of the server", func() bool { return c.pid() == 0 })
		if path == "restore" {
			c = adopt(t, s.installation, data, "-c", "recovery_target_action=promote")
			c.waitRecovered()
			s.l.check(c, m.n, m.n)
		}
		discard(t, data)
	}
}

// testGap takes one segment out of the repository: what lies behind it is out of reach, what lies before it is not.
func (s *reachSource) testGap(t *testing.T) {
	wal := s.walObjects(t)
	missing := ""
	for _, name := range wal {
		if at := segmentStart(t, name, 1<<20); at > s.commitAt(3).after {
			missing = name
			break
		}
	}
	if missing == "" || missing == wal[len(wal)-1] {
		t.Fatalf("no segment of %s lies between %v and the end", wal, s.commitAt(3).after)
	}
	s.removeWAL(t, missing)
	behind := segmentStart(t, missing, 1<<20) + 2<<20
	for _, path := range paths {
		t.Run(path, func(t *testing.T) {
			s.refuses(t, path, "latest", 15)
			s.refuses(t, path, "latest", 15, "--to-lsn", behind.String())
			s.refuses(t, path, s.ids[0], 15, "--to-lsn", behind.String())
			s.refuses(t, path, "latest", 15, "--to", targetTime(s.l.commits[len(s.l.commits)-1].at))
			c := s.commitAt(3)
			to := exact(s.l.atXID(c.xid, true), "--to-xid", strconv.FormatUint(c.xid, 10))
			before := &pitrSource{archived: s.archived, l: s.l}
			before.recoverAndCheck(t, asPostgres, path, to, "promoted")
		})
	}
}

// walFile is the object of a WAL file in the repository's directory.
func (a archived) walFile(name string) string {
	return filepath.Join(a.repo, "wal", "main", name[:8], name)
}

// walObjects lists the segments that the repository has, in order.
func (a archived) walObjects(t *testing.T) []string {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(a.repo, "wal", "main", "*", strings.Repeat("[0-9A-F]", 24)))
	var names []string
	for _, f := range files {
		names = append(names, filepath.Base(f))
	}
	if len(names) < 3 {
		t.Fatalf("the repository has %d segments, want some more", len(names))
	}
	return names
}

func (a archived) removeWAL(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(a.walFile(name)); err != nil {
		t.Fatal(err)
	}
}

// segmentStart is where a segment begins.
func segmentStart(t *testing.T, name string, size uint64) lsn {
	t.Helper()
	high, err1 := strconv.ParseUint(name[8:16], 16, 32)
	low, err2 := strconv.ParseUint(name[16:24], 16, 32)
	if err1 != nil || err2 != nil {
		t.Fatalf("%q is no segment", name)
	}
	return lsn(high<<32 + low*size)
}
