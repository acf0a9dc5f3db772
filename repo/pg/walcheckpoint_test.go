package pg

import (
	"encoding/binary"
	"testing"
)

// checkpointFrom is the main data of a checkpoint record, as long as 18's.
func checkpointFrom(redo LSN) []byte {
	return shortData(append(binary.LittleEndian.AppendUint64(nil, uint64(redo)), make([]byte, 80)...))
}

func TestLastCheckpoint(t *testing.T) {
	w := newWAL(3, 1, 5000)
	expect := func(want CheckpointRecord, there bool) {
		t.Helper()
		got, ok, err := LastCheckpoint(w.segment(), w.name(), mib)
		if err != nil || ok != there || got != want {
			t.Errorf("got %+v, %v, %v; want %+v, %v", got, ok, err, want, there)
		}
	}
	expect(CheckpointRecord{}, false)
	w.filler(9000)
	expect(CheckpointRecord{}, false)
	online := w.record(rmXLOG, xlogCheckpointOnline, 0, checkpointFrom(0x300100))
	expect(CheckpointRecord{online, 0x300100}, true)
	w.record(rmXLOG, 0x30, 0, checkpointFrom(0x999)) // XLOG_NEXTOID
	w.record(rmXact, xlogCheckpointOnline, 0, checkpointFrom(0x999))
	w.filler(3 * testPage)
	expect(CheckpointRecord{online, 0x300100}, true)
	shutdown := w.record(rmXLOG, xlogCheckpointShutdown, 0, checkpointFrom(w.end()))
	expect(CheckpointRecord{shutdown, shutdown}, true)
	w.record(rmXLOG, xlogSwitch, 0, nil)
	w.record(rmXLOG, xlogCheckpointOnline, 0, checkpointFrom(0x300100)) // of a recycled segment
	expect(CheckpointRecord{shutdown, shutdown}, true)
}

// TestLastCheckpointContinues: one that ends in the next segment is not there as a whole.
func TestLastCheckpointContinues(t *testing.T) {
	w := newWAL(3, 1, 0)
	first := w.record(rmXLOG, xlogCheckpointOnline, 0, checkpointFrom(0x300100))
	w.filler(mib - len(w.b) - testPage)
	w.align()
	for w.room() > 200 {
		w.filler(min(w.room()-56, 8000))
		w.align()
	}
	for len(w.b) < mib-64 {
		w.filler(32)
		w.align()
	}
	w.record(rmXLOG, xlogCheckpointOnline, 0, checkpointFrom(0x300200))
	if len(w.b) <= mib {
		t.Fatalf("the record ends at %d, in the segment", len(w.b))
	}
	w.b = w.b[:mib]
	got, ok, err := LastCheckpoint(w.segment(), w.name(), mib)
	if err != nil || !ok || got.LSN != first {
		t.Errorf("got %+v, %v, %v; want the one at %s", got, ok, err, first)
	}
}

func TestTablespacesMade(t *testing.T) {
	w := newWAL(3, 1, 0)
	record := func(info byte, dir string) {
		w.record(rmTblspc, info, 0, shortData(append(binary.LittleEndian.AppendUint32(nil, 16384), dir+"\x00"...)))
	}
	record(0x10, "") // XLOG_TBLSPC_DROP
	record(tblspcCreate, "")
	w.filler(9000)
	for _, want := range []int{0, 1, 2} {
		got, err := TablespacesMade(w.segment(), w.name(), mib)
		if err != nil || len(got) != want || want > 0 && got[0] != "/somewhere" {
			t.Errorf("got %q, %v; want %d", got, err, want)
		}
		record(tblspcCreate, "/somewhere")
	}
}

func TestTransactionsFrom(t *testing.T) {
	w := newWAL(3, 1, 0)
	w.filler(9000)
	early := w.record(rmXact, xactCommit, 9, commitAt(5))
	w.filler(200)
	late := w.record(rmXact, 0x10, 10, commitAt(5)) // XLOG_XACT_PREPARE
	w.record(rmXLOG, xlogSwitch, 0, nil)
	w.record(rmXact, xactCommit, 11, commitAt(6)) // of a recycled segment
	for from, want := range map[LSN]bool{early: true, early + 1: true, late: true, late + 1: false} {
		if got, err := TransactionsFrom(w.segment(), w.name(), mib, from); err != nil || got != want {
			t.Errorf("from %s: %v, %v; want %v", from, got, err, want)
		}
	}
}
