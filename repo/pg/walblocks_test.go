package pg

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// refsOf lists the references in a run of segments as pg_waldump does: place, relation, fork, block, whether there is an image.
func refsOf(t testing.TB, segs ...*walBuilder) (refs []string) {
	t.Helper()
	var w WALBlocks
	for _, s := range segs {
		if err := w.Segment(s.segment(), s.name(), mib, func(at LSN, b BlockRef) { refs = append(refs, refText(at, b)) }); err != nil {
			t.Fatal(err)
		}
	}
	return refs
}

func refText(at LSN, b BlockRef) string {
	image := ""
	if b.Image {
		image = " FPW"
	}
	fork := ""
	if b.Fork > 0 && int(b.Fork) < len(forks) {
		fork = " fork " + forks[b.Fork][1:]
	}
	return fmt.Sprintf("%s %d/%d/%d%s blk %d%s", at, b.Tablespace, b.Database, b.Relation, fork, b.Block, image)
}

// waldumpRefs is what pg_waldump says of a segment file. It may end with an error where the WAL does.
func waldumpRefs(t *testing.T, program, segment string) (refs []string) {
	t.Helper()
	out, _ := exec.Command(program, segment).Output()
	for line := range strings.Lines(string(out)) {
		_, rest, ok := strings.Cut(line, " lsn: ")
		if !ok {
			t.Fatalf("pg_waldump says %q", line)
		}
		lsn, rest, _ := strings.Cut(rest, ",")
		at, err := ParseLSN(lsn)
		if err != nil {
			t.Fatal(err)
		}
		for _, ref := range strings.Split(rest, "blkref #")[1:] {
			_, ref, _ = strings.Cut(ref, ": rel ")
			ref = strings.TrimRight(ref, ", \n")
			refs = append(refs, fmt.Sprintf("%s %s", at, ref))
		}
	}
	return refs
}

// TestWALBlocksAsWaldump compares the golden segments with pg_waldump of their majors.
func TestWALBlocksAsWaldump(t *testing.T) {
	for _, major := range majors {
		t.Run(major, func(t *testing.T) {
			name, seg := goldenWAL(t, major)
			dumped := bytes.Clone(seg)
			by := major
			if major == "16" { // whose pg_waldump is packaged nowhere: block references are those of 15
				by = "15"
				for p := 0; p < len(dumped); p += testPage {
					binary.LittleEndian.PutUint16(dumped[p:], 0xD110)
				}
			}
			var program string
			for _, dir := range []string{"/usr/lib/postgresql/" + by + "/bin", "/opt/pg" + by + "/bin"} {
				if _, err := os.Stat(dir + "/pg_waldump"); err == nil {
					program = dir + "/pg_waldump"
				}
			}
			if program == "" {
				t.Skip("no pg_waldump of this major here")
			}
			file := filepath.Join(t.TempDir(), name.String())
			if err := os.WriteFile(file, dumped, 0o600); err != nil {
				t.Fatal(err)
			}
			want := waldumpRefs(t, program, file)
			var w WALBlocks
			var got []string
			if err := w.Segment(seg, name, mib, func(at LSN, b BlockRef) { got = append(got, refText(at, b)) }); err != nil {
				t.Fatal(err)
			}
			if len(want) < 100 || !reflect.DeepEqual(got, want) {
				t.Errorf("%d references, pg_waldump has %d", len(got), len(want))
			}
		})
	}
}

// blockBody is a record's body that names n pages of one relation, the second of them with an image, and has size bytes of data.
func blockBody(n, size int) []byte {
	var b []byte
	for i := range n {
		flags := byte(i % 4)
		if i > 0 {
			flags |= sameRelation
		}
		image := i == 1
		if image {
			flags |= hasImage
		}
		b = append(b, byte(i), flags, 0, 0)
		if image {
			b = append(b, 0, 0, 0, 0, imageApply|imageHasHole|4, 0, 0)
		}
		if i == 0 {
			b = binary.LittleEndian.AppendUint32(b, 1663)
			b = binary.LittleEndian.AppendUint32(b, 5)
			b = binary.LittleEndian.AppendUint32(b, 16384)
		}
		b = binary.LittleEndian.AppendUint32(b, uint32(100+i))
	}
	b = append(b, 254)
	b = binary.LittleEndian.AppendUint32(b, uint32(size))
	return append(b, make([]byte, size)...)
}

