package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"pgthaw/repo/store"
)

// TestCrashFileStoreFaults lets each kind of system call of the file store fail, the first, the second and so on and all from then
// on, done or not done. The error names key and errno; no object is there but whole; what lies in tmp goes; and the next try succeeds.
func TestCrashFileStoreFaults(t *testing.T) {
	long(t)
	d := mountDisk(t)
	for name, links := range map[string]bool{"links": true, "no links": false} {
		t.Run(name, func(t *testing.T) {
			k := &faultyDisk{t: t, d: d, o: DiskOptions{NoLinks: !links}, all: crashRounds(t) > 0, rng: rand.New(rand.NewPCG(5, 0)), hits: map[string]int{}}
			classes := []string{"create", "write", "fsync", "fsyncdir", "mkdir", "lookup", "getattr", "setattr", "open", "opendir", "readdir", "read", "link", "unlink"}
			if !links {
				classes = append(slices.DeleteFunc(classes, func(c string) bool { return c == "link" }), "rename")
			}
			for _, class := range classes {
				k.sweep(class, syscall.EIO)
			}
			for _, class := range []string{"create", "write", "fsync", "fsyncdir", "mkdir", "link", "rename"} {
				k.sweep(class, syscall.ENOSPC)
			}
			for _, class := range []string{"create", "mkdir", "link", "unlink", "rename"} {
				k.sweep(class, syscall.EROFS)
			}
			for _, class := range classes {
				if k.hits[class] == 0 {
					t.Errorf("no failing %s was reported", class)
				}
			}
		})
	}
}

type faultyDisk struct {
	t    *testing.T
	d    *mountedDisk
	o    DiskOptions
	all  bool
	rng  *rand.Rand
	hits map[string]int // errors seen, by class
}

// sweep goes on to the nth call as long as there is one; make check takes samples.
func (k *faultyDisk) sweep(class string, errno syscall.Errno) {
	k.t.Helper()
	kinds := []DiskFault{{After: true}, {}, {Kept: true}}
	for n := 1; ; n++ {
		for i, f := range kinds {
			f.Class, f.Nth, f.Errno = class, n, int(errno)
			if (k.all || i == n%len(kinds)) && k.one(f) < n {
				return
			}
		}
		if !k.all && n > 2 {
			n += n + k.rng.IntN(2*n)
		}
	}
}

// one does everything once with a fault, and returns how often its class was called.
func (k *faultyDisk) one(f DiskFault) int {
	k.t.Helper()
	dir := filepath.Join(k.d.dir, "repo")
	k.d.reset(k.o)
	if err := os.Mkdir(dir, 0o750); err != nil { // other permissions than the store's own: they are to be taken over
		k.t.Fatal(err)
	}
	s, err := store.OpenFile(dir)
	if err != nil {
		k.t.Fatal(err)
	}
	what := fmt.Sprintf("%+v", f)
	objects := map[string][]byte{"config": []byte("1"), "a/old": []byte("2")}
	for key, b := range objects {
		if err := s.Put(noContext, key, b); err != nil {
			k.t.Fatal(err)
		}
	}
	if _, err := s.Get(noContext, "config", 0, -1); err != nil {
		k.t.Fatal(err)
	}
	objects["a/b/new"] = bytes.Repeat([]byte("3"), 5000)

	k.d.arm(f)
	putErr := k.failed(f, what, "a/b/new", s.Put(noContext, "a/b/new", objects["a/b/new"]))
	_, err = s.Get(noContext, "a/old", 0, -1)
	k.failed(f, what, "a/old", err)
	for _, err := range s.List(noContext, "a/") {
		k.failed(f, what, "a/", err)
	}
	deleteErr := k.failed(f, what, "a/old", s.Delete(noContext, "a/old"))
	calls := k.d.calls()[f.Class]
	k.d.arm(DiskFault{})

	found := k.objects(what, s)
	k.sound(what, found, objects)
	if _, ok := found["a/b/new"]; putErr == nil && !ok {
		k.t.Errorf("%s: Put reports success, and nothing is there", what)
	}
	if _, ok := found["a/old"]; deleteErr == nil && ok {
		k.t.Errorf("%s: Delete reports success, and it is there", what)
	}
	if err := s.Put(noContext, "a/b/new", objects["a/b/new"]); err != nil && !errors.Is(err, store.ErrExist) {
		k.t.Errorf("%s: tried again: %v", what, err)
	}
	if err := s.Delete(noContext, "a/old"); err != nil {
		k.t.Errorf("%s: deleted again: %v", what, err)
	}
	found = k.objects(what, s)
	if k.sound(what, found, objects); len(found) != 2 || found["a/old"] != nil {
		k.t.Errorf("%s: in the end there are %d objects", what, len(found))
	}
	return calls
}

