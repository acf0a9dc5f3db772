package pg

import (
	"encoding/binary"
	"hash/crc32"
)

// recordHeaderSize is SizeOfXLogRecord in bytes: xl_tot_len, xl_xid, xl_prev, xl_info, xl_rmid, two of padding, xl_crc.
const recordHeaderSize = 24

// walRecord is an XLogRecord as far as it lies in the segment. Its accessors want the header whole: see hasHeader.
type walRecord struct {
	start, end LSN // end as the server reports it: aligned, and before the header of a page that begins there
	data       []byte
	continues  bool // into the next segment, which has the rest of it
}

func (r walRecord) hasHeader() bool { return len(r.data) >= recordHeaderSize }
func (r walRecord) total() uint32   { return binary.LittleEndian.Uint32(r.data) }
func (r walRecord) xid() uint32     { return binary.LittleEndian.Uint32(r.data[4:]) }
func (r walRecord) prev() LSN       { return LSN(binary.LittleEndian.Uint64(r.data[8:])) }
func (r walRecord) info() byte      { return r.data[16] }
func (r walRecord) rmid() byte      { return r.data[17] }

// crcMatches is ValidXLogRecord: everything after the header first, then the header up to xl_crc.
func (r walRecord) crcMatches() bool {
	crc := crc32.Update(0, castagnoli, r.data[recordHeaderSize:])
	crc = crc32.Update(crc, castagnoli, r.data[:20])
	return crc == binary.LittleEndian.Uint32(r.data[20:])
}

// mainData is the part that the resource manager lays out: the end of the record, as long as the last of the headers
// says. Only records without block references are understood, as those of transactions and restore points are. Of a
// record that continues, it is what lies here.
func (r walRecord) mainData() ([]byte, bool) {
	p := recordHeaderSize
	for p < len(r.data) {
		rest := r.data[p:]
		switch rest[0] {
		case 253: // XLR_BLOCK_ID_ORIGIN: a RepOriginId
			p += 1 + 2
		case 252: // XLR_BLOCK_ID_TOPLEVEL_XID
			p += 1 + 4
		case 255: // XLR_BLOCK_ID_DATA_SHORT
			if len(rest) < 2 {
				return nil, false
			}
			return r.mainDataAt(p+2, uint32(rest[1]))
		case 254: // XLR_BLOCK_ID_DATA_LONG
			if len(rest) < 5 {
				return nil, false
			}
			return r.mainDataAt(p+5, binary.LittleEndian.Uint32(rest[1:]))
		default:
			return nil, false
		}
	}
	return nil, false
}

// mainDataAt is the data from p to the record's end, if there are n bytes of it.
func (r walRecord) mainDataAt(p int, n uint32) ([]byte, bool) {
	if uint64(p)+uint64(n) != uint64(r.total()) || p > len(r.data) {
		return nil, false
	}
	return r.data[p:], true
}

// walSegment reads the records of one WAL segment file in order, as xlogreader.c does.
type walSegment struct {
	b         []byte // whole pages
	whole     bool   // b is the segment to its end
	start     LSN
	pageSize  int
	magic     uint16
	newest    Timeline // the file name's: no page may have a newer one
	timeline  Timeline // of the page read last: no later page may have an older one
	prev      LSN      // start of the record before; 0 before the first
	assembled []byte   // a record that crosses pages
}

// page reads the header of the page at off, a multiple of the page size. It is not ok at the end of valid WAL: recycled
// segments hold pages of other addresses, new ones zeros.
func (s *walSegment) page(off int) (h walPageHeader, ok bool) {
	if off >= len(s.b) {
		return h, false
	}
	h = decodePageHeader(s.b[off:])
	ok = h.magic == s.magic &&
		h.info&^allPageFlags == 0 &&
		(h.info&longHeader != 0) == (off == 0) &&
		h.addr == s.start+LSN(off) &&
		h.timeline >= s.timeline && h.timeline <= s.newest
	if ok {
		s.timeline = h.timeline
	}
	return h, ok
}

// first finds where the first record begins: after what is left of one that began in an earlier segment
// (XLogFindNextRecord). It is not ok when the whole segment is such a rest.
func (s *walSegment) first() (off int, ok bool) {
	for page := 0; ; page += s.pageSize {
		h, ok := s.page(page)
		if !ok {
			return 0, false
		}
		if h.info&firstIsContrecord == 0 {
			return page + h.size(), true
		}
		if rest := align8(h.remLen); rest < uint64(s.pageSize-h.size()) {
			return page + h.size() + int(rest), true
		}
	}
}

// next reads the record at off or, where off ends a page, the one that begins the next page. after is where to go on.
// It is not ok at the end of valid WAL. The record's data is good until the next call.
func (s *walSegment) next(off int) (r walRecord, after int, ok bool) {
	for {
		page := off - off%s.pageSize
		h, ok := s.page(page)
		if !ok {
			return r, 0, false
		}
		if off == page {
			off += h.size()
		}
		if off == page+h.size() && h.info&firstIsContrecord != 0 {
			return r, 0, false
		}
		overwritten := false
		r, after, overwritten, ok = s.gather(off)
		if !overwritten {
			return r, after, ok && s.accept(r)
		}
		off = after
	}
}

// gather puts together the record at off, which lies within a page whose header is good. Where a page says that the
// record was never finished (CreateOverwriteContrecordRecord), it is overwritten, and after is that page.
func (s *walSegment) gather(off int) (r walRecord, after int, overwritten, ok bool) {
	r.start = s.start + LSN(off)
	total := uint64(binary.LittleEndian.Uint32(s.b[off:])) // at least eight bytes of a record are on its first page
	page := off - off%s.pageSize
	n := min(total, uint64(page+s.pageSize-off))
	r.data = s.b[off : off+int(n)]
	if total < recordHeaderSize {
		return r, 0, false, false
	}
	if n == total {
		after = off + int(align8(uint32(total)))
		r.end = s.start + LSN(after)
		return r, after, false, true
	}
	s.assembled = append(s.assembled[:0], r.data...)
	for left := total - n; left > 0; left -= n {
		if page += s.pageSize; page == len(s.b) && s.whole {
			r.data, r.end, r.continues = s.assembled, s.start+LSN(page), true
			return r, page, false, true
		}
		h, ok := s.page(page)
		if !ok {
			return r, 0, false, false
		}
		if h.info&firstIsOverwriteContrecord != 0 {
			return r, page, true, false
		}
		if h.info&firstIsContrecord == 0 || uint64(h.remLen) != left {
			return r, 0, false, false
		}
		body := page + h.size()
		n = min(left, uint64(page+s.pageSize-body))
		s.assembled = append(s.assembled, s.b[body:body+int(n)]...)
		after = body + int(align8(uint32(n)))
	}
	r.data, r.end = s.assembled, s.start+LSN(after)
	return r, after, false, true
}

// accept checks r as recovery does before it believes it, so far as it lies here.
func (s *walSegment) accept(r walRecord) bool {
	if !r.hasHeader() {
		return r.continues
	}
	if s.prev == 0 && r.prev() >= r.start || s.prev != 0 && r.prev() != s.prev {
		return false
	}
	s.prev = r.start
	return r.continues || r.crcMatches()
}

// align8 is MAXALIGN.
func align8(n uint32) uint64 {
	return (uint64(n) + 7) &^ 7
}
