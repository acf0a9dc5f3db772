package recovery

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"

	"pgthaw/repo"
)

// scratch is a temporary directory in which a backup is thawed, for whoever makes an image. Its lock tells that this process lives.
type scratch struct {
	dir  string
	lock *os.File
}

const (
	scratchPrefix = "pgthaw-image-"
	scratchLock   = "lock"
)

func newScratch(parent string) (*scratch, error) {
	if parent == "" {
		parent = os.TempDir()
	}
	dir, err := os.MkdirTemp(parent, scratchPrefix)
	if err == nil {
		dir, err = canonical(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTargetDir, err)
	}
	s := &scratch{dir: dir}
	if err = os.Chmod(dir, 0o711); err == nil { // the server's user has to get at what lies in it
		err = s.take()
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, nil
}

// take locks the directory, or finds that its maker lives.
func (s *scratch) take() (err error) {
	s.lock, err = os.OpenFile(filepath.Join(s.dir, scratchLock), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return errors.Join(err, s.lock.Close())
	}
	return nil
}

func (s *scratch) data() string    { return filepath.Join(s.dir, "pgdata") }
func (s *scratch) sockets() string { return filepath.Join(s.dir, "s") }

func (s *scratch) makeSockets(o owner) error {
	err := os.Mkdir(s.sockets(), 0o700)
	if err == nil && o.foreign() {
		err = os.Lchown(s.sockets(), o.uid, o.gid)
	}
	return err
}

// tablespaces gives each a place beside the data directory.
func (s *scratch) tablespaces(m *repo.Manifest) map[string]string {
	places := map[string]string{}
	for _, t := range m.Tablespaces {
		if !t.InPlace {
			places[t.Path] = filepath.Join(s.dir, strconv.FormatUint(uint64(t.OID), 10))
		}
	}
	return places
}

// remove throws the thawed directory away, and then its surroundings: nothing is removed through a mount.
func (s *scratch) remove(ctx context.Context) error {
	defer s.lock.Close()
	if err := Discard(ctx, s.data()); err != nil && !errors.Is(err, ErrNoOverlay) && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.RemoveAll(s.dir)
}

// sweep removes what makers of images left who were killed. Only this user's own is looked at.
func (k *imageMaker) sweep(ctx context.Context) {
	parent := k.o.Scratch
	if parent == "" {
		parent = os.TempDir()
	}
	all, err := os.ReadDir(parent)
	if err != nil {
		return // what is wrong with it, the next step says
	}
	for _, e := range slices.DeleteFunc(all, func(e os.DirEntry) bool { return !isScratch(e) }) {
		s := &scratch{dir: filepath.Join(parent, e.Name())}
		if s.take() != nil {
			continue // its maker lives
		}
		if err := s.remove(ctx); err != nil {
			k.o.Log.Warn("a temporary directory of an earlier boot image is left", "dir", s.dir, "error", err)
		}
	}
}

func isScratch(e os.DirEntry) bool {
	info, err := e.Info()
	if err != nil || !e.IsDir() || !scratchName.MatchString(e.Name()) {
		return false
	}
	return int(info.Sys().(*syscall.Stat_t).Uid) == os.Geteuid()
}

var scratchName = regexp.MustCompile("^" + scratchPrefix + "[0-9]+$")
