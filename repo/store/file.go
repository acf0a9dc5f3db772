package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
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
// CIFS do. It may be absent, and then holds nothing; the first Put makes it.
type File struct {
	root string

	mu     sync.Mutex
	synced map[string]bool // directories that this process made sure are durable
	swept  bool            // leftovers in tmp were looked for
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

func (s *File) Put(ctx context.Context, key string, body []byte) error {
	if err := errors.Join(checkKey(key), ctx.Err()); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	if err := s.createDurably(ctx, s.path(key), body); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	return nil
}

// createDurably makes the file path with body in it, or gives ErrExist; either way the file that is then there survives a
// power cut. These are its system calls, and why it takes them all:
//
//	mkdir(2), fsync(2) of the parent  for each missing directory, downwards: a name is durable when its directory was synced
//	open(tmp/X, O_CREAT|O_EXCL)       nobody sees the bytes before all of them are there
//	write(2), fsync(2) of the file    the bytes are durable before the name exists
//	link(tmp/X, path)                 atomic, and refused with EEXIST where rename(2) would replace
//	unlink(tmp/X)                     if we die before, tmp/X is a second name of the object, which harms nobody
//	fsync(2) of path's directory      the name is durable; after EEXIST too, for the winner may not have come this far
//
// Where the file system has no hard links, renameat2(RENAME_NOREPLACE) stands for link and unlink. An fsync that fails
// is an error and is not tried again: Linux may have dropped the dirty pages and would answer the second one with success.
func (s *File) createDurably(ctx context.Context, path string, body []byte) (err error) {
	dir := filepath.Dir(path)
	if err := errors.Join(s.ensureDir(dir), s.ensureDir(filepath.Join(s.root, tmpPart))); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Join(s.root, tmpPart), "put-*") // O_EXCL, mode 0600
	if err != nil {
		return err
	}
	s.sweepOnce(f)
	err = errors.Join(s.takeAfterRoot(f, 0o600, 0o044), writeSynced(ctx, f, body), f.Close())
	if err == nil {
		err = publish(f.Name(), path)
	}
	os.Remove(f.Name()) // absent after a rename; a leftover is harmless, so its error changes nothing
	if err != nil && !errors.Is(err, ErrExist) {
		return err
	}
	if syncErr := syncDir(dir); syncErr != nil {
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

// publish gives the file tmp the name path, or ErrExist. tmp may keep its own name.
func publish(tmp, path string) error {
	err := os.Link(tmp, path)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST):
		// link(2): "On NFS filesystems, the return code may be wrong in case the NFS server performs the link creation
		// and dies before it can say so. Use stat(2) to find out if the link got created."
		if linked(tmp) {
			return nil
		}
		return ErrExist
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
		return renameNew(tmp, path)
	default:
		return err
	}
}

func linked(path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Nlink == 2
}

func renameNew(tmp, path string) error {
	err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return ErrExist
	}
	return os.NewSyscallError("renameat2", err)
}

// ensureDir makes dir and whatever above it is missing, and syncs the names of all up to the root, once in this process:
// a directory that is there already may have been made a moment ago by a process that has yet to sync it.
func (s *File) ensureDir(dir string) error {
	s.mu.Lock()
	done := s.synced[dir]
	s.mu.Unlock()
	if done {
		return nil
	}
	if err := s.makeDir(dir); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.synced[dir] = true
	return nil
}

func (s *File) makeDir(dir string) error {
	parent := filepath.Dir(dir)
	below := strings.HasPrefix(dir, s.root+"/")
	if below {
		if err := s.ensureDir(parent); err != nil {
			return err
		}
	}
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.ensureDir(parent); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o700)
	}
	made := err == nil
	if !made && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if made && below {
		if err := s.adoptDir(dir); err != nil {
			return err
		}
	}
	err = syncDir(parent)
	if !made && !below && errors.Is(err, fs.ErrPermission) {
		return nil // somebody else's directory, made before us
	}
	return err
}

// takeAfterRoot gives what was just made the permissions own, and of the root directory's those in mask; if root made it,
// the root directory's owner, too. It is not fatal where a file system knows no owners.
func (s *File) takeAfterRoot(f *os.File, own, mask fs.FileMode) error {
	info, err := os.Stat(s.root)
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

func (s *File) adoptDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(s.takeAfterRoot(d, 0o700, 0o077), d.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// sweepOnce removes what crashed Puts left in tmp. fresh is a file made there just now: its time is the medium's clock.
func (s *File) sweepOnce(fresh *os.File) {
	s.mu.Lock()
	swept := s.swept
	s.swept = true
	s.mu.Unlock()
	now, err := fresh.Stat()
	if swept || err != nil {
		return
	}
	dir := filepath.Dir(fresh.Name())
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if info, err := e.Info(); err == nil && now.ModTime().Sub(info.ModTime()) > leftoverAge {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

func (s *File) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	if err := errors.Join(checkKey(key), ctx.Err()); err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	b, err := readRange(s.path(key), off, n)
	if absent(err) {
		err = ErrNotExist
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	return b, nil
}

func readRange(path string, off, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
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
		err := s.list(ctx, "", prefix, yield)
		if err != nil && err != errStop {
			yield(Object{}, fmt.Errorf("list %s: %w", prefix, err))
		}
	}
}

// errStop says that yield wants no more.
var errStop = errors.New("stop")

// list yields the objects below the directory dir, which is empty or ends with "/".
func (s *File) list(ctx context.Context, dir, prefix string, yield func(Object, error) bool) error {
	entries, err := os.ReadDir(s.path(dir))
	if err != nil && !absent(err) {
		return err
	}
	// Byte order of keys, not of names: a-b comes before a/c, and so before the directory a.
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(keyPart(a), keyPart(b)) })
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.listEntry(ctx, dir+keyPart(e), e, prefix, yield); err != nil {
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

func (s *File) listEntry(ctx context.Context, key string, e fs.DirEntry, prefix string, yield func(Object, error) bool) error {
	if e.IsDir() {
		wanted := strings.HasPrefix(key, prefix) || strings.HasPrefix(prefix, key)
		if !wanted || key == tmpPart+"/" {
			return nil
		}
		return s.list(ctx, key, prefix, yield)
	}
	if !e.Type().IsRegular() || !strings.HasPrefix(key, prefix) {
		return nil
	}
	info, err := e.Info()
	if absent(err) {
		return nil // deleted since ReadDir
	}
	if err != nil {
		return err
	}
	if !yield(Object{Key: key, Size: info.Size(), Modified: info.ModTime()}, nil) {
		return errStop
	}
	return nil
}

func (s *File) Delete(ctx context.Context, key string) error {
	if err := errors.Join(checkKey(key), ctx.Err()); err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	path := s.path(key)
	err := unix.Unlink(path) // os.Remove would take an empty directory too
	if absent(err) || errors.Is(err, unix.EISDIR) {
		return nil
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	return nil
}
