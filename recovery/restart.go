package recovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/fusefs"
)

const (
	// fastStop is how long a fast shutdown may take before Restart says so. pg_ctl's own limit is as long.
	fastStop = time.Minute
	// takeOffLimit is how long the server stays down for a mount that somebody else keeps busy.
	takeOffLimit = 10 * time.Second
	// startLimit is how long the server may take to accept connections again, after a clean shutdown.
	startLimit = time.Minute
)

// Restart is Finish for a directory that PostgreSQL runs in: when all is hydrated it stops the server, has the mount taken
// off and starts the server as it was started. downtime is the time from the stop to the first connection; 0 if no server ran.
// Once the server is stopped, the end of ctx no longer keeps it from being started.
func Restart(ctx context.Context, dir string, progress func(Progress)) (downtime time.Duration, err error) {
	if dir, err = canonical(dir); err != nil {
		return 0, err
	}
	r, err := findServer(dir)
	if err != nil {
		return 0, err
	}
	if r != nil { // what will be refused need not be waited for
		r.old.close()
	}
	err = Finish(ctx, dir, progress)
	if !errors.Is(err, ErrServerRunning) {
		return 0, err
	}
	if r, err = findServer(dir); err != nil {
		return 0, err
	}
	if r == nil { // it has ended meanwhile
		return 0, Finish(ctx, dir, progress)
	}
	defer r.old.close()
	r.checkpoint(ctx)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if err := r.checkOthers(); err != nil {
		return 0, err
	}
	return r.restart(ctx)
}

// checkOthers refuses to stop a server in vain.
func (r *restarting) checkOthers() error {
	users, err := fusefs.Users(r.dir)
	if err != nil {
		return err
	}
	for _, u := range users {
		parent := parentOf(u.PID)
		switch {
		case u.PID == r.old.pid, u.PID == os.Getpid(), parent == r.old.pid:
		case syscall.Kill(u.PID, 0) == syscall.ESRCH: // it has ended
		default:
			return withHint(fmt.Errorf("%s is hydrated, but its mount cannot be taken off: %w: %s works in it or has a file open", r.dir, syscall.EBUSY, u),
				"The server was not stopped. Try again when that process has ended or left.")
		}
	}
	return nil
}

// restarting is one restart of the server in a data directory.
type restarting struct {
	dir   string
	old   *process
	owner owner
	plan  *startPlan // where the server answers
}

// findServer looks at the server that runs in dir; nil: none does.
func findServer(dir string) (*restarting, error) {
	text, err := os.ReadFile(filepath.Join(dir, "postmaster.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pid := livingPID(text)
	if pid == 0 {
		return nil, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	r := &restarting{dir: dir, owner: lookupOwner(int(st.Uid), int(st.Gid))}
	if r.old, err = lookAt(pid, r.owner, st.Dev); err != nil {
		return nil, fmt.Errorf("restart the server in %s: %w", dir, err)
	}
	if who, hint := r.old.manager(); who != "" {
		r.old.close()
		return nil, withHint(fmt.Errorf("%s: %w (PID %d), under the care of %s", dir, ErrServerRunning, pid, who), hint)
	}
	r.plan = &startPlan{owner: r.owner, postgres: r.old.program}
	// pidfile.h: the fourth line is the port, the fifth a directory for sockets.
	if lines := strings.Split(string(text), "\n"); len(lines) > 4 {
		r.plan.port, _ = strconv.Atoi(strings.TrimSpace(lines[3]))
		r.plan.sockets = []string{strings.TrimSpace(lines[4])}
	}
	return r, nil
}

// checkpoint keeps the shutdown's own short. Where nobody can log in the shutdown takes longer.
func (r *restarting) checkpoint(ctx context.Context) {
	if len(r.plan.sockets) == 0 || r.plan.sockets[0] == "" {
		return
	}
	s := server{plan: r.plan, dir: r.dir, pid: r.old.pid}
	conn, err := s.logIn(ctx)
	if err != nil {
		return
	}
	_, _ = conn.Exec(ctx, "checkpoint")
	_ = conn.Close(ctx)
}

// restart stops the server, waits for the mount to go, and starts the server in any case.
func (r *restarting) restart(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	if err := r.stop(ctx); err != nil {
		return 0, withHint(err, r.howToStart())
	}
	mountErr := r.awaitMount()
	pid, err := r.old.startAgain(r.dir, r.owner)
	if err != nil {
		return 0, withHint(fmt.Errorf("%w: %w", ErrServer, errors.Join(err, mountErr)), r.howToStart())
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startLimit)
	defer cancel()
	if err := r.awaitConnections(ctx, pid); err != nil {
		return 0, withHint(errors.Join(err, mountErr), r.howToStart())
	}
	return time.Since(began), mountErr
}

// stop is pg_ctl stop -m fast.
func (r *restarting) stop(ctx context.Context) error {
	fd := int(r.old.fd.Fd())
	if err := unix.PidfdSendSignal(fd, unix.SIGINT, nil, 0); err != nil {
		return fmt.Errorf("stop the server (PID %d): %w", r.old.pid, err)
	}
	for deadline := time.Now().Add(fastStop); !awaitExit(fd, 50); {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("the server (PID %d) is shutting down: %w", r.old.pid, err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the server (PID %d) was told to stop and has not ended within %s", r.old.pid, fastStop)
		}
	}
	return nil
}

func (r *restarting) howToStart() string {
	return fmt.Sprintf("Start it again as user %s: pg_ctl start -D %s. It ran as: %s", r.owner.name, r.dir, strings.Join(r.old.args, " "))
}

// awaitMount returns when the overlay's daemon has ended, which it does when all is off.
func (r *restarting) awaitMount() error {
	for deadline := time.Now().Add(takeOffLimit); served(r.dir); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return withHint(fmt.Errorf("%s is still mounted: %w; the server was started again", r.dir, syscall.EBUSY),
				"Something has a file open there or its working directory; `pgthaw overlay status` says more. Try again when it has ended.")
		}
	}
	return nil
}

// served tells whether the overlay at dir has a daemon.
func served(dir string) bool {
	conn, err := net.DialUnix("unix", nil, controlAddress(dir))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// awaitConnections waits until the server that was started accepts connections.
func (r *restarting) awaitConnections(ctx context.Context, pid int) error {
	s := server{plan: r.plan, dir: r.dir, pid: pid, log: r.old.output[1].path}
	for pause := newPause(); !s.accepts(); {
		if !s.running() {
			return s.failed()
		}
		if err := pause.sleep(ctx); err != nil {
			return fmt.Errorf("the server (PID %d) was started and does not accept connections yet: %w", pid, err)
		}
	}
	return nil
}
