package integration

import (
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// crashSeed is printed; PGTHAW_SEED repeats a campaign's choices, though not its races.
func crashSeed(t *testing.T) *rand.Rand {
	t.Helper()
	seed := environmentNumber(t, "PGTHAW_SEED", int(time.Now().UnixNano()&0xffffffff))
	t.Logf("PGTHAW_SEED=%d", seed)
	return rand.New(rand.NewPCG(uint64(seed), 0))
}

// crashed is a thawed copy whose daemon is killed under load, again and again.
type crashed struct {
	*thawSource
	t    *testing.T
	r    *rand.Rand
	data string
	c    *cluster
	l    *ledger
	hits struct{ lazy, busy int } // kills while holes were left, and while commits were running
}

// TestCrashDaemon kills the daemon at random moments: errors, but no wrong bytes and no lost commit.
func TestCrashDaemon(t *testing.T) {
	t.Parallel()
	rounds := environmentNumber(t, "PGTHAW_CRASH_ROUNDS", 4)
	r := crashSeed(t)
	sources := map[int]*thawSource{}
	lazy, busy := 0, 0
	for round := range rounds {
		p := majors(t)[round%4]
		if sources[p.major] == nil {
			sources[p.major] = newThawSource(t, p)
		}
		t.Run(strconv.Itoa(round), func(t *testing.T) {
			k := &crashed{thawSource: sources[p.major], t: t, r: r}
			k.live(round)
			lazy += k.hits.lazy
			busy += k.hits.busy
		})
	}
	t.Logf("%d kills while holes were left, %d while commits were running", lazy, busy)
	if lazy < rounds || busy < rounds {
		t.Errorf("in %d rounds only %d kills while holes were left, %d while commits were running", rounds, lazy, busy)
	}
}

// live is the life of one copy: a kill in replay or not, two under load, and then it becomes an ordinary directory.
func (k *crashed) live(round int) {
	k.t.Helper()
	k.data, _ = k.copy(k.t, invocation{}, "thaw", "--hydrate", []string{"1MB", "auto"}[round%2])
	k.c = attach(k.t, k.installation, k.data, 0, "-c", "archive_mode=off")
	k.c.mayPanic = true
	if k.r.IntN(2) == 0 {
		k.killInReplay()
	}
	k.start()
	k.l = &ledger{t: k.t, source: k.c, commits: slices.Clone(k.thawSource.l.commits)}
	for range 2 {
		k.killUnderLoad()
		k.start()
		k.l.checkDurable(k.c)
	}
	k.c.pgbenchBalances()
	k.c.amcheck()
	k.c.Stop()
	pgthaw(k.t, "overlay", "finish", k.data).ok(k.t)
	checkNothingOfOurs(k.t, k.data)
	k.c.Start()
	k.l.checkDurable(k.c)
	k.c.Stop()
	k.checksums(k.t, k.data)
}

// start starts the server and waits for its recovery to end: a hot standby answers sooner.
func (k *crashed) start() {
	k.t.Helper()
	k.c.Start()
	waitFor(k.t, startLimit, "end of recovery", func() bool { return k.c.SQL("SELECT pg_is_in_recovery()") == "f" })
}

// killDaemon kills it, and gives what it had done just before. It may have ended by itself when all was whole.
func (k *crashed) killDaemon() thawed {
	k.t.Helper()
	st := overlayStatus(k.t, invocation{}, k.data)
	if st.PID == 0 {
		return st
	}
	if err := syscall.Kill(st.PID, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		k.t.Errorf("kill the daemon: %v", err)
	}
	waitFor(k.t, stopLimit, "end of the daemon", func() bool { return !alive(st.PID) })
	if st.State == "hydrating" && st.BytesHydrated < st.BytesTotal {
		k.hits.lazy++
	}
	return st
}

// killInReplay kills the daemon while the server starts for the first time.
func (k *crashed) killInReplay() {
	k.t.Helper()
	killed := make(chan struct{})
	time.AfterFunc(time.Duration(k.r.IntN(400))*time.Millisecond, func() {
		defer close(killed)
		k.killDaemon()
	})
	err := k.c.tryStart()
	<-killed
	k.t.Logf("killed in replay: %v", err)
	k.recover()
}

// killUnderLoad kills the daemon, and perhaps the server with it, while the ledger is written and pgbench runs.
func (k *crashed) killUnderLoad() {
	k.t.Helper()
	before := k.l.acknowledged()
	k.l.write(2)
	bench := k.load()
	k.l.waitCommits(20 + k.r.IntN(200))
	busy := k.l.acknowledged()
	both := k.r.IntN(3) == 0
	var killing sync.WaitGroup
	if both {
		killing.Go(k.c.Kill)
	}
	st := k.killDaemon()
	killing.Wait()
	if st.PID != 0 && busy > before {
		k.hits.busy++
	}
	if !both && st.PID != 0 {
		k.seesNoWrongBytes()
	}
	k.t.Logf("killed after %d commits, %d of %d bytes hydrated, the server too: %v", k.l.acknowledged()-before, st.BytesHydrated, st.BytesTotal, both)
	k.recover()
	k.l.Stop()
	bench()
}

// load runs pgbench until the function it returns is called. That it fails is what is to be expected.
func (k *crashed) load() (stop func()) {
	k.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, k.tool(k.t, "pgbench"), "--no-vacuum", "--client", "2", "--time", "600", k.c.dsn("postgres"))
	becomePostgres(k.t, cmd)
	if err := cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	return func() {
		cancel()
		_ = cmd.Wait()
	}
}

// seesNoWrongBytes queries a server whose mount is dead: it may answer from its buffers, rightly, or fail.
func (k *crashed) seesNoWrongBytes() {
	for query, want := range map[string]string{
		"SELECT count(*) FROM pgbench_accounts": "300000",
		"SELECT count(*), sum(i) FROM in_slow":  "1000|500500",
	} {
		if got, err := k.c.query("postgres", query); err == nil && got != want {
			k.t.Errorf("on a dead mount, %s is %s", query, got)
		}
	}
}

// recover takes the overlay up again, before or after the server is ended.
func (k *crashed) recover() {
	k.t.Helper()
	if k.r.IntN(2) == 0 {
		k.c.Kill()
	}
	resumed := pgthaw(k.t, "overlay", "resume", k.data).exits(k.t, 0, 17)
	if _, err := os.Stat(filepath.Join(k.data, "PG_VERSION")); err != nil || resumed.code != 0 && mounted(k.data) {
		// 17: the server's end has let a daemon that had done its work take the mount off
		k.t.Errorf("overlay resume: %v\n%s", err, resumed.stderr)
	}
	k.c.Kill()
	removeSystemV(k.data) // which could not be read while the mount was dead
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
			k := &crashed{t: t, data: data}
			k.killDaemon()
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

// pgctlStart tries to start a server as a person would.
func (a archived) pgctlStart(t *testing.T, data string) (string, error) {
	t.Helper()
	log := filepath.Join(filepath.Dir(data), "pg_ctl.log")
	return a.try(t, "pg_ctl", "start", "--wait", "--timeout", "20", "--pgdata", data, "--log", log)
}
