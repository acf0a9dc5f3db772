package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"strings"
	"testing"
	"time"
)

// writing runs fn on a writer whose tree has the directories pgdata and pgdata/base/5.
func writing(t testing.TB, r *Repository, prior *Backup, fn func(w *BackupWriter) error) (*Backup, error) {
	t.Helper()
	m, err := r.WriteBackup(t.Context(), "main", BackupOptions{Prior: prior}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		if err := makeParents(w, "pgdata/base/5", map[string]bool{".": true}); err != nil {
			return Manifest{}, err
		}
		return testManifest(), fn(w)
	})
	if err != nil {
		return nil, err
	}
	return r.OpenBackup(m), nil
}

// put writes a file; size is what is announced.
func put(w *BackupWriter, name string, content []byte, size int64) error {
	e := testEntry(content)
	e.Size = size
	f, err := w.Create(name, e, true)
	if err != nil {
		return err
	}
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.Close()
}

// TestUnknownSize writes files whose size nobody announced: they are stored as any other.
func TestUnknownSize(t *testing.T) {
	r := newTestRepository(t)
	files := testFiles{}
	for _, size := range []int{0, 1, maxInline, maxInline + 1, PageSize, ChunkSize - 1, ChunkSize, ChunkSize + 1, 40*ChunkSize - 7} {
		files[fmt.Sprintf("pgdata/%d", size)] = pagesOf(uint64(size), 640)[:size]
	}
	known := writeTestBackup(t, r, files, nil)
	unknown, err := writing(t, r, nil, func(w *BackupWriter) error {
		for name, content := range files {
			if err := put(w, name, content, UnknownSize); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	checkFiles(t, unknown, files)
	for name := range files {
		want, err := known.Stat(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		got, err := unknown.Stat(t.Context(), name)
		if err != nil || got.Size != want.Size || got.content.kind != want.content.kind || !got.ModTime.Equal(want.ModTime) {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
	}
	if unknown.Manifest.Files != len(files) || unknown.Manifest.SizeBytes != known.Manifest.SizeBytes {
		t.Errorf("%d files of %d bytes", unknown.Manifest.Files, unknown.Manifest.SizeBytes)
	}
}

func TestSetModTime(t *testing.T) {
	at := time.Unix(1_700_000_777, 0)
	b, err := writing(t, newTestRepository(t), nil, func(w *BackupWriter) error {
		f, err := w.Create("pgdata/backup_manifest", Entry{Mode: 0o600, Size: UnknownSize}, false)
		if err != nil {
			return err
		}
		if _, err := f.ReadFrom(bytes.NewReader(pagesOf(1, 100))); err != nil {
			return err
		}
		f.SetModTime(at)
		return f.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := b.Stat(t.Context(), "pgdata/backup_manifest"); err != nil || !e.ModTime.Equal(at) {
		t.Errorf("%v, %v", e.ModTime, err)
	}
}

// TestCloseDir closes directories early: the backup is the same, but nothing can come into them any more.
func TestCloseDir(t *testing.T) {
	r := newTestRepository(t)
	want := testFiles{"pgdata/base/5/1": pagesOf(1, 1000), "pgdata/base/5/2": []byte("15\n"), "pgdata/base/5/below/3": pagesOf(3, 20), "pgdata/late": {}}
	var prior *Backup
	for range 2 {
		b, err := writing(t, r, prior, func(w *BackupWriter) error {
			err := w.Mkdir("pgdata/base/5/below", Entry{Mode: 0o700, ModTime: time.Unix(1_700_000_000, 0)})
			for _, name := range []string{"pgdata/base/5/1", "pgdata/base/5/2"} {
				err = errors.Join(err, put(w, name, want[name], int64(len(want[name]))))
			}
			err = errors.Join(err, w.CloseDir("pgdata/base/5"))
			if put(w, "pgdata/base/5/4", nil, 0) == nil || w.Mkdir("pgdata/base/5/d", Entry{}) == nil || w.CloseDir("pgdata/base/5") == nil {
				t.Error("something came into a closed directory")
			}
			// What is below a closed directory is open still.
			err = errors.Join(err, put(w, "pgdata/base/5/below/3", want["pgdata/base/5/below/3"], 20*PageSize), w.CloseDir("pgdata/base/5/below"))
			return errors.Join(err, put(w, "pgdata/late", nil, 0))
		})
		if err != nil {
			t.Fatal(err)
		}
		checkFiles(t, b, want)
		if prior != nil && prior.Manifest.Root != b.Manifest.Root {
			t.Error("the root tree was written again")
		}
		prior = b
	}
	if plain := writeTestBackup(t, r, want, prior); plain.Manifest.Root != prior.Manifest.Root {
		t.Error("the tree is another where no directory is closed early")
	}
}

// A name that comes twice, as whatever, makes no backup.
func TestNameTwice(t *testing.T) {
	r := newTestRepository(t)
	for name, second := range map[string]func(w *BackupWriter) error{
		"file":      func(w *BackupWriter) error { return put(w, "pgdata/x", []byte("2"), 1) },
		"large":     func(w *BackupWriter) error { return put(w, "pgdata/x", pagesOf(1, 50), 50*PageSize) },
		"directory": func(w *BackupWriter) error { return w.Mkdir("pgdata/x", Entry{}) },
		"link":      func(w *BackupWriter) error { return w.Symlink("pgdata/x", Entry{Link: "y"}) },
	} {
		_, err := writing(t, r, nil, func(w *BackupWriter) error {
			return errors.Join(put(w, "pgdata/x", []byte("1"), 1), second(w))
		})
		if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "x") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all, err := r.Backups(t.Context(), "main"); err != nil || len(all) > 0 {
		t.Errorf("%d backups, %v", len(all), err)
	}
}

// A file whose end was not reached makes no backup, also if the caller overlooks the error.
func TestUnfinishedFile(t *testing.T) {
	for _, size := range []int64{100, 100 * PageSize} {
		_, err := writing(t, newTestRepository(t), nil, func(w *BackupWriter) error {
			if put(w, "pgdata/x", []byte("short"), size) == nil {
				t.Error("a short file was taken")
			}
			return nil
		})
		if err == nil {
			t.Errorf("a backup with 5 of %d bytes", size)
		}
	}
}

// TestMemoryOfManyFiles counts what a file takes in memory until its directory is closed, and after: the promise that
// memory does not grow with a cluster stands on it. A second backup holds the prior listing of the directory, too; a
// decoder of zstd keeps hold of it until it decodes something else.
func TestMemoryOfManyFiles(t *testing.T) {
	long(t)
	const files, most, left = 100_000, 90, 20 // bytes; most of them are the file's map
	r := newTestRepository(t)
	content := pagesOf(1, 1)[:maxInline+1]
	create := func(w *BackupWriter, name string) error { return put(w, name, content, int64(len(content))) }
	var prior *Backup
	for round := range int64(2) {
		var before, open, closed int64
		b, err := writing(t, r, prior, func(w *BackupWriter) error {
			// What is there once: packs, a pool's buffers.
			err := errors.Join(w.Mkdir("pgdata/base/4", Entry{}), create(w, "pgdata/base/4/1"), w.CloseDir("pgdata/base/4"))
			for deadline := time.Now().Add(10 * time.Second); !begun(&w.packs.meta) && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			before = liveHeap()
			for i := range files {
				err = errors.Join(err, create(w, fmt.Sprintf("pgdata/base/5/%d", 16384+i)))
			}
			open = liveHeap()
			err = errors.Join(err, w.CloseDir("pgdata/base/5"))
			// A worker may be writing the listing.
			deadline := time.Now().Add(10 * time.Second)
			for closed = liveHeap(); closed > before+files*(left+most*round) && time.Now().Before(deadline); closed = liveHeap() {
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("a file takes %d bytes, and %d when its directory is closed", (open-before)/files, (closed-before)/files)
		if open > before+files*most*(round+1) {
			t.Errorf("%d files take %d bytes", files, open-before)
		}
		if closed > before+files*(left+most*round) {
			t.Errorf("%d files in a closed directory take %d bytes", files, closed-before)
		}
		prior = b
	}
}

// begun says whether a worker has put a piece into a pack of the packer.
func begun(p *packer) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.buf != nil
}

// liveHeap is what is reachable, in bytes.
func liveHeap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools held
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestMemoryOfWalk holds that a walk decodes a directory entry by entry.
func TestMemoryOfWalk(t *testing.T) {
	long(t)
	const files, most = 100_000, 120 // bytes
	r := newTestRepository(t)
	content := pagesOf(1, 1)[:maxInline+1]
	b, err := writing(t, r, nil, func(w *BackupWriter) (err error) {
		for i := range files {
			err = errors.Join(err, put(w, fmt.Sprintf("pgdata/base/5/%d", 16384+i), content, int64(len(content))))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	before, seen := liveHeap(), 0
	err = b.Walk(t.Context(), ".", func(name string, e Entry) error {
		if seen++; seen == files/2 {
			if live := liveHeap(); live > before+files*most {
				t.Errorf("in the middle of %d files, a walk takes %d bytes", files, live-before)
			}
		}
		return nil
	})
	if err != nil || seen != files+4 {
		t.Errorf("%d entries, %v", seen, err)
	}
}
