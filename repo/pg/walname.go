package pg

import (
	"fmt"
	"strings"
)

// SegmentSize is wal_segment_size in bytes.
type SegmentSize uint32

// DefaultSegmentSize is initdb's choice, 16 MiB.
const DefaultSegmentSize SegmentSize = 16 << 20

// Valid says whether it is a power of two from 1 MiB to 1 GiB. No other method may be called on a size that is not.
func (s SegmentSize) Valid() bool {
	return s >= 1<<20 && s <= 1<<30 && s&(s-1) == 0
}

// Segment is the number of the segment that contains lsn. The end of a segment is in the next one.
func (s SegmentSize) Segment(lsn LSN) uint64 {
	return uint64(lsn) / uint64(s)
}

// Start is the first byte of segment segno.
func (s SegmentSize) Start(segno uint64) LSN {
	return LSN(segno * uint64(s))
}

// perLog is the number of segments that share a Log part (XLogSegmentsPerXLogId).
func (s SegmentSize) perLog() uint64 {
	return 1 << 32 / uint64(s)
}

// WALKind tells the files of pg_wal and of an archive apart.
type WALKind int

const (
	WALSegment       WALKind = iota // 000000010000000000000002
	WALPartial                      // 000000010000000000000002.partial
	WALHistory                      // 00000002.history
	WALBackupHistory                // 000000010000000000000002.00000028.backup
)

// WALName is a file name of pg_wal or of an archive, taken apart.
type WALName struct {
	Kind     WALKind
	Timeline Timeline
	Log, Seg uint32 // second and third eight digits; zero in a history file's name
	Offset   uint32 // of the backup's start within the segment, in bytes; WALBackupHistory only
}

// ParseWALName reads a name as the server writes it (upper-case digits, a timeline that is not 0) and rejects anything else.
// Whether Seg is in range depends on the segment size: see SegmentNo.
func ParseWALName(name string) (WALName, error) {
	n, err := parseWALName(name)
	if err != nil || n.Timeline == 0 {
		return WALName{}, fmt.Errorf("invalid WAL file name %q", name)
	}
	return n, nil
}

func parseWALName(name string) (n WALName, err error) {
	if tli, ok := strings.CutSuffix(name, ".history"); ok {
		n.Kind = WALHistory
		err = nameParts(tli, (*uint32)(&n.Timeline))
		return n, err
	}
	segment, suffix, dotted := strings.Cut(name, ".")
	if dotted {
		if n.Kind, n.Offset, err = parseSegmentSuffix(suffix); err != nil {
			return n, err
		}
	}
	err = nameParts(segment, (*uint32)(&n.Timeline), &n.Log, &n.Seg)
	return n, err
}

// parseSegmentSuffix reads what follows a segment's name and a dot.
func parseSegmentSuffix(suffix string) (kind WALKind, offset uint32, err error) {
	if suffix == "partial" {
		return WALPartial, 0, nil
	}
	digits, ok := strings.CutSuffix(suffix, ".backup")
	if !ok {
		return 0, 0, fmt.Errorf("unknown suffix %q", suffix)
	}
	err = nameParts(digits, &offset)
	return WALBackupHistory, offset, err
}

// nameParts reads s as groups of eight upper-case hexadecimal digits, one for each part.
func nameParts(s string, parts ...*uint32) error {
	if len(s) != 8*len(parts) || strings.Trim(s, "0123456789ABCDEF") != "" {
		return fmt.Errorf("%q is not %d groups of eight digits", s, len(parts))
	}
	for i, p := range parts {
		v, err := parseHex32(s[8*i : 8*i+8])
		if err != nil {
			return err
		}
		*p = v
	}
	return nil
}

// String is the name that ParseWALName reads.
func (n WALName) String() string {
	if n.Kind == WALHistory {
		return HistoryName(n.Timeline)
	}
	segment := fmt.Sprintf("%08X%08X%08X", uint32(n.Timeline), n.Log, n.Seg)
	switch n.Kind {
	case WALPartial:
		return segment + ".partial"
	case WALBackupHistory:
		return fmt.Sprintf("%s.%08X.backup", segment, n.Offset)
	default:
		return segment
	}
}

// SegmentNo is the segment's number. A history file has none, and with segments of this size Log and Seg may be no
// name that a server could write; both are errors.
func (n WALName) SegmentNo(size SegmentSize) (uint64, error) {
	if n.Kind == WALHistory {
		return 0, fmt.Errorf("%s is not of a WAL segment", n)
	}
	if uint64(n.Seg) >= size.perLog() {
		return 0, fmt.Errorf("%s is not the name of a WAL segment of %d bytes", n, size)
	}
	return uint64(n.Log)*size.perLog() + uint64(n.Seg), nil
}

// SegmentName is the name of segment segno on timeline tli (XLogFileName).
func SegmentName(tli Timeline, segno uint64, size SegmentSize) WALName {
	return WALName{Timeline: tli, Log: uint32(segno / size.perLog()), Seg: uint32(segno % size.perLog())}
}

// HistoryName is the name of the history file of timeline tli, "00000002.history".
func HistoryName(tli Timeline) string {
	return tli.Hex() + ".history"
}
