package fusefs

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// apart calls fn on a thread of its own that shares no descriptor with this process but those of Go's runtime, and keep (-1: none).
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
	kept, err := runtimeDescriptors()
	if err != nil {
		return err
	}
	if keep >= 0 {
		kept = append(slices.Clone(kept), keep)
		slices.Sort(kept)
	}
	// First those behind all that stay: they are not even copied.
	err = unix.CloseRange(uint(kept[len(kept)-1]+1), math.MaxUint32, unix.CLOSE_RANGE_UNSHARE)
	for next, i := 0, 0; err == nil && i < len(kept); i++ {
		if kept[i] > next {
			err = unix.CloseRange(uint(next), uint(kept[i]-1), 0)
		}
		next = kept[i] + 1
	}
	if err != nil {
		return fmt.Errorf("give a thread descriptors of its own: %w", err)
	}
	return nil
}

// runtimeDescriptors are those by which Go's runtime waits for others, and is woken: any thread may have to write to one when it
// gives its processor back (handoffp in runtime/proc.go), and where that fails the process ends. They keep no file open.
var runtimeDescriptors = sync.OnceValues(func() (all []int, err error) {
	time.Sleep(time.Nanosecond) // from the first timer on they are there
	dir, err := os.ReadDir("/proc/self/fd")
	for _, d := range dir {
		target, _ := os.Readlink("/proc/self/fd/" + d.Name())
		if fd, err := strconv.Atoi(d.Name()); err == nil && (target == "anon_inode:[eventpoll]" || target == "anon_inode:[eventfd]") {
			all = append(all, fd)
		}
	}
	slices.Sort(all)
	if err == nil && len(all) == 0 {
		err = errors.New("no descriptors found by which Go's runtime waits")
	}
	return all, err
})
