package integration

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCrashCampaign kills daemons and servers while they do what is dangerous, on PostgreSQL 15 to 18 in turn: no commit that
// was acknowledged is lost, no page and no index is damaged, and what is finished is an ordinary directory.
//
// A cycle is the life of one copy, which is killed several times: perhaps while its directories leave the mount, or in the
// replay of its first start, then in three kinds of work, and every other time while it is finished. PGTHAW_CRASH_ROUNDS is
// how many cycles; PGTHAW_CRASH_DIR names the directory of a campaign that goes on where it was, see campaign.
func TestCrashCampaign(t *testing.T) {
	t.Parallel()
	cycles := environmentNumber(t, "PGTHAW_CRASH_ROUNDS", 4)
	c := openCampaign(t, os.Getenv("PGTHAW_CRASH_DIR"))
	terminated := c.termination()
	for n := 0; n < cycles && terminated.Err() == nil; n++ {
		if !t.Run(fmt.Sprintf("cycle %d", c.Cycles), c.cycle) {
			break
		}
		c.Cycles++
		c.save()
	}
	c.judge()
}

// cycle is the life of one copy.
func (c *campaign) cycle(t *testing.T) {
	n := c.Cycles
	r := rand.New(rand.NewPCG(c.Seed, uint64(n)))
	k := &life{crashSource: c.source(majors(t)[n%4]), t: t, r: r, note: func(hit kill) { c.note(t, hit) }}
	chosen := c.choose(n)
	leaving, hydrate := n%3 == 0, []string{"off", "1MB", "10MB", "auto"}[r.IntN(4)]
	end := []string{"", "finish", "", "restart"}[(n+n/4)%4] // another one each time it is this major's turn
	switch {
	case leaving || chosen[0].lazy:
		hydrate = "1MB"
	case end != "":
		hydrate = "off" // a whole copy whose server is stopped is finished by itself
	}
	k.thaw(hydrate)
	if leaving {
		k.strikeLeaving()
	}
	if r.IntN(2) == 0 {
		k.strikeReplay()
	}
	k.start()
	for _, w := range chosen {
		k.strike(w)
	}
	k.end(end)
}

// crashSource is a cluster with a backup and some WAL behind it, which all copies of a major are made of.
type crashSource struct {
	archived
	l *ledger
}

// newCrashSource makes a small cluster whose relations, of more than a megabyte, are placeholders until they are hydrated.
func newCrashSource(t *testing.T, p installation) *crashSource {
	t.Helper()
	s := &crashSource{archived: newArchived(t, p, clusterOptions{walSegmentMB: 1, checksums: true,
		tablespaces: []string{"fast", "slow", "spare"}, conf: []string{"fsync = off", "autovacuum = off", "max_wal_size = 256MB"}})}
	s.SQL("DROP TABLE in_spare")
	for table, place := range map[string]string{"cut": "pg_default", "shrunk": "pg_default", "packed": "pg_default", "sorted": "pg_default", "moved": "slow", "still": "fast"} {
		s.SQL(fmt.Sprintf("CREATE TABLE %s TABLESPACE %s AS %s; CREATE INDEX %[1]s_i ON %[1]s (i)", table, place, manyRows))
	}
	s.SQLIn("template1", "CREATE EXTENSION amcheck; CREATE TABLE inside AS "+manyRows)
	s.SQL("CREATE DATABASE made TEMPLATE template1 STRATEGY file_copy") // the other one is all in the WAL
	// Each database costs every life the time for 300 files.
	s.SQL("UPDATE pg_database SET datistemplate = false WHERE datname = 'template0'")
	s.SQL("DROP DATABASE template0")
	s.SQL("CREATE EXTENSION amcheck; DELETE FROM shrunk WHERE i > 10000")
	s.SQL(smallBank)
	s.SQL("CHECKPOINT")
	s.l = startLedger(t, s.cluster, 1)
	s.l.waitCommits(20)
	s.l.Stop()
	s.backup(t)
	s.SQL(strings.Repeat(transfer+";", 100))
	s.SQL("CREATE TABLE behind AS " + manyRows)
	s.l.write(1)
	s.l.waitCommits(20)
	s.l.Stop()
	s.Stop() // archives the last segment
	return s
}

