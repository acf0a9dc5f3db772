package repo

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgthaw/repo/store"
)

// gatedStore lets Gets of packs wait while its gate is closed, unless their context ends.
type gatedStore struct {
	store.Store

	mu    sync.Mutex
	gate  chan struct{} // nil: open
	fail  error         // of those who have waited
	asked int           // Gets
	given int           // of these, those whose context ended while they waited
}

func (s *gatedStore) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	s.mu.Lock()
	gate := s.gate
	s.asked++
	s.mu.Unlock()
	if gate != nil && strings.HasPrefix(key, "packs/") {
		select {
		case <-gate:
			if s.fail != nil {
				return nil, s.fail
			}
		case <-ctx.Done():
			s.mu.Lock()
			s.given++
			s.mu.Unlock()
			return nil, ctx.Err()
		}
	}
	return s.Store.Get(ctx, key, off, n)
}

// shut closes the gate until open is called.
func (s *gatedStore) shut() (open func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gate := make(chan struct{})
	s.gate = gate
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.gate = nil
		close(gate)
	})
}

func (s *gatedStore) askedFor() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

// aheadPages is how many pages the file has that is read here: 7 MiB.
const aheadPages = 900

// aheadFiles opens one file n times by way of one ReadAhead.
func aheadFiles(t *testing.T, n int) (r *Repository, s *gatedStore, a *ReadAhead, files []*AheadFile, content []byte) {
	t.Helper()
	r = newMemRepository(t)
	content = incompressible(aheadPages)
	b := writeTestBackup(t, r, testFiles{"pgdata/1": content}, nil)
	s = &gatedStore{Store: r.store}
	r.store = s
	a = NewReadAhead(t.Context())
	t.Cleanup(a.Close)
	e, err := b.Stat(t.Context(), "pgdata/1")
	if err != nil {
		t.Fatal(err)
	}
	f, err := b.Open(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		files = append(files, a.Open(f))
	}
	return r, s, a, files, content
}

// checkRead reads n bytes and compares them.
func checkRead(t *testing.T, f *AheadFile, off int64, n int, content []byte) {
	t.Helper()
	b, err := f.Read(make([]byte, n), off)
	if err != nil {
		t.Errorf("read %d+%d: %v", off, n, err)
		return
	}
	defer b.Release()
	end := min(off+int64(n), int64(len(content)))
	if got := slices.Concat(b.Parts...); !bytes.Equal(got, content[min(off, end):end]) {
		t.Errorf("read %d+%d: %d bytes, other than were written", off, n, len(got))
	}
}

const kernelRead = 256 << 10

// readTo reads a file from front to back up to end.
func readTo(t *testing.T, f *AheadFile, end int64, content []byte) {
	t.Helper()
	for off := int64(0); off < end; off += kernelRead {
		checkRead(t, f, off, kernelRead, content)
	}
}

// held is how many pieces are in hand, of all files.
func (a *ReadAhead) held() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.inHand)
}

// checkHolds waits until n pieces are in hand, and no buffer is without an owner.
func checkHolds(t *testing.T, a *ReadAhead, n int) {
	t.Helper()
	a.mu.Lock()
	pieces := slices.Clone(a.inHand)
	a.mu.Unlock()
	for _, p := range pieces {
		<-p.done
	}
	a.running.Wait()
	if got := a.held(); got != n {
		t.Errorf("%d pieces in hand, want %d", got, n)
	}
	if n == 0 && a.free != nil {
		t.Error("memory is kept for nobody")
	}
}

// TestReadAheadSequential reads a file from front to back: all chunks are decompressed once, and by others than who reads.
func TestReadAheadSequential(t *testing.T) {
	r, _, a, files, content := aheadFiles(t, 1)
	f := files[0]
	before := r.ReadBytes()
	readTo(t, f, f.size, content)
	if f.next < f.size {
		t.Errorf("read ahead up to %d of %d", f.next, f.size)
	}
	stored := int64(0)
	for _, ref := range f.content.(*mappedFile).m.chunks {
		stored += int64(ref.Length)
	}
	if got := r.ReadBytes() - before; got != stored {
		t.Errorf("%d bytes read of the store, where the chunks have %d", got, stored)
	}
	checkHolds(t, a, 0)
}

// TestReadAheadInDisorder has the reads of a run arrive as the kernel's do: several at once, in any order.
func TestReadAheadInDisorder(t *testing.T) {
	_, _, a, files, content := aheadFiles(t, 1)
	f := files[0]
	for from := int64(0); from < f.size; from += 8 * kernelRead {
		var reads sync.WaitGroup
		for off := from; off < from+8*kernelRead; off += kernelRead {
			reads.Go(func() { checkRead(t, f, off, kernelRead, content) })
		}
		reads.Wait()
	}
	if f.next < f.size {
		t.Errorf("read ahead up to %d of %d", f.next, f.size)
	}
	f.Close()
	checkHolds(t, a, 0)
}

// TestReadAheadRandom reads single pages: nothing is read for them but the chunks they lie in.
func TestReadAheadRandom(t *testing.T) {
	r, _, a, files, content := aheadFiles(t, 1)
	f := files[0]
	chunks := f.content.(*mappedFile).m.chunks
	rng := rand.New(rand.NewPCG(1, 2))
	before, want := r.ReadBytes(), int64(0)
	for range 400 {
		page := rng.IntN(aheadPages)
		checkRead(t, f, int64(page)*PageSize, PageSize, content)
		want += int64(chunks[page/ChunkPages].Length)
	}
	if got := r.ReadBytes() - before; got > want {
		t.Errorf("%d bytes read of the store, where the chunks touched have %d", got, want)
	}
	checkHolds(t, a, 0)
}

