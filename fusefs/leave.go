package fusefs

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// arrival is ample for an answer that is on its way to the kernel.
const arrival = 50 * time.Millisecond

// Leave takes branches out of the mount that are whole and of which no handle is cached, as OverlayOptions.Leave says:
// paths then lead to the backing file system. It is to be called now and then: what is not ready is left for the next time.
//
// Handles that are open stay on the mount, and see what is done beside them: passthrough and direct I/O know no page
// cache but the backing file's. What the kernel remembers of names and attributes it is told to forget before, and is told
// nothing more that it may remember. That holds for good, so FUSE can be uncovered again at any time.
func (v *Overlay) Leave() error {
	if !v.leaves {
		return nil
	}
	v.mount.Lock()
	defer v.mount.Unlock()
	done, err := v.use()
	if err != nil {
		return err
	}
	defer done()
	if v.barred || v.off.Load() {
		return nil
	}
	ready, err := v.closeReady()
	if err != nil || len(ready) == 0 {
		return err
	}
	if forgotten, err := v.forget(ready); err != nil || !forgotten {
		return err
	}
	// Nobody but us would keep an attribute that is gone from coming back after a power cut.
	if err := unix.Syncfs(v.root); err != nil {
		return fmt.Errorf("sync the file system of %s: %w", v.dir, err)
	}
	if v.o.Leave == Whole {
		err := unmount(v.dir, unix.MNT_DETACH)
		v.off.Store(err == nil)
		return err
	}
	return v.bindAll(ready)
}

// closeReady closes the branches that can leave. Caller holds mount.
func (v *Overlay) closeReady() (ready []*branch, err error) {
	bound, err := v.bound()
	if err != nil {
		return nil, err
	}
	err = v.eachBranch(func(b *branch) error {
		if b == v.top && v.o.Leave != Whole || v.hidden[b.name] || bound(b) {
			return nil
		}
		whole, err := v.wholeBranch(b)
		if err == nil && whole && b.close() {
			ready = append(ready, b)
		}
		return err
	})
	return ready, err
}

// bound returns a function that tells whether another file system lies over a branch now. To look there would be to ask
// ourselves: see apart.
func (v *Overlay) bound() (func(b *branch) bool, error) {
	at, err := mountPoint(v.dir)
	if err != nil {
		return nil, err
	}
	all, err := mounts()
	return func(b *branch) bool { return b != v.top && all[filepath.Join(at, b.name)] != "" }, err
}

// devIno asks the kernel for what it knows by itself: a mount of ours is not asked, unless the path leads through it.
func devIno(path string, flags int) (dev, ino uint64, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, flags|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return 0, 0, err
	}
	return unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino, nil
}

// forget makes the kernel forget what it remembers of closed branches. An answer about an inode that was on its way when
// the branch was closed, the kernel drops by itself (fuse_inode.attr_version), unless the inode is new to it: then it says
// that it does not know it, and all is left for the next time.
//
// No lock may be held that a request waits for: the kernel holds a directory's own while it asks us.
func (v *Overlay) forget(closed []*branch) (done bool, err error) {
	var known []*node
	for _, b := range closed {
		known = append(known, v.nodes.in(b)...)
	}
	if len(known) > 0 {
		time.Sleep(arrival)
	}
	for _, n := range known {
		s := v.server.InodeNotify(n.id, 0, 0)
		if s.Ok() || v.nodes.get(n.id) == nil {
			continue
		}
		if s == fuse.ENOENT {
			return false, nil
		}
		return false, fmt.Errorf("have the kernel forget inode %d: %w", n.key.ino, unix.Errno(s))
	}
	if v.o.Leave == Whole { // no path will lead there
		return true, nil
	}
	for _, b := range closed {
		if err := v.forgetNames(v.root, b.name, nil); err != nil {
			return false, fmt.Errorf("have the kernel forget names in %s: %w", b.name, err)
		}
	}
	return true, nil
}

// forgetNames makes the kernel look up again what is at and below a name in a directory: what lies below a directory that
// it does not know, it knows neither. parent is nil for a branch, whose own name must stay: with a name that is
// forgotten goes what is mounted there.
func (v *Overlay) forgetNames(dirfd int, name string, parent *node) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return ifThere(err)
	}
	n := v.nodes.find(&st)
	if n == nil {
		return nil
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := v.forgetBelow(dirfd, name, n); err != nil {
			return err
		}
	}
	if parent == nil {
		return nil
	}
	if s := v.server.EntryNotify(parent.id, name); !s.Ok() && s != fuse.ENOENT {
		return unix.Errno(s)
	}
	return nil
}

func (v *Overlay) forgetBelow(dirfd int, name string, n *node) error {
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return ifThere(err)
	}
	defer unix.Close(fd)
	names, err := namesIn(procPath(fd))
	for i := 0; i < len(names) && err == nil; i++ {
		err = v.forgetNames(fd, names[i], n)
	}
	return err
}

func ifThere(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return err
}

