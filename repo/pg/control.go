package pg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ControlFileSize is the length of global/pg_control in bytes (PG_CONTROL_FILE_SIZE); only its first 300 mean anything.
const ControlFileSize = 8192

// DBState is pg_control's word on what the server was doing.
type DBState uint32

const (
	DBStartup DBState = iota
	DBShutdowned
	DBShutdownedInRecovery
	DBShutdowning
	DBInCrashRecovery
	DBInArchiveRecovery
	DBInProduction
)

var dbStates = [...]string{
	"starting up", "shut down", "shut down in recovery", "shutting down",
	"in crash recovery", "in archive recovery", "in production",
}

// String is pg_controldata's text.
func (s DBState) String() string {
	if int(s) >= len(dbStates) {
		return "unrecognized status code"
	}
	return dbStates[s]
}

// ControlFile is what pg_control says that a backup or a restore needs to know.
type ControlFile struct {
	Version          uint32 // of the format: 1300 (13 to 16), 1700 (17), 1800 (18)
	CatalogVersion   uint32
	SystemIdentifier uint64
	State            DBState

	Checkpoint     LSN // the latest checkpoint's record, and what that says:
	Redo           LSN
	Timeline       Timeline
	PrevTimeline   Timeline
	NextXid        uint64 // with its epoch in the upper half
	CheckpointTime time.Time

	MinRecoveryPoint    LSN // zero unless in archive recovery
	MinRecoveryTimeline Timeline
	BackupStartPoint    LSN // zero unless a backup's end has still to be replayed
	BackupEndPoint      LSN // likewise, for a backup from a standby
	BackupEndRequired   bool

	WALLevel             int32 // 0 minimal, 1 replica, 2 logical
	WALLogHints          bool
	MaxConnections       int32 // a hot standby needs at least these five
	MaxWorkerProcesses   int32
	MaxWALSenders        int32
	MaxPreparedXacts     int32
	MaxLocksPerXact      int32
	TrackCommitTimestamp bool

	PageSize      uint32      // BLCKSZ, bytes
	RelSegPages   uint32      // RELSEG_SIZE: pages in a relation segment
	WALPageSize   uint32      // XLOG_BLCKSZ, bytes
	SegmentSize   SegmentSize // always Valid
	DataChecksums bool
}

// Offsets in bytes within struct ControlFileData of pg_control.h, with checkPointCopy's fields at their own. Versions
// 1300, 1700 and 1800 agree on all of them: 17's checkpoint record has wal_level where 16's has padding, and 18's
// default_char_signedness only moves the nonce and the CRC.
const (
	offSystemIdentifier  = 0
	offControlVersion    = 8
	offCatalogVersion    = 12
	offState             = 16
	offCheckpoint        = 32
	offRedo              = 40
	offThisTimeline      = 48
	offPrevTimeline      = 52
	offNextXid           = 64
	offCheckpointTime    = 104
	offMinRecoveryPoint  = 136
	offMinRecoveryTLI    = 144
	offBackupStartPoint  = 152
	offBackupEndPoint    = 160
	offBackupEndRequired = 168
	offWALLevel          = 172
	offWALLogHints       = 176
	offMaxConnections    = 180
	offMaxWorkers        = 184
	offMaxWALSenders     = 188
	offMaxPrepared       = 192
	offMaxLocks          = 196
	offTrackCommitTS     = 200
	offFloatFormat       = 208
	offPageSize          = 216
	offRelSegPages       = 220
	offWALPageSize       = 224
	offSegmentSize       = 228
	offChecksumVersion   = 252
)

// controlCRCOffset is where the CRC-32C of all bytes before it lies, per pg_control_version.
var controlCRCOffset = map[uint32]int{1300: 288, 1700: 288, 1800: 292}

// ParseControlFile reads global/pg_control and verifies its CRC. A file that was read while the server wrote it may
// fail here: read it again.
func ParseControlFile(b []byte) (ControlFile, error) {
	if err := checkControl(b); err != nil {
		return ControlFile{}, fmt.Errorf("pg_control: %w", err)
	}
	c := decodeControl(b)
	if !c.SegmentSize.Valid() || !validPageSize(c.PageSize) || !validPageSize(c.WALPageSize) || c.RelSegPages == 0 {
		return ControlFile{}, fmt.Errorf("pg_control: impossible sizes: pages of %d, relation segments of %d pages, WAL pages of %d, WAL segments of %d",
			c.PageSize, c.RelSegPages, c.WALPageSize, c.SegmentSize)
	}
	return c, nil
}

// checkControl verifies all that must hold before a field means anything.
func checkControl(b []byte) error {
	if len(b) < offCatalogVersion {
		return errors.New("too short")
	}
	version := binary.LittleEndian.Uint32(b[offControlVersion:])
	crcOffset, ok := controlCRCOffset[version]
	if !ok {
		return fmt.Errorf("version %d is none of PostgreSQL 15 to 18", version)
	}
	if len(b) < crcOffset+4 {
		return errors.New("too short")
	}
	if crc32.Checksum(b[:crcOffset], castagnoli) != binary.LittleEndian.Uint32(b[crcOffset:]) {
		return errors.New("CRC does not match")
	}
	if math.Float64frombits(binary.LittleEndian.Uint64(b[offFloatFormat:])) != 1234567 {
		return errors.New("written on an incompatible machine")
	}
	return nil
}

// validPageSize holds for what configure lets BLCKSZ and XLOG_BLCKSZ be, 1 to 64 KiB.
func validPageSize(n uint32) bool {
	return n >= 1<<10 && n <= 1<<16 && n&(n-1) == 0
}

func decodeControl(b []byte) ControlFile {
	u32 := func(off int) uint32 { return binary.LittleEndian.Uint32(b[off:]) }
	i32 := func(off int) int32 { return int32(u32(off)) }
	u64 := func(off int) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
	return ControlFile{
		Version:              u32(offControlVersion),
		CatalogVersion:       u32(offCatalogVersion),
		SystemIdentifier:     u64(offSystemIdentifier),
		State:                DBState(u32(offState)),
		Checkpoint:           LSN(u64(offCheckpoint)),
		Redo:                 LSN(u64(offRedo)),
		Timeline:             Timeline(u32(offThisTimeline)),
		PrevTimeline:         Timeline(u32(offPrevTimeline)),
		NextXid:              u64(offNextXid),
		CheckpointTime:       time.Unix(int64(u64(offCheckpointTime)), 0).UTC(),
		MinRecoveryPoint:     LSN(u64(offMinRecoveryPoint)),
		MinRecoveryTimeline:  Timeline(u32(offMinRecoveryTLI)),
		BackupStartPoint:     LSN(u64(offBackupStartPoint)),
		BackupEndPoint:       LSN(u64(offBackupEndPoint)),
		BackupEndRequired:    b[offBackupEndRequired] != 0,
		WALLevel:             i32(offWALLevel),
		WALLogHints:          b[offWALLogHints] != 0,
		MaxConnections:       i32(offMaxConnections),
		MaxWorkerProcesses:   i32(offMaxWorkers),
		MaxWALSenders:        i32(offMaxWALSenders),
		MaxPreparedXacts:     i32(offMaxPrepared),
		MaxLocksPerXact:      i32(offMaxLocks),
		TrackCommitTimestamp: b[offTrackCommitTS] != 0,
		PageSize:             u32(offPageSize),
		RelSegPages:          u32(offRelSegPages),
		WALPageSize:          u32(offWALPageSize),
		SegmentSize:          SegmentSize(u32(offSegmentSize)),
		DataChecksums:        u32(offChecksumVersion) != 0,
	}
}
