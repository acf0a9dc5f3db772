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

// run trims when it is due, until the mount is gone or ctx ends. It may not be called while answering a request: the kernel waits for
// a directory's lock, which whoever is looking something up in it holds.
func (t *trimmer) run(ctx context.Context, served <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-served:
			return
		case <-t.full:
			t.count.Store(0)
			t.trim(t.root)
		}
	}
}

// trim asks the kernel to drop the names of all files below dir. It keeps those in use, and asks us again for others.
func (t *trimmer) trim(dir *fs.Inode) {
	for name, child := range dir.Children() {
		if child.Mode() == syscall.S_IFDIR {
			t.trim(child)
		} else {
			dir.NotifyEntry(name) // ENOENT: it has forgotten already
		}
	}
}
