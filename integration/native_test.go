package integration

import (
	"context"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// native is what these tests read of overlay status --json.
type native struct {
	State  string   `json:"state"`
	Native []string `json:"native"`
	Held   []held   `json:"held"`
}

type held struct {
	Dir       string `json:"dir"`
	Processes []struct {
		Command string `json:"command"`
	} `json:"processes"`
}

func (n native) has(dir string) bool { return slices.Contains(n.Native, dir) }

// TestNative has a copy leave FUSE, directory by directory and at last by finish --restart, while sessions that have been
// there since the beginning write to it.
func TestNative(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) { newThawSource(t, p).testNative(t) })
	}
}

func (s *thawSource) testNative(t *testing.T) {
	data, r := s.copy(t, invocation{}, "thaw", "--start", "--hydrate", "10MB")
	c := r.server(t, s.installation, data)
	look := func() (n native) {
		pgthaw(t, "--json", "overlay", "status", data).ok(t).into(t, &n)
		return n
	}
	in := func(name string) string { return filepath.Join(data, name) }
	if n := look(); !n.has(in("pg_wal")) || n.has(in("base")) || n.State != "hydrating" {
		t.Fatalf("at first %+v", n)
	}
	l := &ledger{t: t, source: c, commits: slices.Clone(s.l.commits)}
	l.write(2)
	stopBench := s.benchOn(t, c)
	l.waitCommits(50)
	waitFor(t, hydrateLimit, "hydration", func() bool { return look().State == "hydrated" })
	n := look()
	i := slices.IndexFunc(n.Held, func(h held) bool { return h.Dir == in("base") })
	if i < 0 && !n.has(in("base")) || i >= 0 && (len(n.Held[i].Processes) == 0 || n.Held[i].Processes[0].Command != "postgres") {
		t.Errorf("who holds base: %+v", n)
	}
	l.waitCommits(50)

	// The smgr-release barrier: every process closes its files.
	c.SQL("CHECKPOINT")
	c.SQL("CREATE DATABASE barrier")
	c.SQL("DROP DATABASE barrier")
	everything := []string{in("base"), in("global"), in("pg_xact"), in("pg_wal"), filepath.Join(filepath.Dir(data), "fast"), filepath.Join(filepath.Dir(data), "slow")}
	defer func() {
		if t.Failed() {
			t.Logf("at last %+v", n)
		}
	}()
	waitFor(t, 20*time.Second, "all directories leave the mount", func() bool {
		n = look()
		return !slices.ContainsFunc(everything, func(dir string) bool { return !n.has(dir) })
	})
	l.waitCommits(100)
	c.pgbenchBalances()
	c.SQL("CREATE DATABASE late TABLESPACE slow")
	c.SQL("DROP DATABASE late")
	c.SQL("DROP TABLE in_slow")
	c.SQL("DROP TABLESPACE slow")
	c.SQL("VACUUM FULL pgbench_tellers")
	c.SQL("TRUNCATE in_fast")

	busy := exec.Command("sleep", "600")
	busy.Dir = data
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	refused := pgthaw(t, "overlay", "finish", "--restart", data).exits(t, 19)
	if !strings.Contains(refused.stderr, "(sleep)") || c.SQL("SELECT 1") != "1" {
		t.Errorf("finish --restart with somebody in the mount:\n%s", refused.stderr)
	}
	_ = busy.Process.Kill()
	_ = busy.Wait()

	before := l.acknowledged()
	var restarted struct {
		DowntimeMS int64 `json:"downtime_ms"`
	}
	pgthaw(t, "--json", "overlay", "finish", "--restart", data).ok(t).into(t, &restarted)
	t.Logf("down for %d ms after %d commits", restarted.DowntimeMS, before)
	if restarted.DowntimeMS <= 0 || mounted(data) {
		t.Errorf("restarted: %+v, mounted: %v", restarted, mounted(data))
	}
	l.Stop()
	stopBench()
	checkNothingOfOurs(t, data)
	c.lastPID = c.pid()
	l.checkDurable(c)
	c.pgbenchBalances()
	c.amcheck()
	c.Stop()
	s.checksums(t, data)
}

// benchOn runs pgbench with sessions that last until the function it returns is called, or the server goes away.
func (s *thawSource) benchOn(t *testing.T, c *cluster) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	cmd := exec.CommandContext(ctx, s.tool(t, "pgbench"), "--no-vacuum", "--client", "3", "--time", "600", c.dsn("postgres"))
	becomePostgres(t, cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() {
		cancel()
		_ = cmd.Wait()
	}
}
