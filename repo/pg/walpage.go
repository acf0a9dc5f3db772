package pg

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Flags of xlp_info and lengths in bytes, from xlog_internal.h.
const (
	firstIsContrecord          = 0x0001 // XLP_FIRST_IS_CONTRECORD
	longHeader                 = 0x0002 // XLP_LONG_HEADER
	firstIsOverwriteContrecord = 0x0008 // XLP_FIRST_IS_OVERWRITE_CONTRECORD
	allPageFlags               = 0x000F // XLP_ALL_FLAGS

	shortHeaderSize = 24
	longHeaderSize  = 40
)

// walMagics are the XLOG_PAGE_MAGICs of PostgreSQL 15, 16, 17 and 18.
var walMagics = map[uint16]bool{0xD110: true, 0xD113: true, 0xD116: true, magic18: true}

const magic18 = 0xD118

// walPageHeader is struct XLogPageHeaderData.
type walPageHeader struct {
	magic, info uint16
	timeline    Timeline // of the first record on the page; may be older than the file's name
	addr        LSN
	remLen      uint32 // bytes of a record that began on an earlier page
}

func decodePageHeader(b []byte) walPageHeader {
	return walPageHeader{
		magic:    binary.LittleEndian.Uint16(b),
		info:     binary.LittleEndian.Uint16(b[2:]),
		timeline: Timeline(binary.LittleEndian.Uint32(b[4:])),
		addr:     LSN(binary.LittleEndian.Uint64(b[8:])),
		remLen:   binary.LittleEndian.Uint32(b[16:]),
	}
}

func (h walPageHeader) size() int {
	if h.info&longHeader != 0 {
		return longHeaderSize
	}
	return shortHeaderSize
}

// ParseLongPageHeader reads the header that begins each WAL segment file, from the file's first 40 bytes: the magic,
// which differs between major versions, the timeline of the first record on the page, which may be an ancestor of that
// in the file's name, the segment's start, the system identifier, and the sizes of segment and WAL page in bytes.
func ParseLongPageHeader(b []byte) (magic uint16, tli Timeline, pageAddr LSN, sysid uint64, size SegmentSize, xlogBlcksz uint32, err error) {
	if len(b) < longHeaderSize {
		return 0, 0, 0, 0, 0, 0, errors.New("WAL page header: too short")
	}
	h := decodePageHeader(b)
	sysid = binary.LittleEndian.Uint64(b[24:])
	size = SegmentSize(binary.LittleEndian.Uint32(b[32:]))
	xlogBlcksz = binary.LittleEndian.Uint32(b[36:])
	switch {
	case !walMagics[h.magic]:
		err = fmt.Errorf("WAL page header: magic %04X is none of PostgreSQL 15 to 18", h.magic)
	case h.info&longHeader == 0 || h.info&^allPageFlags != 0:
		err = fmt.Errorf("WAL page header: flags %04X do not begin a segment", h.info)
	case !size.Valid() || !validPageSize(xlogBlcksz) || uint64(h.addr)%uint64(size) != 0 || h.timeline == 0:
		err = fmt.Errorf("WAL page header: impossible: timeline %s, %s, segments of %d bytes, pages of %d", h.timeline, h.addr, size, xlogBlcksz)
	}
	if err != nil {
		return 0, 0, 0, 0, 0, 0, err
	}
	return h.magic, h.timeline, h.addr, sysid, size, xlogBlcksz, nil
}
