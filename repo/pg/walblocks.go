package pg

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// BlockRef is a page of a relation to which a WAL record refers.
type BlockRef struct {
	Tablespace, Database, Relation uint32 // RelFileLocator; before 16, RelFileNode
	Fork                           uint8  // MAIN_FORKNUM and its like
	Block                          uint32
	// Image says that the record has all of the page, Init that redo makes it anew: it is not read then.
	Image, Init bool
}

// Tablespaces that every cluster has: pg_tablespace.dat.
const (
	defaultTablespace = 1663
	globalTablespace  = 1664
)

// forks are the suffixes of relation files: forkNames of relpath.c.
var forks = []string{"", "_fsm", "_vm", "_init"}

// Relation segments are of 1 GiB, unless PostgreSQL was built with another RELSEG_SIZE.
const (
	relationPage    = 8192
	relationSegment = 1 << 30 / relationPage
)

// File returns the file of a page and its place there, as in relpath.c: a path in the data directory for the default
// tablespaces, else one in the directory "PG_15_..." of a tablespace. It is not ok for a fork that is none.
func (b BlockRef) File() (tablespace uint32, name string, off int64, ok bool) {
	if int(b.Fork) >= len(forks) {
		return 0, "", 0, false
	}
	name = fmt.Sprintf("%d%s", b.Relation, forks[b.Fork])
	if n := b.Block / relationSegment; n > 0 {
		name = fmt.Sprintf("%s.%d", name, n)
	}
	off = int64(b.Block%relationSegment) * relationPage
	switch b.Tablespace {
	case globalTablespace:
		return 0, "global/" + name, off, true
	case defaultTablespace:
		return 0, fmt.Sprintf("base/%d/%s", b.Database, name), off, true
	}
	return b.Tablespace, fmt.Sprintf("%d/%s", b.Database, name), off, true
}

// WALBlocks finds the pages to which the records of consecutive segments refer. The zero value begins with the first record that begins
// in the first segment.
type WALBlocks struct {
	next  LSN    // where the segment after begins
	begin LSN    // of a record that the next segment goes on with
	begun []byte // what there is of it; nil: none
}

// maxBegun is more than a record has that refers to pages: 33 images.
const maxBegun = 1 << 20

// Segment calls fn for each page of each record that ends in a segment, with the place where the record begins: of all records but
// the first, those that recovery would accept. The errors are those of ScanWAL.
func (w *WALBlocks) Segment(seg []byte, name WALName, size SegmentSize, fn func(LSN, BlockRef)) error {
	s, err := openSegment(seg, name, size)
	if err != nil {
		return fmt.Errorf("WAL segment %s: %w", name, err)
	}
	before := *w
	*w = WALBlocks{next: s.start + LSN(size)}
	if before.begun != nil && before.next == s.start {
		w.begin, w.begun = before.begin, before.begun
		if r, ok := w.finish(s); ok {
			r.blocks(fn)
		}
		if w.begun != nil {
			return nil
		}
	}
	off, ok := s.first()
	for ok {
		var r walRecord
		if r, off, ok = s.next(off); !ok {
			break
		}
		if r.continues {
			w.begin, w.begun = r.start, slices.Clone(r.data)
			break
		}
		r.blocks(fn)
		ok = r.rmid() != rmXLOG || r.info()&rmgrInfoMask != xlogSwitch
	}
	return nil
}

// finish goes on with the record that an earlier segment began. begun stays if the next segment goes on with it.
func (w *WALBlocks) finish(s *walSegment) (r walRecord, ok bool) {
	data, total := w.begun, uint64(walRecord{data: w.begun}.total())
	w.begun = nil
	for page := 0; len(data) < maxBegun; page += s.pageSize {
		left := total - uint64(len(data))
		if page == len(s.b) && s.whole {
			w.begun = data
			return r, false
		}
		h, ok := s.page(page)
		if !ok || h.info&firstIsContrecord == 0 || uint64(h.remLen) != left {
			return r, false
		}
		body := page + h.size()
		n := min(left, uint64(page+s.pageSize-body))
		data = append(data, s.b[body:body+int(n)]...)
		if n == left {
			r = walRecord{start: w.begin, data: data}
			return r, r.hasHeader() && r.crcMatches()
		}
	}
	return r, false
}

// Flags of blocks and images: xlogrecord.h.
const (
	maxBlockID   = 32   // XLR_MAX_BLOCK_ID
	forkMask     = 0x0F // BKPBLOCK_FORK_MASK
	hasImage     = 0x10 // BKPBLOCK_HAS_IMAGE
	willInit     = 0x40 // BKPBLOCK_WILL_INIT
	sameRelation = 0x80 // BKPBLOCK_SAME_REL

	imageHasHole    = 0x01       // BKPIMAGE_HAS_HOLE
	imageApply      = 0x02       // BKPIMAGE_APPLY
	imageCompressed = 4 | 8 | 16 // BKPIMAGE_COMPRESSED: PGLZ, LZ4, ZSTD
)

// blocks calls fn for the pages that a whole record names, as DecodeXLogRecord finds them, up to what is odd.
func (r walRecord) blocks(fn func(LSN, BlockRef)) {
	d := blockDecoder{b: r.data[recordHeaderSize:]}
	var b BlockRef
	for known, last := false, -1; uint64(len(d.b)) > d.data && !d.bad; {
		switch id := d.byte(); {
		case id == 253: // XLR_BLOCK_ID_ORIGIN: a RepOriginId
			d.skip(2)
		case id == 252: // XLR_BLOCK_ID_TOPLEVEL_XID
			d.skip(4)
		case id > maxBlockID, int(id) <= last: // main data, whose header is the last
			return
		default:
			relation := d.block(&b)
			known, last = known || relation, int(id)
			if d.bad || !known {
				return
			}
			fn(r.start, b)
		}
	}
}

// blockDecoder reads the headers of a record. What is missing is bad.
type blockDecoder struct {
	b    []byte
	data uint64 // bytes that the headers read so far have at the record's end
	bad  bool
}

func (d *blockDecoder) skip(n int) []byte {
	if len(d.b) < n {
		d.bad, d.b = true, nil
		return make([]byte, n)
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *blockDecoder) byte() byte     { return d.skip(1)[0] }
func (d *blockDecoder) uint16() uint16 { return binary.LittleEndian.Uint16(d.skip(2)) }
func (d *blockDecoder) uint32() uint32 { return binary.LittleEndian.Uint32(d.skip(4)) }

// block reads an XLogRecordBlockHeader behind its id. relation: it names one, else it is that of the block before.
func (d *blockDecoder) block(b *BlockRef) (relation bool) {
	flags := d.byte()
	d.data += uint64(d.uint16())
	b.Fork, b.Image, b.Init = flags&forkMask, false, flags&willInit != 0
	if flags&hasImage != 0 {
		d.data += uint64(d.uint16())
		d.uint16() // where its hole is
		info := d.byte()
		if info&imageHasHole != 0 && info&imageCompressed != 0 {
			d.uint16() // the hole's length
		}
		b.Image = info&imageApply != 0
	}
	if relation = flags&sameRelation == 0; relation {
		b.Tablespace, b.Database, b.Relation = d.uint32(), d.uint32(), d.uint32()
	}
	b.Block = d.uint32()
	return relation
}
