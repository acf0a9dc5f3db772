package repo

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
)

// gathered are the bytes that Gather brings, in the files' places, and how many.
type gathered struct {
	mu    sync.Mutex
	files testFiles
	n     int64
}

func gather(t *testing.T, b *Backup, files testFiles, spans []Span) *gathered {
	t.Helper()
	g := &gathered{files: testFiles{}}
	for name, content := range files {
		g.files[name] = make([]byte, len(content))
	}
	err := b.Gather(t.Context(), spans, func(s Span, p []byte) error {
		g.mu.Lock()
		defer g.mu.Unlock()
		if int64(len(p)) != s.Len {
			t.Errorf("%d bytes for %+v", len(p), s)
		}
		g.n += int64(copy(g.files[s.Path][s.Off:], p))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// manyFiles are small relations in two databases, and a large one.
func manyFiles() testFiles {
	files := testFiles{"pgdata/base/5/big": pagesOf(1, 200), "pgdata/PG_VERSION": []byte("15\n"), "pgdata/global/1": pagesOf(7, 3)}
	for i := range 120 {
		files[fmt.Sprintf("pgdata/base/%d/%d", 1+i%2, 1000+i)] = pagesOf(uint64(i+10), 1+i%8)
	}
	return files
}

// TestGather reads whole files and parts of them, and what is not there.
func TestGather(t *testing.T) { bothSeals(t, testGather) }

func testGather(t *testing.T, keys ...Key) {
	files := manyFiles()
	b := writeTestBackup(t, newTestRepository(t, keys...), files, nil)
	var all []Span
	for _, name := range slices.Sorted(maps.Keys(files)) {
		all = append(all, Span{name, 0, 1 << 40})
	}
	all = append(all, Span{"pgdata/base/1/none", 0, 10}, Span{"pgdata/base", 0, 10}, Span{"elsewhere/1", 0, 1}, Span{"pgdata/PG_VERSION/x", 0, 1}, Span{".", 0, 1})
	g := gather(t, b, files, all)
	for name, want := range files {
		if !bytes.Equal(g.files[name], want) {
			t.Errorf("%s differs", name)
		}
	}
	const big = "pgdata/base/5/big"
	some := gather(t, b, files, []Span{{big, 17*PageSize + 5, 3 * PageSize}, {big, 199 * PageSize, 1 << 20}, {big, 500 * PageSize, 1}, {big, 0, 0}})
	want := make([]byte, len(files[big]))
	copy(want[17*PageSize+5:][:3*PageSize], files[big][17*PageSize+5:])
	copy(want[199*PageSize:], files[big][199*PageSize:])
	if !bytes.Equal(some.files[big], want) || some.n != 4*PageSize {
		t.Errorf("%d bytes of parts of a file, or others than asked for", some.n)
	}
}

// TestGatherReadsLittle counts: a read for each level of directories, one for the maps, and one for what lies together.
func TestGatherReadsLittle(t *testing.T) {
	files := manyFiles()
	s := newTestRepository(t)
	m := writeTestBackup(t, s, files, nil).Manifest
	counts := &countingStore{Store: s.store, counts: map[string]int{}}
	r, err := openStore(t.Context(), counts, s.URL(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := r.OpenBackup(m)
	var spans []Span
	for name := range files {
		if name != "pgdata/base/5/big" {
			spans = append(spans, Span{name, 0, 1 << 30})
		}
	}
	got := counts.during(t, func() error { gather(t, b, files, spans); return nil })
	if got["get packs/"] > 6 {
		t.Errorf("%d reads of packs", got["get packs/"])
	}
	again := counts.during(t, func() error { gather(t, b, files, spans); return nil })
	if again["get packs/"] > 2 { // the content does not compress
		t.Errorf("%d reads of packs for what lies together, its places known", again["get packs/"])
	}
}

// TestGatherFromEdition reads what lies together no longer since its neighbours are gone.
func TestGatherFromEdition(t *testing.T) {
	r := newTestRepository(t)
	first := manyFiles()
	deleted := writeTestBackup(t, r, first, nil)
	second := testFiles{}
	for name, content := range first {
		if len(content) > 3*PageSize || len(second)%2 == 0 {
			second[name] = content
		}
	}
	kept := 0
	for name := range second {
		if kept++; kept > 20 {
			delete(second, name)
		}
	}
	b := writeTestBackup(t, r, second, deleted)
	repackWithout(t, r, deleted.Manifest)
	if len(editionsAmong(packKeys(t, r.store))) == 0 {
		t.Fatal("nothing was repacked")
	}
	var spans []Span
	for name := range second {
		spans = append(spans, Span{name, 0, 1 << 30})
	}
	g := gather(t, b, second, spans)
	for name, want := range second {
		if !bytes.Equal(g.files[name], want) {
			t.Errorf("%s differs", name)
		}
	}
}

// TestGatherEnds: an error of fn ends it, and damage is never given to fn.
func TestGatherEnds(t *testing.T) {
	files := manyFiles()
	b := writeTestBackup(t, newTestRepository(t), files, nil)
	spans := []Span{{"pgdata/base/5/big", 0, 1 << 30}}
	enough := errors.New("enough")
	if err := b.Gather(t.Context(), spans, func(Span, []byte) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
}
