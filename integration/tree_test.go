package integration

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// fileState is what must be the same of a file in two copies of a directory.
type fileState struct {
	mode     fs.FileMode
	uid, gid uint32
	size     int64     // of regular files
	modified time.Time // of all but symbolic links
	link     string
	sum      [sha256.Size]byte // of a regular file's bytes
}

// tree reads a directory whole, by path relative to it.
func tree(t *testing.T, dir string) map[string]fileState {
	t.Helper()
	files := map[string]fileState{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		files[name], err = stateOf(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func stateOf(path string) (s fileState, err error) {
	info, err := os.Lstat(path)
	if err != nil {
		return s, err
	}
	st := info.Sys().(*syscall.Stat_t)
	s = fileState{mode: info.Mode(), uid: st.Uid, gid: st.Gid, modified: info.ModTime()}
	switch {
	case s.mode&fs.ModeSymlink != 0:
		s.modified = time.Time{}
		s.link, err = os.Readlink(path)
	case s.mode.IsRegular():
		var content []byte
		content, err = os.ReadFile(path)
		s.size, s.sum = info.Size(), sha256.Sum256(content)
	}
	return s, err
}

// sameTrees fails the test for each path at which two directories differ.
func sameTrees(t *testing.T, got, want map[string]fileState, but ...string) {
	t.Helper()
	names := maps.Clone(want)
	maps.Copy(names, got)
	differ := 0
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if got[name] == want[name] || slices.Contains(but, name) {
			continue
		}
		if differ++; differ > 20 {
			t.Fatal("and more")
		}
		t.Errorf("%s is %s, want %s", name, got[name], want[name])
	}
}

func (s fileState) String() string {
	if s == (fileState{}) {
		return "absent"
	}
	return fmt.Sprintf("%v %d:%d %d bytes of %v %q sum %x", s.mode, s.uid, s.gid, s.size, s.modified, s.link, s.sum[:4])
}
