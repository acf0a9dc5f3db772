package recovery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo"
)

// manyFiles makes a backup of very many files, size bytes each, and a restore of it that has been checked.
func manyFiles(t testing.TB, files, databases, size int) *job {
	t.Helper()
	ctx := t.Context()
	dir := t.TempDir()
	r, err := repo.Init(ctx, filepath.Join(dir, "repo"), repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.BindCluster(ctx, "main", 1, 16<<20); err != nil {
		t.Fatal(err)
	}
	m, err := r.WriteBackup(ctx, "main", repo.BackupOptions{}, func(_ context.Context, w *repo.BackupWriter) (repo.Manifest, error) {
		err := errors.Join(makeDir(w, "pgdata"), makeDir(w, "pgdata/global"), makeDir(w, "pgdata/base"), makeFile(w, "pgdata/global/pg_control", size, 0))
		for i := 0; i < files && err == nil; i++ {
			dir := fmt.Sprintf("pgdata/base/%d", i%databases)
			if i < databases {
				err = makeDir(w, dir)
			}
			err = errors.Join(err, makeFile(w, fmt.Sprintf("%s/%d", dir, i), size, i))
		}
		return repo.Manifest{SystemIdentifier: 1, SegmentSize: 16 << 20}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err = repo.Open(ctx, r.URL(), repo.Options{}); err != nil { // with empty caches
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	o := owner{uid: os.Geteuid(), gid: os.Getegid()}
	return &job{r: r, route: Route{Manifest: m}, backup: r.OpenBackup(m), owner: o, roots: []root{{Path: "pgdata", Dir: filepath.Join(dir, "copy"), Made: true}}}
}

func makeDir(w *repo.BackupWriter, name string) error {
	return w.Mkdir(name, repo.Entry{Mode: 0o700, ModTime: time.Unix(1_700_000_000, 0)})
}

func makeFile(w *repo.BackupWriter, name string, size, salt int) error {
	f, err := w.Create(name, repo.Entry{Mode: 0o600, Size: int64(size), ModTime: time.Unix(1_700_000_000, 0)}, true)
	if err != nil {
		return err
	}
	content := make([]byte, size)
	for k := 0; k+8 <= min(size, 400); k += 8 { // what does not compress
		binary.LittleEndian.PutUint64(content[k:], uint64(salt*1000+k)*0x9e3779b97f4a7c15)
	}
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.Close()
}

// TestMemoryOfManyFiles counts what a restore keeps of each file: nothing but the listing of the directory it is in.
func TestMemoryOfManyFiles(t *testing.T) {
	const files, databases, size, most = 60_000, 10, 16, 60 // the last in bytes
	j := manyFiles(t, files, databases, size)
	seen, n := make([]bool, files), 0
	before := liveHeap()
	c, err := j.collect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(files+1) * size; c.total != want || len(c.dirs) != databases+2 {
		t.Errorf("%d bytes in %d directories, want %d", c.total, len(c.dirs), want)
	}
	parts := make(chan part)
	g, ctx := errgroup.WithContext(t.Context())
	g.Go(func() error {
		defer close(parts)
		return c.sendParts(ctx, parts)
	})
	for p := range parts {
		i, err := strconv.Atoi(path.Base(p.file.to))
		if err != nil || seen[i] {
			t.Errorf("%s, %v", p.file.to, err)
		}
		seen[i] = true
		if n++; n == files/2 {
			took := liveHeap() - before
			t.Logf("a file takes %d bytes", took/files)
			if took > files*most {
				t.Errorf("%d files take %d bytes", files, took)
			}
		}
	}
	if err := g.Wait(); err != nil || n != files {
		t.Errorf("%d files, %v", n, err)
	}
	runtime.KeepAlive(c)
}

// liveHeap is what is reachable, in bytes.
func liveHeap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools held
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkRestoreManyFiles tells the peak of resident memory while a million files are restored:
//
//	go test -run '^$' -bench RestoreManyFiles -benchtime 1x ./recovery
func BenchmarkRestoreManyFiles(b *testing.B) {
	for _, databases := range []int{1, 4, 4000} {
		j := manyFiles(b, 1_000_000, databases, 8192)
		b.Run(fmt.Sprintf("of %d databases", databases), func(b *testing.B) {
			for b.Loop() {
				debug.FreeOSMemory()
				// proc(5): the peak is counted anew.
				if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
					b.Fatal(err)
				}
				c, err := j.collect(b.Context())
				if err == nil {
					err = j.writeAll(b.Context(), c)
				}
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(peakMemory(b)>>20), "peak-MiB")
				if err := os.RemoveAll(j.dir()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// peakMemory is the most that this process had in memory, in bytes.
func peakMemory(t testing.TB) int64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	kB, err := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kB << 10
}
