package pg

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// majors are those that testdata, which make.sh there makes, has golden files of.
var majors = []string{"15", "16", "17", "18"}

func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(name, ".gz") {
		return b
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	b, err = io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// goldenWAL is the segment of 1 MiB that a server of this major filled, switched out of, and named.
func goldenWAL(t testing.TB, major string) (WALName, []byte) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "wal."+major+".*.gz"))
	if err != nil || len(files) != 1 {
		t.Fatalf("golden WAL of %s: %v, %v", major, files, err)
	}
	file := filepath.Base(files[0])
	name, err := ParseWALName(strings.TrimSuffix(strings.TrimPrefix(file, "wal."+major+"."), ".gz"))
	if err != nil {
		t.Fatal(err)
	}
	return name, golden(t, file)
}

// withinMemory fails when f allocates more than a reader of n bytes has a reason to.
func withinMemory(t *testing.T, n int, f func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	if got, limit := after.TotalAlloc-before.TotalAlloc, uint64(1<<20+64*n); got > limit {
		t.Errorf("%d bytes allocated to read %d", got, n)
	}
}
