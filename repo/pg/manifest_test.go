package pg

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func TestParseBackupManifestGolden(t *testing.T) {
	for _, major := range majors {
		m, err := ParseBackupManifest(golden(t, "backup_manifest."+major+".gz"))
		if err != nil {
			t.Fatalf("%s: %v", major, err)
		}
		label, control := golden(t, "backup_label."+major), golden(t, "pg_control."+major)
		c, _ := ParseControlFile(control)
		l, _ := ParseBackupLabel(label)
		wantVersion, wantSysid := 2, c.SystemIdentifier
		if major < "17" {
			wantVersion, wantSysid = 1, 0
		}
		if m.Version != wantVersion || m.SystemIdentifier != wantSysid {
			t.Errorf("%s: version %d of system %d", major, m.Version, m.SystemIdentifier)
		}
		if len(m.WALRanges) != 1 || m.WALRanges[0].Timeline != 1 || m.WALRanges[0].Start != l.StartWAL || m.WALRanges[0].End <= l.Checkpoint {
			t.Errorf("%s: WAL ranges %+v", major, m.WALRanges)
		}
		checkListed(t, m, "backup_label", label)
		checkListed(t, m, "PG_VERSION", []byte(major+"\n"))
		if len(m.Files) < 900 {
			t.Errorf("%s: %d files", major, len(m.Files))
		}
	}
}

// checkListed fails unless m has the file and its checksum is that of content.
func checkListed(t *testing.T, m BackupManifest, path string, content []byte) {
	t.Helper()
	i := slices.IndexFunc(m.Files, func(f ManifestFile) bool { return f.Path == path })
	if i < 0 {
		t.Fatalf("%s is not listed", path)
	}
	f := m.Files[i]
	sum, err := NewChecksum(f.Algorithm)
	if err != nil {
		t.Fatal(err)
	}
	sum.Write(content)
	if got := hex.EncodeToString(sum.Sum(nil)); got != f.Checksum || f.Size != int64(len(content)) {
		t.Errorf("%s: %+v, but it has %d bytes and %s", path, f, len(content), got)
	}
}

// sealManifest ends a manifest with the line that holds its checksum.
func sealManifest(body string) []byte {
	return fmt.Appendf(nil, "%s\"Manifest-Checksum\": \"%x\"}\n", body, sha256.Sum256([]byte(body)))
}

const smallManifest = `{ "PostgreSQL-Backup-Manifest-Version": 2,
"System-Identifier": 18446744073709551615,
"Files": [
{ "Path": "pg_tblspc/16384/PG_17/5/1", "Size": 8192, "Last-Modified": "2026-11-20 22:16:38 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "C1FD2AD6" },
{ "Encoded-Path": "62617365ff", "Size": 0, "Last-Modified": "2026-11-20 22:16:37 GMT" }
],
"WAL-Ranges": [
{ "Timeline": 3, "Start-LSN": "1/2000028", "End-LSN": "1/2000100" }
],
`

func TestParseBackupManifest(t *testing.T) {
	m, err := ParseBackupManifest(sealManifest(smallManifest))
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 20, 22, 16, 38, 0, time.UTC)
	files := []ManifestFile{
		{Path: "pg_tblspc/16384/PG_17/5/1", Size: 8192, LastModified: at, Checksum: "c1fd2ad6", Algorithm: "CRC32C"},
		{Path: "base\xff", LastModified: at.Add(-time.Second), Algorithm: "NONE"},
	}
	if m.SystemIdentifier != 1<<64-1 || !slices.Equal(m.Files, files) || !slices.Equal(m.WALRanges, []WALRange{{3, 0x102000028, 0x102000100}}) {
		t.Errorf("got %+v", m)
	}
}

