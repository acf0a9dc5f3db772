package fusefs

import (
	"fmt"
	"math"
	"runtime"

	"golang.org/x/sys/unix"
)

// apart calls fn on a thread of its own that shares no descriptor with this process and has none but keep (-1: none at all).
// All that walks through a mount of this process's own goes by way of it.
//
// Such a thread waits for an answer of this process. If that is killed meanwhile, the kernel lets the thread wait on, for the
// request has been read; and as long as it lives all that it shares stays open, /dev/fuse among it. So the kernel would not
// learn that nobody answers any more, and neither this thread nor anybody else in the mount would ever come back.
func apart(keep int, fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // the first thread's descriptors are those that /proc/self shows: it must be another
			err := apart(keep, fn)
			runtime.UnlockOSThread()
			done <- err
			return
		}
		err := shareNothing(keep)
		if err == nil {
			err = fn()
		}
		done <- err // and the thread, which is still locked, ends with the goroutine
	}()
	return <-done
}

func shareNothing(keep int) error {
	var err error
	if keep > 0 {
		err = unix.CloseRange(0, uint(keep-1), unix.CLOSE_RANGE_UNSHARE)
	} else {
		err = unix.Unshare(unix.CLONE_FILES)
	}
	if err == nil {
		err = unix.CloseRange(uint(keep+1), math.MaxUint32, 0)
	}
	if err != nil {
		return fmt.Errorf("give a thread descriptors of its own: %w", err)
	}
	return nil
}
