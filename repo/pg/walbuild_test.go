package pg

import (
	"encoding/binary"
	"hash/crc32"
	"testing"
)

const testPage = 8192

// walBuilder writes WAL as a server of 18 does, from the start of a segment of 1 MiB, into pages that it adds.
type walBuilder struct {
	b        []byte
	start    LSN
	timeline Timeline
	prev     LSN
}

// newWAL begins segment segno, of which rest bytes belong to a record of the segment before.
func newWAL(segno uint64, timeline Timeline, rest uint32) *walBuilder {
	w := &walBuilder{start: SegmentSize(mib).Start(segno), timeline: timeline}
	w.prev = w.start - 64
	w.page(rest, 0)
	for rest > 0 {
		n := min(rest, uint32(w.room()))
		w.b = append(w.b, make([]byte, n)...)
		if rest -= n; rest > 0 {
			w.page(rest, 0)
		}
	}
	return w
}

func (w *walBuilder) room() int { return (testPage - len(w.b)%testPage) % testPage }

// page begins a page, of which rest bytes belong to a record that began before.
func (w *walBuilder) page(rest uint32, flags uint16) {
	off := len(w.b)
	if rest > 0 {
		flags |= firstIsContrecord
	}
	if off == 0 {
		flags |= longHeader
	}
	w.b = binary.LittleEndian.AppendUint16(w.b, magic18)
	w.b = binary.LittleEndian.AppendUint16(w.b, flags)
	w.b = binary.LittleEndian.AppendUint32(w.b, uint32(w.timeline))
	w.b = binary.LittleEndian.AppendUint64(w.b, uint64(w.start)+uint64(off))
	w.b = binary.LittleEndian.AppendUint32(w.b, rest)
	w.b = append(w.b, 0, 0, 0, 0)
	if off == 0 {
		w.b = binary.LittleEndian.AppendUint64(w.b, 42)
		w.b = binary.LittleEndian.AppendUint32(w.b, mib)
		w.b = binary.LittleEndian.AppendUint32(w.b, testPage)
	}
}

// align pads to where the next record may begin, a new page's header included.
func (w *walBuilder) align() {
	w.b = append(w.b, make([]byte, -len(w.b)&7)...)
	if w.room() == 0 {
		w.page(0, 0)
	}
}

// record writes a record with what follows its header, over as many pages as it takes, and gives its place.
func (w *walBuilder) record(rmid, info byte, xid uint32, body []byte) (start LSN) {
	w.align()
	start = w.start + LSN(len(w.b))
	r := binary.LittleEndian.AppendUint32(nil, uint32(recordHeaderSize+len(body)))
	r = binary.LittleEndian.AppendUint32(r, xid)
	r = binary.LittleEndian.AppendUint64(r, uint64(w.prev))
	r = append(r, info, rmid, 0, 0)
	crc := crc32.Update(crc32.Checksum(body, castagnoli), castagnoli, r)
	r = binary.LittleEndian.AppendUint32(r, crc)
	r = append(r, body...)
	for len(r) > 0 {
		if w.room() == 0 {
			w.page(uint32(len(r)), 0)
		}
		n := min(len(r), w.room())
		w.b = append(w.b, r[:n]...)
		r = r[n:]
	}
	w.prev = start
	return start
}

// filler writes a record of n bytes that says nothing.
func (w *walBuilder) filler(n int) LSN {
	return w.record(15, 0, 0, make([]byte, n-recordHeaderSize))
}

// end is the place after the last record, as the server would report it.
func (w *walBuilder) end() LSN { return w.start + LSN((len(w.b)+7)&^7) }

// segment is what has been written, cut at the segment's end or padded to it.
func (w *walBuilder) segment() []byte {
	seg := make([]byte, mib)
	copy(seg, w.b)
	return seg
}

func (w *walBuilder) name() WALName {
	return SegmentName(w.timeline, SegmentSize(mib).Segment(w.start), mib)
}

// scan is ScanWAL of the segment.
func (w *walBuilder) scan(t *testing.T) WALSummary {
	t.Helper()
	sum, err := ScanWAL(w.segment(), w.name(), mib)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// shortData is main data of up to 255 bytes with its header.
func shortData(data []byte) []byte {
	return append([]byte{255, byte(len(data))}, data...)
}

// commitAt is the main data of a commit record without anything optional, us microseconds after 2000.
func commitAt(us int64) []byte {
	return shortData(binary.LittleEndian.AppendUint64(nil, uint64(us)))
}