// TestReadAheadRandomly mixes all kinds of reads of several files, many at once.
func TestReadAheadRandomly(t *testing.T) {
	_, _, a, files, content := aheadFiles(t, 3)
	var readers sync.WaitGroup
	for i := range 5 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(5, uint64(i)))
			f := files[i%3]
			off := int64(0)
			for range 60 {
				if rng.IntN(40) == 0 {
					off = rng.Int64N(f.size + 1)
				}
				n := 1 + rng.IntN(kernelRead)
				checkRead(t, f, off, n, content)
				off += int64(n)
			}
		})
	}
	readers.Wait()
	if held := a.held(); held > aheadRoom {
		t.Errorf("%d pieces in hand, at most %d may be", held, aheadRoom)
	}
	for _, f := range files {
		f.Close()
	}
	checkHolds(t, a, 0)
}

// TestReadAheadDamage damages one chunk: it is met ahead, and an error for who reads it, and for nobody else.
func TestReadAheadDamage(t *testing.T) {
	_, _, a, files, content := aheadFiles(t, 1)
	f := files[0]
	m := f.content.(*mappedFile)
	const hurt = 3<<20 + 3*ChunkSize
	m.m.chunks[hurt/ChunkSize].ID[0] ^= 1
	readTo(t, f, 1<<20, content)
	if f.next < hurt+ChunkSize {
		t.Fatalf("read ahead to %d only", f.next)
	}
	for off := int64(1 << 20); off < f.size; off += ChunkSize {
		if off != hurt {
			checkRead(t, f, off, ChunkSize, content)
			continue
		}
		if _, err := f.Read(make([]byte, ChunkSize), off); !errors.Is(err, ErrCorrupt) {
			t.Errorf("read of the damaged chunk: %v", err)
		}
	}
	f.Close()
	checkHolds(t, a, 0)
}

// TestReadAheadEnds closes a file, and reads another place of one, while pieces are on their way: these are given up.
func TestReadAheadEnds(t *testing.T) {
	for name, end := range map[string]func(f *AheadFile){
		"close":     func(f *AheadFile) { f.Close() },
		"elsewhere": func(f *AheadFile) { f.Read(nil, 6<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			_, s, a, files, content := aheadFiles(t, 1)
			f := files[0]
			readTo(t, f, aheadRun-kernelRead, content)
			open := s.shut()
			defer open()
			var last sync.WaitGroup
			last.Go(func() { checkRead(t, f, aheadRun-kernelRead, kernelRead, content) }) // waits at the gate, as the pieces do
			eventually(t, "pieces in hand", func() bool { return a.held() == 4 })
			end(f)
			checkHolds(t, a, 0)
			if s.given != 4 {
				t.Errorf("%d reads of the store were given up, want 4", s.given)
			}
			open()
			last.Wait()
			f.Close()
		})
	}
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// TestReadAheadNoAnswer has a store not answer: who waited for what is read ahead does not wait as long again, and who comes later asks anew.
func TestReadAheadNoAnswer(t *testing.T) {
	_, s, a, files, content := aheadFiles(t, 1)
	f := files[0]
	readTo(t, f, aheadRun-kernelRead, content)
	s.fail = store.ErrNoAnswer
	asked := s.askedFor()
	open := s.shut()
	var readers sync.WaitGroup
	for i, off := range []int64{aheadRun - kernelRead, aheadRun, aheadRun + 100} { // the first reads by itself
		readers.Go(func() {
			if _, err := f.Read(make([]byte, kernelRead), off); !errors.Is(err, store.ErrNoAnswer) {
				t.Errorf("read at %d: %v", off, err)
			}
		})
		eventually(t, "readers that wait", func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return len(f.pieces) >= 4 && f.pieces[0].users == 1+i
		})
	}
	const want = 1 + 5 // with the pieces that were begun meanwhile
	eventually(t, "questions to the store", func() bool { return s.askedFor() == asked+want })
	open()
	readers.Wait()
	a.running.Wait()
	if got := s.askedFor() - asked; got != want {
		t.Errorf("the store was asked %d times, want %d", got, want)
	}
	readTo(t, f, 6<<20, content)
	f.Close()
	checkHolds(t, a, 0)
}

// TestReadAheadIsBounded has more files read from front to back than there is room for; and one that is read no more gives its room to another.
func TestReadAheadIsBounded(t *testing.T) {
	_, _, a, files, content := aheadFiles(t, 5)
	for _, f := range files[:4] {
		readTo(t, f, aheadRun, content)
	}
	if held := a.held(); held != aheadRoom {
		t.Fatalf("%d pieces in hand, want %d", held, aheadRoom)
	}
	f := files[4]
	readTo(t, f, aheadRun+kernelRead, content)
	if len(f.pieces) > 0 {
		t.Error("room was taken from files that are being read")
	}
	for range aheadIdle {
		checkRead(t, files[1], 0, PageSize, content)
	}
	readTo(t, f, f.size, content)
	if f.next < f.size {
		t.Errorf("no room was taken from files that nobody reads: read ahead to %d", f.next)
	}
	for _, f := range files {
		f.Close()
	}
	checkHolds(t, a, 0)
}

// TestReadAheadClosed reads files whose ReadAhead was closed.
func TestReadAheadClosed(t *testing.T) {
	_, _, a, files, content := aheadFiles(t, 1)
	readTo(t, files[0], aheadRun, content)
	a.Close()
	readTo(t, files[0], files[0].size, content)
	files[0].Close()
	checkHolds(t, a, 0)
}
