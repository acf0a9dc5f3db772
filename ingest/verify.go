package ingest

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"

	"pgthaw/repo/pg"
)

// arrivals knows all files that were received, each by a hash of its path in backup_manifest, size and CRC-32C: so a file
// takes 10 to 20 bytes, with these three themselves it would take 120. Should two of a million have one hash, which
// happens in one backup of forty million, the backup fails.
type arrivals struct {
	seed  maphash.Seed
	files map[fingerprint]struct{}
}

// fingerprint is not a uint64, for a map would align that: twice the memory.
type fingerprint [8]byte

func newArrivals() arrivals {
	return arrivals{seed: maphash.MakeSeed(), files: map[fingerprint]struct{}{}}
}

// arrival is what is compared of a file.
type arrival struct {
	path string
	size int64
	crc  uint32
}

func (a *arrivals) fingerprint(f arrival) (p fingerprint) {
	binary.NativeEndian.PutUint64(p[:], maphash.Comparable(a.seed, f))
	return p
}

func (a *arrivals) add(f arrival) error {
	key := a.fingerprint(f)
	if _, twice := a.files[key]; twice {
		return errors.New("comes twice")
	}
	a.files[key] = struct{}{}
	return nil
}

// verify compares a file with what backup_manifest says of it, and forgets it.
func (a *arrivals) verify(f pg.ManifestFile) error {
	if f.Algorithm != "CRC32C" {
		return fmt.Errorf("%s: a %s checksum where CRC32C was asked for", f.Path, f.Algorithm)
	}
	crc, err := hex.DecodeString(f.Checksum)
	if err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	// The server prints the bytes of a pg_crc32c as they lie in its memory (checksum_helper.c).
	key := a.fingerprint(arrival{f.Path, f.Size, binary.LittleEndian.Uint32(crc)})
	if _, ok := a.files[key]; !ok {
		return fmt.Errorf("%s: the server sent %d bytes with checksum %s, and that is not what was received", f.Path, f.Size, f.Checksum)
	}
	delete(a.files, key)
	return nil
}

// verifyAll is called after all files of backup_manifest: it lists each file of the archives.
func (a *arrivals) verifyAll() error {
	if n := len(a.files); n > 0 {
		return fmt.Errorf("backup_manifest does not list %d of the files that were received", n)
	}
	return nil
}

// verifyManifest compares backup_manifest with what the server said over the wire.
func verifyManifest(m pg.BackupManifest, systemID uint64, start, stop position) error {
	if m.SystemIdentifier != 0 && m.SystemIdentifier != systemID {
		return fmt.Errorf("backup_manifest is of system %d, the server is %d", m.SystemIdentifier, systemID)
	}
	want := pg.WALRange{Timeline: start.timeline, Start: start.lsn, End: stop.lsn}
	if !slices.Contains(m.WALRanges, want) {
		return fmt.Errorf("backup_manifest asks for WAL %v, the server for %v", m.WALRanges, want)
	}
	return nil
}

// verifyLabel compares backup_label with where the server said that the backup begins.
func verifyLabel(label []byte, start position) error {
	l, err := pg.ParseBackupLabel(label)
	if err != nil {
		return err
	}
	if l.StartWAL != start.lsn || l.Timeline != start.timeline {
		return fmt.Errorf("backup_label starts at %s on timeline %s, the server at %s on %s",
			l.StartWAL, l.Timeline, start.lsn, start.timeline)
	}
	return nil
}
