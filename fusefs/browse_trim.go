package fusefs

import (
	"context"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
)

// maxNodes is how many files the kernel may make us remember. It drops names only when it is short of memory itself, and
// each costs us some 600 bytes: walking a cluster of a million relations took 700 MB.
const maxNodes = 150_000

// trimmer makes the kernel forget files, so that a mount's memory does not grow with the number of files in it.
type trimmer struct {
	root  *fs.Inode
	limit int64
	count atomic.Int64  // nodes made since the last trim
	full  chan struct{} // holds a token when a trim is due
}

func newTrimmer(root *fs.Inode, limit int64) *trimmer {
	return &trimmer{root: root, limit: limit, full: make(chan struct{}, 1)}
}

// added counts a node that was made.
func (t *trimmer) added() {
	if t.count.Add(1) < t.limit {
		return
	}
	select {
	case t.full <- struct{}{}:
	default: // one is due already
	}
}

// run trims the mount at dir when it is due, until it is gone or ctx ends. It may not be called while answering a request: the
// kernel waits for a directory's lock, which whoever is looking something up in it holds.
func (t *trimmer) run(ctx context.Context, dir string, served <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-served:
			return
		case <-t.full:
			t.count.Store(0)
			t.trim(t.root, t.root.Children(), nobodyWorksIn(dir))
		}
	}
}

// trimLeast is how many names that the kernel knows make a directory large.
const trimLeast = 1000

// trim asks the kernel to drop the names of all files below dir, in which it knows these. It keeps those in use, and asks us again for others. If whole, it
// drops large directories at once with all that is in them, which takes half of the processor time: 14 µs for each file of a walk
// instead of 27. But who works in one of these would have no name for where he is until somebody looks it up.
func (t *trimmer) trim(dir *fs.Inode, known map[string]*fs.Inode, whole bool) {
	for name, child := range known {
		if child.Mode() == syscall.S_IFDIR {
			if below := child.Children(); !whole || len(below) < trimLeast {
				t.trim(child, below, whole)
				continue
			}
		}
		dir.NotifyEntry(name) // ENOENT: it has forgotten already
	}
}

// nobodyWorksIn tells whether no process has its working or root directory in the mount at dir.
func nobodyWorksIn(dir string) bool {
	dev, _, err := devIno(dir, 0)
	return err == nil && len(workingIn(dev)) == 0
}
