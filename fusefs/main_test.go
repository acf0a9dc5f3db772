package fusefs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// children are what this binary does when a test starts it by that name: a process that uses its own mount can deadlock.
// A child calls ready when it answers, and returns when ctx ends.
var children = map[string]func(ctx context.Context, args []string, ready func()) error{
	"apart":   apartChild,
	"browse":  browseChild,
	"overlay": overlayChild,
	"disk":    diskChild,
	"cuts":    cutsChild,
	"replay":  replayChild,
}

const childVariable = "PGTHAW_TEST_CHILD"

func TestMain(m *testing.M) {
	if name := os.Getenv(childVariable); name != "" {
		os.Exit(runChild(name))
	}
	os.Exit(inOwnDirectory(m))
}

// inOwnDirectory runs the tests with a temporary directory of their own, in which nobody else mounts anything.
func inOwnDirectory(m *testing.M) (code int) {
	dir, err := os.MkdirTemp("", "f") // short, for names of sockets
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o755), os.Setenv("TMPDIR", dir))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code = m.Run()
	if leaked := leakedMounts(); len(leaked) > 0 {
		fmt.Fprintf(os.Stderr, "mounts left behind: %q\n", leaked)
		return 1
	}
	_ = os.RemoveAll(dir)
	return code
}

func runChild(name string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	go func() { // the test's death is the child's end
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	if err := children[name](ctx, os.Args[1:], func() { fmt.Println("ready") }); err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 1
	}
	return 0
}

// leakedMounts lists the mounts below the temporary directory.
func leakedMounts() []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	var leaked []string
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if strings.HasPrefix(fields[4], os.TempDir()+"/") {
			leaked = append(leaked, fields[4])
		}
	}
	return leaked
}

// child is this binary, started again.
type child struct {
	cmd    *exec.Cmd
	waited chan struct{} // closed when it has ended
	err    error
	killed bool // by the test itself

	mu  sync.Mutex
	log []string // lines of standard error
}

// startChild starts a child and returns when it is ready. edit may change the command. The test fails if the child ends
// with an error.
func startChild(t testing.TB, name string, edit func(*exec.Cmd), args ...string) *child {
	t.Helper()
	c := &child{cmd: exec.Command(os.Args[0], args...), waited: make(chan struct{})}
	// A race detector sleeps a second at each exit, for races that are under way.
	c.cmd.Env = append(os.Environ(), childVariable+"="+name, "GORACE=atexit_sleep_ms=0")
	if edit != nil {
		edit(c.cmd)
	}
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := c.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	logged := make(chan struct{})
	go func() { defer close(logged); c.collect(stderr) }()
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	go func() { <-logged; c.err = c.cmd.Wait(); close(c.waited) }()
	t.Cleanup(func() {
		stdin.Close()
		if err := c.wait(); err != nil && !c.killed {
			t.Errorf("child %s: %v\n%s", name, err, strings.Join(c.lines(), "\n"))
		}
	})
	if line != "ready\n" {
		t.Fatalf("child %s did not become ready", name)
	}
	return c
}

func (c *child) collect(r io.Reader) {
	for s := bufio.NewScanner(r); s.Scan(); {
		c.mu.Lock()
		c.log = append(c.log, s.Text())
		c.mu.Unlock()
	}
}

func (c *child) lines() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.log...)
}

// kill ends the child as a crash would.
func (c *child) kill() {
	c.killed = true
	c.cmd.Process.Kill()
	<-c.waited
}

// wait returns when the child has ended; one that does not is killed.
func (c *child) wait() error {
	select {
	case <-c.waited:
		return c.err
	case <-time.After(time.Minute):
		c.cmd.Process.Kill()
		<-c.waited
		return fmt.Errorf("it had to be killed: %w", c.err)
	}
}

// eventually polls until cond holds, for at most a minute.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}
