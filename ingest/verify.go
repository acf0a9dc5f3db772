package ingest

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"

	"pgthaw/repo/pg"
)

// verifyFiles compares what was received with what the server says it sent. Nothing may be in one and not in the
// other: backup_manifest lists each file of the archives.
func verifyFiles(m pg.BackupManifest, received map[string]fileSum) error {
	missing := make(map[string]bool, len(received))
	for name := range received {
		missing[name] = true
	}
	for _, f := range m.Files {
		got, ok := received[f.Path]
		if !ok {
			return fmt.Errorf("backup_manifest lists %q, which was not sent", f.Path)
		}
		delete(missing, f.Path)
		if err := got.verify(f); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	for name := range missing {
		return fmt.Errorf("backup_manifest does not list %q, which was sent", name)
	}
	return nil
}

func (s fileSum) verify(f pg.ManifestFile) error {
	if f.Algorithm != "CRC32C" {
		return fmt.Errorf("backup_manifest has a %s checksum where CRC32C was asked for", f.Algorithm)
	}
	// The server prints the bytes of a pg_crc32c as they lie in its memory (checksum_helper.c).
	if crc := hex.EncodeToString(binary.LittleEndian.AppendUint32(nil, s.crc)); s.size != f.Size || crc != f.Checksum {
		return fmt.Errorf("received %d bytes with checksum %s, but the server sent %d with %s", s.size, crc, f.Size, f.Checksum)
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
