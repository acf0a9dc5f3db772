package fusefs

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"pgthaw/repo"
)

// prefetchAll prefetches every file of the backup, a page too early and too much, twice at once, and some that there are not.
func prefetchAll(v *Overlay, b *repo.Backup) error {
	ctx := context.Background()
	spans := []repo.Span{{Path: "pgdata/none", Len: 100}, {Path: "pgdata", Len: 1}, {Path: "elsewhere/1", Len: 1}, {Path: "pgdata/PG_VERSION/x", Len: 1}}
	err := b.Walk(ctx, ".", func(name string, e repo.Entry) error {
		if e.Mode.IsRegular() {
			spans = append(spans, repo.Span{Path: name, Off: -8192, Len: e.Size + 16384})
		}
		return nil
	})
	if err != nil {
		return err
	}
	var other sync.WaitGroup
	other.Go(func() { _ = v.Prefetch(ctx, b, "pgdata", spans, true) })
	defer other.Wait()
	return v.Prefetch(ctx, b, "pgdata", spans, false)
}

// TestPrefetch fills a tree's holes beside what was written into it, moved and removed, and then does without the repository.
func TestPrefetch(t *testing.T) {
	modes(t, func(t *testing.T, o OverlayOptions) {
		rng := rand.New(rand.NewPCG(seed(t), 3))
		tree := lowerTree{}
		tree.dir("pgdata", 0o700)
		tree.dir("pgdata/base", 0o700)
		contents := map[string][]byte{}
		for _, name := range []string{"written", "moved", "cut", "replaced", "removed", "open", "odd"} {
			contents[name] = random(rng, 3<<20+rng.IntN(100_000))
			tree.file("pgdata/base/"+name, 0o600, contents[name])
		}
		v := thaw(t, tree, o)
		in := func(name string) string { return filepath.Join(v.dir, "base", name) }
		held := open(t, in("open"), os.O_RDWR)
		written := open(t, in("written"), os.O_RDWR)
		p := random(rng, 20_000)
		if _, err := written.WriteAt(p, 1_000_001); err != nil {
			t.Fatal(err)
		}
		copy(contents["written"][1_000_001:], p)
		if err := os.Truncate(in("cut"), 1_234_567); err != nil {
			t.Fatal(err)
		}
		contents["cut"] = contents["cut"][:1_234_567]
		if err := os.Rename(in("moved"), in("away")); err != nil {
			t.Fatal(err)
		}
		contents["away"] = contents["moved"]
		contents["moved"] = []byte("another file")
		if err := os.WriteFile(in("moved"), contents["moved"], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(in("odd"), in("replaced")); err != nil {
			t.Fatal(err)
		}
		contents["replaced"] = contents["odd"]
		if err := os.Remove(in("removed")); err != nil {
			t.Fatal(err)
		}
		s := v.do("prefetch")
		lazy := int64(len(contents["away"]) + len(contents["replaced"])) // under other names than the backup's
		if left := s.BytesTotal - s.BytesHydrated; left == 0 || left > lazy {
			t.Errorf("%d bytes are left, want those of files that moved, %d", left, lazy)
		}
		for _, name := range []string{"away", "replaced"} { // by reading
			checkFile(t, v.dir, "base/"+name, contents[name])
		}
		if err := os.Rename(v.repository, v.repository+"-away"); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"written", "cut", "moved", "open"} {
			checkFile(t, v.dir, "base/"+name, contents[name])
		}
		got := make([]byte, len(contents["open"]))
		if _, err := held.ReadAt(got, 0); err != nil || !bytes.Equal(got, contents["open"]) {
			t.Errorf("through a handle from before: %v", err)
		}
		if err := os.Rename(v.repository+"-away", v.repository); err != nil {
			t.Fatal(err)
		}
		held.Close()
		written.Close()
	})
}

// TestFirstOf: all of the spans is taken, in their order, and about as much at a time as was asked for.
func TestFirstOf(t *testing.T) {
	const chunk = repo.ChunkSize
	spans := []repo.Span{{Path: "a", Off: 8192, Len: 8192}, {Path: "a", Off: 0, Len: 8192}, {Path: "b", Off: -5, Len: 3*chunk + 5}, {Path: "c"}, {Path: "d", Len: 1}}
	want := [][]repo.Span{
		{{Path: "a", Off: 8192, Len: 8192}, {Path: "a", Len: 8192}},
		{{Path: "b", Off: -5, Len: 2 * chunk}},
		{{Path: "b", Off: 2*chunk - 5, Len: chunk + 5}, {Path: "c"}},
		{{Path: "d", Len: 1}},
	}
	for i := 0; len(spans) > 0; i++ {
		var first []repo.Span
		if first, spans = firstOf(spans, 2*chunk); i >= len(want) || !slices.Equal(first, want[i]) {
			t.Fatalf("%d: %v, of %v", i, first, want)
		}
	}
}

// TestPrefetchChunks: while hydration runs, what is prefetched in turns brings all of its chunk, once.
func TestPrefetchChunks(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), 2*aroundMost+20_000)
	f, fd := layFile(t, lower)
	f.openLower = func(string) (io.ReaderAt, error) { return chunked{bytes.NewReader(lower)}, nil }
	for _, c := range []struct {
		chunks bool
		want   span
	}{{false, span{aroundMost + 8192, aroundMost + 16384}}, {true, span{aroundMost, 2 * aroundMost}}} {
		got, err := f.missing(fd, span{aroundMost + 8192, aroundMost + 16384}, c.chunks)
		if err != nil || !slices.Equal(got, []span{c.want}) {
			t.Errorf("chunks %v: %v, %v", c.chunks, got, err)
		}
	}
}

// TestTouched: it is told which bytes somebody waits for, once, and of files that are opened.
func TestTouched(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), 100_000)
	f, fd := layFile(t, lower)
	var told []span
	f.touched = func(_ string, off, n int64) { told = append(told, span{off, off + n}) }
	for range 2 {
		if _, err := f.readAt(fd, make([]byte, 8192), 16384, true); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.writeAt(fd, []byte("x"), 50_000); err != nil {
		t.Fatal(err)
	}
	if _, err := f.fill(fd, span{0, 1 << 20}, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if want := []span{{16384, 24576}, {49152, 53248}}; !slices.Equal(told, want) {
		t.Errorf("told of %v, want %v", told, want)
	}
}
