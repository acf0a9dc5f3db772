package fusefs

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// node is an inode of the bare directory that the kernel knows, or that the hydrator has in hand.
type node struct {
	id   uint64 // the kernel's name for it; never used twice
	key  inodeKey
	fd   int   // O_PATH: it pins the inode, so key stays its own for as long as the node lives
	file *file // of regular files

	branch *branch // that it lies in

	refs uint64 // guarded by nodes.mu: the kernel's lookups, open handles, the hydrator
}

// inodeKey is how the backing file system names an inode. Hard links share it.
type inodeKey struct{ dev, ino uint64 }

func keyOf(st *unix.Stat_t) inodeKey { return inodeKey{st.Dev, st.Ino} }

// nodes holds the live nodes of an overlay. The root is never dropped.
type nodes struct {
	mu    sync.RWMutex
	byID  map[uint64]*node
	byKey map[inodeKey]*node
	last  uint64 // the newest id
	limit int    // half of how many descriptors there are for them; what the hydrator has in hand may go beyond it

	backing atomic.Int64 // descriptors of open files
}

func newNodes(rootfd int, st *unix.Stat_t, top *branch) *nodes {
	root := &node{id: fuse.FUSE_ROOT_ID, key: keyOf(st), fd: rootfd, branch: top, refs: 1}
	return &nodes{
		byID:  map[uint64]*node{root.id: root},
		byKey: map[inodeKey]*node{root.key: root},
		last:  root.id,
	}
}

// get returns a live node, nil if there is none of that id.
func (t *nodes) get(id uint64) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byID[id]
}

// adopt returns the node of an inode and counts a reference. It takes fd, an O_PATH descriptor of the inode.
func (t *nodes) adopt(fd int, st *unix.Stat_t, b *branch, newFile func(*node) *file) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := t.byKey[keyOf(st)]; n != nil {
		unix.Close(fd)
		n.refs++
		return n
	}
	t.last++
	n := &node{id: t.last, key: keyOf(st), fd: fd, branch: b, refs: 1}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		n.file = newFile(n)
	}
	t.byID[n.id], t.byKey[n.key] = n, n
	return n
}

// ref counts one more reference to a live node.
func (t *nodes) ref(n *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.refs++
}

// drop takes references away. A node without any is gone.
func (t *nodes) drop(n *node, refs uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n.refs -= min(refs, n.refs); n.refs > 0 || n.id == fuse.FUSE_ROOT_ID {
		return
	}
	delete(t.byID, n.id)
	delete(t.byKey, n.key)
	unix.Close(n.fd)
}

// in returns the live nodes of a branch.
func (t *nodes) in(b *branch) []*node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var found []*node
	for _, n := range t.byID {
		if n.branch == b {
			found = append(found, n)
		}
	}
	return found
}

// find returns the live node of an inode, nil if there is none.
func (t *nodes) find(st *unix.Stat_t) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byKey[keyOf(st)]
}

// closeAll ends all nodes, when nobody can ask for them any more.
func (t *nodes) closeAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, n := range t.byID {
		if n.file != nil {
			n.file.close()
		}
		unix.Close(n.fd)
	}
	clear(t.byID)
	clear(t.byKey)
}

func (n *node) stat() (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(n.fd, &st); err != nil {
		return st, fmt.Errorf("stat: %w", err)
	}
	return st, nil
}

// path names the inode for system calls that take no O_PATH descriptor.
func (n *node) path() string { return procPath(n.fd) }
