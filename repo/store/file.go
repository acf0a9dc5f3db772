package store

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// File keeps objects as files below one directory, the object a/b as the file a/b. It makes that directory with mode 0700:
// a repository holds everything the database holds. Whom the operator then gives access to it has access to what is made
// in it later: files and directories take after its permissions and, if root makes them, its owner.
//
// The directory must lie on a file system that honours fsync(2) and has link(2) or RENAME_NOREPLACE: local ones, NFS and
// CIFS do. Nothing in it is a symbolic link. It may be absent, and then holds nothing; the first Put makes it. But once an object was read from it, a directory
// that is absent, or does not hold that object, is one whose file system was unmounted: nothing is made in its place, and
// nothing is said to be absent, but everything is ErrOutOfReach. So whoever opens a store reads first what stays in it.
type File struct {
	root string
	kept *kept // nil: no file is kept open

	mu      sync.Mutex
	witness string          // key of the object that was read first; "": none yet
	synced  map[string]bool // directories that this process made sure are durable, named as keys are; "." is the root
	swept   bool            // leftovers in tmp were looked for
}

// leftoverAge is how old a file in tmp must be to be taken for a crashed Put's: no Put of one object lasts a day.
const leftoverAge = 24 * time.Hour

// OpenFile returns the store in dir, an absolute path.
func OpenFile(dir string) (*File, error) {
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		return nil, fmt.Errorf("open store: %s is not a directory", dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open store: %w", err)
	}
	return &File{root: dir, synced: make(map[string]bool)}, nil
}

func (s *File) path(key string) string { return filepath.Join(s.root, filepath.FromSlash(key)) }

// enter opens the root directory: whatever is mounted or unmounted meanwhile, what the caller does by way of it happens in
// one file system, which is the store's. fs.ErrNotExist: there is no store yet.
func (s *File) enter() (*os.Root, error) {
	witness := s.seen("")
	root, err := os.OpenRoot(s.root)
	if err == nil && witness != "" {
		if _, err = root.Lstat(witness); err != nil {
			root.Close()
		}
	}
	if witness != "" && absent(err) {
		return nil, fmt.Errorf("%w: %s is gone, or not the directory it was: is its file system mounted?", ErrOutOfReach, s.root)
	}
	if err != nil {
		return nil, err
	}
	return root, nil
}

// seen says that the object key was read, and returns the one that was read first. "" asks only.
func (s *File) seen(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.witness == "" {
		s.witness = key
	}
	return s.witness
}

func (s *File) Put(ctx context.Context, key string, body []byte) error {
	if err := errors.Join(checkKey(key), ctx.Err()); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	if err := s.createDurably(ctx, key, body); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	return nil
}

// createDurably makes the file key with body in it, or gives ErrExist; either way the file that is then there survives a
// power cut. These are its system calls, and why it takes them all:
//
//	open(2) of the root               and all else from there on: it cannot be unmounted any more, nor anything be made where it was
//	mkdir(2), fsync(2) of the parent  for each missing directory, downwards: a name is durable when its directory was synced
//	open(tmp/X, O_CREAT|O_EXCL)       nobody sees the bytes before all of them are there
//	write(2), fsync(2) of the file    the bytes are durable before the name exists
//	link(tmp/X, key)                  atomic, and refused with EEXIST where rename(2) would replace
//	unlink(tmp/X)                     if we die before, tmp/X is a second name of the object, which harms nobody
//	fsync(2) of the key's directory   the name is durable; after EEXIST too, for the winner may not have come this far
//
// Where the file system has no hard links, renameat2(RENAME_NOREPLACE) stands for link and unlink. An fsync that fails
// is an error and is not tried again: Linux may have dropped the dirty pages and would answer the second one with success.
func (s *File) createDurably(ctx context.Context, key string, body []byte) error {
	if s.seen("") == "" {
		if err := s.makeRoot(s.root); err != nil {
			return err
		}
	}
	root, err := s.enter()
	if err != nil {
		return err
	}
	defer root.Close()
	err = s.create(ctx, root, key, body)
	if absent(err) { // somebody has taken a directory away: the next Put looks again
		s.mu.Lock()
		clear(s.synced)
		s.mu.Unlock()
	}
	return err
}

func (s *File) create(ctx context.Context, root *os.Root, key string, body []byte) error {
	dir := path.Dir(key)
	if err := errors.Join(s.ensureDir(root, dir), s.ensureDir(root, tmpPart)); err != nil {
		return err
	}
	tmp := tmpPart + "/put-" + rand.Text()
	f, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	s.sweepOnce(root, f)
	err = errors.Join(takeAfterRoot(root, f, 0o600, 0o044), writeSynced(ctx, f, body), f.Close())
	if err == nil {
		err = publish(root, tmp, key)
	}
	root.Remove(tmp) // absent after a rename; a leftover is harmless, so its error changes nothing
	if err != nil && !errors.Is(err, ErrExist) {
		return err
	}
	if syncErr := syncDir(root, dir); syncErr != nil {
		return syncErr
	}
	return err
}

