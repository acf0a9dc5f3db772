package fusefs

import (
	"context"
	"errors"
	iofs "io/fs"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"pgthaw/repo"
)

// rootDir shows the clusters.
type rootDir struct{ place }

func (d *rootDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.b.dirAttr(time.Time{}, &out.Attr)
	return 0
}

func (d *rootDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if repo.ValidClusterName(name) != nil {
		return nil, syscall.ENOENT
	}
	c, err := d.b.repo.Cluster(d.b.ctx, name)
	if err != nil {
		return nil, d.b.fail("lookup", d.childPath(name), err)
	}
	d.b.dirAttr(c.CreatedAt, &out.Attr)
	child := &clusterDir{place{b: d.b, path: d.childPath(name)}, c}
	return d.child(ctx, name, syscall.S_IFDIR, child), 0
}

func (d *rootDir) OpendirHandle(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	s, number := openStream(d.list, d.Lookup)
	return s, 0, number
}

func (d *rootDir) list() ([]fuse.DirEntry, syscall.Errno) {
	clusters, err := d.b.repo.Clusters(d.b.ctx)
	if err != nil {
		return nil, d.b.fail("readdir", d.path, err)
	}
	var list []fuse.DirEntry
	for _, c := range clusters {
		list = append(list, fuse.DirEntry{Name: c.Name, Mode: syscall.S_IFDIR, Ino: identity(c.Name, 0).Ino})
	}
	return list, 0
}

// Statfs tells what pathconf(3) asks; how much room there is means nothing here.
func (d *rootDir) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = 4096, 4096, 255
	return 0
}

// Names in a cluster's directory that are no backup's.
const (
	latestName = "latest"
	walName    = "wal"
)

// clusterDir shows a cluster's backups.
type clusterDir struct {
	place
	c repo.Cluster
}

func (d *clusterDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.b.dirAttr(d.c.CreatedAt, &out.Attr)
	return 0
}

func (d *clusterDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	switch name {
	case walName:
		d.b.dirAttr(d.c.CreatedAt, &out.Attr)
		child := &walDir{place{b: d.b, path: d.childPath(name)}, d.c, d.b.repo.OpenWALTree(d.c)}
		return d.child(ctx, name, syscall.S_IFDIR, child), 0
	case latestName:
		return d.lookupLatest(ctx, out)
	default:
		return d.lookupBackup(ctx, name, out)
	}
}

func (d *clusterDir) lookupBackup(ctx context.Context, id string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	m, err := d.b.repo.Manifest(d.b.ctx, d.c.Name, id)
	if err != nil {
		return nil, d.b.fail("lookup", d.childPath(id), err)
	}
	d.b.dirAttr(m.StoppedAt, &out.Attr)
	child := &backupDir{treeDir{treeNode{inBackup: inBackup{d.b, d.b.repo.OpenBackup(m), "."}}}}
	return d.child(ctx, id, syscall.S_IFDIR, child), 0
}

func (d *clusterDir) lookupLatest(ctx context.Context, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	ids, err := d.b.repo.BackupIDs(d.b.ctx, d.c.Name)
	if err != nil {
		return nil, d.b.fail("lookup", d.childPath(latestName), err)
	}
	if len(ids) == 0 {
		return nil, syscall.ENOENT
	}
	link := &latestLink{b: d.b, id: ids[len(ids)-1]}
	link.attr(&out.Attr)
	if known := d.GetChild(latestName); known != nil && known.Operations().(*latestLink).id == link.id {
		return known, 0
	}
	d.b.trimmer.added()
	return d.NewInode(ctx, link, link.identity(d.path)), 0
}

func (d *clusterDir) OpendirHandle(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	s, number := openStream(d.list, d.Lookup)
	return s, 0, number
}

func (d *clusterDir) list() ([]fuse.DirEntry, syscall.Errno) {
	ids, err := d.b.repo.BackupIDs(d.b.ctx, d.c.Name)
	if err != nil {
		return nil, d.b.fail("readdir", d.path, err)
	}
	var list []fuse.DirEntry
	for _, id := range ids {
		list = append(list, dirEntry(d.path, id, syscall.S_IFDIR))
	}
	if len(ids) > 0 {
		link := latestLink{id: ids[len(ids)-1]}
		list = append(list, fuse.DirEntry{Name: latestName, Mode: syscall.S_IFLNK, Ino: link.identity(d.path).Ino})
	}
	return append(list, dirEntry(d.path, walName, syscall.S_IFDIR)), 0
}

// latestLink leads to a backup, which was the newest when the name was looked up. Where another one is, the name leads to another link,
// with numbers of its own: the kernel may keep what it has read of this one. Every path that goes by way of it reads it again,
// for "ls -lR latest/" several times for each file.
type latestLink struct {
	fs.Inode
	b  *browser
	id string
}

func (l *latestLink) identity(dir string) fs.StableAttr {
	return identity(dir+"/"+latestName+"/"+l.id, syscall.S_IFLNK)
}

func (l *latestLink) attr(out *fuse.Attr) {
	l.b.ownAttr(repo.Entry{Mode: iofs.ModeSymlink | 0o777, Link: l.id, Size: int64(len(l.id))}, out)
}

func (l *latestLink) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	l.attr(&out.Attr)
	return 0
}

func (l *latestLink) Readlink(context.Context) ([]byte, syscall.Errno) { return []byte(l.id), 0 }

// walDir shows the timelines that have WAL.
type walDir struct {
	place
	c   repo.Cluster
	wal *repo.WALTree
}

func (d *walDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.b.dirAttr(d.c.CreatedAt, &out.Attr)
	return 0
}

