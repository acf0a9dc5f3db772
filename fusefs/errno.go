package fusefs

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"

	"pgthaw/repo"
)

// errno is the table from error to error number. What it does not know, a damaged repository and an unreachable store
// among it, is EIO. An error of the operating system keeps its number.
//
// It is meant for names. An error in *reading content* is EIO whatever it wraps, for a pack that the store does not
// have must not look like a file that is not there: use faults.eio, or a *lowerError.
func errno(err error) syscall.Errno {
	var number syscall.Errno
	var lower *lowerError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &lower), errors.Is(err, repo.ErrCorrupt):
		return syscall.EIO
	case errors.As(err, &number):
		return number
	case errors.Is(err, fs.ErrNotExist),
		errors.Is(err, repo.ErrNoCluster), errors.Is(err, repo.ErrNoBackup), errors.Is(err, repo.ErrNoWAL):
		return syscall.ENOENT
	case errors.Is(err, fs.ErrExist):
		return syscall.EEXIST
	case errors.Is(err, fs.ErrPermission):
		return syscall.EACCES
	case errors.Is(err, fs.ErrInvalid):
		return syscall.EINVAL
	case errors.Is(err, context.Canceled):
		return syscall.EINTR
	}
	return syscall.EIO
}

// faults answers errors and logs those that a reader of the log must know of: each operation on each inode once, for
// PostgreSQL asks again and again.
type faults struct {
	log *slog.Logger

	mu     sync.Mutex
	logged map[fault]struct{}
}

type fault struct {
	op  string
	ino uint64
}

// maxFaults bounds the memory of what was logged; past it the log may repeat itself.
const maxFaults = 10_000

func newFaults(log *slog.Logger) *faults {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &faults{log: log, logged: make(map[fault]struct{})}
}

// status answers err by the table, and logs it if that makes it EIO.
func (f *faults) status(op string, ino uint64, err error) fuse.Status {
	number := errno(err)
	if number == syscall.EIO {
		return f.eio(op, ino, err)
	}
	return fuse.Status(number)
}

// eio answers EIO whatever err is, and logs it.
func (f *faults) eio(op string, ino uint64, err error) fuse.Status {
	if f.first(fault{op, ino}) {
		f.log.Error("input/output error", "op", op, "ino", ino, "err", err)
	}
	return fuse.EIO
}

func (f *faults) first(x fault) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.logged[x]; ok {
		return false
	}
	if len(f.logged) >= maxFaults {
		clear(f.logged)
	}
	f.logged[x] = struct{}{}
	return true
}