// writePiece bounds how long a cancelled ctx goes unnoticed.
const writePiece = 4 << 20

func writeSynced(ctx context.Context, f *os.File, body []byte) error {
	for piece := range slices.Chunk(body, writePiece) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.Write(piece); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return ctx.Err()
}

// publish gives the file tmp the name key, or ErrExist. tmp may keep its own name.
func publish(root *os.Root, tmp, key string) error {
	err := root.Link(tmp, key)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST):
		// link(2): "On NFS filesystems, the return code may be wrong in case the NFS server performs the link creation
		// and dies before it can say so. Use stat(2) to find out if the link got created."
		if linked(root, tmp) {
			return nil
		}
		return ErrExist
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
		return renameNew(root, tmp, key)
	default:
		return err
	}
}

func linked(root *os.Root, name string) bool {
	info, err := root.Lstat(name)
	return err == nil && info.Sys().(*syscall.Stat_t).Nlink == 2
}

func renameNew(root *os.Root, tmp, key string) error {
	from, err := root.Open(path.Dir(tmp))
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := root.Open(path.Dir(key))
	if err != nil {
		return err
	}
	defer to.Close()
	err = unix.Renameat2(int(from.Fd()), path.Base(tmp), int(to.Fd()), path.Base(key), unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return ErrExist
	}
	return os.NewSyscallError("renameat2", err)
}

// once runs make unless it succeeded for dir in this process: a directory that is there already may have been made a
// moment ago by a process that has yet to sync it.
func (s *File) once(dir string, do func() error) error {
	s.mu.Lock()
	done := s.synced[dir]
	s.mu.Unlock()
	if done {
		return nil
	}
	if err := do(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.synced[dir] = true
	return nil
}

// ensureDir makes the directory dir below the root, and whatever above it is missing, and syncs the names of all.
func (s *File) ensureDir(root *os.Root, dir string) error {
	if dir == "." {
		return nil
	}
	return s.once(dir, func() error {
		if err := s.ensureDir(root, path.Dir(dir)); err != nil {
			return err
		}
		err := root.Mkdir(dir, 0o700)
		if err == nil {
			err = adoptDir(root, dir)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return syncDir(root, path.Dir(dir))
	})
}

// makeRoot makes the root, or a directory above it, and syncs the names of all on the way to it: dir is a path.
func (s *File) makeRoot(dir string) error {
	return s.once(dir, func() error {
		parent := filepath.Dir(dir)
		if parent == dir {
			return nil
		}
		if err := s.makeRoot(parent); err != nil {
			return err
		}
		err := os.Mkdir(dir, 0o700)
		made := err == nil
		if info, statErr := os.Stat(dir); !made && (statErr != nil || !info.IsDir()) {
			return err
		}
		err = syncPath(parent)
		if !made && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EROFS)) {
			return nil // somebody else's directory, made before us
		}
		return err
	})
}

