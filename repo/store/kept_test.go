package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCached: what was read a moment ago can be had at once as long as it is the object's, and no file stays open for it.
func TestCached(t *testing.T) {
	dir := t.TempDir()
	needsNowait(t, dir)
	s, err := OpenFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.KeepOpen()
	const objects = keptFiles + 8
	body := func(i int) []byte { return bytes.Repeat([]byte{byte(i + 1)}, 10_000) }
	key := func(i int) string { return fmt.Sprintf("packs/%02d", i) }
	for i := range objects {
		if err := s.Put(t.Context(), key(i), body(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := s.Cached(key(0), 0, 100); ok {
		t.Error("it has what was never read")
	}
	for i := range objects {
		if _, err := s.Get(t.Context(), key(i), 0, 1); err != nil {
			t.Fatal(err)
		}
	}
	if n := openBelow(t, dir); n != keptFiles {
		t.Errorf("%d files are open", n)
	}
	last := objects - 1
	if b, ok := s.Cached(key(last), 5_000, 3_000); !ok || !bytes.Equal(b, body(last)[5_000:8_000]) {
		t.Errorf("%d bytes, %v", len(b), ok)
	}
	for _, at := range [][2]int64{{9_000, 1_001}, {20_000, 1}, {0, -1}} {
		if _, ok := s.Cached(key(last), at[0], at[1]); ok {
			t.Errorf("it has %d bytes from %d", at[1], at[0])
		}
	}

	if err := s.Delete(t.Context(), key(last)); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), key(last), body(200)); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Cached(key(last), 0, 100); ok {
		t.Error("it has what was deleted")
	}
	if b, err := s.Get(t.Context(), key(last), 0, 100); err != nil || !bytes.Equal(b, body(200)[:100]) {
		t.Errorf("another object of the name: %v, %v", b[:1], err)
	}
	if b, ok := s.Cached(key(last), 0, 100); !ok || !bytes.Equal(b, body(200)[:100]) {
		t.Errorf("another object of the name: %v", ok)
	}

	for deadline := time.Now().Add(20 * keptFor); openBelow(t, dir) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d files are still open", openBelow(t, dir))
		}
	}
	if _, err := s.Get(t.Context(), key(0), 0, 1); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil || openBelow(t, dir) > 0 {
		t.Errorf("after Close %d files are open, %v", openBelow(t, dir), err)
	}
}

// needsNowait skips a test where the file system cannot tell what is in memory.
func needsNowait(t *testing.T, dir string) {
	t.Helper()
	name := filepath.Join(dir, "probe")
	if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(name)
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := unix.Preadv2(int(f.Fd()), [][]byte{make([]byte, 1)}, 0, unix.RWF_NOWAIT); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("no RWF_NOWAIT here")
	}
}

// openBelow counts this process's descriptors of files in a directory.
func openBelow(t *testing.T, dir string) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(target, dir+"/") {
			n++
		}
	}
	return n
}
