package fusefs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Leaving is in which parts a tree leaves the mount while that is in use.
type Leaving int

const (
	Never       Leaving = iota
	Directories         // directories of the root: each is bound over the mount. The files in the root stay
	Whole               // all at once: the mount is taken off. For directories that nobody works in by relative paths
)

// branch is a part of the tree that leaves the mount as one: a directory of the root with all below it, or all. What
// lies in the root directory itself is a branch that never leaves, unless all does.
type branch struct {
	name string // in the root directory; "": the root

	// closed: the files may be reached without the mount, or will be in a moment. So no handle is cached, and the kernel
	// is to believe nothing of what it was told. It is written under mu.
	closed atomic.Bool

	mu       sync.Mutex
	cached   int  // handles
	whole    bool // no file has holes, and the disk knows. Never false again but for what comes from another branch
	searched bool // it was found not to be whole, and Hydrate will tell when it is
	begun    int  // renames and links that began
	ended    int
}

// cache counts one more cached handle. false: there may be none.
func (b *branch) cache() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed.Load() {
		return false
	}
	b.cached++
	return true
}

func (b *branch) uncache() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cached--
}

// close closes a branch that is whole and has no cached handle.
func (b *branch) close() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.whole && b.cached == 0 {
		b.closed.Store(true)
	}
	return b.closed.Load()
}

// reopen is for a branch that did not leave after all, and of which nothing could be changed without the mount.
func (b *branch) reopen() { b.closed.Store(false) }

// held tells whether only cached handles keep a branch from leaving.
func (b *branch) held() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.whole && b.cached > 0
}

// validity is how long the kernel may believe what it is told of the branch.
func (b *branch) validity() time.Duration {
	if b.closed.Load() {
		return 0
	}
	return validity
}

// moving is called before a name changes; the returned function after it. Who goes through the tree meanwhile may miss
// the file, under its old name and under the new one.
func (b *branch) moving(from *branch) (moved func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.begun++
	if from != b {
		b.whole = false
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.ended++
	}
}

// search calls walk, which tells how many placeholders it met, and notes when it is certain that there are none.
func (b *branch) search(walk func() (int, error)) (found int, err error) {
	b.mu.Lock()
	begun, still := b.begun, b.begun == b.ended
	b.mu.Unlock()
	found, err = walk()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.searched = true
	if err == nil && found == 0 && still && begun == b.begun {
		b.whole = true
	}
	return found, err
}

func (b *branch) isWhole() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.whole
}

// branches are those of the root's directories, by name.
type branches struct {
	mu     sync.Mutex
	byName map[string]*branch
}

func (t *branches) at(name string) *branch {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byName == nil {
		t.byName = make(map[string]*branch)
	}
	b := t.byName[name]
	if b == nil {
		b = &branch{name: name}
		t.byName[name] = b
	}
	return b
}

// branchAt is the branch of a directory in the root.
func (v *Overlay) branchAt(name string) *branch {
	if v.o.Leave == Whole {
		return v.top
	}
	return v.others.at(name)
}

// isBranch tells whether a name in a directory is that of a branch.
func (v *Overlay) isBranch(dir *node, name string) bool {
	if dir.id != fuse.FUSE_ROOT_ID || v.o.Leave != Directories {
		return false
	}
	var st unix.Stat_t
	err := unix.Fstatat(dir.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
}

// eachBranch calls fn for each branch: those that Options.First names, in its order, then what is in the root, then the others.
func (v *Overlay) eachBranch(fn func(*branch) error) error {
	all := []*branch{v.top}
	var names []string
	err := readDir(procPath(v.root), func(e fuse.DirEntry) {
		if e.Mode&unix.S_IFMT == unix.S_IFDIR && e.Name != "." && e.Name != ".." && v.o.Leave != Whole {
			names = append(names, e.Name)
		}
	})
	if err != nil {
		return err
	}
	there := set(names)
	for _, name := range append(append([]string(nil), v.o.First...), names...) {
		if there[name] {
			there[name] = false
			all = append(all, v.branchAt(name))
		}
	}
	for _, b := range all {
		if err := fn(b); err != nil {
			return err
		}
	}
	return nil
}

// eachFileOf calls fn for each regular file of a branch.
func (v *Overlay) eachFileOf(ctx context.Context, b *branch, fn func(dirfd int, name string, st *unix.Stat_t) error) error {
	if b != v.top || v.o.Leave == Whole {
		return ifThere(eachFile(ctx, procPath(v.root)+"/"+b.name, fn))
	}
	var names []string
	err := readDir(procPath(v.root), func(e fuse.DirEntry) {
		if e.Mode&unix.S_IFMT == unix.S_IFREG {
			names = append(names, e.Name)
		}
	})
	for i := 0; i < len(names) && err == nil; i++ {
		err = eachFileAt(ctx, v.root, names[i], fn)
	}
	return err
}

// errEnough ends a walk.
var errEnough = errors.New("enough is known")

// wholeBranch looks whether a branch is whole, once; later Hydrate knows.
func (v *Overlay) wholeBranch(b *branch) (bool, error) {
	b.mu.Lock()
	whole, searched := b.whole, b.searched
	b.mu.Unlock()
	if whole || searched {
		return whole, nil
	}
	_, err := b.search(func() (found int, err error) {
		err = v.eachFileOf(v.ctx, b, func(dirfd int, name string, _ *unix.Stat_t) error {
			p, err := readPlaceholder(procPath(dirfd) + "/" + name)
			if err == nil && p.limit > 0 {
				found++
				err = errEnough
			}
			if errors.Is(err, unix.ENOENT) {
				return nil
			}
			return err
		})
		if errors.Is(err, errEnough) {
			err = nil
		}
		return found, err
	})
	if err != nil {
		return false, fmt.Errorf("look for placeholders in %s: %w", b.name, err)
	}
	return b.isWhole(), nil
}