func TestParseBackupManifestRefuses(t *testing.T) {
	for _, edit := range [][2]string{
		{`Version": 2`, `Version": 3`},
		{`Version": 2`, `Version": "2"`},
		{`"Files"`, `"Folders"`},
		{smallManifest, "{\"PostgreSQL-Backup-Manifest-Version\": 1,\n"},
		{smallManifest, ""},
		{`"WAL-Ranges": [`, `"Files": [], "WAL-Ranges": [`},
		{`pg_tblspc/16384/PG_17/5/1`, `/etc/passwd`},
		{`pg_tblspc/16384/PG_17/5/1`, `../x`},
		{`pg_tblspc/16384/PG_17/5/1`, `a/../../x`},
		{`pg_tblspc/16384/PG_17/5/1`, `a//x`},
		{`pg_tblspc/16384/PG_17/5/1`, `.`},
		{`pg_tblspc/16384/PG_17/5/1`, ``},
		{`pg_tblspc/16384/PG_17/5/1`, `a\u0000`},
		{`"pg_tblspc/16384/PG_17/5/1"`, "\"a\xff\""},
		{`"Path": "pg_tblspc/16384/PG_17/5/1"`, `"Encoded-Path": "62617365ff"`}, // twice
		{`"Path": `, `"Encoded-Path": "61", "Path": `},
		{`"Path": "pg_tblspc/16384/PG_17/5/1",`, ``},
		{`62617365ff`, `2e2e2f78`}, // ../x
		{`62617365ff`, `6`},
		{`"Size": 8192,`, ``},
		{`8192`, `-1`},
		{`8192`, `9223372036854775808`},
		{`GMT`, `CET`},
		{`2026-11-20`, `2026-11-31`},
		{`CRC32C`, `MD5`},
		{`CRC32C`, `SHA256`},
		{`"Checksum-Algorithm": "CRC32C", `, ``},
		{`, "Checksum": "C1FD2AD6"`, ``},
		{`C1FD2AD6`, `C1FD2AXY`},
		{`"Checksum": `, `"Sum": `},
		{`"Timeline": 3`, `"Timeline": 0`},
		{`1/2000100`, `1/2000000`},
		{`1/2000100`, `12000100`},
	} {
		body := strings.Replace(smallManifest, edit[0], edit[1], 1)
		if body == smallManifest {
			t.Fatalf("%q is not in the manifest", edit[0])
		}
		if m, err := ParseBackupManifest(sealManifest(body)); err == nil {
			t.Errorf("%q for %q: %+v", edit[1], edit[0], m)
		}
	}
}

// TestReadBackupManifestInPieces hands the text over byte by byte, so that lines and runes come apart.
func TestReadBackupManifestInPieces(t *testing.T) {
	body := strings.Replace(smallManifest, "PG_17", "Größe", 1)
	n := 0
	count := func(ManifestFile) error { n++; return nil }
	if _, err := ReadBackupManifest(iotest.OneByteReader(bytes.NewReader(sealManifest(body))), count); err != nil || n != 2 {
		t.Errorf("%d files, %v", n, err)
	}
	enough := errors.New("enough")
	if _, err := ReadBackupManifest(bytes.NewReader(sealManifest(body)), func(ManifestFile) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("got %v, want what the function returned", err)
	}
	broken := io.MultiReader(strings.NewReader(body), iotest.ErrReader(enough))
	if _, err := ReadBackupManifest(broken, count); !errors.Is(err, enough) {
		t.Errorf("got %v, want the reader's error", err)
	}
}

func TestParseBackupManifestRefusesDamage(t *testing.T) {
	good := sealManifest(smallManifest)
	for off := range good {
		b := bytes.Clone(good)
		b[off] ^= 1
		if _, err := ParseBackupManifest(b); err == nil {
			t.Errorf("byte %d damaged and nobody saw it", off)
		}
		if _, err := ParseBackupManifest(good[:off]); err == nil {
			t.Errorf("cut to %d bytes and nobody saw it", off)
		}
	}
	if _, err := ParseBackupManifest(append(good, "{}\n"...)); err == nil {
		t.Error("lines after the last and nobody saw it")
	}
}

func TestNewChecksum(t *testing.T) {
	for algorithm, size := range checksumSizes {
		sum, err := NewChecksum(algorithm)
		if algorithm == "NONE" {
			if err == nil {
				t.Error("NONE is no checksum")
			}
			continue
		}
		if err != nil || sum.Size() != size || len(sum.Sum(nil)) != size {
			t.Errorf("%s: %v", algorithm, err)
		}
	}
}

func FuzzParseBackupManifest(f *testing.F) {
	f.Add(smallManifest, true)
	f.Add(string(sealManifest(smallManifest)), false)
	f.Fuzz(func(t *testing.T, body string, seal bool) {
		b := []byte(body)
		if seal {
			b = sealManifest(body)
		}
		var m BackupManifest
		withinMemory(t, len(b), func() { m, _ = ParseBackupManifest(b) })
		seen := make(map[string]bool)
		for _, file := range m.Files {
			p := strings.ToValidUTF8(file.Path, "?")
			if !fs.ValidPath(p) || p == "." || seen[file.Path] || file.Size < 0 {
				t.Errorf("accepted %+v", file)
			}
			seen[file.Path] = true
		}
	})
}

// BenchmarkParseBackupManifest reads a manifest of a hundred thousand files.
func BenchmarkParseBackupManifest(b *testing.B) {
	var body strings.Builder
	body.WriteString("{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n")
	for i := range 100_000 {
		if i > 0 {
			body.WriteString(",\n")
		}
		fmt.Fprintf(&body, `{ "Path": "base/16384/%d", "Size": 8192, "Last-Modified": "2026-11-20 22:16:38 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "c1fd2ad6" }`, 16384+i)
	}
	body.WriteString("\n],\n\"WAL-Ranges\": [],\n")
	manifest := sealManifest(body.String())
	b.SetBytes(int64(len(manifest)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseBackupManifest(manifest); err != nil {
			b.Fatal(err)
		}
	}
}
