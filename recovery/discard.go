package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Discard throws a thawed directory away: what is in it and its tablespaces, and the directories that Thaw made; also when
// it has become whole by itself. It refuses what Finish made an ordinary directory, and one that PostgreSQL runs in.
func Discard(ctx context.Context, dir string) error {
	dir, err := canonical(dir)
	if err != nil {
		return err
	}
	if err := stopDaemon(ctx, dir); err != nil {
		return err
	}
	r, _, err := takeUp(dir)
	if errors.Is(err, ErrNoOverlay) {
		r, err = markedRecord(dir)
	}
	if errors.Is(err, ErrNoOverlay) {
		return withHint(err, "A directory that was finished is no overlay any more: remove it like any other.")
	}
	if err != nil {
		return err
	}
	if pid := postmasterPID(filepath.Join(dir, "postmaster.pid")); pid != 0 {
		return fmt.Errorf("discard %s: %w (PID %d)", dir, ErrServerRunning, pid)
	}
	return r.discard()
}

func markedRecord(dir string) (record, error) {
	bare, err := openBare(dir)
	if err != nil {
		return record{}, err
	}
	defer bare.Close()
	return bare.marked(dir)
}

// stopDaemon has the daemon, if there is one, unmount and end.
func stopDaemon(ctx context.Context, dir string) error {
	s, err := ask(ctx, dir, commandStatus)
	if errors.Is(err, ErrNoDaemon) {
		return nil
	}
	if err == nil && s.ServerPID != 0 {
		return withHint(fmt.Errorf("discard %s: %w (PID %d)", dir, ErrServerRunning, s.ServerPID), "Stop it first.")
	}
	if err == nil {
		_, err = ask(ctx, dir, commandStop)
	}
	if errors.Is(err, syscall.EBUSY) {
		return withHint(fmt.Errorf("discard %s: it is in use: %w", dir, err),
			"Something has a file open there or its working directory; see fuser -vm.")
	}
	if err != nil && !errors.Is(err, ErrNoDaemon) { // which it may be by now: all was whole
		return err
	}
	return awaitEnd(ctx, dir)
}

// awaitEnd waits until the daemon has let go of the overlay.
func awaitEnd(ctx context.Context, dir string) error {
	for pause := newPause(); ; {
		bare, err := openBare(dir)
		if err != nil {
			return err
		}
		lock, err := bare.lock()
		if err == nil {
			err = lock.Close()
		}
		bare.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err
		}
		if err := pause.sleep(ctx); err != nil {
			return err
		}
	}
}

// discard deletes the roots. The record lies in a directory that the server's user can write to, so it may name anything:
// what it names must belong to the same user, and root deletes it with no more rights than that user's.
func (r record) discard() error {
	o, err := ownerOf(r.Target)
	if err != nil {
		return err
	}
	for _, x := range r.Roots {
		switch other, err := ownerOf(x.Dir); {
		case errors.Is(err, fs.ErrNotExist): // what was interrupted is done again
		case err != nil:
			return fmt.Errorf("discard %s: %w", r.Target, err)
		case other.uid != o.uid:
			return withHint(fmt.Errorf("discard %s: %w: %s, which its record names, is not its owner's", r.Target, ErrTargetDir, x.Dir),
				"Somebody may have changed the record. Nothing was deleted; remove by hand what is to go.")
		}
	}
	if err := removeIfThere(startupLog(r.Target)); err != nil {
		return err
	}
	if err := removeRoots(r.Roots, o); err != nil {
		return fmt.Errorf("discard %s: %w", r.Target, err)
	}
	return nil
}

func ownerOf(dir string) (owner, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return owner{}, fmt.Errorf("look at %s: %w", dir, err)
	}
	return lookupOwner(int(st.Uid), int(st.Gid)), nil
}

// removeRoots takes back what was put into the roots of o, and removes those that were made. The data directory goes last,
// and of it the record, so that what was interrupted can be done again.
func removeRoots(roots []root, o owner) error {
	for _, r := range slices.Backward(roots) {
		if err := removeRoot(r, o); err != nil {
			return err
		}
	}
	return nil
}

func removeRoot(r root, o owner) error {
	dir, err := os.OpenRoot(r.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	bare := bareDir{dir}
	if err := bare.empty(o); err != nil {
		return err
	}
	if err := errors.Join(bare.clean(), bare.unmark()); err != nil || !r.Made {
		return err
	}
	return unix.Rmdir(r.Dir)
}

// empty deletes what is in the directory, but for what is ours, with the rights of o. It follows no link.
func (b bareDir) empty(o owner) error {
	entries, err := fs.ReadDir(b.FS(), ".")
	if err != nil {
		return fmt.Errorf("list %s: %w", b.Name(), err)
	}
	return asUser(o, func() error {
		var errs []error
		for _, e := range entries {
			if e.Name() != privateDir {
				errs = append(errs, b.RemoveAll(e.Name()))
			}
		}
		return errors.Join(errs...)
	})
}

// AsUser has root call fn with no more rights than that user's.
func AsUser(uid, gid int, fn func() error) error { return asUser(lookupOwner(uid, gid), fn) }

// asUser has root call fn with no more rights than the user's; anybody else calls it as it is. In Linux rights belong to
// threads: fn gets one of its own, which ends with it.
func asUser(o owner, fn func() error) error {
	if os.Geteuid() != 0 || o.uid == 0 {
		return fn()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := becomeUser(o)
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}

// becomeUser changes this thread alone, unlike syscall.Setuid, and for good.
func becomeUser(o owner) error {
	var groups []uint32
	for _, g := range o.groups() {
		groups = append(groups, uint32(g))
	}
	n, list := uintptr(len(groups)), unsafe.Pointer(&groups[0])
	_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, n, uintptr(list), 0)
	if errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_SETRESGID, uintptr(o.gid), uintptr(o.gid), uintptr(o.gid))
	}
	if errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_SETRESUID, uintptr(o.uid), uintptr(o.uid), uintptr(o.uid))
	}
	if errno != 0 {
		return fmt.Errorf("become user %d: %w", o.uid, errno)
	}
	return nil
}
