package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

// readyFD is where a daemon finds the pipe on which it says once that it answers, or why it does not.
const readyFD = 3

func readyFlag() cli.Flag {
	return &cli.IntFlag{Name: "ready-fd", Hidden: true}
}

// announcement is what comes through the pipe. An empty Error means that the daemon answers.
type announcement struct {
	Error string `json:"error,omitempty"`
	Code  int    `json:"code,omitempty"`
	Hint  string `json:"hint,omitempty"`
}

// spawn starts this binary again as a daemon, in a session of its own and in the root directory, and returns once it
// answers. What it logs goes to the file log; nil is nowhere. If ctx ends before the daemon answers, the daemon is ended too.
func spawn(ctx context.Context, log *os.File, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	defer r.Close()
	cmd := exec.Command(self, append(args, "--ready-fd", strconv.Itoa(readyFD))...)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if log != nil {
		cmd.Stdout, cmd.Stderr = log, log
	}
	err = startLax(cmd)
	w.Close()
	if err != nil {
		return fmt.Errorf("start daemon: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	return await(ctx, cmd, r)
}

// startLax starts a program whose timers may be late by a millisecond: prctl(2), PR_SET_TIMERSLACK.
//
// As long as threads go into system calls and out of them, as those do that answer the kernel's requests, Go's runtime looks every 20 µs
// after them (sysmon): that was a quarter of the processor time of an overlay's daemon under pgbench, and it took the
// processor away from the server each time.
func startLax(cmd *exec.Cmd) error {
	runtime.LockOSThread() // a thread's children inherit its slack
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(time.Millisecond), 0, 0, 0); err == nil {
		defer unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) // as it was
	}
	return cmd.Start()
}

// waiting is how many threads more than there are processors may be in Go's hands in a daemon. One that waits in the kernel for the next
// request keeps its place until the runtime looks after it, which with lax timers is late: with a place for each processor alone these
// stood still for a quarter of the time while eight sessions waited for pages, of which 1430 a second came, and 1950 with six places more.
const waiting = 6

// await reads the daemon's announcement. One that ended is waited for; one that answers runs on.
func await(ctx context.Context, cmd *exec.Cmd, r io.Reader) error {
	var a announcement
	err := json.NewDecoder(r).Decode(&a)
	switch {
	case err == nil && a.Error == "" && ctx.Err() == nil:
		return cmd.Process.Release()
	case err == nil && a.Error != "":
		_ = cmd.Wait() // it has said why
		return &failure{err: errors.New(a.Error), code: a.Code, hint: a.Hint}
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("daemon ended before its mount answered: %w", err)
}

// announced runs a daemon's body. The body calls ready once it answers; if it fails before, whoever spawned it is told.
func announced(c *cli.Context, body func(ready func() error) error) error {
	if !c.IsSet("ready-fd") {
		return body(func() error { return nil })
	}
	runtime.GOMAXPROCS(runtime.NumCPU() + waiting)
	syscall.CloseOnExec(c.Int("ready-fd")) // fusermount3 must not hold the pipe open
	pipe := os.NewFile(uintptr(c.Int("ready-fd")), "ready")
	told := false
	tell := func(a announcement) error {
		told = true
		return errors.Join(json.NewEncoder(pipe).Encode(a), pipe.Close())
	}
	err := body(func() error { return tell(announcement{}) })
	if !told && err == nil {
		err = errors.New("ended before the mount answered")
	}
	if !told {
		return errors.Join(err, tell(announcement{err.Error(), exitCode(err), hintFor(err)}))
	}
	return err
}

// spawnOverlay starts the daemon of a thawed directory. Its log is opened now, for the mount will cover the path.
func spawnOverlay(c *cli.Context) func(ctx context.Context, dir string) error {
	return func(ctx context.Context, dir string) error {
		log, err := os.OpenFile(filepath.Join(dir, ".pgthaw", "daemon.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("open the daemon's log: %w", err)
		}
		defer log.Close()
		args, err := daemonArgs(c)
		if err != nil {
			return err
		}
		args = append(args, "overlay", "serve")
		if limit := c.String(readTimeout); limit != "" {
			args = append(args, "--"+readTimeout, limit)
		}
		return spawn(ctx, log, append(args, dir)...)
	}
}

// daemonArgs hands the level of logging and the key files on to a daemon.
func daemonArgs(c *cli.Context) ([]string, error) {
	args, err := keyArgs(c)
	if c.Bool("trace") {
		args = append(args, "--trace")
	}
	return append(args, "--verbose"), err
}
