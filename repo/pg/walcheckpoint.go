package pg

import (
	"bytes"
	"encoding/binary"
	"iter"
)

// CheckpointRecord is the record that ends a checkpoint.
type CheckpointRecord struct {
	LSN  LSN // where it begins
	Redo LSN // where replay from it begins
}

// Checkpoint records of rmXLOG: pg_control.h.
const (
	xlogCheckpointShutdown = 0x00
	xlogCheckpointOnline   = 0x10
)

// LastCheckpoint finds the last checkpoint record that lies in a segment file as a whole. It is not ok where there is none. Errors
// are those of ScanWAL.
func LastCheckpoint(seg []byte, name WALName, size SegmentSize) (last CheckpointRecord, ok bool, err error) {
	s, err := openSegment(seg, name, size)
	if err != nil {
		return last, false, err
	}
	for r := range s.records() {
		if c, is := r.checkpoint(); is && !r.continues {
			last, ok = c, true
		}
	}
	return last, ok, nil
}

// checkpoint reads a CheckPoint as far as its first field, redo.
func (r walRecord) checkpoint() (CheckpointRecord, bool) {
	kind := r.info() & rmgrInfoMask
	if r.rmid() != rmXLOG || kind != xlogCheckpointShutdown && kind != xlogCheckpointOnline {
		return CheckpointRecord{}, false
	}
	data, ok := r.mainData()
	if !ok || len(data) < 8 {
		return CheckpointRecord{}, false
	}
	return CheckpointRecord{LSN: r.start, Redo: LSN(binary.LittleEndian.Uint64(data))}, true
}

// Tablespace records: rmgrlist.h, tablespace.h.
const (
	rmTblspc     = 5
	tblspcCreate = 0x00
)

// TablespacesMade lists the directories of the tablespaces whose making begins in a segment file: an xl_tblspc_create_rec is an OID
// and a path, which is empty for one within pg_tblspc. Of a record that continues in the next segment, the path may be cut short.
// Errors are those of ScanWAL.
func TablespacesMade(seg []byte, name WALName, size SegmentSize) (dirs []string, err error) {
	s, err := openSegment(seg, name, size)
	if err != nil {
		return nil, err
	}
	for r := range s.records() {
		if r.rmid() != rmTblspc || r.info()&rmgrInfoMask != tblspcCreate {
			continue
		}
		if data, ok := r.mainData(); !ok || len(data) < 4 {
			dirs = append(dirs, "a directory that is not known")
		} else if dir, _, _ := bytes.Cut(data[4:], []byte{0}); len(dir) > 0 || r.continues {
			dirs = append(dirs, string(dir))
		}
	}
	return dirs, nil
}

// TransactionsFrom tells whether a transaction leaves a record in a segment file at or behind a place: commits, aborts, is prepared.
// Errors are those of ScanWAL.
func TransactionsFrom(seg []byte, name WALName, size SegmentSize, from LSN) (bool, error) {
	s, err := openSegment(seg, name, size)
	if err != nil {
		return false, err
	}
	for r := range s.records() {
		if r.start >= from && r.rmid() == rmXact {
			return true, nil
		}
	}
	return false, nil
}

// records are those that begin in the segment and have a header there; only the last one may continue in the next segment. Behind
// XLOG_SWITCH there is none.
func (s *walSegment) records() iter.Seq[walRecord] {
	return func(yield func(walRecord) bool) {
		for off, more := s.first(); more; {
			var r walRecord
			if r, off, more = s.next(off); !more || !r.hasHeader() || !yield(r) {
				return
			}
			more = !r.continues && (r.rmid() != rmXLOG || r.info()&rmgrInfoMask != xlogSwitch)
		}
	}
}
