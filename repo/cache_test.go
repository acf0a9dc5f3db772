package repo

import (
	"errors"
	"testing"
)

// TestCacheKeepsWhatIsTooLarge looks names up in a directory whose listing alone is over the cache's limit, as overlays and
// mounts do: from the root down, again and again.
func TestCacheKeepsWhatIsTooLarge(t *testing.T) {
	c := newCache[string, int](100)
	costs := map[string]int64{"root": 1, "base": 2, "database": 1000, "other": 1000}
	loads := map[string]int{}
	get := func(key string) {
		if _, err := c.get(key, func() (int, int64, error) { loads[key]++; return 0, costs[key], nil }); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		get("root")
		get("base")
		get("database")
	}
	if loads["database"] > 2 || loads["root"] > 2 || loads["base"] > 2 {
		t.Errorf("loaded %v", loads)
	}
	get("other")
	if get("database"); loads["database"] < 2 {
		t.Error("two listings over the limit were kept")
	}
}

// TestCacheTellsContentsApart asks for two chunks at one place, as there are after a pack lay under another's name when a
// backup was compared with it. Only one can be there; the other is damage, also when the one has just been read.
func TestCacheTellsContentsApart(t *testing.T) {
	r := newTestRepository(t)
	b := writeTestBackup(t, r, smallFiles(), nil)
	e, err := b.Stat(t.Context(), "pgdata/base/5/2")
	if err != nil {
		t.Fatal(err)
	}
	m, err := r.fileMap(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	there := m.chunks[0]
	other := there
	other.ID = m.chunks[1].ID
	if _, err := r.chunk(t.Context(), there); err != nil {
		t.Fatal(err)
	}
	if got, err := r.chunk(t.Context(), other); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%d bytes of another chunk, %v", len(got), err)
	}
}

// TestWALPushedAgain reads a WAL file whose head was read before its object was damaged, taken away and pushed again.
func TestWALPushedAgain(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		r := newTestRepository(t, keys...)
		content := []byte(goldenHistory)
		for range 2 {
			if err := r.store.Delete(t.Context(), walKey("main", goldenWAL)); err != nil {
				t.Fatal(err)
			}
			if err := r.PutWAL(t.Context(), "main", goldenWAL, content); err != nil {
				t.Fatal(err)
			}
			if _, err := r.WALHead(t.Context(), "main", goldenWAL); err != nil {
				t.Fatal(err)
			}
		}
		f, err := r.openWAL(t.Context(), "main", goldenWAL)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(content))
		if _, err := f.ReadAt(got, 0); err != nil || string(got) != goldenHistory {
			t.Errorf("%q, %v", got, err)
		}
	})
}
