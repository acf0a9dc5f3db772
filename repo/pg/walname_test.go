package pg

import "testing"

const mib = 1 << 20

func TestParseWALName(t *testing.T) {
	for name, want := range map[string]WALName{
		"000000010000000000000002":                 {Kind: WALSegment, Timeline: 1, Seg: 2},
		"0000000A00000001000000FF":                 {Kind: WALSegment, Timeline: 10, Log: 1, Seg: 255},
		"000000010000000000000002.partial":         {Kind: WALPartial, Timeline: 1, Seg: 2},
		"00000002.history":                         {Kind: WALHistory, Timeline: 2},
		"000000010000000000000002.00000028.backup": {Kind: WALBackupHistory, Timeline: 1, Seg: 2, Offset: 0x28},
	} {
		got, err := ParseWALName(name)
		if err != nil || got != want {
			t.Errorf("ParseWALName(%q) = %+v, %v", name, got, err)
		}
		if got.String() != name {
			t.Errorf("%q became %q", name, got)
		}
	}
}

func TestParseWALNameRefuses(t *testing.T) {
	for _, name := range []string{
		"", ".", "..", ".history", "0000000100000000000000", "00000001000000000000000200",
		"00000001000000000000000a", "00000001000000000000000G", "+0000001000000000000002 ",
		"000000000000000000000002", "00000000.history", "0000002.history", "00000002.history.partial",
		"000000010000000000000002.", "000000010000000000000002.Partial", "000000010000000000000002.partial.partial",
		"000000010000000000000002.28.backup", "000000010000000000000002..backup", "000000010000000000000002.0000002g.backup",
		"000000010000000000000002/", "../00000002.history", "000000010000000000000002\n",
	} {
		if got, err := ParseWALName(name); err == nil {
			t.Errorf("ParseWALName(%q) = %+v", name, got)
		}
	}
}

func TestSegmentNumbers(t *testing.T) {
	for _, c := range []struct {
		size  SegmentSize
		segno uint64
		name  string
	}{
		{1 * mib, 1, "000000010000000000000001"},
		{1 * mib, 4096, "000000010000000100000000"},
		{16 * mib, 255, "0000000100000000000000FF"},
		{16 * mib, 256, "000000010000000100000000"},
		{1024 * mib, 3, "000000010000000000000003"},
		{1024 * mib, 4, "000000010000000100000000"},
	} {
		name := SegmentName(1, c.segno, c.size).String()
		n, err := ParseWALName(name)
		if name != c.name || err != nil {
			t.Fatalf("segment %d of %d bytes is %s, want %s (%v)", c.segno, c.size, name, c.name, err)
		}
		if got, err := n.SegmentNo(c.size); err != nil || got != c.segno {
			t.Errorf("%s is segment %d of %d bytes, want %d (%v)", name, got, c.size, c.segno, err)
		}
		start := c.size.Start(c.segno)
		if c.size.Segment(start) != c.segno || c.size.Segment(start-1) != c.segno-1 {
			t.Errorf("%s is not where segment %d begins", start, c.segno)
		}
	}
}

func TestSegmentNoRefuses(t *testing.T) {
	over := WALName{Timeline: 1, Seg: 256}
	if _, err := over.SegmentNo(16 * mib); err == nil {
		t.Error("a log file has 256 segments of 16 MiB, the last of them FF")
	}
	if _, err := over.SegmentNo(1 * mib); err != nil {
		t.Error(err)
	}
	if _, err := (WALName{Kind: WALHistory, Timeline: 2}).SegmentNo(16 * mib); err == nil {
		t.Error("a history file is no segment")
	}
}

func TestSegmentSizeValid(t *testing.T) {
	for size, want := range map[SegmentSize]bool{0: false, 1: false, mib / 2: false, mib: true, 3 * mib: false, 1024 * mib: true, 2048 * mib: false} {
		if size.Valid() != want {
			t.Errorf("%d bytes: valid = %v", size, !want)
		}
	}
}

func FuzzParseWALName(f *testing.F) {
	for _, s := range []string{"000000010000000000000002", "000000010000000000000002.partial", "00000002.history", "000000010000000000000002.00000028.backup"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		n, err := ParseWALName(name)
		if err != nil {
			return
		}
		if n.String() != name {
			t.Errorf("%q became %q", name, n)
		}
		if segno, err := n.SegmentNo(mib); err == nil && n.Kind == WALSegment && SegmentName(n.Timeline, segno, mib) != n {
			t.Errorf("%q is segment %d, which is %q", name, segno, SegmentName(n.Timeline, segno, mib))
		}
	})
}
