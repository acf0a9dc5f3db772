package pg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// WALSummary is what one WAL segment file tells about recovery targets: facts of the records that begin in it.
type WALSummary struct {
	FirstRecord LSN `json:"first_record"` // where the first record begins; 0 if none does
	LastRecord  LSN `json:"last_record"`  // where the last one begins: recovery_target_lsn can be reached up to here
	// EndOfRecords is where the last record ends, or the segment's end if it Continues; 0 if there is none. A record
	// that began in an earlier segment and ends here is none of this segment's.
	EndOfRecords LSN  `json:"end_of_records"`
	Switched     bool `json:"switched"`  // the last record is XLOG_SWITCH: the rest of the file says nothing
	Continues    bool `json:"continues"` // the last record continues into the next segment; its own facts may be missing here

	// Of commit and abort records, prepared transactions' too; those of subtransactions are not counted. Times need
	// not ascend: concurrent commits take their time before their place. Both are zero where Xids is.
	FirstCommit time.Time `json:"first_commit"` // earliest
	LastCommit  time.Time `json:"last_commit"`  // latest
	MinXid      uint32    `json:"min_xid"`      // with MaxXid, in the order of TransactionIdPrecedes, which wraps around
	MaxXid      uint32    `json:"max_xid"`
	Xids        int       `json:"xids"`

	RestorePoints []RestorePoint `json:"restore_points,omitempty"`
}

// RestorePoint is a record of pg_create_restore_point.
type RestorePoint struct {
	Name string    `json:"name"`
	Time time.Time `json:"time"`
	LSN  LSN       `json:"lsn"` // end of the record, as the function returned it; recovery_target_name stops there
}

// Resource managers and their records: rmgrlist.h, pg_control.h, xact.h.
const (
	rmXLOG = 0
	rmXact = 1

	rmgrInfoMask     = 0xF0 // XLR_RMGR_INFO_MASK
	xlogSwitch       = 0x40
	xlogRestorePoint = 0x70

	xactOpMask         = 0x70
	xactCommit         = 0x00
	xactAbort          = 0x20
	xactCommitPrepared = 0x30
	xactAbortPrepared  = 0x40
	xactHasInfo        = 0x80
)

// ScanWAL reads the segment file called name, whole, padded or cut short, as recovery would: from the first record that
// begins in it to the end of valid WAL, which is no error. It is an error when the file does not begin with a WAL page
// of PostgreSQL 15 to 18 for this place, segment size and timeline (or an older one: a new timeline's first segment
// begins with a copy). Whose cluster's it is, ParseLongPageHeader tells.
func ScanWAL(seg []byte, name WALName, size SegmentSize) (WALSummary, error) {
	s, err := openSegment(seg, name, size)
	if err != nil {
		return WALSummary{}, fmt.Errorf("WAL segment %s: %w", name, err)
	}
	var sum WALSummary
	off, ok := s.first()
	for ok {
		var r walRecord
		if r, off, ok = s.next(off); ok {
			sum.add(r, s.magic)
			ok = !sum.Switched && !sum.Continues
		}
	}
	return sum, nil
}

func openSegment(seg []byte, name WALName, size SegmentSize) (*walSegment, error) {
	if name.Kind != WALSegment && name.Kind != WALPartial {
		return nil, errors.New("not the name of a segment")
	}
	segno, err := name.SegmentNo(size)
	if err != nil {
		return nil, err
	}
	magic, tli, addr, _, headerSize, pageSize, err := ParseLongPageHeader(seg)
	switch {
	case err != nil:
		return nil, err
	case headerSize != size || len(seg) > int(size):
		return nil, fmt.Errorf("%d bytes of a segment of %d, where segments have %d", len(seg), headerSize, size)
	case addr != size.Start(segno):
		return nil, fmt.Errorf("holds the WAL of %s", addr)
	case tli > name.Timeline:
		return nil, fmt.Errorf("holds the WAL of timeline %s", tli)
	}
	return &walSegment{
		b:        seg[:len(seg)-len(seg)%int(pageSize)],
		whole:    len(seg) == int(size),
		start:    addr,
		pageSize: int(pageSize),
		magic:    magic,
		newest:   name.Timeline,
		timeline: tli,
	}, nil
}

