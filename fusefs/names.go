package fusefs

import (
	"errors"
	"fmt"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// place finds what a name in a directory means beneath: the directory's node and a name in it, or for a moved name a
// path. EPERM: the name is hidden.
func (v *Overlay) place(parent uint64, name string) (dir *node, path string, err error) {
	dir = v.nodes.get(parent)
	switch {
	case dir == nil:
		return nil, "", unix.ESTALE
	case parent != fuse.FUSE_ROOT_ID:
		return dir, name, nil
	case v.hidden[name]:
		return nil, "", unix.EPERM
	}
	if moved, ok := v.o.Moved[name]; ok {
		return dir, moved, nil
	}
	return dir, name, nil
}

// look finds what is at a path beneath a directory of a branch and counts a reference to its node.
func (v *Overlay) look(b *branch, dirfd int, path string) (*node, *unix.Stat_t, error) {
	fd, err := unix.Openat(dirfd, path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("stat: %w", err)
	}
	if b == v.top && st.Mode&unix.S_IFMT == unix.S_IFDIR {
		b = v.branchAt(path)
	}
	return v.nodes.adopt(fd, &st, b, v.newFile), &st, nil
}

func (v *Overlay) newFile(n *node) *file {
	return &file{name: n.path, openLower: v.openLower, block: v.block, traffic: &v.traffic, touched: v.o.Touched,
		open: handles{descriptors: &v.nodes.backing}}
}

// entry answers with the node at a path, to which the kernel has one reference more from now on. The attributes are not
// to be believed for longer than this answer (see SetAttr), unless the caller knows better. The caller has made way.
func (v *Overlay) entry(dir *node, path string, out *fuse.EntryOut) (*node, error) {
	n, st, err := v.look(dir.branch, dir.fd, path)
	if err != nil {
		return nil, err
	}
	out.NodeId, out.Generation = n.id, 1
	out.SetEntryTimeout(dir.branch.validity())
	n.attributes(st, &out.Attr)
	return n, nil
}

// Lookup finds a name.
func (v *Overlay) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	dir, path, err := v.place(in.NodeId, name)
	if errors.Is(err, unix.EPERM) {
		return fuse.ENOENT
	}
	if err == nil {
		err = v.makeWay()
	}
	var n *node
	if err == nil {
		n, err = v.entry(dir, path, out)
	}
	if err == nil {
		out.SetAttrTimeout(n.branch.validity())
	}
	if errors.Is(err, unix.ENOENT) && in.NodeId == fuse.FUSE_ROOT_ID && v.top.validity() > 0 {
		// A reply without a node lets the kernel remember that there is nothing. Below the root it must not: those
		// memories could not be found again when the directory leaves the mount.
		out.NodeId = 0
		out.SetEntryTimeout(validity)
		return fuse.OK
	}
	return v.faults.status("lookup", in.NodeId, err)
}

// Forget takes lookups away.
func (v *Overlay) Forget(id, lookups uint64) {
	if n := v.nodes.get(id); n != nil {
		v.nodes.drop(n, lookups)
	}
}

// make makes a name by create, and gives what was made to the caller with the mode asked for, which has the caller's
// umask in it but not ours.
func (v *Overlay) make(in *fuse.InHeader, name string, mode uint32, create func(dirfd int, path string) error, out *fuse.EntryOut) error {
	dir, path, err := v.place(in.NodeId, name)
	if err == nil {
		err = v.makeWay()
	}
	if err != nil {
		return err
	}
	if err := create(dir.fd, path); err != nil {
		return err
	}
	if err := v.give(in, dir, path, mode); err != nil {
		return err
	}
	_, err = v.entry(dir, path, out)
	return err
}

// give sets owner and permissions of a new file. In a directory with the set-group-ID bit the group stays the
// directory's, and a new directory keeps the bit.
func (v *Overlay) give(in *fuse.InHeader, dir *node, path string, mode uint32) error {
	st, err := dir.stat()
	if err != nil {
		return err
	}
	gid := int(in.Gid)
	if st.Mode&unix.S_ISGID != 0 {
		gid = -1
		if mode&unix.S_IFMT == unix.S_IFDIR {
			mode |= unix.S_ISGID
		}
	}
	if v.asRoot {
		if err := unix.Fchownat(dir.fd, path, int(in.Uid), gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	return unix.Fchmodat(dir.fd, path, mode&0o7777, 0)
}

// Mkdir makes a directory.
func (v *Overlay) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	err := v.make(&in.InHeader, name, in.Mode&0o7777|unix.S_IFDIR, func(dirfd int, path string) error {
		return unix.Mkdirat(dirfd, path, 0o700)
	}, out)
	return v.faults.status("mkdir", in.NodeId, err)
}

// Mknod makes a socket's or a pipe's name, or an empty file.
func (v *Overlay) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	err := v.make(&in.InHeader, name, in.Mode, func(dirfd int, path string) error {
		return unix.Mknodat(dirfd, path, in.Mode&unix.S_IFMT|0o600, int(in.Rdev))
	}, out)
	return v.faults.status("mknod", in.NodeId, err)
}

