package fusefs

import (
	"fmt"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// attributes answers with st. A file with a lower says that all of its blocks are there: GNU tar and others take a file
// of few blocks for mostly zeros.
func (n *node) attributes(st *unix.Stat_t, out *fuse.Attr) {
	if n.file != nil {
		n.file.correctTime(n.fd, st)
	}
	*out = fuse.Attr{
		Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks), Blksize: uint32(st.Blksize),
		Mode: st.Mode, Nlink: uint32(st.Nlink), Rdev: uint32(st.Rdev),
		Owner: fuse.Owner{Uid: st.Uid, Gid: st.Gid},
		Atime: uint64(st.Atim.Sec), Atimensec: uint32(st.Atim.Nsec),
		Mtime: uint64(st.Mtim.Sec), Mtimensec: uint32(st.Mtim.Nsec),
		Ctime: uint64(st.Ctim.Sec), Ctimensec: uint32(st.Ctim.Nsec),
	}
	if n.file == nil {
		return
	}
	if p, err := n.file.placeholder(); err == nil && p.limit > 0 {
		out.Blocks = max(out.Blocks, uint64(roundUp(st.Size, 512)/512))
	}
}

// GetAttr tells a file's attributes.
func (v *Overlay) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := v.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	out.SetTimeout(n.branch.validity())
	return v.faults.status("getattr", n.key.ino, n.attrOut(out))
}

func (n *node) attrOut(out *fuse.AttrOut) error {
	st, err := n.stat()
	if err == nil {
		n.attributes(&st, &out.Attr)
	}
	return err
}

// SetAttr changes a file's size, permissions, owner and times. The kernel must ask for them again before it believes
// them: an answer to this request would count even if it were overtaken by what leave tells the kernel.
func (v *Overlay) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	n := v.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	for _, change := range []func(*fuse.SetAttrIn) error{n.setSize, n.setOwner, n.setMode, n.setTimes} {
		if err := change(in); err != nil {
			return v.faults.status("setattr", n.key.ino, err)
		}
	}
	return v.faults.status("setattr", n.key.ino, n.attrOut(out))
}

func (n *node) setSize(in *fuse.SetAttrIn) error {
	size, ok := in.GetSize()
	if !ok {
		return nil
	}
	if n.file == nil {
		return unix.EINVAL
	}
	return n.resize(int64(size))
}

// resize truncates or lengthens a regular file.
func (n *node) resize(size int64) error {
	fd, err := n.file.open.acquire(n.path())
	if err != nil {
		return err
	}
	defer n.file.open.release()
	return n.file.truncate(fd, size)
}

// setOwner changes user and group; -1 leaves one as it is. chown(2) clears set-user-ID bits, so it comes before setMode.
func (n *node) setOwner(in *fuse.SetAttrIn) error {
	uid, gid := -1, -1
	if u, ok := in.GetUID(); ok {
		uid = int(u)
	}
	if g, ok := in.GetGID(); ok {
		gid = int(g)
	}
	if uid == -1 && gid == -1 {
		return nil
	}
	if err := unix.Fchownat(n.fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	return nil
}

func (n *node) setMode(in *fuse.SetAttrIn) error {
	mode, ok := in.GetMode()
	if !ok {
		return nil
	}
	if err := unix.Chmod(n.path(), mode); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	return nil
}

func (n *node) setTimes(in *fuse.SetAttrIn) error {
	if in.Valid&(fuse.FATTR_ATIME|fuse.FATTR_MTIME) == 0 {
		return nil
	}
	ts := []unix.Timespec{
		timeAsked(in, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec),
		timeAsked(in, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec),
	}
	if n.file != nil {
		return n.file.setTimes(n.fd, ts)
	}
	return setTimesOf(n.fd, ts)
}

// setTimesOf sets access and modification time of what a descriptor, an O_PATH one among them, is open for.
func setTimesOf(fd int, ts []unix.Timespec) error {
	if err := unix.UtimesNanoAt(fd, "", ts, unix.AT_EMPTY_PATH); err != nil {
		return fmt.Errorf("utimensat: %w", err)
	}
	return nil
}

func timeAsked(in *fuse.SetAttrIn, given, now uint32, sec uint64, nsec uint32) unix.Timespec {
	switch {
	case in.Valid&now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	case in.Valid&given != 0:
		return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
	}
	return unix.Timespec{Nsec: unix.UTIME_OMIT}
}

// StatFs tells what the backing file system has.
func (v *Overlay) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(v.root, &st); err != nil {
		return v.faults.status("statfs", in.NodeId, err)
	}
	out.FromStatfsT(&st)
	return fuse.OK
}
