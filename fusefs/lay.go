package fusefs

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

// Owner is a user and a group by number.
type Owner struct{ UID, GID uint32 }

// LayOptions of Lay. Paths given to the functions are those in the backup: "pgdata/PG_VERSION". The zero value works.
type LayOptions struct {
	Owner  *Owner                           // of everything that is made; nil: whoever runs this
	Link   func(path, target string) string // where a symbolic link shall lead; nil: where it led
	Rename func(path string) string         // a file's place, relative to the directory, if it has another one than in the backup; else ""
	Skip   func(path string) bool           // leave this and all below it out
	Whole  func(path string) bool           // a file that is written whole, for it will be wanted at once
}

// LayResult is what was laid.
type LayResult struct {
	Files      int   // regular files
	LowerBytes int64 // of placeholders: what hydration will write
}

// Lay makes the bare tree of the backup's directory root ("pgdata", "tablespaces/16385") in the existing, empty
// directory dir: directories, symbolic links, files that lie in the backup's tree whole, and all other files as
// placeholders, sparse and of the right size. It is on disk when Lay returns.
func Lay(ctx context.Context, b *repo.Backup, root, dir string, o LayOptions) (LayResult, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return LayResult{}, fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(fd)
	if err := checkHoles(fd); err != nil {
		return LayResult{}, fmt.Errorf("lay %s: %w", dir, err)
	}
	if err := b.Preload(ctx, root); err != nil {
		return LayResult{}, fmt.Errorf("lay %s: %w", dir, err)
	}
	top, err := b.Stat(ctx, root)
	if err != nil {
		return LayResult{}, fmt.Errorf("lay %s: %w", dir, err)
	}
	l := layer{b: b, o: o, root: root, top: fd}
	defer l.scatter()()
	l.g, l.ctx = errgroup.WithContext(ctx)
	l.g.SetLimit(max(2, runtime.NumCPU()))
	l.g.Go(func() error {
		list, err := b.ReadDir(l.ctx, root)
		if err != nil {
			return err
		}
		return l.dir(fd, root, top, list)
	})
	if err := l.g.Wait(); err != nil {
		return LayResult{}, fmt.Errorf("lay %s: %w", dir, err)
	}
	if err := unix.Syncfs(fd); err != nil {
		return LayResult{}, fmt.Errorf("sync the file system of %s: %w", dir, err)
	}
	return LayResult{Files: int(l.files.Load()), LowerBytes: l.lower.Load()}, nil
}

// layer is one run of Lay.
type layer struct {
	b    *repo.Backup
	o    LayOptions
	ctx  context.Context
	g    *errgroup.Group
	root string // in the backup
	top  int    // the directory that root is laid in

	scatters bool // large directories come to lie far from others

	files, lower atomic.Int64
}

// layBatch is how many files of one directory a worker makes: some milliseconds of work.
const layBatch = 256

// spread calls fn in a worker if one is free, here if not.
func (l *layer) spread(wg *sync.WaitGroup, fn func() error) error {
	wg.Add(1)
	if l.g.TryGo(func() error { defer wg.Done(); return fn() }) {
		return nil
	}
	defer wg.Done()
	return fn()
}

