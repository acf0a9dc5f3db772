package pg

import "encoding/binary"

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
	off, more := s.first()
	for more {
		var r walRecord
		if r, off, more = s.next(off); !more || r.continues {
			break
		}
		if c, is := r.checkpoint(); is {
			last, ok = c, true
		}
		more = r.rmid() != rmXLOG || r.info()&rmgrInfoMask != xlogSwitch
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
