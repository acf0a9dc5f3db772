package fusefs

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// dirHandle is an open directory. What it lists is what was there when it was last read from the start: names made or
// taken away since may or may not be in it, as readdir(3) has it.
type dirHandle struct {
	node *node

	mu      sync.Mutex
	entries []fuse.DirEntry
}

// dirHandles holds the open directories by the number that the kernel knows them by.
type dirHandles struct {
	mu   sync.Mutex
	open map[uint64]*dirHandle
	last uint64
}

func (d *dirHandles) add(n *node) uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open == nil {
		d.open = make(map[uint64]*dirHandle)
	}
	d.last++
	d.open[d.last] = &dirHandle{node: n}
	return d.last
}

func (d *dirHandles) get(id uint64) *dirHandle {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.open[id]
}

func (d *dirHandles) remove(id uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.open, id)
}

// OpenDir opens a directory.
func (v *Overlay) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := v.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	out.Fh = v.dirs.add(n)
	return fuse.OK
}

// ReleaseDir closes a directory.
func (v *Overlay) ReleaseDir(in *fuse.ReleaseIn) { v.dirs.remove(in.Fh) }

// ReadDir lists a directory from in.Offset on, which counts entries.
func (v *Overlay) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	h := v.dirs.get(in.Fh)
	if h == nil {
		return fuse.EBADF
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if in.Offset == 0 || h.entries == nil {
		entries, err := v.list(h.node)
		if err != nil {
			return v.faults.status("readdir", h.node.key.ino, err)
		}
		h.entries = entries
	}
	for i := in.Offset; i < uint64(len(h.entries)); i++ {
		e := h.entries[i]
		e.Off = i + 1
		if !out.AddDirEntry(e) {
			break
		}
	}
	return fuse.OK
}

// list returns what the mount shows of a directory, "." and ".." among it.
func (v *Overlay) list(n *node) ([]fuse.DirEntry, error) {
	entries := make([]fuse.DirEntry, 0, 16)
	root := n.id == fuse.FUSE_ROOT_ID
	err := readDir(n.path(), func(e fuse.DirEntry) {
		if _, moved := v.o.Moved[e.Name]; !root || !moved && !v.hidden[e.Name] {
			entries = append(entries, e)
		}
	})
	if !root {
		return entries, err
	}
	for name, path := range v.o.Moved {
		var st unix.Stat_t
		if unix.Fstatat(n.fd, path, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			entries = append(entries, fuse.DirEntry{Name: name, Mode: st.Mode, Ino: st.Ino})
		}
	}
	return entries, err
}

// readDir calls fn for each entry of a directory, "." and ".." among them. A directory that was removed has none.
func readDir(name string, fn func(fuse.DirEntry)) error {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open a directory: %w", err)
	}
	defer unix.Close(fd)
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if errors.Is(err, unix.ENOENT) || err == nil && n == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list a directory: %w", err)
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e fuse.DirEntry
			rest = rest[e.Parse(rest):]
			fn(e)
		}
	}
}

// FsyncDir brings a directory's names to disk.
func (v *Overlay) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	n := v.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	fd, err := unix.Open(n.path(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return v.faults.status("fsync", n.key.ino, err)
	}
	defer unix.Close(fd)
	return v.faults.status("fsync", n.key.ino, unix.Fsync(fd))
}