// takeAfterRoot gives what was just made the permissions own, and of the root directory's those in mask; if root made it,
// the root directory's owner, too. It is not fatal where a file system knows no owners.
func takeAfterRoot(root *os.Root, f *os.File, own, mask fs.FileMode) error {
	info, err := root.Stat(".")
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	if os.Geteuid() == 0 && (st.Uid != 0 || st.Gid != 0) {
		if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil && !errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	if mode := own | info.Mode().Perm()&mask; mode != own {
		return f.Chmod(mode)
	}
	return nil
}

// owner is who owns what this process puts.
func (s *File) owner() (uid int, err error) {
	info, err := os.Stat(s.root)
	if os.Geteuid() != 0 || errors.Is(err, fs.ErrNotExist) {
		return os.Geteuid(), nil
	}
	if err != nil {
		return 0, err
	}
	return int(info.Sys().(*syscall.Stat_t).Uid), nil
}

func adoptDir(root *os.Root, dir string) error {
	d, err := root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(takeAfterRoot(root, d, 0o700, 0o077), d.Close())
}

func syncDir(root *os.Root, dir string) error {
	d, err := root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func syncPath(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// sweepOnce removes what crashed Puts left in tmp. fresh is a file made there just now: its time is the medium's clock.
func (s *File) sweepOnce(root *os.Root, fresh *os.File) {
	s.mu.Lock()
	swept := s.swept
	s.swept = true
	s.mu.Unlock()
	now, err := fresh.Stat()
	if swept || err != nil {
		return
	}
	entries, _ := fs.ReadDir(root.FS(), tmpPart)
	for _, e := range entries {
		name := tmpPart + "/" + e.Name()
		if info, err := root.Lstat(name); err == nil && now.ModTime().Sub(info.ModTime()) > leftoverAge {
			root.Remove(name)
		}
	}
}

func (s *File) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	if err := errors.Join(checkKey(key), ctx.Err()); err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	b, err := s.read(key, off, n)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	s.seen(key)
	return b, nil
}

func (s *File) read(key string, off, n int64) ([]byte, error) {
	f, err := os.Open(s.path(key))
	if absent(err) {
		f, err = s.openAgain(key)
	}
	if absent(err) {
		return nil, ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	b, err := readRange(f, off, n)
	if s.kept != nil && err == nil && n >= 0 {
		s.kept.keep(key, f)
	} else {
		f.Close()
	}
	return b, err
}

// KeepOpen has parts of objects ready for Cached. It is for a store that is read often, by few; Close ends it.
func (s *File) KeepOpen() { s.kept = &kept{} }

// Cached is Get for what lies in memory: it never waits for the medium. false: Get has to be asked.
func (s *File) Cached(key string, off, n int64) ([]byte, bool) {
	if s.kept == nil || n < 0 {
		return nil, false
	}
	return s.kept.read(key, off, n)
}

// Close closes what is kept open. The store can still be used.
func (s *File) Close() error {
	if s.kept != nil {
		s.kept.release(func(string, keptFile) bool { return true })
	}
	return nil
}

// openAgain opens what seems to be absent in a directory that is sure to be the store's.
func (s *File) openAgain(key string) (*os.File, error) {
	root, err := s.enter()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return root.Open(key)
}

func readRange(f *os.File, off, n int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, ErrNotExist
	}
	start, length, err := extent(info.Size(), off, n)
	if err != nil {
		return nil, err
	}
	b := make([]byte, length)
	if _, err := f.ReadAt(b, start); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF // truncated since Stat
		}
		return nil, err
	}
	return b, nil
}

// absent holds for the errors of a path that names nothing: ENOTDIR is a/b where a is a file.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

func (s *File) List(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		err := s.listFrom(ctx, prefix, yield)
		if err != nil && err != errStop {
			yield(Object{}, fmt.Errorf("list %s: %w", prefix, err))
		}
	}
}

// errStop says that yield wants no more.
var errStop = errors.New("stop")

func (s *File) listFrom(ctx context.Context, prefix string, yield func(Object, error) bool) error {
	root, err := s.enter()
	if absent(err) {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	defer root.Close()
	return listDir(ctx, root, "", prefix, yield)
}

// listDir yields the objects below the directory dir, which is empty or ends with "/".
func listDir(ctx context.Context, root *os.Root, dir, prefix string, yield func(Object, error) bool) error {
	d, err := root.Open(path.Clean(dir))
	if absent(err) {
		return nil // removed since its parent was read
	}
	if err != nil {
		return err
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return err
	}
	// Byte order of keys, not of names: a-b comes before a/c, and so before the directory a.
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(keyPart(a), keyPart(b)) })
	for _, e := range entries {
		err := ctx.Err()
		switch key := dir + keyPart(e); {
		case err != nil:
		case e.IsDir() && key != tmpPart+"/" && (strings.HasPrefix(key, prefix) || strings.HasPrefix(prefix, key)):
			err = listDir(ctx, root, key, prefix, yield)
		case e.Type().IsRegular() && strings.HasPrefix(key, prefix):
			err = listFile(d, key, yield)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// keyPart is e's name as it stands in a key.
func keyPart(e fs.DirEntry) string {
	if e.IsDir() {
		return e.Name() + "/"
	}
	return e.Name()
}

// listFile yields a file in the directory d. Not DirEntry.Info, which goes by the directory's path.
func listFile(d *os.File, key string, yield func(Object, error) bool) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(d.Fd()), path.Base(key), &st, unix.AT_SYMLINK_NOFOLLOW)
	if absent(err) {
		return nil // deleted since it was read
	}
	if err != nil {
		return &fs.PathError{Op: "fstatat", Path: key, Err: err}
	}
	if !yield(Object{Key: key, Size: st.Size, Modified: time.Unix(st.Mtim.Unix())}, nil) {
		return errStop
	}
	return nil
}

func (s *File) Delete(ctx context.Context, key string) error {
	if err := errors.Join(checkKey(key), ctx.Err()); err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	if err := s.removeDurably(key); err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.witness == key {
		s.witness = ""
	}
	return nil
}

// removeDurably syncs the directory of an absent file, too: who removed it may have died before.
func (s *File) removeDurably(key string) error {
	root, err := s.enter()
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	d, err := root.Open(path.Dir(key))
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	err = unix.Unlinkat(int(d.Fd()), path.Base(key), 0) // os.Remove would take an empty directory too
	if err != nil && !absent(err) && !errors.Is(err, unix.EISDIR) {
		return os.NewSyscallError("unlinkat", err)
	}
	return d.Sync()
}