// smallBank is what pgbench makes, with half of the accounts: their index has a megabyte still.
const smallBank = `CREATE TABLE pgbench_accounts AS SELECT i AS aid, 1 AS bid, 0 AS abalance, ''::char(84) AS filler FROM generate_series(1, 50000) i;
	ALTER TABLE pgbench_accounts ADD PRIMARY KEY (aid);
	CREATE TABLE pgbench_tellers AS SELECT i AS tid, 0 AS tbalance FROM generate_series(1, 10) i;
	CREATE TABLE pgbench_branches AS SELECT 0 AS bbalance;
	CREATE TABLE pgbench_history (tid int, bid int, aid int, delta int)`

const (
	manyRows = "SELECT i, " + ofRow + " AS x FROM generate_series(1, 20000) i"
	ofRow    = "repeat(lpad(i::text, 8, '0'), 8)"
)

// life is one copy.
type life struct {
	*crashSource
	t       *testing.T
	r       *rand.Rand
	note    func(kill)
	dir     string // holds the data directory and the tablespaces
	data    string
	beneath string // dir, without what is mounted in it
	c       *cluster
	l       *ledger
	daemon  int      // its PID; 0 when it has ended
	memory  []string // what a postmaster that was killed leaves in /dev/shm
	crashes int      // of the server, that it took for a backend's, up to the last kill
	readies int      // how often it was ready up to its last start or kill
}

// thaw makes the copy, and a view of it that no mount hides.
func (k *life) thaw(hydrate string) {
	k.t.Helper()
	k.data = newTarget(k.t)
	k.dir, k.beneath = filepath.Dir(k.data), tempDir(k.t)
	if err := bindPrivately(k.dir, k.beneath); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { unmount(k.beneath) })
	k.thawTo(hydrate)
}

func (k *life) thawTo(hydrate string) {
	k.t.Helper()
	args := []string{"--hydrate", hydrate}
	for _, name := range []string{"fast", "slow", "spare"} {
		args = append(args, "--tablespace-mapping", filepath.Join(k.crashSource.dir, "tablespace "+name)+"="+filepath.Join(k.dir, name))
	}
	k.copyTo(k.t, invocation{}, "thaw", "latest", k.data, args...).ok(k.t)
	k.findDaemon()
	k.c = attach(k.t, k.installation, k.data, 0, "-c", "archive_mode=off", "-c", "fsync=on", "-c", "log_checkpoints=on")
	k.c.mayPanic = true
	k.l = &ledger{t: k.t, source: k.c, commits: slices.Clone(k.crashSource.l.commits)}
}

// bindPrivately makes a directory visible at another path, without what is mounted in it now or later.
func bindPrivately(dir, at string) error {
	if err := unix.Mount(dir, at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", dir, err)
	}
	return unix.Mount("", at, "", unix.MS_PRIVATE, "")
}

func (k *life) findDaemon() {
	k.daemon = 0
	for pid, line := range processesNaming("\x00" + k.data + "\x00") {
		if strings.Contains(line, " overlay serve ") {
			k.daemon = pid
		}
	}
}

// start starts the server and waits for its recovery to end: a hot standby answers sooner.
func (k *life) start() {
	k.t.Helper()
	k.readies = k.logged(isReady)
	k.c.Start()
	k.awaitRecovery()
}

// What a server says when it begins anew because a process of it has crashed, and when it has recovered.
const beginsAnew, isReady = "all server processes terminated; reinitializing", "database system is ready to accept connections"

// logged counts how often a text is in the log of the copy's servers.
func (k *life) logged(text string) int {
	log, _ := os.ReadFile(k.c.logFile())
	return strings.Count(string(log), text)
}

func (k *life) awaitRecovery() {
	k.t.Helper()
	waitFor(k.t, startLimit, "end of recovery", func() bool { return k.logged(isReady) > k.readies })
}

// resume takes the overlay up, sometimes with a kill while it does. It may be that there is nothing left to take up: the
// server's end lets a daemon that had done its work take the mount off.
func (k *life) resume() {
	k.t.Helper()
	if k.daemon == 0 && k.r.IntN(4) == 0 {
		k.strikeResume()
	}
	resumed := pgthaw(k.t, "overlay", "resume", k.data).exits(k.t, 0, 17)
	if _, err := os.Stat(filepath.Join(k.data, "PG_VERSION")); err != nil || resumed.code != 0 && mounted(k.data) {
		k.t.Errorf("overlay resume: %v\n%s", err, resumed.stderr)
	}
	k.findDaemon()
}

