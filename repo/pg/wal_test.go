package pg

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestScanWALGolden compares with what the server said while it wrote the segment, and with what pg_waldump says: a
// COMMIT, a COMMIT_PREPARED and an ABORT_PREPARED, then a restore point, a COMMIT, a COMMIT_PREPARED and an ABORT.
func TestScanWALGolden(t *testing.T) {
	for _, major := range majors {
		name, seg := goldenWAL(t, major)
		sum, err := ScanWAL(seg, name, mib)
		if err != nil {
			t.Fatalf("%s: %v", major, err)
		}
		var prepared []uint32
		var at, switched LSN
		for line := range strings.Lines(string(golden(t, "facts."+major))) {
			var xid uint32
			if n, _ := fmt.Sscanf(line, "prepared %d", &xid); n == 1 {
				prepared = append(prepared, xid)
			}
			key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			switch key {
			case "restore_point":
				at, err = ParseLSN(value)
			case "switched":
				switched, err = ParseLSN(value)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if sum.Xids != 6 || sum.MinXid != prepared[0]-1 || sum.MaxXid != prepared[2]+1 {
			t.Errorf("%s: %d xids from %d to %d, prepared were %v", major, sum.Xids, sum.MinXid, sum.MaxXid, prepared)
		}
		if !sum.Switched || sum.Continues || sum.EndOfRecords != switched || sum.LastRecord != switched-recordHeaderSize {
			t.Errorf("%s: switched at %s, got %+v", major, switched, sum)
		}
		if p := sum.RestorePoints; len(p) != 1 || p[0].Name != "before the mistake" || p[0].LSN != at ||
			p[0].Time.Before(sum.FirstCommit) || p[0].Time.After(sum.LastCommit) {
			t.Errorf("%s: restore point at %s, got %+v", major, at, sum)
		}
	}
}

// TestScanWALPreparedXids reads each prepared transaction's end by itself: of its record, the golden segment up to it
// and the one up to the record before differ in one xid.
func TestScanWALPreparedXids(t *testing.T) {
	for _, major := range majors {
		name, seg := goldenWAL(t, major)
		s, err := openSegment(seg, name, mib)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		off, ok := s.first()
		for ok {
			var r walRecord
			if r, off, ok = s.next(off); ok && r.rmid() == rmXact && r.xid() == 0 {
				var sum WALSummary
				sum.add(r, s.magic)
				got = append(got, fmt.Sprintf("prepared %d\n", sum.MaxXid))
			}
		}
		facts := string(golden(t, "facts."+major))
		for _, want := range got {
			if !strings.Contains(facts, want) {
				t.Errorf("%s: %q is not in %q", major, want, facts)
			}
		}
		slices.Sort(got)
		if len(slices.Compact(got)) != 3 {
			t.Errorf("%s: got %q, want the three of %q", major, got, facts)
		}
	}
}

func TestScanWALRefuses(t *testing.T) {
	w := newWAL(7, 3, 0)
	seg, name := w.segment(), w.name()
	with := func(off int, c byte) []byte { b := bytes.Clone(seg); b[off] ^= c; return b }
	rename := func(edit func(*WALName)) WALName { n := name; edit(&n); return n }
	for what, c := range map[string]struct {
		seg  []byte
		name WALName
		size SegmentSize
	}{
		"empty":             {nil, name, mib},
		"zeros":             {make([]byte, mib), name, mib},
		"other magic":       {with(0, 1), name, mib},
		"short header":      {with(2, longHeader), name, mib},
		"unknown flag":      {with(2, 0x10), name, mib},
		"WAL page of 0":     {with(37, 0x20), name, mib},
		"other place":       {seg, rename(func(n *WALName) { n.Seg++ }), mib},
		"newer timeline":    {seg, rename(func(n *WALName) { n.Timeline-- }), mib},
		"history":           {seg, rename(func(n *WALName) { n.Kind = WALHistory }), mib},
		"other size":        {seg, name, 2 * mib},
		"longer":            {append(bytes.Clone(seg), 0), name, mib},
		"out of range Seg":  {seg, rename(func(n *WALName) { n.Seg = 4096 }), mib},
		"in a .backup file": {seg, rename(func(n *WALName) { n.Kind = WALBackupHistory }), mib},
	} {
		if sum, err := ScanWAL(c.seg, c.name, c.size); err == nil {
			t.Errorf("%s: %+v", what, sum)
		}
	}
	if _, err := ScanWAL(seg, rename(func(n *WALName) { n.Timeline++ }), mib); err != nil {
		t.Errorf("a new timeline begins with a copy of the old one's: %v", err)
	}
	if _, err := ScanWAL(seg, rename(func(n *WALName) { n.Kind = WALPartial }), mib); err != nil {
		t.Error(err)
	}
}

func TestScanWALCrossesPages(t *testing.T) {
	w := newWAL(7, 1, 3*testPage) // three pages and a bit of somebody else's record
	first := w.filler(100)
	w.filler(testPage * 3)
	w.align()
	for w.room() >= 48 {
		w.filler(24)
	}
	w.filler(w.room()) // ends with its page
	boundary := w.end()
	last := w.record(rmXact, xactCommit, 9, commitAt(5))
	got := w.scan(t)
	want := WALSummary{FirstRecord: first, LastRecord: last, EndOfRecords: w.end(), MinXid: 9, MaxXid: 9, Xids: 1,
		FirstCommit: pgEpoch.Add(5 * time.Microsecond), LastCommit: pgEpoch.Add(5 * time.Microsecond)}
	if boundary%testPage != 0 || last != boundary+shortHeaderSize || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v (page ends at %s)", got, want, boundary)
	}
}

func TestScanWALContinues(t *testing.T) {
	full := func() *walBuilder { // all but 32 bytes
		w := newWAL(7, 1, 0)
		w.filler(mib - longHeaderSize - 127*shortHeaderSize - 32)
		return w
	}
	end := SegmentSize(mib).Start(8)

	w := full()
	at := w.record(rmXact, xactCommit, 9, commitAt(5)) // two bytes of its time are in the next segment
	if got := w.scan(t); !got.Continues || got.EndOfRecords != end || got.LastRecord != at || got.Xids != 0 {
		t.Errorf("time cut off: %+v", got)
	}
	w = full()
	w.filler(24)
	w.record(rmXact, xactCommit, 9, commitAt(5)) // so is most of its header
	if got := w.scan(t); !got.Continues || got.EndOfRecords != end || got.Xids != 0 {
		t.Errorf("header cut off: %+v", got)
	}
	w = newWAL(7, 1, 0)
	w.filler(mib - longHeaderSize - 127*shortHeaderSize - 40)
	w.record(rmXact, xactCommit, 9, shortData(make([]byte, 100)))
	if got := w.scan(t); !got.Continues || got.Xids != 1 || !got.FirstCommit.Equal(pgEpoch) {
		t.Errorf("time not cut off: %+v", got)
	}
	w = full()
	w.filler(32)
	if got := w.scan(t); got.Continues || got.EndOfRecords != end {
		t.Errorf("nothing cut off: %+v", got)
	}
	w = newWAL(7, 1, 5*mib)
	if got := w.scan(t); !reflect.DeepEqual(got, WALSummary{}) {
		t.Errorf("no record begins in it: %+v", got)
	}
}

func TestScanWALStopsAtDamage(t *testing.T) {
	w := newWAL(7, 1, 0)
	w.filler(100)
	good := w.end()
	w.record(rmXact, xactCommit, 9, append(shortData(make([]byte, 100)), make([]byte, 2*testPage)...))
	first, cut := int(good-w.start), len(w.b)
	seg := w.segment()
	for off := first; off < cut; off++ {
		if in := off % testPage; in >= 20 && in < shortHeaderSize {
			continue // a page header's padding
		}
		seg[off] ^= 1
		if got, err := ScanWAL(seg, w.name(), mib); err != nil || got.EndOfRecords != good || got.Xids != 0 {
			t.Fatalf("byte %d damaged: %+v, %v", off, got, err)
		}
		seg[off] ^= 1
	}
	for n := longHeaderSize; n < cut; n += 101 {
		if got, err := ScanWAL(w.b[:n:n], w.name(), mib); err != nil || got.Continues || got.EndOfRecords > good {
			t.Fatalf("cut to %d bytes: %+v, %v", n, got, err)
		}
	}
}

// A record that a crash cut short is replaced on the next page (CreateOverwriteContrecordRecord).
func TestScanWALOverwrittenContrecord(t *testing.T) {
	w := newWAL(7, 1, 0)
	before := w.filler(100)
	w.filler(2 * testPage)
	w.b = w.b[:testPage]
	w.prev = before
	w.page(0, firstIsOverwriteContrecord)
	w.record(rmXLOG, 0xD0, 0, shortData(make([]byte, 16)))
	last := w.record(rmXact, xactAbort, 9, commitAt(5))
	if got := w.scan(t); got.LastRecord != last || got.Xids != 1 {
		t.Errorf("%+v, want up to %s", got, last)
	}
}

// A recycled segment holds the pages of an earlier one behind the end.
func TestScanWALRecycled(t *testing.T) {
	old := newWAL(3, 1, 0)
	for len(old.b) < mib/2 {
		old.record(rmXact, xactCommit, 5, commitAt(1))
	}
	w := newWAL(7, 1, 0)
	w.record(rmXact, xactCommit, 9, commitAt(5))
	seg := old.segment()
	copy(seg, append(w.b, make([]byte, w.room())...))
	if got, err := ScanWAL(seg, w.name(), mib); err != nil || got.Xids != 1 || got.EndOfRecords != w.end() {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestScanWALTimelineNeverGoesBack(t *testing.T) {
	w := newWAL(7, 2, 0)
	w.filler(testPage - longHeaderSize)
	good := w.end()
	w.timeline = 1
	w.filler(100)
	w.timeline = 2
	if got := w.scan(t); got.EndOfRecords != good {
		t.Errorf("%+v, want up to %s", got, good)
	}
}

func TestScanWALXidsWrapAround(t *testing.T) {
	w := newWAL(7, 1, 0)
	for _, xid := range []uint32{4294967290, 5, 3, 4294967295} {
		w.record(rmXact, xactCommit, xid, commitAt(int64(xid)))
	}
	got := w.scan(t)
	if got.MinXid != 4294967290 || got.MaxXid != 5 || got.Xids != 4 {
		t.Errorf("%+v", got)
	}
	if got.FirstCommit != pgEpoch.Add(3*time.Microsecond) || got.LastCommit != pgEpoch.Add(4294967295*time.Microsecond) {
		t.Errorf("from %s to %s", got.FirstCommit, got.LastCommit)
	}
}

func TestScanWALMainDataHeaders(t *testing.T) {
	w := newWAL(7, 1, 0)
	origin, toplevel := []byte{253, 1, 0}, []byte{252, 1, 0, 0, 0}
	long := append(binary.LittleEndian.AppendUint32([]byte{254}, 300), make([]byte, 300)...)
	w.record(rmXact, xactCommit, 3, slices.Concat(origin, toplevel, long))
	w.record(rmXact, xactCommit, 4, slices.Concat(origin, commitAt(1)))
	for _, odd := range [][]byte{nil, {255}, {255, 8}, {254, 1}, {253}, {7, 7}, shortData([]byte{1, 2}), append(commitAt(1), 0)} {
		w.record(rmXact, xactCommit, 5, odd)
	}
	if got := w.scan(t); got.Xids != 2 || got.MaxXid != 4 {
		t.Errorf("%+v", got)
	}
}

func TestPreparedXidOfOddRecords(t *testing.T) {
	u32 := func(v ...uint32) (b []byte) {
		for _, x := range v {
			b = binary.LittleEndian.AppendUint32(b, x)
		}
		return b
	}
	for _, c := range []struct {
		data []byte
		info byte
		want uint32
	}{
		{u32(1<<4, 77), xactHasInfo, 77},
		{u32(1<<4, 77), 0, 0},
		{u32(1 << 4), xactHasInfo, 0},
		{u32(0, 77), xactHasInfo, 0},
		{u32(1<<4|1, 1, 2, 77), xactHasInfo, 77},
		{u32(1<<4|1, 1), xactHasInfo, 0},
		{u32(1<<4|1<<1, 2, 1, 1, 77), xactHasInfo, 77},
		{u32(1<<4|1<<1, 0xFFFFFFFF, 1, 1, 77), xactHasInfo, 0},
		{u32(1<<4|1<<8, 1, 1, 1, 1, 1, 77), xactHasInfo, 77}, // 18: an item has four words
		{nil, xactHasInfo, 0},
	} {
		if got := preparedXid(c.data, c.info, magic18); got != c.want {
			t.Errorf("% x: got %d, want %d", c.data, got, c.want)
		}
	}
}

func TestParseLongPageHeader(t *testing.T) {
	for major, magic := range map[string]uint16{"15": 0xD110, "16": 0xD113, "17": 0xD116, "18": 0xD118} {
		_, seg := goldenWAL(t, major)
		c, err := ParseControlFile(golden(t, "pg_control."+major))
		if err != nil {
			t.Fatal(err)
		}
		m, tli, addr, sysid, size, page, err := ParseLongPageHeader(seg[:longHeaderSize])
		if err != nil || m != magic || tli != 1 || addr != 0xA00000 || sysid != c.SystemIdentifier || size != c.SegmentSize || page != c.WALPageSize {
			t.Errorf("%s: %X %s %s %d %d %d %v", major, m, tli, addr, sysid, size, page, err)
		}
	}
}

// checkSummary fails where a summary contradicts itself.
func checkSummary(t *testing.T, w WALSummary, start LSN) {
	t.Helper()
	if (w.FirstRecord == 0) != (w.LastRecord == 0) || w.LastRecord < w.FirstRecord || w.EndOfRecords < w.LastRecord || w.EndOfRecords > start+mib {
		t.Errorf("records of %s: %+v", start, w)
	}
	if w.FirstCommit.After(w.LastCommit) || w.Switched && w.Continues {
		t.Errorf("%+v", w)
	}
}

func FuzzScanWAL(f *testing.F) {
	for _, major := range majors {
		_, seg := goldenWAL(f, major)
		f.Add(seg[:2*testPage])
	}
	w := newWAL(10, 1, 100)
	w.filler(2 * testPage)
	f.Add(w.b)
	f.Fuzz(func(t *testing.T, seg []byte) {
		withinMemory(t, len(seg), func() {
			w, _ := ScanWAL(seg, WALName{Timeline: 1, Seg: 10}, mib)
			checkSummary(t, w, 10*mib)
		})
	})
}

// FuzzScanWALRecords gives the fuzzer's bytes right CRCs and pages, which it would hardly find by itself.
func FuzzScanWALRecords(f *testing.F) {
	f.Add(byte(rmXact), byte(xactCommit), uint32(3), commitAt(5), uint16(0))
	f.Add(byte(rmXact), byte(xactCommitPrepared|xactHasInfo), uint32(0), shortData(make([]byte, 60)), uint16(9000))
	f.Add(byte(rmXLOG), byte(xlogRestorePoint), uint32(0), shortData(make([]byte, 72)), uint16(100))
	f.Add(byte(rmXLOG), byte(xlogSwitch), uint32(0), []byte(nil), uint16(0))
	f.Fuzz(func(t *testing.T, rmid, info byte, xid uint32, body []byte, rest uint16) {
		w := newWAL(10, 1, uint32(rest))
		first := w.record(rmid, info, xid, body)
		last := w.filler(100)
		end := w.end()
		sum := w.scan(t)
		checkSummary(t, sum, w.start)
		switched := rmid == rmXLOG && info&rmgrInfoMask == xlogSwitch
		if sum.FirstRecord != first || sum.Switched != switched || !switched && end <= w.start+mib && (sum.LastRecord != last || sum.EndOfRecords != end) {
			t.Errorf("first %s, last %s, end %s: %+v", first, last, end, sum)
		}
	})
}

func BenchmarkScanWAL(b *testing.B) {
	w := newWAL(7, 1, 0)
	for len(w.b) < mib-2000 {
		w.filler(1000)
		w.record(rmXact, xactCommit, 9, commitAt(5))
	}
	seg := w.segment()
	b.SetBytes(mib)
	for b.Loop() {
		if _, err := ScanWAL(seg, w.name(), mib); err != nil {
			b.Fatal(err)
		}
	}
}
