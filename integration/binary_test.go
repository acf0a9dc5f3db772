package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	// runLimit bounds every run of pgthaw that sets no limit of its own.
	runLimit = 5 * time.Minute
	// pipeLimit is how long a run's output may stay open after it has ended: a daemon that keeps it
	// would hang whoever calls pgthaw in $(...).
	pipeLimit = 5 * time.Second
)

// invocation says how pgthaw is run. The zero value is as root with a bare environment.
type invocation struct {
	postgres bool     // as user postgres
	env      []string // NAME=value, beside PATH, HOME, XDG_CONFIG_HOME, LC_ALL, TZ, TMPDIR
	stdin    string
	limit    time.Duration // runLimit when zero; the run then gets SIGQUIT, and prints its goroutines
}

// asPostgres runs pgthaw as the server's user.
var asPostgres = invocation{postgres: true}

// result is what one run of pgthaw left.
type result struct {
	args           []string
	stdout, stderr string
	code           int // exit code; 128 + signal when a signal ended it
	took           time.Duration
}

// pgthaw runs the built binary as root.
func pgthaw(t *testing.T, args ...string) result {
	t.Helper()
	return invocation{}.run(t, args...)
}

// run runs pgthaw to its end.
func (v invocation) run(t *testing.T, args ...string) result {
	t.Helper()
	limit := v.limit
	if limit == 0 {
		limit = runLimit
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := v.command(t, ctx, args)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(v.stdin), &stdout, &stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) }
	cmd.WaitDelay = pipeLimit
	began := time.Now()
	err := cmd.Run()
	r := result{args, stdout.String(), stderr.String(), 0, time.Since(began)}
	if cmd.ProcessState == nil {
		t.Fatalf("run pgthaw: %v", err)
	}
	r.code = exitCode(cmd.ProcessState)
	switch {
	case ctx.Err() != nil:
		t.Fatalf("pgthaw %q has not ended after %v\n%s", args, limit, r.stderr)
	case errors.Is(err, exec.ErrWaitDelay):
		t.Fatalf("pgthaw %q ended, but something keeps its stdout or stderr open\n%s", args, r.stderr)
	}
	return r
}

func (v invocation) command(t *testing.T, ctx context.Context, args []string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(ctx, filepath.Join(scratch, "bin", "pgthaw"), args...)
	user := "root"
	if v.postgres {
		user = "postgres"
		becomePostgres(t, cmd)
		cmd.SysProcAttr.Pdeathsig = 0 // what stays, a mount for one, is to be ended by the test
	}
	cmd.Env = environment(append([]string{"HOME=" + filepath.Join(scratch, "home"), stateHome(t, user)}, v.env...)...)
	cmd.Dir = "/"
	return cmd
}

func exitCode(state *os.ProcessState) int {
	if status := state.Sys().(syscall.WaitStatus); status.Signaled() {
		return 128 + int(status.Signal())
	}
	return state.ExitCode()
}

// ok fails the test unless the run exited with 0 and warned of nothing.
func (r result) ok(t *testing.T) result {
	t.Helper()
	r.exits(t, 0)
	if strings.Contains(r.stderr, "warning: ") {
		t.Fatalf("pgthaw %q warned:\n%s", r.args, r.stderr)
	}
	return r
}

// exits fails the test unless the run's exit code is one of codes.
func (r result) exits(t *testing.T, codes ...int) result {
	t.Helper()
	for _, code := range codes {
		if r.code == code {
			return r
		}
	}
	t.Fatalf("pgthaw %q: exit code %d, want %v\nstdout:\n%sstderr:\n%s", r.args, r.code, codes, r.stdout, r.stderr)
	return r
}

// into decodes stdout, the last line of it when there are several, as JSON.
func (r result) into(t *testing.T, value any) {
	t.Helper()
	text := strings.TrimSpace(r.stdout)
	if !json.Valid([]byte(text)) {
		text = text[strings.LastIndexByte(text, '\n')+1:]
	}
	if err := json.Unmarshal([]byte(text), value); err != nil {
		t.Fatalf("pgthaw %q: %v in\n%s", r.args, err, r.stdout)
	}
}

// running is a pgthaw that stays: wal stream, mount --foreground. It ends with the test.
type running struct {
	t      *testing.T
	args   []string
	cmd    *exec.Cmd
	output string // file of stdout and stderr
	ended  chan struct{}
}

// start starts pgthaw and does not wait for it.
func (v invocation) start(t *testing.T, args ...string) *running {
	t.Helper()
	r := &running{t: t, args: args, output: filepath.Join(tempDir(t), "output"), ended: make(chan struct{})}
	r.cmd = v.command(t, context.Background(), args)
	file, err := os.Create(r.output)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	r.cmd.Stdin, r.cmd.Stdout, r.cmd.Stderr = strings.NewReader(v.stdin), file, file
	if err := r.cmd.Start(); err != nil {
		t.Fatalf("start pgthaw: %v", err)
	}
	go func() {
		_ = r.cmd.Wait()
		close(r.ended)
	}()
	t.Cleanup(func() {
		r.signal(syscall.SIGTERM)
		if !poll(stopLimit, r.down) {
			t.Errorf("pgthaw %q does not end on SIGTERM", args)
			r.signal(syscall.SIGKILL)
		}
		if t.Failed() {
			t.Logf("pgthaw %q printed:\n%s", args, r.text())
		}
	})
	return r
}

// signal sends a signal, if there is still something to send it to.
func (r *running) signal(s syscall.Signal) {
	if !r.down() {
		_ = r.cmd.Process.Signal(s)
	}
}

// end sends a signal, waits for the end and gives the exit code.
func (r *running) end(s syscall.Signal) int {
	r.t.Helper()
	r.signal(s)
	waitFor(r.t, stopLimit, "end of pgthaw "+strings.Join(r.args, " "), r.down)
	return exitCode(r.cmd.ProcessState)
}

func (r *running) down() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

// killed reports whether a signal ended it that it did not catch: one that came before it was ready for signals.
func (r *running) killed() bool {
	return r.down() && r.cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled()
}

// text is what it has printed so far.
func (r *running) text() string {
	out, _ := os.ReadFile(r.output)
	return string(out)
}