// recover brings the copy to where a server answers again, whatever was killed.
func (k *life) recover(victim string) {
	k.t.Helper()
	if victim == "backend" { // the postmaster ends all the others, and starts them again
		k.awaitCrash()
		k.awaitRecovery()
		return
	}
	if k.r.IntN(2) == 0 {
		k.endServer()
	}
	if k.daemon == 0 {
		k.resume()
	}
	k.endServer()
	if k.r.IntN(5) == 0 {
		k.strikeReplay()
	}
	k.start()
}

// check compares the copy, after a kill, with what it must hold: every commit that was acknowledged, and what the works that were
// hit write. Whether all pages and indexes are sound is asked at the end of a life; what is damaged stays so.
func (k *life) check(hit ...*work) {
	k.t.Helper()
	k.c.inSession(func() {
		k.l.checkDurable(k.c)
		k.c.pgbenchBalances()
		k.checkWorks("postgres", hit)
		k.checkWorks("made", hit)
	})
}

// checkWorks compares a database, if it is there, with what the works in it may leave.
func (k *life) checkWorks(database string, hit []*work) {
	k.t.Helper()
	var queries []string
	var either [][]string
	for _, w := range hit {
		if w.holds != "" && cmp.Or(w.database, "postgres") == database {
			queries = append(queries, fmt.Sprintf("SELECT %d, * FROM (%s) AS it", len(queries), w.holds))
			either = append(either, w.either)
		}
	}
	if len(queries) == 0 || k.c.SQL("SELECT count(*) FROM pg_database WHERE datconnlimit <> -2 AND datname = '"+database+"'") == "0" {
		return
	}
	for i, row := range strings.Split(k.c.SQLIn(database, strings.Join(queries, " UNION ALL ")+" ORDER BY 1"), "\n") {
		if got := strings.TrimPrefix(row, fmt.Sprintf("%d|", i)); !slices.Contains(either[i], got) {
			k.t.Errorf("%s gives %s, want one of %q", queries[i], got, either[i])
		}
	}
}

// checkAll compares all of the copy with what it must hold, and may look at each page and index.
func (k *life) checkAll(pages bool) {
	k.t.Helper()
	k.check(works...)
	if pages {
		k.c.amcheck("--exclude-database", "template1") // nobody writes to that one
	}
}

// end makes an ordinary directory of the copy, with a kill meanwhile or not. Every other time it is pg_amcheck'ed as what it
// became, else as what is mounted.
func (k *life) end(how string) {
	k.t.Helper()
	mounted := k.r.IntN(2) == 0
	k.dropInvalid()
	k.dropHalved()
	k.checkAll(mounted)
	k.removeOrphans()
	switch how {
	case "finish":
		k.c.Stop()
		k.strikeFinish()
	case "restart":
		k.strikeRestart()
	}
	k.c.Stop()
	pgthaw(k.t, "overlay", "finish", k.data).exits(k.t, 0, 17)
	if m := mountsBelow(k.dir); len(m) > 0 {
		k.t.Errorf("after finish, mounted are %q", m)
	}
	for _, name := range []string{"data", "fast", "slow", "spare"} {
		checkNothingOfOurs(k.t, filepath.Join(k.dir, name))
	}
	k.start()
	k.checkAll(!mounted)
	k.c.Stop()
	k.checksums(k.t, k.data)
}

// dropInvalid drops the databases whose DROP was interrupted: PostgreSQL lets nobody connect to them.
func (k *life) dropInvalid() {
	k.t.Helper()
	for name := range strings.Lines(k.c.SQL("SELECT datname FROM pg_database WHERE datconnlimit = -2")) {
		k.c.SQL("DROP DATABASE " + strings.TrimSuffix(name, "\n"))
	}
}

// dropHalved drops a tablespace whose DROP was interrupted when its directory was gone and its link was not, and removes the link of
// one that never was: pg_checksums wants a directory behind each.
func (k *life) dropHalved() {
	k.t.Helper()
	links, _ := filepath.Glob(filepath.Join(k.data, "pg_tblspc", "*"))
	for _, link := range links {
		if inside, _ := filepath.Glob(filepath.Join(link, "PG_*")); len(inside) > 0 {
			continue
		}
		k.c.SQL("DROP TABLESPACE IF EXISTS spare")
		if _, err := os.Lstat(link); err == nil {
			k.remove(link)
		}
	}
}

