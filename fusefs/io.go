package fusefs

import (
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// smallFile is the largest placeholder that is made whole when it is opened, in bytes: about a millisecond of reading
// from a local repository. It is then open to passthrough.
const smallFile = 1 << 20

// Requests are never given up half-way: PostgreSQL takes an interrupted read(2) of a file for an error. So the channels
// that tell of interrupts are not looked at.

// Open opens a regular file.
func (v *Overlay) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := v.nodes.get(in.NodeId)
	if n == nil || n.file == nil {
		return fuse.Status(unix.ESTALE)
	}
	o, err := v.openFile(n)
	if err != nil {
		return v.faults.status("open", n.key.ino, err)
	}
	*out = o
	return fuse.OK
}

// openFile counts one more handle of a node, and a reference to it.
func (v *Overlay) openFile(n *node) (fuse.OpenOut, error) {
	fd, err := n.file.open.acquire(n.path())
	if err != nil {
		return fuse.OpenOut{}, err
	}
	return v.addHandle(n, fd), nil
}

// openMade is openFile with the descriptor that made the file, if the name still leads there.
func (v *Overlay) openMade(n *node, made int) (fuse.OpenOut, error) {
	var st unix.Stat_t
	if err := unix.Fstat(made, &st); err != nil || keyOf(&st) != n.key {
		unix.Close(made)
		return v.openFile(n)
	}
	n.file.made()
	return v.addHandle(n, n.file.open.adopt(made)), nil
}

// addHandle is openFile with a descriptor that was acquired.
func (v *Overlay) addHandle(n *node, fd int) fuse.OpenOut {
	register := v.register
	if !v.passthrough.Load() || !v.whole(n, fd) {
		register = nil
	}
	v.opened(n.file)
	v.nodes.ref(n)
	v.openFiles.Add(1)
	return n.file.open.add(register, n.branch)
}

// whole tells whether the backing file has all bytes, and makes it so if it is small. Where that fails the file is
// served all the same: it is reads of its holes that fail, and not even those if it was for want of space.
func (v *Overlay) whole(n *node, fd int) bool {
	whole, err := n.file.checkFilled(fd)
	if err == nil && !whole {
		whole, err = v.fillSmall(n, fd)
	}
	if err != nil {
		v.faults.status("hydrate at open", n.key.ino, err)
	}
	return whole && err == nil
}

func (v *Overlay) fillSmall(n *node, fd int) (bool, error) {
	p, err := n.file.placeholder()
	if err != nil || p.limit > smallFile {
		return false, err
	}
	defer v.traffic.enter()()
	n.file.tell([]span{{0, p.limit}})
	if _, err := n.file.fill(fd, span{0, p.limit}, make([]byte, p.limit)); err != nil {
		return false, err
	}
	return n.file.checkFilled(fd)
}

// register gives the kernel a backing descriptor for passthrough. Where it refuses once, it is not asked again.
func (v *Overlay) register(fd int) (int32, bool) {
	id, number := v.server.RegisterBackingFd(&fuse.BackingMap{Fd: int32(fd)})
	if number != 0 {
		if v.passthrough.Swap(false) {
			v.faults.log.Info("the kernel does not serve whole files by itself", "err", number)
		}
		return 0, false
	}
	return id, true
}

func (v *Overlay) unregister(id int32) {
	if number := v.server.UnregisterBackingFd(id); number != 0 && number != unix.EBADF {
		v.faults.log.Warn("unregister a backing file", "id", id, "err", number)
	}
}

// Release ends a handle.
func (v *Overlay) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	n := v.nodes.get(in.NodeId)
	if n == nil || n.file == nil {
		return
	}
	n.file.open.remove(in.Fh, v.unregister, n.branch)
	n.file.open.release()
	v.openFiles.Add(-1)
	v.nodes.drop(n, 1)
}

// Read answers a handle that is not passthrough.
func (v *Overlay) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	defer v.traffic.enter()()
	n := v.nodes.get(in.NodeId)
	if n == nil || n.file == nil {
		return nil, fuse.EBADF
	}
	n.file.open.use(in.Fh)
	var k *kept
	fd, off := n.file.open.descriptor(), int64(in.Offset)
	count, err := n.file.read(fd, buf, off, func(holes []span) (err error) {
		k, err = v.fromLower(n, fd, buf, off, holes)
		return err
	})
	if err != nil {
		return nil, v.faults.status("read", n.key.ino, err)
	}
	if k == nil {
		return fuse.ReadResultData(buf[:count]), fuse.OK
	}
	k.answer[0] = buf[:count]
	return k, fuse.OK
}

// Write answers a handle that is not passthrough.
func (v *Overlay) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	defer v.traffic.enter()()
	n := v.nodes.get(in.NodeId)
	if n == nil || n.file == nil {
		return 0, fuse.EBADF
	}
	n.file.open.use(in.Fh)
	count, err := n.file.writeAt(n.file.open.descriptor(), data, int64(in.Offset))
	if err != nil && count == 0 {
		return 0, v.faults.status("write", n.key.ino, err)
	}
	if in.Fh >= direct && count > 0 && n.file.open.isCached() {
		// Read-ahead for a cached handle may have taken up what was there before.
		if s := v.server.InodeNotify(n.id, int64(in.Offset), int64(count)); !s.Ok() {
			return 0, v.faults.eio("write beside a cached handle", n.key.ino, unix.Errno(s))
		}
	}
	return uint32(count), fuse.OK
}

// Flush answers ENOSYS, so that the kernel does not ask at each close(2); it still writes back what was mapped.
func (v *Overlay) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

// Lseek answers ENOSYS: the kernel then takes all of a file for data, as it is.
func (v *Overlay) Lseek(<-chan struct{}, *fuse.LseekIn, *fuse.LseekOut) fuse.Status {
	return fuse.ENOSYS
}

// Fsync brings the backing file to disk.
func (v *Overlay) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	const dataOnly = 1 // fuse.h: FUSE_FSYNC_FDATASYNC
	n := v.nodes.get(in.NodeId)
	if n == nil || n.file == nil {
		return fuse.EBADF
	}
	err := n.file.sync(n.file.open.descriptor(), in.FsyncFlags&dataOnly != 0)
	return v.faults.status("fsync", n.key.ino, err)
}

// Fallocate reserves space. What would make holes, or move bytes, is refused while the file has a lower.
func (v *Overlay) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	n := v.nodes.get(in.NodeId)
	if n == nil || n.file == nil {
		return fuse.EBADF
	}
	fd := n.file.open.descriptor()
	if in.Mode&^unix.FALLOC_FL_KEEP_SIZE == 0 {
		err := n.file.allocate(fd, in.Mode, int64(in.Offset), int64(in.Length))
		return v.faults.status("fallocate", n.key.ino, err)
	}
	p, err := n.file.placeholder()
	if err == nil && p.limit > 0 {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	if err == nil {
		err = unix.Fallocate(fd, in.Mode, int64(in.Offset), int64(in.Length))
	}
	return v.faults.status("fallocate", n.key.ino, err)
}

// CopyFileRange answers ENOSYS: the kernel then copies through its page cache.
func (v *Overlay) CopyFileRange(<-chan struct{}, *fuse.CopyFileRangeIn) (uint32, fuse.Status) {
	return 0, fuse.ENOSYS
}
