package integration

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The harness is proved on its own: each piece against each major.

func TestHarnessCluster(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			c := newCluster(t, p, clusterOptions{walSegmentMB: 1, checksums: true, pgbenchScale: 1, tablespaces: []string{"fast", "slow"}})
			if got := c.SQL("SHOW server_version_num"); !strings.HasPrefix(got, p.String()) {
				t.Errorf("server_version_num is %s, want %d....", got, p.major)
			}
			if got := c.SQL("SHOW wal_segment_size"); got != "1MB" {
				t.Errorf("wal_segment_size is %s, want 1MB", got)
			}
			c.pgbench("--client", "2", "--transactions", "100")
			c.pgbenchBalances()
			c.amcheck()
			c.Restart()
			if got := c.SQL("SELECT count(*) FROM in_slow"); got != "1000" {
				t.Errorf("in_slow has %s rows, want 1000", got)
			}
			c.Stop()
			p.checksums(t, c.data)
			if left, _ := filepath.Glob(filepath.Join(c.dir, "tablespace *", "PG_*")); len(left) != 2 {
				t.Errorf("the tablespaces hold %q, want one directory each", left)
			}
		})
	}
}

func TestHarnessConfigurationOutside(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			c := newCluster(t, p, clusterOptions{confOutside: true, conf: []string{"work_mem = '7MB'"}})
			if got := c.SQL("SHOW work_mem"); got != "7MB" {
				t.Errorf("work_mem is %s, want 7MB", got)
			}
			if _, err := os.Stat(filepath.Join(c.data, "postgresql.conf")); !os.IsNotExist(err) {
				t.Errorf("postgresql.conf is in PGDATA: %v", err)
			}
		})
	}
}

func TestHarnessLedger(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			c := newCluster(t, p, clusterOptions{})
			l := startLedger(t, c, 2)
			l.waitCommits(200)
			m := l.Mark("middle")
			l.waitCommits(200)
			l.Stop()
			checkLedgerOrder(t, l, m)
			all := len(l.commits)
			l.check(c, all, all)
			checkLedgerSees(t, l, l.read(c))

			l.write(2)
			l.waitCommits(100)
			c.Kill()
			l.Stop()
			c.Start()
			l.checkDurable(c)
		})
	}
}

// checkLedgerOrder: times, LSNs and the mark all agree on the order of commits.
func checkLedgerOrder(t *testing.T, l *ledger, m moment) {
	t.Helper()
	if !slices.IsSortedFunc(l.commits, func(a, b commit) int { return a.at.Compare(b.at) }) {
		t.Error("commit times do not follow the order of commits")
	}
	for i, c := range l.commits {
		if i > 0 && c.before < l.commits[i-1].after || c.before >= c.after {
			t.Errorf("commit %d lies in [%v, %v), the one before it ends at %v", i, c.before, c.after, l.commits[max(0, i-1)].after)
		}
	}
	if n := l.atTime(m.at, true); n != m.n {
		t.Errorf("at the mark's time there are %d commits, want %d", n, m.n)
	}
	if least, most := l.atLSN(m.lsn, false); least != m.n || most != m.n {
		t.Errorf("at the mark's LSN there are %d to %d commits, want %d", least, most, m.n)
	}
	if n := l.atXID(l.commits[10].xid, true); n != 11 {
		t.Errorf("the eleventh transaction makes %d commits", n)
	}
}

// checkLedgerSees: a row lost, changed or too many is seen.
func checkLedgerSees(t *testing.T, l *ledger, rows map[int64]string) {
	t.Helper()
	first, all := l.commits[0].id, len(rows)
	for what, damage := range map[string]func(map[int64]string){
		"lost":     func(m map[int64]string) { delete(m, first) },
		"changed":  func(m map[int64]string) { m[first] += "x" },
		"too many": func(m map[int64]string) { m[1<<40] = "x" },
	} {
		damaged := maps.Clone(rows)
		damage(damaged)
		if l.prefix(damaged, 0, all) == nil {
			t.Errorf("prefix does not see a row %s", what)
		}
		if l.durable(damaged) == nil {
			t.Errorf("durable does not see a row %s", what)
		}
	}
}