// removeOrphans removes what a server that is killed leaves of a relation or database in the making. Nothing refers to it, and
// it can end with half a page, at which pg_checksums gives up.
func (k *life) removeOrphans() {
	k.t.Helper()
	k.c.SQL("CHECKPOINT") // what was dropped is unlinked behind it
	known := map[string]map[string]bool{}
	for line := range strings.Lines(k.c.SQL("SELECT oid, datname FROM pg_database")) {
		oid, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "|")
		known[oid] = map[string]bool{}
		for node := range strings.Lines(k.c.SQLIn(name, "SELECT pg_relation_filenode(oid) FROM pg_class WHERE pg_relation_filenode(oid) IS NOT NULL")) {
			known[oid][strings.TrimSuffix(node, "\n")] = true
		}
	}
	databases, _ := filepath.Glob(filepath.Join(k.data, "base", "[0-9]*"))
	inTablespaces, _ := filepath.Glob(filepath.Join(k.data, "pg_tblspc", "*", "PG_*", "[0-9]*"))
	for _, dir := range append(databases, inTablespaces...) {
		relations := known[filepath.Base(dir)]
		if relations == nil {
			k.remove(dir)
			continue
		}
		files, _ := filepath.Glob(filepath.Join(dir, "[0-9]*"))
		for _, file := range files {
			if node := strings.FieldsFunc(filepath.Base(file), func(c rune) bool { return c == '_' || c == '.' })[0]; !relations[node] {
				k.remove(file)
			}
		}
	}
}

func (k *life) remove(path string) {
	k.t.Helper()
	k.t.Logf("an orphan: %s", strings.TrimPrefix(path, k.dir))
	if err := os.RemoveAll(path); err != nil {
		k.t.Error(err)
	}
}

// seesNoWrongBytes queries a server whose mount is dead: it may answer from its buffers, rightly, or fail.
func (k *life) seesNoWrongBytes() {
	for query, want := range map[string]string{
		"SELECT count(*) FROM pgbench_accounts":                "50000",
		"SELECT count(*), sum(i) FROM still":                   "20000|200010000",
		"SELECT count(*), sum(i) FROM shrunk WHERE i <= 10000": "10000|50005000",
	} {
		if got, err := k.c.query("postgres", query); err == nil && got != want {
			k.t.Errorf("on a dead mount, %s is %s", query, got)
		}
	}
}

// TestCrashBareDirectory: what lies beneath a dead mount is no PGDATA that could be started by mistake.
func TestCrashBareDirectory(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			a := newArchived(t, p, clusterOptions{})
			a.SQL("CREATE TABLE kept AS SELECT 42 AS answer")
			a.backup(t)
			a.Stop()
			data := newTarget(t)
			a.copyTo(t, invocation{}, "thaw", "latest", data, "--hydrate", "off").ok(t)
			killDaemon(t, overlayStatus(t, invocation{}, data).PID)
			if out, err := a.pgctlStart(t, data); err == nil {
				t.Errorf("pg_ctl starts a server on a dead mount:\n%s", out)
			}
			if err := syscall.Unmount(data, syscall.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
			absent(t, filepath.Join(data, "PG_VERSION"))
			if _, err := os.Stat(filepath.Join(data, "global", "pg_control")); err != nil {
				t.Errorf("this is not the bare directory: %v", err)
			}
			if out, err := a.pgctlStart(t, data); err == nil {
				t.Errorf("pg_ctl starts a server on a bare directory:\n%s", out)
			}
			if st := overlayStatus(t, invocation{}, data); st.State != "lost" {
				t.Errorf("status is %+v", st)
			}
			pgthaw(t, "overlay", "finish", data).exits(t, 1, 19)
			for range 2 {
				pgthaw(t, "overlay", "resume", data).ok(t)
			}
			c := adopt(t, p, data)
			if got := c.SQL("SELECT answer FROM kept"); got != "42" {
				t.Errorf("kept holds %s", got)
			}
			c.Stop()
			pgthaw(t, "overlay", "discard", data).ok(t)
		})
	}
}

// killDaemon kills a process and waits for its end.
func killDaemon(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		t.Errorf("kill the daemon: %v", err)
	}
	waitFor(t, stopLimit, "end of the daemon", func() bool { return !alive(pid) })
}

// pgctlStart tries to start a server as a person would.
func (a archived) pgctlStart(t *testing.T, data string) (string, error) {
	t.Helper()
	log := filepath.Join(filepath.Dir(data), "pg_ctl.log")
	return a.try(t, "pg_ctl", "start", "--wait", "--timeout", "20", "--pgdata", data, "--log", log)
}

// hitLimit is how long a kill waits for the moment that it is aimed at, before it misses it.
const hitLimit = 20 * time.Second
