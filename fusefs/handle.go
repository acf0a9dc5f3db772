package fusefs

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// How an open handle is served. It is the handle's number for the kernel, which gives it back with each request; those from direct on
// are direct, each with a number of its own.
const (
	cached  = 1 // READ and WRITE come to us; the kernel's page cache of our inode holds what was read
	through = 2 // passthrough: the kernel reads and writes the backing file
	direct  = 3 // READ and WRITE come to us; nothing is cached but the backing file
)

// handles is who has a regular file open. All share one backing descriptor.
//
// The kernel answers EIO to an open that mixes cached and passthrough handles on one inode, or that comes with direct I/O
// beside passthrough, so the mode is decided here, under mu, and a handle counts from then until its RELEASE. The kernel
// leaves its own mode before it sends RELEASE, so ours is never the laxer count. It looks at a handle's mode some time after our
// answer: a direct one, beside which passthrough is fine once it is open, may not be open yet until somebody uses it.
type handles struct {
	fd atomic.Int32 // the backing descriptor, O_RDWR where permissions allow; valid while users > 0

	descriptors *atomic.Int64 // of all files

	mu      sync.Mutex // held over open(2) and ioctl(2) of local files only
	users   int        // handles, and whoever else uses fd
	both    bool       // fd is open for reading and writing
	cached  int        // handles
	through int        // handles
	backing int32      // the kernel's id of fd, while through > 0
	stale   bool       // other handles may have changed what the kernel's page cache of our inode holds

	opening map[uint64]struct{} // direct handles that nobody has used
	unused  atomic.Int32        // how many
	next    uint64              // that many direct handles there were
}

// acquire returns the backing descriptor, and keeps it open until release.
func (h *handles) acquire(name string) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.users == 0 || !h.both {
		fd, both, err := openBacking(name)
		switch {
		case err == nil && (both || h.users == 0):
			h.put(fd, both)
		case err == nil:
			unix.Close(fd)
		case h.users == 0:
			return -1, err
		}
	}
	h.users++
	return int(h.fd.Load()), nil
}

// adopt is acquire for a file that was just made, with a descriptor for reading and writing: open(2) gives one whatever the new
// file's permissions, which need not let it be opened again. It is the callee's from now on.
func (h *handles) adopt(fd int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.users == 0 || !h.both {
		h.put(fd, true)
	} else {
		unix.Close(fd)
	}
	h.users++
	return int(h.fd.Load())
}

// put makes fd the backing descriptor. Those who have one already may be using it: it keeps its number. Caller holds mu.
func (h *handles) put(fd int, both bool) {
	if h.users == 0 {
		h.fd.Store(int32(fd))
		h.both = both
		h.descriptors.Add(1)
		return
	}
	h.both = unix.Dup3(fd, int(h.fd.Load()), unix.O_CLOEXEC) == nil
	unix.Close(fd)
}

// openBacking opens for reading and writing whatever the handle's own mode is, as passthrough needs it. The owner of a
// file that is not writable can only read it, and so can whoever asked: the kernel has compared the permissions.
func openBacking(name string) (fd int, both bool, err error) {
	for _, mode := range []int{unix.O_RDWR, unix.O_RDONLY, unix.O_WRONLY} {
		if fd, err = unix.Open(name, mode|unix.O_CLOEXEC, 0); !errors.Is(err, unix.EACCES) {
			both = mode == unix.O_RDWR
			break
		}
	}
	if err != nil {
		return -1, false, fmt.Errorf("open the backing file: %w", err)
	}
	return fd, both, nil
}

func (h *handles) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.users--; h.users == 0 {
		h.closeBacking()
	}
}

// closeBacking closes the backing descriptor. Caller holds mu.
func (h *handles) closeBacking() {
	unix.Close(int(h.fd.Load()))
	h.descriptors.Add(-1)
}

// add decides how a new handle of an acquired file is served. register gives the kernel the backing descriptor and
// returns its id; nil: it cannot have one more. b is the branch that the file lies in.
//
// A file that could be passthrough but for other handles is opened for direct I/O: else sessions that come and go would
// hand the cached mode on to each other for ever, and the branch would never leave.
func (h *handles) add(register func(fd int) (int32, bool), b *branch) fuse.OpenOut {
	h.mu.Lock()
	defer h.mu.Unlock()
	busy := h.cached > 0 || len(h.opening) > 0
	switch {
	case h.through > 0 || register != nil && !busy && h.passOn(register):
		h.through++
		h.stale = true
		return fuse.OpenOut{Fh: through, OpenFlags: fuse.FOPEN_PASSTHROUGH, BackingID: h.backing}
	case register != nil && busy || !b.cache():
		h.stale = true
		return fuse.OpenOut{Fh: h.addDirect(), OpenFlags: fuse.FOPEN_DIRECT_IO}
	}
	h.cached++
	out := fuse.OpenOut{Fh: cached, OpenFlags: fuse.FOPEN_KEEP_CACHE}
	if h.stale {
		h.stale, out.OpenFlags = false, 0
	}
	return out
}

// addDirect gives a new direct handle its number. Caller holds mu.
func (h *handles) addDirect() uint64 {
	fh := direct + h.next
	h.next++
	if h.opening == nil {
		h.opening = map[uint64]struct{}{}
	}
	h.opening[fh] = struct{}{}
	h.unused.Store(int32(len(h.opening)))
	return fh
}

// use is called with the handle that a request came by: the kernel has opened it.
func (h *handles) use(fh uint64) {
	if fh >= direct && h.unused.Load() > 0 {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.opened(fh)
	}
}

// opened takes a direct handle from those that may not be open yet. Caller holds mu.
func (h *handles) opened(fh uint64) {
	delete(h.opening, fh)
	h.unused.Store(int32(len(h.opening)))
}

// passOn makes the backing descriptor known to the kernel. Caller holds mu.
func (h *handles) passOn(register func(fd int) (int32, bool)) bool {
	id, ok := register(int(h.fd.Load()))
	h.backing = id
	return ok
}

// remove takes a handle away. unregister undoes register.
func (h *handles) remove(fh uint64, unregister func(id int32), b *branch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch fh {
	case cached:
		h.cached--
		b.uncache()
	case through:
		if h.through--; h.through == 0 {
			unregister(h.backing)
		}
	default:
		h.opened(fh)
	}
}

// isCached tells whether a handle is served by way of the kernel's page cache of our inode.
func (h *handles) isCached() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cached > 0
}

// isOpen tells whether there is a backing descriptor.
func (h *handles) isOpen() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.users > 0
}

// close ends the file when nobody can ask for it any more.
func (f *file) close() {
	f.open.mu.Lock()
	defer f.open.mu.Unlock()
	if f.open.users > 0 {
		f.open.closeBacking()
		f.open.users = 0
	}
}

// descriptor is the backing descriptor, for whoever holds it open by a handle.
func (h *handles) descriptor() int { return int(h.fd.Load()) }
