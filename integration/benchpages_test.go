//go:build bench

package integration

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// changedPages compares two restored clusters page by page: how many pages differ, of how many, and what the
// differing ones take when they are compressed together in pieces of 128 KiB.
func changedPages(t *testing.T, before, after string) (changed, total int, compressed int64) {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	var pending []byte
	flush := func() {
		compressed += int64(len(enc.EncodeAll(pending, nil)))
		pending = pending[:0]
	}
	err = filepath.WalkDir(after, func(name string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.Contains(name, "pg_wal") {
			return err
		}
		return comparePages(filepath.Join(before, strings.TrimPrefix(name, after)), name, func(page []byte, same bool) {
			total++
			if same {
				return
			}
			changed++
			if pending = append(pending, page...); len(pending) >= 128<<10 {
				flush()
			}
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	flush()
	return changed, total, compressed
}

func comparePages(before, after string, fn func(page []byte, same bool)) error {
	was, err := os.Open(before)
	if err != nil {
		was = nil
	} else {
		defer was.Close()
	}
	now, err := os.Open(after)
	if err != nil {
		return err
	}
	defer now.Close()
	a, b := make([]byte, 8192), make([]byte, 8192)
	for {
		n, err := io.ReadFull(now, b)
		if n > 0 {
			m := 0
			if was != nil {
				m, _ = io.ReadFull(was, a)
			}
			fn(b[:n], bytes.Equal(a[:m], b[:n]))
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// dropCache forgets what the kernel has cached of a file.
func dropCache(f *os.File) error { return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }
