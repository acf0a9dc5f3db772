package fusefs

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOpensWhileFileBecomesWhole: files become whole while somebody has them open and others come and go. The kernel answers EIO to who
// comes with a mode that does not suit those that it knows by then.
func TestOpensWhileFileBecomesWhole(t *testing.T) {
	const files, size, openers = 120, smallFile + 8192, 4
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	content := make([]byte, size)
	for i := range files {
		content[0] = byte(i)
		tree.file(fmt.Sprintf("pgdata/%d", i), 0o600, append([]byte(nil), content...))
	}
	v := thaw(t, tree, OverlayOptions{Passthrough: true, FillOnRead: true})
	buf := make([]byte, size)
	for i := range files {
		name := filepath.Join(v.dir, fmt.Sprint(i))
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(buf, 0); err != nil {
			t.Fatal(err)
		}
		var opened atomic.Int64
		var others sync.WaitGroup
		for range openers {
			others.Go(func() { openAgain(t, name, &opened) })
		}
		for opened.Load() < openers {
		}
		f.Close()
		others.Wait()
	}
	expectQuiet(t, v.c)
}

// openAgain opens and closes a file some times, without a look at it.
func openAgain(t *testing.T, name string, opened *atomic.Int64) {
	for range 25 {
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Errorf("open %s: %v", name, err)
			return
		}
		opened.Add(1)
		unix.Close(fd)
	}
}
