package pg

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// heapPage makes a page as a heap fills it: tuples of varying size from the end downwards, pointing at themselves.
func heapPage(rng *rand.Rand, block uint32, special int) []byte {
	page := make([]byte, filterPageSize)
	le := binary.LittleEndian
	upper, items := special, 0
	for {
		size := 24 + rng.IntN(120)
		at := upper - (size+7)&^7
		if at < pageHeaderSize+itemIDSize*(items+1) {
			break
		}
		le.PutUint32(page[pageHeaderSize+itemIDSize*items:], uint32(at)|lpNormal<<15|uint32(size)<<17)
		for i := at; i < upper; i += 8 {
			le.PutUint64(page[i:], rng.Uint64())
		}
		items++
		if special == filterPageSize {
			putTID(page[at+heapTIDOffset:], block, uint16(items))
		} else {
			putTID(page[at:], block+uint32(items/50), uint16(items))
		}
		upper = at
	}
	le.PutUint16(page[12:], uint16(pageHeaderSize+itemIDSize*items))
	le.PutUint16(page[14:], uint16(upper))
	le.PutUint16(page[16:], uint16(special))
	le.PutUint16(page[18:], filterPageSize|4)
	return page
}

func TestPageFilter(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, test := range []struct {
		name string
		page []byte
		want PageFilter
	}{
		{"heap", heapPage(rng, 12345, filterPageSize), FilterHeap},
		{"index in the table's order", heapPage(rng, 70000, filterPageSize-16), FilterIndexTIDs},
		{"zeros", make([]byte, filterPageSize), FilterNone},
		{"short", make([]byte, 100), FilterNone},
	} {
		page := bytes.Clone(test.page)
		if got := FilterPage(page); got != test.want {
			t.Errorf("%s: filter %d, want %d", test.name, got, test.want)
		}
		if test.want != FilterNone && bytes.Equal(page, test.page) {
			t.Errorf("%s: nothing changed", test.name)
		}
		if err := UnfilterPage(page, test.want); err != nil || !bytes.Equal(page, test.page) {
			t.Errorf("%s: does not come back: %v", test.name, err)
		}
	}
}

// TestPageFilterSharedTuple has two line pointers at one tuple, as only a damaged page has.
func TestPageFilterSharedTuple(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 2))
	page := heapPage(rng, 1, filterPageSize)
	copy(page[pageHeaderSize+itemIDSize:], page[pageHeaderSize:pageHeaderSize+itemIDSize])
	was := bytes.Clone(page)
	if err := UnfilterPage(page, FilterPage(page)); err != nil || !bytes.Equal(page, was) {
		t.Errorf("does not come back: %v", err)
	}
}

// FuzzPageFilter: whatever the bytes, they come back; and no bytes make the inverse fail worse than by an error.
func FuzzPageFilter(f *testing.F) {
	rng := rand.New(rand.NewPCG(3, 3))
	f.Add(heapPage(rng, 7, filterPageSize), byte(1))
	f.Add(heapPage(rng, 7, filterPageSize-16), byte(3))
	f.Fuzz(func(t *testing.T, b []byte, kind byte) {
		page := make([]byte, filterPageSize)
		copy(page, b)
		was := bytes.Clone(page)
		if err := UnfilterPage(page, FilterPage(page)); err != nil || !bytes.Equal(page, was) {
			t.Fatalf("does not come back: %v", err)
		}
		_ = UnfilterPage(page, PageFilter(kind))
	})
}

// TestPageFilterMutations damages headers and line pointers, where a mistake in the inverse would hide.
func TestPageFilterMutations(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	rounds := 20000
	if testing.Short() {
		rounds = 2000
	}
	for range rounds {
		page := heapPage(rng, rng.Uint32(), filterPageSize-16*rng.IntN(2))
		for range 1 + rng.IntN(6) {
			page[10+rng.IntN(200)] = byte(rng.Uint32())
		}
		was := bytes.Clone(page)
		if err := UnfilterPage(page, FilterPage(page)); err != nil || !bytes.Equal(page, was) {
			t.Fatalf("does not come back: %v", err)
		}
	}
}

func BenchmarkFilterPage(b *testing.B) {
	page := heapPage(rand.New(rand.NewPCG(4, 4)), 7, filterPageSize)
	b.SetBytes(2 * filterPageSize)
	for b.Loop() {
		if err := UnfilterPage(page, FilterPage(page)); err != nil {
			b.Fatal(err)
		}
	}
}
