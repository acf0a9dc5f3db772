package fusefs

import (
	"errors"
	"path/filepath"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Each inode that the kernel knows takes a descriptor, and one more while it is open. The kernel forgets names when it
// wants memory, not when we want descriptors; so where there are not enough for all files of a cluster, it is asked to.

const (
	// otherFiles is how many descriptors are left to all else: requests under way, the repository, the control socket.
	otherFiles = 256
	// manyFiles is how many are wanted at most. Root can have them.
	manyFiles = 1 << 20
	// leastFiles is what a process must have: a server that starts has some dozens of files open, in many directories.
	leastFiles = 1024
)

// ErrFewFiles: the process may have too few files open.
var ErrFewFiles = errors.New("the limit on open files is too low")

// FileLimit is how many files this process, or one like it, can have open. Go has raised the soft limit to the hard one already.
func FileLimit() int {
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		return leastFiles
	}
	return int(min(now.Max, manyFiles))
}

// CheckFileLimit refuses a limit with which a server could not run on the given number of mounts.
func CheckFileLimit(mounts int) error {
	if FileLimit() >= leastFiles+(mounts-1)*otherFiles || raisesFileLimit() {
		return nil
	}
	return ErrFewFiles
}

// KnownFiles is how many files the kernel can know of all mounts before it is asked to forget some.
func KnownFiles() int {
	if raisesFileLimit() {
		return known(manyFiles)
	}
	return known(FileLimit())
}

func known(limit int) int { return (limit - otherFiles) / 2 }

// raisesFileLimit tells whether the daemon will raise the limit.
func raisesFileLimit() bool { return hasCapability(unix.CAP_SYS_RESOURCE) }

func hasCapability(number uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	err := unix.Capget(&header, &sets[0])
	return err == nil && sets[number/32].Effective>>(number%32)&1 != 0
}

// raiseFileLimit allows as many descriptors as may be.
func raiseFileLimit() {
	if limit := (unix.Rlimit{Cur: manyFiles, Max: manyFiles}); FileLimit() < manyFiles {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) // not allowed: then the limit is what it is
	}
}

// crowding is what a number of descriptors asks for.
type crowding int

const (
	roomy   crowding = iota
	crowded          // some nodes should go
	tight            // and who looks for more leaves some time for that
	full             // there is no descriptor for more
)

func (t *nodes) crowding() crowding {
	n := t.used()
	switch {
	case n >= 2*t.limit:
		return full
	case n > t.limit*3/2:
		return tight
	case n > t.limit:
		return crowded
	}
	return roomy
}

// makeWay sees to it that there will be a descriptor for one more inode that the kernel gets to know. ENFILE: there is
// none, for most are open.
//
// It waits only so long for shed: the kernel holds a directory's lock while it asks for a name, and shed may want that lock.
func (v *Overlay) makeWay() error {
	c := v.nodes.crowding()
	if c == roomy {
		return nil
	}
	v.wantShed()
	if c == crowded || c == full && len(v.nodes.closedFiles()) < v.nodes.limit/8 {
		return c.err()
	}
	for range shedPatience / time.Millisecond {
		time.Sleep(time.Millisecond)
		if c = v.nodes.crowding(); c < full {
			break
		}
		v.wantShed()
	}
	if v.nodes.used() < 2*v.nodes.limit+otherFiles/2 {
		return nil // files are closed, only time was short
	}
	return c.err()
}

func (v *Overlay) wantShed() {
	select {
	case v.crowded <- struct{}{}:
	default: // it is known
	}
}

// shedPatience is ample.
const shedPatience = 500 * time.Millisecond

func (c crowding) err() error {
	if c == full {
		return unix.ENFILE
	}
	return nil
}

// shedWhenCrowded has the kernel forget files whenever it knows too many, until the mount is gone.
func (v *Overlay) shedWhenCrowded() {
	for {
		select {
		case <-v.ctx.Done():
			return
		case <-v.crowded:
		}
		if done, err := v.use(); err == nil {
			v.shed()
			done()
		}
	}
}

// shed has the kernel forget files that are not open, until less than half of all descriptors is in use. Where it can it
// has it forget a directory: with that go all names below that nobody uses, and no lock is wanted that those hold who look
// for names in it. The name of a directory in the root stays, for something may be mounted there.
func (v *Overlay) shed() {
	want := v.nodes.used() - v.nodes.limit*3/4
	known := v.closedByDirectory()
	for dir, names := range known {
		up, name := filepath.Split(dir)
		if want <= 0 || up == "" {
			continue
		}
		if s := v.server.EntryNotify(v.idOf(strings.TrimSuffix(up, "/")), name); s.Ok() {
			want -= len(names)
			delete(known, dir)
		}
	}
	for dir, names := range known {
		id := v.idOf(dir)
		for i := 0; i < len(names) && want > 0; i++ {
			v.server.EntryNotify(id, names[i])
			want--
		}
	}
}

// closedByDirectory returns the names of files that the kernel knows and nobody has open, by the paths of their directories.
func (v *Overlay) closedByDirectory() map[string][]string {
	all := make(map[string][]string)
	for _, n := range v.nodes.closedFiles() {
		if path, ok := v.beneath(n); ok {
			dir, name := filepath.Split(path)
			dir = strings.TrimSuffix(dir, "/")
			all[dir] = append(all[dir], name)
		}
	}
	return all
}

// beneath is where a node's file lies in the bare directory; of a hard link, by one of its names. If it was removed or
// replaced meanwhile it is something else that the kernel forgets, which does no harm.
func (v *Overlay) beneath(n *node) (path string, ok bool) {
	top, err := readlink(v.root)
	if err != nil {
		return "", false
	}
	path, err = readlink(n.fd)
	if err != nil {
		return "", false
	}
	return strings.CutPrefix(path, top+"/")
}

func readlink(fd int) (string, error) {
	var b [unix.PathMax]byte
	n, err := unix.Readlink(procPath(fd), b[:])
	return string(b[:max(n, 0)]), err
}

// idOf is the id of a directory by its path, 0 if the kernel does not know it.
func (v *Overlay) idOf(dir string) uint64 {
	if dir == "" {
		return fuse.FUSE_ROOT_ID
	}
	var st unix.Stat_t
	if err := unix.Fstatat(v.root, dir, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0
	}
	if n := v.nodes.find(&st); n != nil {
		return n.id
	}
	return 0
}

// used is how many descriptors nodes and open files have.
func (t *nodes) used() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.byID) + int(t.backing.Load())
}

// closedFiles returns the live nodes of regular files that are not open, in no order.
func (t *nodes) closedFiles() (all []*node) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, n := range t.byID {
		if n.file != nil && !n.file.open.isOpen() {
			all = append(all, n)
		}
	}
	return all
}
