package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"pgthaw/fusefs"
)

// Status tells how a thawed directory does, from its daemon or from what it left.
func Status(ctx context.Context, dir string) (OverlayStatus, error) {
	dir, err := canonical(dir)
	if err != nil {
		return OverlayStatus{}, err
	}
	s, err := ask(ctx, dir, commandStatus)
	if !errors.Is(err, ErrNoDaemon) {
		return s, err
	}
	ours, _, err := fusefs.IsMount(dir)
	if err != nil {
		return OverlayStatus{}, err
	}
	if ours {
		return OverlayStatus{State: stateLost, Target: dir, LastError: "the mount is dead: its daemon has ended"}, nil
	}
	return unmountedStatus(ctx, dir)
}

// unmountedStatus looks at a directory at which nothing is mounted.
func unmountedStatus(ctx context.Context, dir string) (OverlayStatus, error) {
	bare, err := openBare(dir)
	if err != nil {
		return OverlayStatus{}, err
	}
	defer bare.Close()
	s := OverlayStatus{State: stateHydrated, Target: dir, ServerPID: bare.postmaster()}
	roots := []root{{Path: "pgdata", Dir: dir}}
	r, err := bare.record()
	switch {
	case errors.Is(err, ErrNoOverlay) && bare.whole():
	case err != nil:
		return OverlayStatus{}, err
	default:
		s.Cluster, s.Backup, roots = r.Cluster, r.Backup, r.Roots
		if !bare.whole() {
			s.State, s.LastError = stateLost, "the mount is off before the directory is whole"
		}
	}
	for _, r := range roots {
		if err := s.measure(ctx, r.Dir); err != nil {
			return s, err
		}
	}
	return s, nil
}

// measure adds up a bare directory. What a file has no blocks for is counted as a hole.
func (s *OverlayStatus) measure(ctx context.Context, dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		const blockUnit = 512 // stat(2): st_blocks
		here := info.Sys().(*syscall.Stat_t).Blocks * blockUnit
		s.FilesTotal++
		s.BytesTotal += info.Size()
		if s.State == stateLost {
			s.BytesHydrated += min(here, info.Size())
			return nil
		}
		s.FilesWhole++
		s.BytesHydrated += info.Size()
		return nil
	})
}

// Resume takes an overlay up again whose daemon has ended: after a crash, a reboot. It is fine if the daemon runs.
func Resume(ctx context.Context, dir string, spawn func(ctx context.Context, dir string) error) error {
	dir, err := canonical(dir)
	if err != nil {
		return err
	}
	if _, err := ask(ctx, dir, commandStatus); !errors.Is(err, ErrNoDaemon) {
		return err
	}
	r, whole, err := takeUp(dir)
	if err != nil {
		return err
	}
	if whole {
		return finishBare(dir)
	}
	if err := r.checkTrust(); err != nil {
		return err
	}
	return spawn(ctx, r.Target)
}

// takeUp takes off what is left of an overlay's dead mounts and reads its record. whole: the directory needs no daemon
// any more.
func takeUp(dir string) (r record, whole bool, err error) {
	if err := takeOffDead(dir); err != nil {
		return record{}, false, err
	}
	bare, err := openBare(dir)
	if err != nil {
		return record{}, false, err
	}
	defer bare.Close()
	if r, err = bare.record(); err != nil {
		return r, false, err
	}
	if r.Target != dir {
		return r, false, fmt.Errorf("%w: %s is a copy, or was moved: it was thawed as %s", ErrNoOverlay, dir, r.Target)
	}
	for _, tablespace := range r.Roots[1:] {
		if err := takeOffDead(tablespace.Dir); err != nil {
			return r, false, err
		}
	}
	return r, bare.whole(), nil
}

// finishBare removes what is ours from a whole directory whose mount is off.
func finishBare(dir string) error {
	bare, err := openBare(dir)
	if err != nil {
		return err
	}
	defer bare.Close()
	return errors.Join(bare.unmark(), bare.clean())
}

// busyPatience is how long Finish waits for those who use a mount that no server runs in.
const busyPatience = 10 * time.Second

// Finish has the rest of an overlay hydrated without a limit and its mount taken off. It returns when the directory is an
// ordinary one. While PostgreSQL runs in it that cannot be: then everything is hydrated, and it is ErrServerRunning.
func Finish(ctx context.Context, dir string, progress func(Progress)) error {
	dir, err := canonical(dir)
	if err != nil {
		return err
	}
	begun := time.Now()
	_, err = ask(ctx, dir, commandFinish)
	if errors.Is(err, ErrNoDaemon) {
		return finishUnserved(ctx, dir)
	}
	var hydrated time.Time
	for err == nil {
		asked := time.Now()
		s, err := ask(ctx, dir, commandStatus)
		if errors.Is(err, ErrNoDaemon) {
			return finishUnserved(ctx, dir)
		}
		if err != nil {
			return err
		}
		if progress != nil {
			progress(Progress{"hydrate", s.BytesHydrated, s.BytesTotal})
		}
		if s.State == stateHydrated && hydrated.IsZero() {
			hydrated = time.Now()
		}
		if s.LastErrorAt != nil && s.LastErrorAt.Before(begun) { // it may be over: the disk that was full is not any more
			s.LastError = ""
		}
		if err := finishFailed(dir, s, hydrated); err != nil {
			return err
		}
		// The daemon counts the files for each answer: of a million it should not do nothing else.
		wait(ctx, min(max(50*time.Millisecond, 9*time.Since(asked)), 5*time.Second))
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return err
}

// finishFailed tells whether waiting longer is of no use. hydrated is when the overlay was first seen to be; zero if not yet.
func finishFailed(dir string, s OverlayStatus, hydrated time.Time) error {
	switch {
	case hydrated.IsZero() && s.LastError != "":
		return fmt.Errorf("%s: %s; its daemon tries again", dir, s.LastError)
	case hydrated.IsZero():
		return nil
	case s.ServerPID != 0:
		return withHint(fmt.Errorf("%s is hydrated, but its mount cannot be taken off: %w (PID %d)", dir, ErrServerRunning, s.ServerPID),
			"Stop it; the mount goes by itself then, and the server can be started again.")
	case s.LastError != "" && time.Since(hydrated) > busyPatience:
		return withHint(fmt.Errorf("%s is hydrated, but: %s", dir, s.LastError),
			"Something has a file open there or its working directory; see fuser -vm. The mount goes as soon as it can.")
	}
	return nil
}

// finishUnserved is for a directory without a daemon: it is whole, or there is nobody to make it so.
func finishUnserved(ctx context.Context, dir string) error {
	s, err := Status(ctx, dir)
	if err != nil {
		return err
	}
	if s.State != stateHydrated {
		return lost(dir)
	}
	return finishBare(dir)
}

func lost(dir string) error {
	return withHint(fmt.Errorf("%s: %w", dir, ErrLost), "Take it up again with `pgthaw overlay resume "+dir+"`.")
}