// dir makes what the backup's directory name holds, which is list, in the directory fd, and then gives fd the attributes of e,
// for making entries changes a directory's times.
func (l *layer) dir(fd int, name string, e repo.Entry, list *repo.Listing) error {
	var wg sync.WaitGroup
	err := l.entries(&wg, fd, name, list)
	wg.Wait()
	if err != nil {
		return err
	}
	if err := l.attributes(fd, ".", e); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (l *layer) entries(wg *sync.WaitGroup, fd int, name string, list *repo.Listing) error {
	for from := 0; from < list.Len(); from += layBatch {
		err := l.spread(wg, func() error {
			for i := from; i < min(from+layBatch, list.Len()); i++ {
				e := list.At(i)
				if err := l.entry(wg, fd, path.Join(name, e.Name), e); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *layer) entry(wg *sync.WaitGroup, fd int, name string, e repo.Entry) error {
	if err := l.ctx.Err(); err != nil {
		return err
	}
	if l.o.Skip != nil && l.o.Skip(name) {
		return nil
	}
	var err error
	switch {
	case e.IsDir():
		err = l.mkdir(wg, fd, name, e)
	case e.Link != "":
		err = l.symlink(fd, name, e)
	case l.isWhole(name):
		err = l.spread(wg, func() error { return l.file(fd, name, e) })
	default:
		err = l.file(fd, name, e)
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	return nil
}

func (l *layer) mkdir(wg *sync.WaitGroup, parent int, name string, e repo.Entry) error {
	list, err := l.b.ReadDir(l.ctx, name)
	if err != nil {
		return err
	}
	if err := l.makeDir(parent, e.Name, list.Len()); err != nil {
		return err
	}
	fd, err := unix.Openat(parent, e.Name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if o := l.o.Owner; o != nil { // now, so that who may discard it can, however far it comes
		if err := unix.Fchown(fd, int(o.UID), int(o.GID)); err != nil {
			unix.Close(fd)
			return err
		}
	}
	return l.spread(wg, func() error {
		defer unix.Close(fd)
		return l.dir(fd, name, e, list)
	})
}

// scatterLeast is how many entries make a directory large: what they cost is worth a rename.
const scatterLeast = 64

// makeDir makes a directory for so many entries. One that is large is made in top, where the file system chooses a place for it
// by its name.
func (l *layer) makeDir(parent int, at string, entries int) error {
	if !l.scatters || entries < scatterLeast {
		return unix.Mkdirat(parent, at, 0o700)
	}
	made := rand.Text()
	if err := unix.Mkdirat(l.top, made, 0o700); err != nil {
		return err
	}
	return unix.Renameat(l.top, made, parent, at)
}

// topDir is EXT4_TOPDIR_FL, chattr(1)'s T: directories that are made here have nothing to do with each other.
const topDir = 0x20000

// scatter has ext4 put large directories into block groups of their own, until the returned function is called. In a group where many
// files were removed within a minute, an ext4 without a journal looks at each of them before it makes one: to lay a thousand files took
// 0.3 to 0.5 s instead of 0.03 (recently_deleted in fs/ext4/ialloc.c). Other file systems refuse.
func (l *layer) scatter() (end func()) {
	flags, err := unix.IoctlGetUint32(l.top, unix.FS_IOC_GETFLAGS)
	if err != nil || flags&topDir != 0 || unix.IoctlSetPointerInt(l.top, unix.FS_IOC_SETFLAGS, int(flags|topDir)) != nil {
		return func() {}
	}
	l.scatters = true
	return func() { _ = unix.IoctlSetPointerInt(l.top, unix.FS_IOC_SETFLAGS, int(flags)) }
}

func (l *layer) symlink(parent int, name string, e repo.Entry) error {
	target := e.Link
	if l.o.Link != nil {
		target = l.o.Link(name, target)
	}
	if err := unix.Symlinkat(target, parent, e.Name); err != nil {
		return err
	}
	return l.attributes(parent, e.Name, e)
}

// file makes a regular file: whole if its bytes are at hand, if nobody could write to it later or if that was asked for,
// else a placeholder.
func (l *layer) file(parent int, name string, e repo.Entry) error {
	parent, at, err := l.place(parent, name, e)
	if err != nil {
		return err
	}
	fd, err := unix.Openat(parent, at, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	l.files.Add(1)
	content, inline := e.Inline()
	switch {
	case inline:
		_, err = pwriteFull(fd, content, 0)
	case e.Mode.Perm()&0o200 == 0 || l.isWhole(name):
		err = l.copy(fd, name, e)
	default:
		err = l.placeholder(fd, name, e)
	}
	if err != nil {
		return err
	}
	return l.attributes(parent, at, e)
}

func (l *layer) isWhole(name string) bool { return l.o.Whole != nil && l.o.Whole(name) }

// place tells in which directory and by which name a file is made; a moved file's directory is made if need be.
func (l *layer) place(parent int, name string, e repo.Entry) (dirfd int, at string, err error) {
	if l.o.Rename == nil {
		return parent, e.Name, nil
	}
	at = l.o.Rename(name)
	if at == "" || at == name {
		return parent, e.Name, nil
	}
	if err := unix.Mkdirat(l.top, path.Dir(at), 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return 0, "", err
	}
	return l.top, at, nil
}

func (l *layer) placeholder(fd int, name string, e repo.Entry) error {
	if err := unix.Ftruncate(fd, e.Size); err != nil {
		return err
	}
	l.lower.Add(e.Size)
	return placeholder{limit: e.Size, path: name}.write(procPath(fd))
}

// copyPiece is the unit in which zeros are recognized: most of the last WAL segment is.
const copyPiece = 128 << 10

// copy writes a file whole. Where blocks can be had without writing them, zeros are not written, and need not be synced.
func (l *layer) copy(fd int, name string, e repo.Entry) error {
	if e.Size == 0 {
		return nil
	}
	err := unix.Fallocate(fd, 0, 0, e.Size)
	if errors.Is(err, unix.ENOSPC) {
		return err
	}
	if err != nil {
		err = unix.Ftruncate(fd, e.Size)
	}
	if err != nil {
		return err
	}
	return l.b.Gather(l.ctx, []repo.Span{{Path: name, Len: e.Size}}, func(s repo.Span, content []byte) error {
		return writePieces(fd, content, s.Off)
	})
}

var zeroPiece [copyPiece]byte

// writePieces writes p at an offset, where zeros are.
func writePieces(fd int, p []byte, off int64) error {
	for piece := range slices.Chunk(p, copyPiece) {
		if !bytes.Equal(piece, zeroPiece[:len(piece)]) {
			if _, err := pwriteFull(fd, piece, off); err != nil {
				return err
			}
		}
		off += int64(len(piece))
	}
	return nil
}

// attributes gives a file its owner, permissions and time of change. chown(2) clears set-user-ID bits: it comes first.
func (l *layer) attributes(parent int, name string, e repo.Entry) error {
	if o := l.o.Owner; o != nil {
		if err := unix.Fchownat(parent, name, int(o.UID), int(o.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if e.Link == "" {
		if err := unix.Fchmodat(parent, name, uint32(e.Mode.Perm()), 0); err != nil {
			return err
		}
	}
	return setTimes(parent, name, e.ModTime)
}

func setTimes(parent int, name string, modified time.Time) error {
	ts, err := unix.TimeToTimespec(modified)
	if err != nil {
		return err
	}
	return unix.UtimesNanoAt(parent, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}