// Symlink makes a symbolic link.
func (v *Overlay) Symlink(_ <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	err := v.make(in, name, unix.S_IFLNK, func(dirfd int, path string) error {
		return unix.Symlinkat(target, dirfd, path)
	}, out)
	return v.faults.status("symlink", in.NodeId, err)
}

// Link makes one more name for a file.
func (v *Overlay) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	dir, path, err := v.place(in.NodeId, name)
	n := v.nodes.get(in.Oldnodeid)
	if err == nil && n == nil {
		err = unix.ESTALE
	}
	if err == nil && v.leaves && n.branch != dir.branch {
		err = unix.EXDEV
	}
	if err == nil {
		defer dir.branch.moving(n.branch)()
		err = unix.Linkat(unix.AT_FDCWD, n.path(), dir.fd, path, unix.AT_SYMLINK_FOLLOW)
	}
	if err == nil {
		_, err = v.entry(dir, path, out)
	}
	return v.faults.status("link", in.NodeId, err)
}

// Create makes a regular file and opens it. It is whole, so it is passthrough from the start where the kernel allows.
func (v *Overlay) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	if in.NodeId == fuse.FUSE_ROOT_ID && v.syncFirst[name] {
		if err := unix.Syncfs(v.root); err != nil {
			return v.faults.eio("syncfs", in.NodeId, err)
		}
	}
	fd := -1
	err := v.make(&in.InHeader, name, in.Mode&0o7777|unix.S_IFREG, func(dirfd int, path string) (err error) {
		fd, err = createFile(dirfd, path)
		return err
	}, &out.EntryOut)
	if errors.Is(err, unix.EEXIST) && in.Flags&unix.O_EXCL == 0 {
		err = v.openExisting(in, name, out)
	} else if err == nil {
		out.OpenOut, err = v.openMade(v.nodes.get(out.NodeId), fd)
	} else if fd >= 0 {
		unix.Close(fd)
	}
	return v.faults.status("create", in.NodeId, err)
}

func createFile(dirfd int, path string) (int, error) {
	return unix.Openat(dirfd, path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
}

// openExisting answers a CREATE of a name that the kernel believed to be free.
func (v *Overlay) openExisting(in *fuse.CreateIn, name string, out *fuse.CreateOut) error {
	dir, path, err := v.place(in.NodeId, name)
	if err != nil {
		return err
	}
	n, err := v.entry(dir, path, &out.EntryOut)
	if err != nil {
		return err
	}
	if n.file == nil {
		err = unix.EEXIST
	} else if in.Flags&unix.O_TRUNC != 0 {
		err = n.resize(0)
	}
	if err == nil {
		out.OpenOut, err = v.openFile(n)
	}
	if err != nil {
		v.nodes.drop(n, 1)
	}
	return err
}

// Unlink takes a file's name away.
func (v *Overlay) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	dir, path, err := v.place(in.NodeId, name)
	if err == nil {
		err = unix.Unlinkat(dir.fd, path, 0)
	}
	return v.faults.status("unlink", in.NodeId, err)
}

// Rmdir takes an empty directory away.
func (v *Overlay) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	dir, path, err := v.place(in.NodeId, name)
	if err == nil {
		err = unix.Unlinkat(dir.fd, path, unix.AT_REMOVEDIR)
	}
	return v.faults.status("rmdir", in.NodeId, err)
}

// Rename gives a file another name, also with the flags of renameat2(2). EXDEV: not from one branch to another, for what
// has holes must not come into one that leaves the mount.
func (v *Overlay) Rename(_ <-chan struct{}, in *fuse.RenameIn, oldName, newName string) fuse.Status {
	from, oldPath, err := v.place(in.NodeId, oldName)
	if err != nil {
		return v.faults.status("rename", in.NodeId, err)
	}
	to, newPath, err := v.place(in.Newdir, newName)
	if err == nil && v.leaves && (from.branch != to.branch || v.isBranch(from, oldPath) || v.isBranch(to, newPath)) {
		err = unix.EXDEV
	}
	if err == nil {
		defer to.branch.moving(from.branch)()
		defer from.branch.moving(to.branch)()
		err = unix.Renameat2(from.fd, oldPath, to.fd, newPath, uint(in.Flags))
	}
	return v.faults.status("rename", in.NodeId, err)
}

// Readlink tells where a symbolic link leads.
func (v *Overlay) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	n := v.nodes.get(in.NodeId)
	if n == nil {
		return nil, fuse.Status(unix.ESTALE)
	}
	b := make([]byte, unix.PathMax)
	size, err := unix.Readlinkat(n.fd, "", b)
	if err != nil {
		return nil, v.faults.status("readlink", n.key.ino, err)
	}
	return b[:size], fuse.OK
}