// TestWALBlocksCrossSegments: a record that a segment begins is the next one's, and of another's that follows it is not.
func TestWALBlocksCrossSegments(t *testing.T) {
	first := newWAL(7, 1, 0)
	for len(first.b) < mib-30_000 {
		first.record(10, 0, 3, blockBody(0, 8000))
	}
	body := blockBody(3, 50_000)
	at := first.record(10, 0, 3, body)
	over := first.b[mib:]
	first.b = first.b[:mib]
	second := newWAL(8, 1, 0)
	second.b = bytes.Clone(over)
	for i := 0; i < len(over); i += testPage { // headers of pages that the builder took for those of the first segment
		binary.LittleEndian.PutUint64(second.b[i+8:], uint64(second.start)+uint64(i))
	}
	second = relong(t, second)
	second.prev = at
	last := second.record(10, 0, 3, blockBody(1, 10))
	want := []string{
		fmt.Sprintf("%s 1663/5/16384 blk 100", at), fmt.Sprintf("%s 1663/5/16384 fork fsm blk 101 FPW", at), fmt.Sprintf("%s 1663/5/16384 fork vm blk 102", at),
		fmt.Sprintf("%s 1663/5/16384 blk 100", last),
	}
	if got := refsOf(t, first, second); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := refsOf(t, second); !reflect.DeepEqual(got, want[3:]) {
		t.Errorf("without the segment before: %q", got)
	}
	other := newWAL(9, 1, 500)
	otherAt := other.record(10, 0, 3, blockBody(1, 10))
	if got := refsOf(t, first, other); len(got) != 1 || !strings.HasPrefix(got[0], otherAt.String()) {
		t.Errorf("behind a segment that does not follow: %q", got)
	}
}

// relong writes the segment anew so that its first page has the long header.
func relong(t *testing.T, s *walBuilder) *walBuilder {
	t.Helper()
	rest := binary.LittleEndian.Uint32(s.b[16:])
	var content []byte
	for p := 0; p < len(s.b); p += testPage {
		content = append(content, s.b[min(p+shortHeaderSize, len(s.b)):min(p+testPage, len(s.b))]...)
	}
	again := newWAL(8, 1, 0)
	again.b = nil
	again.page(rest, 0)
	for content = content[:rest]; len(content) > 0; {
		if again.room() == 0 {
			again.page(uint32(len(content)), 0)
		}
		n := min(len(content), again.room())
		again.b = append(again.b, content[:n]...)
		content = content[n:]
	}
	return again
}

func TestBlockFile(t *testing.T) {
	for want, b := range map[string]BlockRef{
		"0 base/5/16384 8192":          {Tablespace: 1663, Database: 5, Relation: 16384, Block: 1},
		"0 base/5/16384_fsm.2 0":       {Tablespace: 1663, Database: 5, Relation: 16384, Fork: 1, Block: 262144},
		"0 global/1262 0":              {Tablespace: 1664, Relation: 1262},
		"16400 7/16384_vm 0":           {Tablespace: 16400, Database: 7, Relation: 16384, Fork: 2},
		"0 base/5/1_init.1 1073733632": {Tablespace: 1663, Database: 5, Relation: 1, Fork: 3, Block: 262143},
	} {
		spc, name, off, ok := b.File()
		if got := fmt.Sprint(spc, " ", name, " ", off); got != want || !ok {
			t.Errorf("%+v is %s, want %s", b, got, want)
		}
	}
	if _, _, _, ok := (BlockRef{Fork: 4}).File(); ok {
		t.Error("a fork that there is not")
	}
}

// FuzzWALBlocks gives the fuzzer's bytes right CRCs and pages.
func FuzzWALBlocks(f *testing.F) {
	f.Add(blockBody(3, 20), uint16(0))
	f.Add(blockBody(33, 300), uint16(9000))
	f.Add(append([]byte{253, 0, 0, 252, 0, 0, 0, 0}, blockBody(1, 1)...), uint16(7))
	f.Fuzz(func(t *testing.T, body []byte, rest uint16) {
		w := newWAL(10, 1, uint32(rest))
		w.record(10, 0, 1, body)
		seg := w.segment()
		withinMemory(t, len(seg), func() {
			n := 0
			var blocks WALBlocks
			if err := blocks.Segment(seg, w.name(), mib, func(LSN, BlockRef) { n++ }); err != nil {
				t.Error(err)
			}
			if n > len(body)/4 {
				t.Errorf("%d pages in %d bytes", n, len(body))
			}
			_ = blocks.Segment(seg, w.name(), mib, func(LSN, BlockRef) {}) // which does not follow itself
		})
	})
}

// FuzzWALBlocksSegments: whatever two segments hold.
func FuzzWALBlocksSegments(f *testing.F) {
	for _, major := range majors {
		_, seg := goldenWAL(f, major)
		f.Add(seg[:2*testPage], seg[:testPage])
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		withinMemory(t, len(first)+len(second), func() {
			var w WALBlocks
			_ = w.Segment(first, WALName{Timeline: 1, Seg: 10}, mib, func(LSN, BlockRef) {})
			_ = w.Segment(second, WALName{Timeline: 1, Seg: 11}, mib, func(_ LSN, b BlockRef) { b.File() })
		})
	})
}

func BenchmarkWALBlocks(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 2))
	w := newWAL(7, 1, 0)
	for len(w.b) < mib-2000 {
		w.record(10, 0, 3, blockBody(1+rng.IntN(3), 100))
	}
	seg := w.segment()
	b.SetBytes(mib)
	for b.Loop() {
		var blocks WALBlocks
		if err := blocks.Segment(seg, w.name(), mib, func(LSN, BlockRef) {}); err != nil {
			b.Fatal(err)
		}
	}
}
