package pg

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"
	"testing"
	"time"
)

// controldata prints c's fields as pg_controldata does.
func controldata(c ControlFile) map[string]string {
	onOff := map[bool]string{false: "off", true: "on"}
	yesNo := map[bool]string{false: "no", true: "yes"}
	return map[string]string{
		"pg_control version number":            fmt.Sprint(c.Version),
		"Catalog version number":               fmt.Sprint(c.CatalogVersion),
		"Database system identifier":           fmt.Sprint(c.SystemIdentifier),
		"Database cluster state":               c.State.String(),
		"Latest checkpoint location":           c.Checkpoint.String(),
		"Latest checkpoint's REDO location":    c.Redo.String(),
		"Latest checkpoint's TimeLineID":       c.Timeline.String(),
		"Latest checkpoint's PrevTimeLineID":   c.PrevTimeline.String(),
		"Latest checkpoint's NextXID":          fmt.Sprintf("%d:%d", c.NextXid>>32, uint32(c.NextXid)),
		"Time of latest checkpoint":            c.CheckpointTime.Format(time.ANSIC),
		"Minimum recovery ending location":     c.MinRecoveryPoint.String(),
		"Min recovery ending loc's timeline":   c.MinRecoveryTimeline.String(),
		"Backup start location":                c.BackupStartPoint.String(),
		"Backup end location":                  c.BackupEndPoint.String(),
		"End-of-backup record required":        yesNo[c.BackupEndRequired],
		"wal_level setting":                    []string{"minimal", "replica", "logical"}[c.WALLevel],
		"wal_log_hints setting":                onOff[c.WALLogHints],
		"max_connections setting":              fmt.Sprint(c.MaxConnections),
		"max_worker_processes setting":         fmt.Sprint(c.MaxWorkerProcesses),
		"max_wal_senders setting":              fmt.Sprint(c.MaxWALSenders),
		"max_prepared_xacts setting":           fmt.Sprint(c.MaxPreparedXacts),
		"max_locks_per_xact setting":           fmt.Sprint(c.MaxLocksPerXact),
		"track_commit_timestamp setting":       onOff[c.TrackCommitTimestamp],
		"Database block size":                  fmt.Sprint(c.PageSize),
		"Blocks per segment of large relation": fmt.Sprint(c.RelSegPages),
		"WAL block size":                       fmt.Sprint(c.WALPageSize),
		"Bytes per WAL segment":                fmt.Sprint(uint32(c.SegmentSize)),
		"Data page checksum version":           map[bool]string{false: "0", true: "1"}[c.DataChecksums],
	}
}

func TestParseControlFileGolden(t *testing.T) {
	for _, major := range majors {
		c, err := ParseControlFile(golden(t, "pg_control."+major))
		if err != nil {
			t.Fatalf("%s: %v", major, err)
		}
		got := controldata(c)
		for line := range strings.Lines(string(golden(t, "controldata."+major))) {
			key, value, _ := strings.Cut(line, ":")
			if v, ok := got[key]; ok && v != strings.TrimSpace(value) {
				t.Errorf("%s: %s: got %s, pg_controldata says %s", major, key, v, value)
			}
			delete(got, key)
		}
		if len(got) > 0 {
			t.Errorf("%s: not in pg_controldata: %v", major, got)
		}
	}
}

func TestParseControlFileRefusesDamage(t *testing.T) {
	good := golden(t, "pg_control.18")
	for off := range controlCRCOffset[1800] + 4 {
		b := append([]byte(nil), good...)
		b[off] ^= 0x10
		if _, err := ParseControlFile(b); err == nil {
			t.Errorf("byte %d damaged and nobody saw it", off)
		}
	}
	for n := range controlCRCOffset[1800] + 4 {
		if _, err := ParseControlFile(good[:n]); err == nil {
			t.Errorf("cut to %d bytes and nobody saw it", n)
		}
	}
}

// sealControl makes b's CRC right, if b has a version and a place for it.
func sealControl(b []byte) {
	if len(b) < offCatalogVersion {
		return
	}
	off, ok := controlCRCOffset[binary.LittleEndian.Uint32(b[offControlVersion:])]
	if ok && len(b) >= off+4 {
		binary.LittleEndian.PutUint32(b[off:], crc32.Checksum(b[:off], castagnoli))
	}
}

func TestParseControlFileRefusesImpossibleSizes(t *testing.T) {
	for _, off := range []int{offFloatFormat + 4, offPageSize, offRelSegPages, offWALPageSize, offSegmentSize} {
		b := golden(t, "pg_control.17")
		binary.LittleEndian.PutUint32(b[off:], 0)
		sealControl(b)
		if c, err := ParseControlFile(b); err == nil {
			t.Errorf("zero at %d: %+v", off, c)
		}
	}
}

func FuzzParseControlFile(f *testing.F) {
	for _, major := range majors {
		f.Add(golden(f, "pg_control."+major)[:300], true)
	}
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		b = append([]byte(nil), b...)
		if seal {
			sealControl(b)
		}
		withinMemory(t, len(b), func() {
			c, err := ParseControlFile(b)
			if err == nil && (!c.SegmentSize.Valid() || c.State.String() == "") {
				t.Errorf("%+v", c)
			}
		})
	})
}
