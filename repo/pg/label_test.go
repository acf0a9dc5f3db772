package pg

import (
	"strings"
	"testing"
)

func TestParseBackupLabelGolden(t *testing.T) {
	for _, major := range majors {
		got, err := ParseBackupLabel(golden(t, "backup_label."+major))
		if err != nil {
			t.Fatal(err)
		}
		if got.StartTime == "" || got.Checkpoint <= got.StartWAL || SegmentName(1, SegmentSize(mib).Segment(got.StartWAL), mib).String() != got.StartFile {
			t.Errorf("%s: %+v", major, got)
		}
		want := BackupLabel{StartWAL: got.StartWAL, StartFile: got.StartFile, Checkpoint: got.Checkpoint, StartTime: got.StartTime,
			Method: "streamed", From: "primary", Label: "golden " + major, Timeline: 1}
		if got != want {
			t.Errorf("%s: got %+v, want %+v", major, got, want)
		}
	}
}

const incrementalLabel = `START WAL LOCATION: 0/C000028 (file 0000000A000000000000000C)
CHECKPOINT LOCATION: 0/C000080
BACKUP METHOD: streamed
BACKUP FROM: standby
START TIME: 2026-11-20 22:16:38 UTC
LABEL: a: label
START TIMELINE: 10
INCREMENTAL FROM LSN: 0/9000028
INCREMENTAL FROM TLI: 9
`

func TestParseBackupLabelIncremental(t *testing.T) {
	got, err := ParseBackupLabel([]byte(incrementalLabel))
	want := BackupLabel{
		StartWAL: 0xC000028, StartFile: "0000000A000000000000000C", Checkpoint: 0xC000080, Method: "streamed", From: "standby",
		StartTime: "2026-11-20 22:16:38 UTC", Label: "a: label", Timeline: 10, IncrementalFromLSN: 0x9000028, IncrementalFromTLI: 9,
	}
	if err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestParseBackupLabelRefuses(t *testing.T) {
	for _, edit := range [][2]string{
		{incrementalLabel, ""},
		{"0/C000028 (", "0C000028 ("},
		{"000C)", "000C"},
		{"(file 0000000A000000000000000C)", "(file 0000000A.history)"},
		{"CHECKPOINT LOCATION: 0/C000080\n", ""},
		{"START TIMELINE: 10", "START TIMELINE: 11"},
		{"a: label", "a\nSTART TIMELINE: 10"},
		{"INCREMENTAL FROM TLI: 9\n", ""},
		{"TLI: 9", "TLI: nine"},
		{"LSN: 0/9000028", "LSN: 9000028"},
	} {
		if got, err := ParseBackupLabel([]byte(strings.Replace(incrementalLabel, edit[0], edit[1], 1))); err == nil {
			t.Errorf("%q for %q: %+v", edit[1], edit[0], got)
		}
	}
}

func FuzzParseBackupLabel(f *testing.F) {
	f.Add([]byte(incrementalLabel))
	f.Add(golden(f, "backup_label.15"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var l BackupLabel
		var err error
		withinMemory(t, len(b), func() { l, err = ParseBackupLabel(b) })
		if n, bad := ParseWALName(l.StartFile); err == nil && (bad != nil || n.Timeline != l.Timeline) {
			t.Errorf("%+v: %v", l, bad)
		}
	})
}
