package fusefs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	iofs "io/fs"
	"log/slog"
	"os"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"pgthaw/repo"
)

// BrowseOptions of Browse. The zero value works.
type BrowseOptions struct {
	Log        *slog.Logger
	AllowOther bool   // users other than the one who mounts may look, as far as the files' modes let them
	AsUser     *Owner // show everything as owned by this user; nil: owners of the original
	Debug      bool   // log every request
}

// Browse mounts all clusters and backups of r at dir, read-only; the mount answers when it returns, and ends with ctx.
// The tree is
//
//	<cluster>/<backup>/pgdata/...             as it lay on the server
//	<cluster>/<backup>/tablespaces/<oid>/...  where pgdata/pg_tblspc/<oid> leads
//	<cluster>/<backup>/manifest.json          the repository's own record
//	<cluster>/latest                          a symbolic link to the newest backup
//	<cluster>/wal/<timeline>/<file>           what was archived
//
// What is above a backup is asked of the repository again after a second, so that new backups and WAL appear. Below a
// backup nothing changes: the kernel keeps names, attributes and pages as long as it likes.
func Browse(ctx context.Context, dir string, r *repo.Repository, o BrowseOptions) (*Mount, error) {
	return browse(ctx, dir, r, o, maxNodes)
}

func browse(ctx context.Context, dir string, r *repo.Repository, o BrowseOptions, limit int64) (*Mount, error) {
	b := &browser{repo: r, ctx: ctx, ahead: repo.NewReadAhead(ctx), faults: newFaults(o.Log), as: o.AsUser,
		owner: Owner{uint32(os.Geteuid()), uint32(os.Getegid())}}
	if o.AsUser != nil {
		b.owner = *o.AsUser
	}
	root := &rootDir{place{b: b}}
	b.trimmer = newTrimmer(root.EmbeddedInode(), limit)
	m, err := mountBrowser(ctx, dir, root, b, o)
	if err != nil {
		b.ahead.Close()
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	return m, nil
}

const (
	// changingTimeout is how long the kernel may rely on what is above a backup.
	changingTimeout = time.Second
	// constantTimeout is how long it may rely on what lies in one. Forgetting is the kernel's affair: long, not for ever.
	constantTimeout = time.Hour
)

// browser is what the nodes of one mount share.
type browser struct {
	repo   *repo.Repository
	ctx    context.Context // the mount's. Not a request's: whoever gets a signal would see EINTR where a file system has none
	ahead  *repo.ReadAhead
	faults *faults
	owner  Owner  // of what is not in a backup
	as     *Owner // of all else, if not nil

	trimmer *trimmer
}

// attr fills in what stat(2) tells of a backup's entry.
func (b *browser) attr(e repo.Entry, out *fuse.Attr) {
	out.Mode = unixType(e) | uint32(e.Mode.Perm())
	out.Nlink = 1
	out.Size = uint64(e.Size)
	out.Owner = fuse.Owner{Uid: e.UID, Gid: e.GID}
	if b.as != nil {
		out.Owner = fuse.Owner{Uid: b.as.UID, Gid: b.as.GID}
	}
	out.SetTimes(&e.ModTime, &e.ModTime, &e.ModTime)
}

// ownAttr does so for what is not in a backup.
func (b *browser) ownAttr(e repo.Entry, out *fuse.Attr) {
	e.UID, e.GID = b.owner.UID, b.owner.GID
	b.attr(e, out)
}

// dirAttr does so for a directory that is not in a backup.
func (b *browser) dirAttr(modified time.Time, out *fuse.Attr) {
	b.ownAttr(repo.Entry{Mode: iofs.ModeDir | 0o555, ModTime: modified}, out)
}

func unixType(e repo.Entry) uint32 {
	switch {
	case e.IsDir():
		return syscall.S_IFDIR
	case e.Link != "":
		return syscall.S_IFLNK
	default:
		return syscall.S_IFREG
	}
}

// place is the part that all nodes above a backup have in common.
type place struct {
	fs.Inode
	b    *browser
	path string // in the mount; "" is the root
}

func (n *place) childPath(name string) string {
	if n.path == "" {
		return name
	}
	return n.path + "/" + name
}

// child makes child the node of a name, unless the kernel knows one already.
func (n *place) child(ctx context.Context, name string, typ uint32, child fs.InodeEmbedder) *fs.Inode {
	if known := n.GetChild(name); known != nil {
		return known
	}
	n.b.trimmer.added()
	return n.NewInode(ctx, child, identity(n.childPath(name), typ))
}

// fail answers an error in an operation on a path.
func (b *browser) fail(op, path string, err error) syscall.Errno {
	number := errno(err)
	if number == syscall.ENOENT || errors.Is(err, context.Canceled) {
		return number
	}
	return syscall.Errno(b.faults.eio(op, identity(path, 0).Ino, wrapPath(path, err)))
}

// identity makes a node's numbers from its path, so that they are the same in every mount. go-fuse takes two nodes for
// one if both numbers agree: 126 bits of SHA-256 keep paths apart. The inode number alone, which is all that stat(2)
// shows, may be another path's once in a thousand million million pairs; nothing here rests on it.
func identity(path string, typ uint32) fs.StableAttr {
	sum := sha256.Sum256([]byte(path))
	ino := binary.LittleEndian.Uint64(sum[:8])&^(3<<62) | 1<<62 // neither go-fuse's reserved numbers nor its own
	return fs.StableAttr{Mode: typ, Ino: ino, Gen: binary.LittleEndian.Uint64(sum[8:16])}
}

// dirEntry describes a child in a listing.
func dirEntry(dir, name string, typ uint32) fuse.DirEntry {
	return fuse.DirEntry{Name: name, Mode: typ, Ino: identity(dir+"/"+name, 0).Ino}
}

// dirStream is an open directory. It shows what was there when it was opened or last rewound.
type dirStream struct {
	load   func() ([]fuse.DirEntry, syscall.Errno)
	lookup func(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno)

	// The kernel sends one request for a handle at a time; go-fuse holds a lock over it.
	list []fuse.DirEntry
	next int
}

func openStream(load func() ([]fuse.DirEntry, syscall.Errno), lookup func(context.Context, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno)) (*dirStream, syscall.Errno) {
	list, number := load()
	return &dirStream{load: load, lookup: lookup, list: list}, number
}

func (d *dirStream) Readdirent(context.Context) (*fuse.DirEntry, syscall.Errno) {
	if d.next >= len(d.list) {
		return nil, 0
	}
	e := &d.list[d.next]
	d.next++
	e.Off = uint64(d.next)
	return e, 0
}

// Seekdir continues after the entry whose Off it is given.
func (d *dirStream) Seekdir(_ context.Context, off uint64) syscall.Errno {
	if off == 0 {
		list, number := d.load()
		if number != 0 {
			return number
		}
		d.list = list
	}
	if off > uint64(len(d.list)) {
		return syscall.EINVAL
	}
	d.next = int(off)
	return 0
}

// Lookup answers for READDIRPLUS.
func (d *dirStream) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return d.lookup(ctx, name, out)
}

var (
	_ fs.FileReaddirenter = (*dirStream)(nil)
	_ fs.FileSeekdirer    = (*dirStream)(nil)
	_ fs.FileLookuper     = (*dirStream)(nil)
)

func wrapPath(path string, err error) error { return fmt.Errorf("%s: %w", path, err) }
