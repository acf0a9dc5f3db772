package fusefs

import (
	"context"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"pgthaw/repo"
)

// inBackup is a place in a backup.
type inBackup struct {
	b      *browser
	backup *repo.Backup
	name   string // path in the backup; "." is its root
}

// mountPath is the path in the mount.
func (p inBackup) mountPath() string {
	return path.Join(p.backup.Manifest.Cluster, p.backup.Manifest.ID, p.name)
}

func (p inBackup) attr(e repo.Entry, out *fuse.Attr) {
	p.b.attr(e, out)
	if e.Link != "" {
		out.Size = uint64(len(shownLink(p.name, e)))
	}
}

// treeNode is the part that all nodes within a backup have in common. It is kept small: the kernel may know a million of
// them. What it tells comes from the repository's cache of directories.
type treeNode struct {
	fs.Inode
	inBackup
}

// fail answers an error in reading the repository: ENOENT only where the whole backup is gone. A pack that the store
// does not have must not look like a file that was never there.
func (n *treeNode) fail(op string, err error) syscall.Errno {
	if n.b.gone(n.backup.Manifest) {
		return syscall.ENOENT
	}
	return syscall.Errno(n.b.faults.eio(op, n.StableAttr().Ino, wrapPath(n.mountPath(), err)))
}

func (n *treeNode) stat(op string) (repo.Entry, syscall.Errno) {
	e, err := n.backup.Stat(n.b.ctx, n.name)
	if err != nil {
		return repo.Entry{}, n.fail(op, err)
	}
	return e, 0
}

func (n *treeNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	e, number := n.stat("getattr")
	n.attr(e, &out.Attr)
	out.SetTimeout(constantTimeout)
	return number
}

// shownLink is where a symbolic link leads in the mount: one of pg_tblspc to the backup's own copy of the tablespace,
// for its location on the server means nothing here, and may be a live one.
func shownLink(name string, e repo.Entry) string {
	if path.Dir(name) == "pgdata/pg_tblspc" && strings.HasPrefix(e.Link, "/") {
		return "../../tablespaces/" + e.Name
	}
	return e.Link
}

// treeDir is a directory of a backup.
type treeDir struct{ treeNode }

func (d *treeDir) entries(op string) (*repo.Listing, syscall.Errno) {
	list, err := d.backup.ReadDir(d.b.ctx, d.name)
	if err != nil {
		return nil, d.fail(op, err)
	}
	return list, 0
}

func (d *treeDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	list, number := d.entries("lookup")
	if number != 0 {
		return nil, number
	}
	e, ok := list.Find(name)
	if !ok {
		return nil, syscall.ENOENT
	}
	return d.child(ctx, e, out), 0
}

func (d *treeDir) child(ctx context.Context, e repo.Entry, out *fuse.EntryOut) *fs.Inode {
	at := inBackup{d.b, d.backup, path.Join(d.name, e.Name)}
	at.attr(e, &out.Attr)
	out.SetEntryTimeout(constantTimeout)
	out.SetAttrTimeout(constantTimeout)
	if known := d.GetChild(e.Name); known != nil {
		return known
	}
	d.b.trimmer.added()
	id := identity(at.mountPath(), unixType(e))
	var n fs.InodeEmbedder
	switch id.Mode {
	case syscall.S_IFDIR:
		n = &treeDir{treeNode{inBackup: at}}
	case syscall.S_IFLNK:
		n = &treeLink{treeNode{inBackup: at}}
	default:
		n = &treeFile{treeNode{inBackup: at}}
	}
	return d.NewInode(ctx, n, id)
}

func (d *treeDir) OpendirHandle(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	list, number := d.entries("readdir")
	if number != 0 {
		return nil, 0, number
	}
	return &treeStream{dir: d, path: d.mountPath(), list: list}, fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE, 0
}

// treeStream is an open directory of a backup. Entries are decoded as the kernel comes by: there may be a million.
type treeStream struct {
	dir  *treeDir
	path string // in the mount
	list *repo.Listing

	// The kernel sends one request for a handle at a time; go-fuse holds a lock over it.
	next int
	last repo.Entry // given last
}