// TestHarnessRecovery proves the ledger's arithmetic with PostgreSQL's own backup and recovery.
func TestHarnessRecovery(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			dir := postgresDir(t)
			archive := "archive_command=cp \"%p\" " + dir + "/%f"
			c := adopt(t, p, newStoppedCluster(t, p), "-c", "archive_mode=on", "-c", archive)
			c.basebackup(dir)
			p.verifyBackup(t, filepath.Join(dir, "data"))
			l := startLedger(t, c, 3)
			l.waitCommits(300)
			m := l.Mark("here")
			l.waitCommits(100)
			l.Stop()
			c.Stop() // archives the last segment

			picked := l.commits[150]
			least, most := l.atLSN(picked.after, true)
			inTime := picked.at.Format("2006-01-02 15:04:05.000000+00") // "Z" for the zone is refused
			for _, target := range []struct {
				setting     string
				least, most int
			}{
				{"recovery_target_name=here", m.n, m.n},
				{"recovery_target_time=" + inTime, 151, 151},
				{"recovery_target_xid=" + strconv.FormatUint(picked.xid, 10), 151, 151},
				{"recovery_target_lsn=" + picked.after.String(), least, most},
			} {
				r := recoverTo(t, p, dir, target.setting)
				n := l.check(r, target.least, target.most)
				t.Logf("%s: %d of %d commits", target.setting, n, len(l.commits))
				r.Stop()
			}
		})
	}
}

// newStoppedCluster gives the PGDATA of a new cluster that is shut down.
func newStoppedCluster(t *testing.T, p installation) string {
	t.Helper()
	c := newCluster(t, p, clusterOptions{})
	c.Stop()
	return c.data
}

// recoverTo starts a copy of dir/data that recovers from the archive in dir up to a target.
func recoverTo(t *testing.T, p installation, dir, setting string) *cluster {
	t.Helper()
	data := filepath.Join(tempDir(t), "data")
	if out, err := exec.Command("cp", "-a", filepath.Join(dir, "data"), data).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	signal := filepath.Join(data, "recovery.signal")
	if err := os.WriteFile(signal, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ownedByPostgres(t, signal)
	c := adopt(t, p, data, "-c", "archive_mode=off", "-c", "restore_command=cp "+dir+"/%f %p", "-c", setting,
		"-c", "recovery_target_action=promote")
	c.waitRecovered()
	return c
}

func TestHarnessReplica(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			c := newCluster(t, p, clusterOptions{tablespaces: []string{"fast"}})
			r := c.Replica()
			c.SQL("CREATE TABLE new AS SELECT 42 AS answer")
			waitFor(t, time.Minute, "the standby to have the new table", func() bool {
				got, err := r.query("postgres", "SELECT answer FROM new")
				return err == nil && got == "42"
			})
			if got := r.SQL("SELECT count(*) FROM in_fast"); got != "1000" {
				t.Errorf("in_fast has %s rows on the standby, want 1000", got)
			}
		})
	}
}

// TestHarnessLeftovers proves that what a test leaves behind is seen, and taken away.
func TestHarnessLeftovers(t *testing.T) {
	dir := filepath.Join(scratch, "tmp", "left")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	sleeper := exec.Command("sleep", "600")
	sleeper.Args[0] = "sleep in " + dir
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, time.Minute, "the sleeper's command line", func() bool { return len(processesNaming(dir)) == 1 })
	left := strings.Join(leftovers(), "\n")
	for _, want := range []string{"sleep in " + dir, "mount " + dir, "file " + dir} {
		if !strings.Contains(left, want) {
			t.Errorf("%q is missing in:\n%s", want, left)
		}
	}
	_ = sleeper.Wait()
	if err := os.Remove(dir); err != nil {
		t.Errorf("the mount is still there: %v", err)
	}
	if more := mountsBelow(dir); len(more) > 0 {
		t.Errorf("mounts %v are still there", more)
	}
}

func TestHarnessBinary(t *testing.T) {
	t.Parallel()
	pgthaw(t, "no-such-command").exits(t, 2)
	if r := asPostgres.run(t, "no-such-command"); r.code != 2 {
		t.Errorf("as postgres: exit code %d, want 2", r.code)
	}
	running := invocation{env: []string{"A=b"}}.start(t, "no-such-command")
	if code := running.end(syscall.SIGCONT); code != 2 {
		t.Errorf("in the background: exit code %d, want 2\n%s", code, running.text())
	}
}
