package fusefs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
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
		tree.file(fmt.Sprintf("pgdata/%d", i), 0o600, bytes.Clone(content))
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
		var others sync.WaitGroup
		tried := make(chan struct{}, openers*attempts)
		for range openers {
			others.Go(func() { openAgain(t, name, tried) })
		}
		for range openers {
			<-tried
		}
		f.Close()
		others.Wait()
	}
	expectQuiet(t, v.c)
}

const attempts = 25

// openAgain opens and closes a file that often, without a look at it.
func openAgain(t *testing.T, name string, tried chan<- struct{}) {
	for range attempts {
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		tried <- struct{}{}
		if err != nil {
			t.Errorf("open %s: %v", name, err)
			return
		}
		unix.Close(fd)
	}
}