func (s *treeStream) Readdirent(context.Context) (*fuse.DirEntry, syscall.Errno) {
	if s.next >= s.list.Len() {
		return nil, 0
	}
	s.last = s.list.At(s.next)
	s.next++
	e := dirEntry(s.path, s.last.Name, unixType(s.last))
	e.Off = uint64(s.next)
	return &e, 0
}

// Seekdir continues after the entry whose Off it is given.
func (s *treeStream) Seekdir(_ context.Context, off uint64) syscall.Errno {
	if off > uint64(s.list.Len()) {
		return syscall.EINVAL
	}
	s.next = int(off)
	return 0
}

// Lookup answers for READDIRPLUS, which asks for the entry just given.
func (s *treeStream) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if s.last.Name == name {
		return s.dir.child(ctx, s.last, out), 0
	}
	return s.dir.Lookup(ctx, name, out)
}

var (
	_ fs.FileReaddirenter = (*treeStream)(nil)
	_ fs.FileSeekdirer    = (*treeStream)(nil)
	_ fs.FileLookuper     = (*treeStream)(nil)
)

// treeLink is a symbolic link of a backup.
type treeLink struct{ treeNode }

func (l *treeLink) Readlink(context.Context) ([]byte, syscall.Errno) {
	e, number := l.stat("readlink")
	return []byte(shownLink(l.name, e)), number
}

// treeFile is a regular file of a backup.
type treeFile struct{ treeNode }

// Open reads the file's map, and no more.
func (f *treeFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	e, number := f.stat("open")
	if number != 0 {
		return nil, 0, number
	}
	file, err := f.backup.Open(f.b.ctx, e)
	if err != nil {
		return nil, 0, f.fail("open", err)
	}
	return f.b.handle(file, f.mountPath()), openFlags, 0
}

// openFlags: what was read stays in the page cache after close(2), for it cannot change; and there is nothing to flush.
const openFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH

// readHandle is an open file of a backup or of the WAL.
type readHandle struct {
	b    *browser
	file *repo.AheadFile
	path string // in the mount
}

func (b *browser) handle(file *repo.File, path string) *readHandle {
	return &readHandle{b, b.ahead.Open(file), path}
}

// Release ends the handle, and what is read ahead for it.
func (f *readHandle) Release(context.Context) syscall.Errno {
	f.file.Close()
	return 0
}

// Read gives verified bytes or EIO.
func (f *readHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	b, err := f.file.Read(dest, off)
	if err != nil {
		return nil, syscall.Errno(f.b.faults.eio("read", identity(f.path, 0).Ino, wrapPath(f.path, err)))
	}
	return readResult{b}, 0
}

// readResult has go-fuse write the bytes to the kernel from where they lie.
type readResult struct{ b *repo.AheadBytes }

// Slices is what go-fuse asks for first.
func (r readResult) Slices() ([][]byte, fuse.Status) { return r.b.Parts, fuse.OK }

func (r readResult) Bytes([]byte) ([]byte, fuse.Status) { return slices.Concat(r.b.Parts...), fuse.OK }

func (r readResult) Size() (n int) {
	for _, part := range r.b.Parts {
		n += len(part)
	}
	return n
}

// Done is called when the kernel has them; where there are none it is not.
func (r readResult) Done() { r.b.Release() }

// Values of whence that the kernel sends for lseek(2) besides those it answers itself.
const (
	seekData = 3
	seekHole = 4
)

// Lseek finds data and holes: cp(1) and tar(1) keep a file sparse by them.
func (f *readHandle) Lseek(_ context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	if off >= uint64(f.file.Size()) {
		return 0, syscall.ENXIO
	}
	pos := int64(off) // up to here all is data, from off on
	for start, n := range f.file.Data() {
		switch {
		case start+n <= pos:
			continue
		case whence == seekData:
			return uint64(max(start, pos)), 0
		case start > pos:
			return uint64(pos), 0
		}
		pos = start + n
	}
	if whence == seekData {
		return 0, syscall.ENXIO
	}
	return uint64(pos), 0
}