// failed looks at an error's words.
func (k *faultyDisk) failed(f DiskFault, what, key string, err error) error {
	k.t.Helper()
	if err == nil {
		return nil
	}
	k.hits[f.Class]++
	if !errors.Is(err, syscall.Errno(f.Errno)) || !strings.Contains(err.Error(), key) || errors.Is(err, store.ErrNotExist) || errors.Is(err, store.ErrExist) {
		k.t.Errorf("%s: the error does not say so: %v", what, err)
	}
	return err
}

func (k *faultyDisk) objects(what string, s store.Store) map[string][]byte {
	k.t.Helper()
	found := map[string][]byte{}
	for o, err := range s.List(noContext, "") {
		var b []byte
		if err == nil {
			b, err = s.Get(noContext, o.Key, 0, -1)
		}
		if err != nil {
			k.t.Fatalf("%s: %v", what, err)
		}
		found[o.Key] = b
	}
	return found
}

func (k *faultyDisk) sound(what string, found, want map[string][]byte) {
	k.t.Helper()
	for key, b := range found {
		if !bytes.Equal(b, want[key]) {
			k.t.Errorf("%s: %s has %d bytes, want %d", what, key, len(b), len(want[key]))
		}
	}
}

// TestBackupDiskFaults lets backups meet a full, a failing and a read-only disk at different moments: they fail with its
// errno, say truly what is left, damage nothing, and the next one succeeds.
func TestBackupDiskFaults(t *testing.T) {
	d := mountDisk(t)
	dir := filepath.Join(d.dir, "repo")
	r, err := Init(t.Context(), dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, 16<<20); err != nil {
		t.Fatal(err)
	}
	backups := map[string]testFiles{}
	files := smallFiles()
	prior := writeTestBackup(t, r, files, nil)
	backups[prior.Manifest.ID] = files
	for i, f := range []DiskFault{
		{Class: "write", Nth: 3, After: true, Errno: int(syscall.ENOSPC)}, {Class: "create", Nth: 5, After: true, Errno: int(syscall.ENOSPC)},
		{Class: "fsync", Nth: 2, Errno: int(syscall.EIO)}, {Class: "fsyncdir", Nth: 4, Errno: int(syscall.EIO)}, {Class: "link", Nth: 3, Errno: int(syscall.EIO)},
		{Class: "unlink", Nth: 1, After: true, Errno: int(syscall.EROFS)}, {Class: "create", Nth: 1, After: true, Errno: int(syscall.EROFS)},
	} {
		before := storedKeys(t, r)
		files := changedFiles(files)
		files["pgdata/round"] = fmt.Appendf(nil, "%d", i)
		d.arm(f)
		m, err := r.WriteBackup(t.Context(), "main", BackupOptions{Prior: prior}, func(ctx context.Context, w *BackupWriter) (Manifest, error) {
			return testManifest(), writeFiles(w, files)
		})
		d.arm(DiskFault{})
		switch {
		case err == nil && f.Class != "unlink": // what cannot be unlinked lies in tmp
			t.Errorf("%+v: the backup succeeds", f)
		case err == nil:
			backups[m.ID] = files
		case !errors.Is(err, syscall.Errno(f.Errno)):
			t.Errorf("%+v: %v", f, err)
		case strings.Contains(err.Error(), "nothing of it is left") && !slices.Equal(storedKeys(t, r), before):
			t.Errorf("%+v: %v; there is %q", f, err, storedKeys(t, r))
		}
		for o := range r.store.List(t.Context(), backupsRoot) { // published, but reported failed
			if name, suffix, ok := splitBackupKey(o.Key); ok && suffix == manifestSuffix && backups[name.Backup] == nil {
				backups[name.Backup] = files
			}
		}
		if err := soundRepository(t.Context(), r, backups); err != nil {
			t.Errorf("after %+v: %v", f, err)
		}
	}
	prior = writeTestBackup(t, r, files, prior)
	backups[prior.Manifest.ID] = files
	if err := soundRepository(t.Context(), r, backups); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Error(err)
	}
}