// add takes in the next record of the segment.
func (w *WALSummary) add(r walRecord, magic uint16) {
	if w.FirstRecord == 0 {
		w.FirstRecord = r.start
	}
	w.LastRecord, w.EndOfRecords, w.Continues = r.start, r.end, r.continues
	if !r.hasHeader() {
		return
	}
	switch {
	case r.rmid() == rmXLOG && r.info()&rmgrInfoMask == xlogSwitch:
		w.Switched = true
	case r.rmid() == rmXLOG && r.info()&rmgrInfoMask == xlogRestorePoint:
		w.addRestorePoint(r)
	case r.rmid() == rmXact:
		w.addXact(r, magic)
	}
}

// addRestorePoint reads an xl_restore_point: a time and a name of 64 bytes.
func (w *WALSummary) addRestorePoint(r walRecord) {
	data, ok := r.mainData()
	if !ok || len(data) != 8+64 {
		return
	}
	name, _, _ := bytes.Cut(data[8:], []byte{0})
	w.RestorePoints = append(w.RestorePoints, RestorePoint{Name: string(name), Time: timestamp(data), LSN: r.end})
}

// addXact reads an xl_xact_commit or xl_xact_abort.
func (w *WALSummary) addXact(r walRecord, magic uint16) {
	data, ok := r.mainData()
	if !ok || len(data) < 8 {
		return
	}
	xid := r.xid()
	switch r.info() & xactOpMask {
	case xactCommit, xactAbort:
	case xactCommitPrepared, xactAbortPrepared:
		xid = preparedXid(data[8:], r.info(), magic)
	default:
		return
	}
	w.addTime(timestamp(data))
	w.addXid(xid)
}

func (w *WALSummary) addTime(t time.Time) {
	if w.FirstCommit.IsZero() || t.Before(w.FirstCommit) {
		w.FirstCommit = t
	}
	if w.LastCommit.IsZero() || t.After(w.LastCommit) {
		w.LastCommit = t
	}
}

func (w *WALSummary) addXid(xid uint32) {
	if xid == 0 {
		return
	}
	if w.Xids == 0 || int32(xid-w.MinXid) < 0 {
		w.MinXid = xid
	}
	if w.Xids == 0 || int32(xid-w.MaxXid) > 0 {
		w.MaxXid = xid
	}
	w.Xids++
}

// preparedXid finds xl_xact_twophase behind the optional parts of a commit or abort record (ParseCommitRecord of
// xactdesc.c); data begins after the time. It is 0 where data is not what it should be, or ends before.
func preparedXid(data []byte, info byte, magic uint16) uint32 {
	xinfo, data, ok := cutUint32(data)
	if info&xactHasInfo == 0 || !ok {
		return 0
	}
	if xinfo&(1<<0) != 0 { // XACT_XINFO_HAS_DBINFO
		if len(data) < 8 {
			return 0
		}
		data = data[8:]
	}
	if data, ok = skipXactLists(data, xinfo, magic); !ok || xinfo&(1<<4) == 0 { // XACT_XINFO_HAS_TWOPHASE
		return 0
	}
	xid, _, _ := cutUint32(data)
	return xid
}

// skipXactLists skips the counted lists of a commit or abort record.
func skipXactLists(data []byte, xinfo uint32, magic uint16) (rest []byte, ok bool) {
	statsItem := uint64(12) // sizeof(xl_xact_stats_item)
	if magic == magic18 {
		statsItem = 16
	}
	for _, list := range []struct {
		flag    uint32
		element uint64 // bytes
	}{
		{1 << 1, 4},         // XACT_XINFO_HAS_SUBXACTS
		{1 << 2, 12},        // XACT_XINFO_HAS_RELFILENODES, from 16 on RELFILELOCATORS
		{1 << 8, statsItem}, // XACT_XINFO_HAS_DROPPED_STATS
		{1 << 3, 16},        // XACT_XINFO_HAS_INVALS
	} {
		if xinfo&list.flag == 0 {
			continue
		}
		var n uint32
		if n, data, ok = cutUint32(data); !ok || uint64(n)*list.element > uint64(len(data)) {
			return nil, false
		}
		data = data[uint64(n)*list.element:]
	}
	return data, true
}

// cutUint32 takes the first four bytes off b.
func cutUint32(b []byte) (v uint32, rest []byte, ok bool) {
	if len(b) < 4 {
		return 0, nil, false
	}
	return binary.LittleEndian.Uint32(b), b[4:], true
}

// pgEpoch is where a TimestampTz counts its microseconds from.
var pgEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// timestamp reads the TimestampTz that begins b.
func timestamp(b []byte) time.Time {
	us := int64(binary.LittleEndian.Uint64(b))
	return time.Unix(pgEpoch.Unix()+us/1e6, us%1e6*1e3).UTC()
}
