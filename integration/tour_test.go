package integration

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// shellBlock is what a page shows to be typed.
var shellBlock = regexp.MustCompile("(?s)```sh\n(.*?)```")

// TestTour types the README's tour into a shell of the server's user, beside a server that runs.
func TestTour(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var lines strings.Builder
	for _, block := range shellBlock.FindAllStringSubmatch(string(page), -1) {
		lines.WriteString(block[1])
	}
	if lines.Len() == 0 {
		t.Fatal("the README has no tour")
	}
	p := postgresql(t, 15)
	c := newCluster(t, p, clusterOptions{pgbenchScale: 1})
	home := postgresDir(t)
	script := strings.ReplaceAll(lines.String(), "5440", strconv.Itoa(freePort(t)))
	out := typeIn(t, c, home, script)
	for _, want := range []string{"Repository ", "postgresql.auto.conf", "DELETE 1000", "Connect with: psql", "Recovery ended at", "State"} {
		if !strings.Contains(out, want) {
			t.Errorf("the tour does not show %q:\n%s", want, out)
		}
	}
	if n := strings.Count(out, "\n  1000\n"); n != 3 {
		t.Errorf("a thousand rows were counted %d times, want 3:\n%s", n, out)
	}
	for _, pattern := range []string{"[^.]*", ".config/pgthaw/keys/*"} {
		if left, err := filepath.Glob(filepath.Join(home, pattern)); err != nil || len(left) > 0 {
			t.Errorf("the tour leaves %q behind (%v)", left, err)
		}
	}
}

// typeIn runs a script, stopping at the first command that fails.
func typeIn(t *testing.T, c *cluster, home, script string) string {
	t.Helper()
	out, code := typed(t, c, home, script)
	if code != 0 {
		t.Fatalf("the script ended with exit code %d:\n%s", code, out)
	}
	return out
}

// typed runs a script as the server's user, whose server is the one that libpq's variables lead to.
func typed(t *testing.T, c *cluster, home, script string, env ...string) (out string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-e", "-c", script)
	becomePostgres(t, cmd)
	cmd.SysProcAttr.Setpgid = true
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = pipeLimit
	cmd.Dir = home
	cmd.Env = environment(append(env, "HOME="+home, "XDG_CONFIG_HOME=", stateHome(t, "postgres"), "PATH="+filepath.Join(scratch, "bin")+":"+c.bin+":"+os.Getenv("PATH"),
		"PGHOST="+c.dir, "PGPORT="+strconv.Itoa(c.port), "PGUSER=postgres", "PGDATABASE=postgres")...)
	text, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || err != nil && cmd.ProcessState.Success() {
		t.Fatalf("run %s: %v\n%s", script, err, text)
	}
	return string(text), exitCode(cmd.ProcessState)
}
