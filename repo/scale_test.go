package repo

import (
	"context"
	"io"
	"iter"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgthaw/repo/store"
)

// countingStore counts the operations on a store, by the beginning of the key: "get packs/", "list backups/".
type countingStore struct {
	store.Store

	mu     sync.Mutex
	counts map[string]int
}

func (s *countingStore) count(op, key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	root, _, below := strings.Cut(key, "/")
	switch {
	case strings.HasSuffix(key, packListSuffix):
		root = "pack list"
	case strings.HasSuffix(key, manifestSuffix):
		root = "manifest"
	case below:
		root += "/"
	}
	s.counts[op+" "+root]++
}

func (s *countingStore) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	s.count("get", key)
	return s.Store.Get(ctx, key, off, n)
}

func (s *countingStore) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	s.count("list", prefix)
	return s.Store.List(ctx, prefix)
}

// during gives what fn cost.
func (s *countingStore) during(t *testing.T, fn func() error) map[string]int {
	t.Helper()
	s.counts = map[string]int{}
	if err := fn(); err != nil {
		t.Fatal(err)
	}
	return s.counts
}

// TestOperationCounts counts what the promises of docs/format.md, "What reading costs", come to, on a small cluster and on one
// of five times its size with five times as many backups: the same, but for one object a backup where backups are listed.
func TestOperationCounts(t *testing.T) {
	long(t)
	small := syntheticSpec{segments: 2, small: 100, databases: 2, backups: 2, changed: 1, wal: 3}
	large := syntheticSpec{segments: 10, small: 5_000, databases: 2, backups: 10, changed: 1, wal: 3}
	for name, spec := range map[string]syntheticSpec{"small": small, "large": large} {
		t.Run(name, func(t *testing.T) {
			s := newSynthetic(t, filepath.Join(t.TempDir(), "repo"), spec)
			countOperations(t, s, spec)
		})
	}
}

func countOperations(t *testing.T, s *synthetic, spec syntheticSpec) {
	counts := &countingStore{Store: s.r.store}
	var r *Repository
	var m *Manifest
	var e Entry
	var f *File
	n := spec.backups
	for _, step := range []struct {
		what string
		do   func() error
		want map[string]int
	}{
		{"open the repository", func() (err error) { r, err = openStore(t.Context(), counts, s.r.URL(), Options{}); return err },
			map[string]int{"get config": 1}},
		{"list backups", func() error { _, err := r.Backups(t.Context(), "main"); return err },
			map[string]int{"get clusters/": 1, "list backups/": 1, "get manifest": n}},
		{"open the latest backup", func() (err error) { m, err = r.Manifest(t.Context(), "main", Latest); return err },
			map[string]int{"get clusters/": 1, "list backups/": 1, "get manifest": 1}},
		{"open a backup by id", func() (err error) { m, err = r.Manifest(t.Context(), "main", m.ID); return err },
			map[string]int{"get clusters/": 1, "get manifest": 1, "get backups/": 1}},
		{"find a file, its four directories", func() (err error) { e, err = r.OpenBackup(m).Stat(t.Context(), "pgdata/base/1/5000000"); return err },
			map[string]int{"get packs/": 4}},
		{"find another file there", func() error { _, err := r.OpenBackup(m).Stat(t.Context(), "pgdata/base/1/16384"); return err },
			map[string]int{}},
		{"open the file", func() (err error) { f, err = r.OpenBackup(m).Open(t.Context(), e); return err },
			map[string]int{"get packs/": 1}},
		{"read a page", func() error { _, err := f.ReadAt(make([]byte, PageSize), 77*PageSize); return err },
			map[string]int{"get packs/": 1}},
		{"read eight chunks that lie together", func() error { _, err := f.ReadAt(make([]byte, 8*ChunkSize), 64*ChunkSize+32*ChunkSize); return err },
			map[string]int{"get packs/": 1}},
		{"tell what it holds", func() error { _, err := r.Info(t.Context()); return err },
			map[string]int{"list clusters/": 1, "get clusters/": 2, "list backups/": 2, "get manifest": n, "get pack list": n, "list ": 1, "list sessions/": 1}},
		{"check the structure", func() error { return checkStructure(t, r) },
			map[string]int{"list keys/": 1, "list clusters/": 1, "get clusters/": 1, "list backups/": 1, "get manifest": n, "get pack list": n,
				"get backups/": n, "list sessions/": 1, "list starts/": 1, "get sessions/": 1, "list wal/": 1, "list damaged/": 1, "list packs/": 1}},
	} {
		if got := counts.during(t, step.do); !maps.Equal(got, step.want) {
			t.Errorf("%s: %v, want %v", step.what, got, step.want)
		}
	}
}

func checkStructure(t *testing.T, r *Repository) error {
	_, err := r.Check(t.Context(), CheckOptions{}, func(f Finding) { t.Errorf("%s: %v", f.Object, f.Err) })
	return err
}

// TestSynthetic checks that the synthetic repository is one that WriteBackup could have written, as far as can be seen
// without the chunks.
func TestSynthetic(t *testing.T) { bothSeals(t, testSynthetic) }

func testSynthetic(t *testing.T, keys ...Key) {
	long(t)
	spec := tenTiB
	spec.databases, spec.backups = 4, 10
	spec = spec.of(1.0 / 1000)
	s := newSynthetic(t, filepath.Join(t.TempDir(), "repo"), spec, keys...)
	done, err := s.r.Check(t.Context(), CheckOptions{Maps: true}, func(f Finding) { t.Errorf("%s: %v: %v", f.Object, f.Err, f.Backups) })
	if err != nil || done.Backups != spec.backups || done.Packs != len(s.sizes) {
		t.Errorf("%+v of %d packs, %v", done, len(s.sizes), err)
	}
	all, err := s.r.Backups(t.Context(), "main")
	if err != nil || !slices.IsSortedFunc(all, func(a, b *Manifest) int { return a.StoppedAt.Compare(b.StoppedAt) }) {
		t.Errorf("backups are not in order, %v", err)
	}
	last := all[len(all)-1]
	if last.Files != spec.segments+spec.small+2 || last.Packs.Count < spec.segments*syntheticPacks {
		t.Errorf("%d files in %d packs", last.Files, last.Packs.Count)
	}
	if shared := s.sharedPacks(t, all[0], last); shared*10 < last.Packs.Count*9 {
		t.Errorf("%d packs of %d are shared", shared, last.Packs.Count)
	}
	checkFirstPack(t, s.r.OpenBackup(last))
}

// sharedPacks counts the packs that two backups use.
func (s *synthetic) sharedPacks(t *testing.T, a, b *Manifest) (n int) {
	t.Helper()
	in := map[PackID]bool{}
	for i, m := range []*Manifest{a, b} {
		uses, err := s.r.packList(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range uses {
			if i == 1 && in[u.pack] {
				n++
			}
			in[u.pack] = true
		}
	}
	return n
}

// checkFirstPack reads what can be read of the first relation segment: a chunk that did not change.
func checkFirstPack(t *testing.T, b *Backup) {
	t.Helper()
	e, err := b.Stat(t.Context(), "pgdata/base/1/5000000")
	if err != nil {
		t.Fatal(err)
	}
	f, err := b.Open(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, ChunkSize)
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, ChunkSize), got); err != nil || string(got) != string(pagesOf(0, ChunkPages)) {
		t.Errorf("its first chunk reads otherwise, %v", err)
	}
}
