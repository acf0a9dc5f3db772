package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// fewKnown is how many files the kernel may know in these tests.
const fewKnown = 100

// manySmall is a tree with far more files than that.
func manySmall() lowerTree {
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	tree.dir("pgdata/base", 0o700)
	tree.dir("pgdata/pg_wal", 0o700)
	for i := range 40 {
		tree.file(fmt.Sprintf("pgdata/pg_wal/%d", i), 0o600, fmt.Appendf(nil, "%d", i))
	}
	for d, files := range []int{500, 150, 150} {
		tree.dir(fmt.Sprintf("pgdata/base/%d", d), 0o700)
		for i := range files {
			tree.file(fmt.Sprintf("pgdata/base/%d/%d", d, i), 0o600, fmt.Appendf(nil, "%d of %d", i, d))
		}
	}
	return tree
}

// TestFewDescriptors goes through more files than the kernel may know: none is refused, all are right, and the descriptors
// stay within the bound.
func TestFewDescriptors(t *testing.T) {
	tree := manySmall()
	v := thaw(t, tree, OverlayOptions{Passthrough: true, FillOnRead: true, KnownFiles: fewKnown})
	stop, watched := make(chan struct{}), make(chan int)
	go func() { watched <- v.c.mostDescriptors(stop) }()
	var g errgroup.Group
	for range 3 {
		g.Go(func() error { return lookAtAll(v.dir) })
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	close(stop)
	if most := <-watched; most < fewKnown/2 || most > 2*fewKnown+otherFiles {
		t.Errorf("the mount had up to %d descriptors", most)
	}
	checkOverlay(t, v.dir, tree.under("pgdata"))
	if s := v.do("hydrate"); !s.Whole {
		t.Errorf("hydrated %+v", s)
	}
	checkOverlay(t, v.dir, tree.under("pgdata"))
	v.do("unmount")
	checkOverlay(t, v.dir, tree.under("pgdata"))
	expectQuiet(t, v.c)
}

// lookAtAll does what "ls -lR" does.
func lookAtAll(dir string) error {
	return filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil {
			_, err = e.Info()
		}
		return err
	})
}

// mostDescriptors counts a child's until stop is closed.
func (c *child) mostDescriptors(stop <-chan struct{}) (most int) {
	for {
		all, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.cmd.Process.Pid))
		most = max(most, len(all))
		select {
		case <-stop:
			return most
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// TestFewDescriptorsAllOpen: who has too many files open is told, as by any file system, and nothing else suffers.
func TestFewDescriptorsAllOpen(t *testing.T) {
	v := thaw(t, manySmall(), OverlayOptions{Passthrough: true, KnownFiles: fewKnown})
	var open []*os.File
	var err error
	for i := 0; i < 500 && err == nil; i++ {
		var f *os.File
		if f, err = os.OpenFile(filepath.Join(v.dir, "base/0", fmt.Sprint(i)), os.O_RDWR, 0); err == nil {
			open = append(open, f)
		}
	}
	if !errors.Is(err, unix.ENFILE) || len(open) < fewKnown*3/4 || len(open) > fewKnown {
		t.Errorf("%d files could be opened, then: %v", len(open), err)
	}
	if err := os.WriteFile(filepath.Join(v.dir, "new"), nil, 0o600); !errors.Is(err, unix.ENFILE) {
		t.Errorf("a new file beside them: %v", err)
	}
	for i, f := range open {
		want := fmt.Appendf(nil, "%d of 0", i)
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s holds %q, %v", f.Name(), got, err)
		}
		f.Close()
	}
	eventually(t, "files can be opened again", func() bool {
		return os.WriteFile(filepath.Join(v.dir, "new"), []byte("new"), 0o600) == nil
	})
	if err := lookAtAll(v.dir); err != nil {
		t.Error(err)
	}
	expectQuiet(t, v.c)
}

// TestMemoryOfKnownFiles counts what a mount takes for each file that the kernel knows, garbage among it.
func TestMemoryOfKnownFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("makes very many files")
	}
	const files, most = 10_000, 2 << 10 // the last in bytes
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	for i := range files {
		tree.file(fmt.Sprintf("pgdata/%d", i), 0o600, []byte("some"))
	}
	v := thaw(t, tree, OverlayOptions{Passthrough: true, FillOnRead: true})
	before := v.c.resident(t)
	if err := lookAtAll(v.dir); err != nil {
		t.Fatal(err)
	}
	took := v.c.resident(t) - before
	t.Logf("a file takes %d bytes", took/files)
	if took > files*most {
		t.Errorf("%d files take %d bytes", files, took)
	}
}

// resident is what a child has in memory, bytes.
func (c *child) resident(t *testing.T) int64 {
	t.Helper()
	// proc_pid_statm(5): the second number, in pages.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", c.cmd.Process.Pid))
	var total, pages int64
	if err == nil {
		_, err = fmt.Sscan(string(text), &total, &pages)
	}
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}