func (d *walDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	child := &timelineDir{place{b: d.b, path: d.childPath(name)}, d.c, d.wal, name}
	list, err := d.wal.ReadDir(d.b.ctx, name)
	if err != nil {
		return nil, d.b.fail("lookup", child.path, err)
	}
	if len(list) == 0 {
		return nil, syscall.ENOENT
	}
	d.b.dirAttr(d.c.CreatedAt, &out.Attr)
	out.SetEntryTimeout(time.Minute) // to ask costs a listing, and a timeline seldom goes
	return d.child(ctx, name, syscall.S_IFDIR, child), 0
}

func (d *walDir) OpendirHandle(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	s, number := openStream(d.list, d.Lookup)
	return s, 0, number
}

func (d *walDir) list() ([]fuse.DirEntry, syscall.Errno) {
	timelines, err := d.wal.Timelines(d.b.ctx)
	if err != nil {
		return nil, d.b.fail("readdir", d.path, err)
	}
	var list []fuse.DirEntry
	for _, t := range timelines {
		list = append(list, dirEntry(d.path, t, syscall.S_IFDIR))
	}
	return list, 0
}

// timelineDir shows a timeline's WAL files.
type timelineDir struct {
	place
	c        repo.Cluster
	wal      *repo.WALTree
	timeline string
}

func (d *timelineDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.b.dirAttr(d.c.CreatedAt, &out.Attr)
	return 0
}

func (d *timelineDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	e, err := d.wal.Stat(d.b.ctx, d.timeline, name)
	if err != nil {
		return nil, d.b.fail("lookup", d.childPath(name), err)
	}
	return d.file(ctx, e, out), 0
}

func (d *timelineDir) file(ctx context.Context, e repo.Entry, out *fuse.EntryOut) *fs.Inode {
	d.b.ownAttr(e, &out.Attr)
	return d.child(ctx, e.Name, syscall.S_IFREG, &walFile{place{b: d.b, path: d.childPath(e.Name)}, d.wal, e})
}

// OpendirHandle lists the files once: a segment's attributes follow from that, so listing thousands reads none of them.
func (d *timelineDir) OpendirHandle(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	known := make(map[string]repo.Entry)
	load := func() ([]fuse.DirEntry, syscall.Errno) {
		files, err := d.wal.ReadDir(d.b.ctx, d.timeline)
		if err != nil {
			return nil, d.b.fail("readdir", d.path, err)
		}
		var list []fuse.DirEntry
		for _, e := range files {
			known[e.Name] = e
			list = append(list, dirEntry(d.path, e.Name, syscall.S_IFREG))
		}
		return list, 0
	}
	lookup := func(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
		if e, ok := known[name]; ok && e.Size >= 0 {
			return d.file(ctx, e, out), 0
		}
		return d.Lookup(ctx, name, out)
	}
	s, number := openStream(load, lookup)
	return s, 0, number
}

// walFile is a WAL file as it was archived.
type walFile struct {
	place
	wal *repo.WALTree
	e   repo.Entry
}

func (f *walFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.b.ownAttr(f.e, &out.Attr)
	return 0
}

func (f *walFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	file, err := f.wal.Open(f.b.ctx, f.e)
	if err != nil {
		return nil, 0, f.b.fail("open", f.path, err)
	}
	return f.b.handle(file, f.path), openFlags, 0
}

// backupDir is the root of a backup, with the manifest beside its directories.
type backupDir struct{ treeDir }

const manifestName = "manifest.json"

func (d *backupDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	d.b.dirAttr(d.backup.Manifest.StoppedAt, &out.Attr)
	return 0
}

func (d *backupDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name != manifestName {
		return d.treeDir.Lookup(ctx, name, out)
	}
	m := d.backup.Manifest
	at := d.mountPath() + "/" + name
	text, err := d.b.repo.ManifestJSON(d.b.ctx, m.Cluster, m.ID)
	if err != nil {
		return nil, d.b.fail("lookup", at, err)
	}
	child := &manifestFile{place{b: d.b, path: at}, text, m.StoppedAt}
	child.attr(&out.Attr)
	out.SetEntryTimeout(constantTimeout)
	out.SetAttrTimeout(constantTimeout)
	return d.NewInode(ctx, child, identity(child.path, syscall.S_IFREG)), 0
}

func (d *backupDir) OpendirHandle(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	load := func() ([]fuse.DirEntry, syscall.Errno) {
		entries, number := d.entries("readdir")
		if number != 0 {
			return nil, number
		}
		var list []fuse.DirEntry
		for i := range entries.Len() {
			e := entries.At(i)
			list = append(list, dirEntry(d.mountPath(), e.Name, unixType(e)))
		}
		return append(list, dirEntry(d.mountPath(), manifestName, syscall.S_IFREG)), 0
	}
	s, number := openStream(load, d.Lookup)
	return s, 0, number
}

// manifestFile is a backup's manifest as it lies in the repository. It names what the server's settings say, so it is
// for the mount's owner only.
type manifestFile struct {
	place
	text     []byte
	modified time.Time
}

func (f *manifestFile) attr(out *fuse.Attr) {
	f.b.ownAttr(repo.Entry{Mode: 0o400, Size: int64(len(f.text)), ModTime: f.modified}, out)
}

func (f *manifestFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.attr(&out.Attr)
	return 0
}

func (f *manifestFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, openFlags, 0
}

func (f *manifestFile) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off >= int64(len(f.text)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(dest[:copy(dest, f.text[off:])]), 0
}

// gone tells whether a backup was pruned, so that nothing in it is there any more.
func (b *browser) gone(m *repo.Manifest) bool {
	_, err := b.repo.Manifest(b.ctx, m.Cluster, m.ID)
	return errors.Is(err, repo.ErrNoBackup) || errors.Is(err, repo.ErrNoCluster)
}