// bindAll binds closed branches over the mount. Caller holds mount.
func (v *Overlay) bindAll(closed []*branch) error {
	var errs []error
	for _, b := range closed {
		err := v.bind(b)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
			v.barred = true
			v.faults.log.Info("directories cannot be bound here", "dir", v.dir, "err", err)
			err = nil
		}
		if err != nil || v.barred {
			b.reopen()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// bind binds a branch of the bare directory over the mount. No path is used that the directory's owner could change
// meanwhile: a link in a branch's place is not followed.
func (v *Overlay) bind(b *branch) error {
	from, err := v.cloneBare(b.name)
	if err != nil {
		return fmt.Errorf("clone the mount of %s: %w", b.name, err)
	}
	defer unix.Close(from)
	return apart(from, func() error { return v.cover(from, b.name) })
}

// cover moves a mount to a name in the root directory.
func (v *Overlay) cover(from int, name string) error {
	top, err := unix.Open(v.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", v.dir, err)
	}
	defer unix.Close(top)
	if dev, _, err := devIno("/proc/thread-self/fd/"+strconv.Itoa(top), 0); err != nil || dev != v.dev {
		return errors.Join(err, fmt.Errorf("something else is mounted at %s", v.dir))
	}
	if err := unix.MoveMount(from, "", top, name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("bind %s over the mount: %w", name, err)
	}
	return nil
}

// cloneBare opens a mount of its own of a directory in the bare one.
func (v *Overlay) cloneBare(name string) (int, error) {
	fd, err := unix.OpenTree(v.root, name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, err
	}
	var bare, st unix.Stat_t
	err = errors.Join(unix.Fstat(v.root, &bare), unix.Fstat(fd, &st))
	if err == nil && (st.Dev != bare.Dev || st.Mode&unix.S_IFMT != unix.S_IFDIR) {
		err = errors.New("it is not a directory of this file system")
	}
	if err == nil {
		// What is mounted elsewhere is not to appear here, nor the other way round.
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Propagation: unix.MS_PRIVATE})
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// unmountAll takes the bound branches and then the mount off. EBUSY: it is in use, and all is as it was. Caller holds mount.
func (v *Overlay) unmountAll() error {
	bound, err := v.boundBranches()
	if err != nil {
		return err
	}
	if len(bound) > 0 {
		if err := v.checkIdle(); err != nil {
			return err
		}
	}
	for _, b := range bound {
		// Whoever is in there has the backing file system, with or without this mount of it.
		err := apart(-1, func() error {
			return unix.Unmount(filepath.Join(v.dir, b.name), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		})
		if err != nil {
			v.faults.log.Warn("take a bound directory off", "dir", v.dir, "name", b.name, "err", err)
		}
	}
	err = unmount(v.dir, 0)
	if err == nil {
		return nil
	}
	for _, b := range bound {
		if bindErr := v.bind(b); bindErr != nil {
			v.faults.log.Warn("bind a directory again", "dir", v.dir, "name", b.name, "err", bindErr)
		}
	}
	return err
}

func (v *Overlay) boundBranches() (all []*branch, err error) {
	if v.o.Leave != Directories {
		return nil, nil
	}
	bound, err := v.bound()
	if err != nil {
		return nil, err
	}
	err = v.eachBranch(func(b *branch) error {
		if bound(b) {
			all = append(all, b)
		}
		return nil
	})
	return all, err
}

// checkIdle spares those who use a mount that is in use that it is uncovered in vain. umount(2) has the last word.
func (v *Overlay) checkIdle() error {
	for range 10 { // the kernel tells of a close(2) after it has returned
		if v.openFiles.Load() == 0 {
			break
		}
		time.Sleep(arrival / 10)
	}
	if n := v.openFiles.Load(); n > 0 {
		return fmt.Errorf("unmount %s: %d files are open: %w", v.dir, n, unix.EBUSY)
	}
	if p := workingIn(v.dev); len(p) > 0 {
		return fmt.Errorf("unmount %s: %s works in it: %w", v.dir, p[0], unix.EBUSY)
	}
	return nil
}

// forsake is Unmount for a mount that is off already. Somebody who still works in it by a relative path is left behind.
func (v *Overlay) forsake() error {
	if n := v.openFiles.Load(); n > 0 {
		return fmt.Errorf("%s is not mounted any more, but %d files are open: %w", v.dir, n, unix.EBUSY)
	}
	return nil
}

// Left tells whether the mount was taken off by Leave.
func (v *Overlay) Left() bool { return v.off.Load() }

// Branch is how a part of the tree is reached that can leave the mount, or has left.
type Branch struct {
	Dir     string
	Left    bool
	Holders []Process // have files open by way of the kernel's page cache of the mount, which keeps it from leaving
}

// Branches tells of the branches that have left, and of those that are whole but held.
func (v *Overlay) Branches() (all []Branch) {
	if !v.leaves {
		return nil
	}
	done, err := v.use()
	if err != nil {
		return nil
	}
	defer done()
	if v.o.Leave == Whole {
		if v.Left() || v.top.held() {
			all = append(all, Branch{v.dir, v.Left(), v.holders(v.top)})
		}
		return all
	}
	bound, err := v.bound()
	if err == nil {
		err = v.eachBranch(func(b *branch) error {
			if bound(b) || b != v.top && b.held() {
				all = append(all, Branch{filepath.Join(v.dir, b.name), bound(b), v.holders(b)})
			}
			return nil
		})
	}
	if err != nil {
		v.faults.eio("list branches", fuse.FUSE_ROOT_ID, err)
	}
	return all
}

// holders are the processes that have a cached handle of a branch.
func (v *Overlay) holders(b *branch) []Process {
	if !b.held() {
		return nil
	}
	inodes := make(map[uint64]bool)
	for _, n := range v.nodes.in(b) {
		if n.file != nil && n.file.open.isCached() {
			inodes[n.key.ino] = true
		}
	}
	return opening(v.dev, inodes)
}
