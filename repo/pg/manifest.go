package pg

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// ManifestFile is a file of a base backup, as backup_manifest lists it.
type ManifestFile struct {
	Path         string // relative to the data directory, slashes; any bytes but NUL
	Size         int64  // bytes
	LastModified time.Time
	Checksum     string // lower-case hex of NewChecksum(Algorithm)'s sum; empty where Algorithm is NONE
	Algorithm    string // NONE, CRC32C, SHA224, SHA256, SHA384 or SHA512
}

// WALRange is WAL that a backup needs to be consistent.
type WALRange struct {
	Timeline   Timeline
	Start, End LSN
}

// BackupManifest is PostgreSQL's backup_manifest.
type BackupManifest struct {
	Version          int    // 1, or 2 from PostgreSQL 17 on
	SystemIdentifier uint64 // zero in version 1, which has none
	Files            []ManifestFile
	WALRanges        []WALRange
}

// ParseBackupManifest reads a whole backup_manifest: ReadBackupManifest with the files in the result. A path that comes
// twice is an error.
func ParseBackupManifest(b []byte) (BackupManifest, error) {
	const shortest = 64 // bytes that no file's line is shorter than
	files := make([]ManifestFile, 0, min(bytes.Count(b, []byte("\n")), len(b)/shortest))
	paths := make(map[string]struct{}, cap(files))
	m, err := ReadBackupManifest(bytes.NewReader(b), func(f ManifestFile) error {
		if _, twice := paths[f.Path]; twice {
			return fmt.Errorf("%q comes twice", f.Path)
		}
		paths[f.Path] = struct{}{}
		files = append(files, f)
		return nil
	})
	if err != nil {
		return BackupManifest{}, err
	}
	m.Files = files
	return m, nil
}

// ReadBackupManifest reads a backup_manifest to its end as parse_manifest.c does, and hands its files to file one by
// one, so that a million of them need not be in memory. A path that is absolute or leaves the data directory is an
// error; whether one comes twice is for file to notice. The manifest's own checksum is known only at the end: what file
// was given counts for nothing unless the error is nil. The result has no Files.
func ReadBackupManifest(r io.Reader, file func(ManifestFile) error) (BackupManifest, error) {
	m, err := readBackupManifest(r, file)
	if err != nil {
		return BackupManifest{}, fmt.Errorf("backup_manifest: %w", err)
	}
	return m, nil
}

func readBackupManifest(src io.Reader, file func(ManifestFile) error) (BackupManifest, error) {
	lines := &manifestLines{src: src, sum: sha256.New()}
	r := manifestReader{dec: json.NewDecoder(lines), emit: file}
	r.dec.DisallowUnknownFields()
	if err := r.object(r.member); err != nil {
		return BackupManifest{}, err
	}
	if t, err := r.dec.Token(); err == nil {
		return BackupManifest{}, fmt.Errorf("%v follows the manifest", t)
	} else if err != io.EOF {
		return BackupManifest{}, err
	}
	if !r.listed {
		return BackupManifest{}, errors.New("no list of files")
	}
	sum, err := lines.checksum()
	if err != nil {
		return BackupManifest{}, err
	}
	if r.checksum != sum {
		return BackupManifest{}, errors.New("checksum does not match")
	}
	if r.m.Version != 1 && r.m.Version != 2 {
		return BackupManifest{}, fmt.Errorf("version %d is none of PostgreSQL 15 to 18", r.m.Version)
	}
	return r.m, nil
}

// maxManifestLines bounds two lines of a manifest together, hence what a token takes in memory. A path has at most
// MAXPGPATH bytes, 1024.
const maxManifestLines = 1 << 20

// manifestLines sums all lines but the last, which holds the sum, as they are read.
type manifestLines struct {
	src     io.Reader
	sum     hash.Hash
	last    []byte // what may yet be the last line: a whole line and the beginning of the next
	invalid bool   // some line is not UTF-8
}

func (l *manifestLines) Read(p []byte) (int, error) {
	n, err := l.src.Read(p)
	l.last = append(l.last, p[:n]...)
	end := bytes.LastIndexByte(l.last, '\n')
	if start := bytes.LastIndexByte(l.last[:max(end, 0)], '\n') + 1; start > 0 {
		l.invalid = l.invalid || !utf8.Valid(l.last[:start])
		l.sum.Write(l.last[:start])
		l.last = append(l.last[:0], l.last[start:]...)
	}
	if len(l.last) > maxManifestLines {
		return 0, fmt.Errorf("lines of over %d bytes", maxManifestLines)
	}
	return n, err
}

// checksum is the SHA-256, in hex, that the last line should have. Everything has been read.
func (l *manifestLines) checksum() (string, error) {
	if !bytes.HasSuffix(l.last, []byte("\n")) {
		return "", errors.New("cut short")
	}
	if l.invalid || !utf8.Valid(l.last) {
		return "", errors.New("not UTF-8")
	}
	return hex.EncodeToString(l.sum.Sum(nil)), nil
}

// manifestReader takes the JSON text apart token by token, so that it holds no more than one file.
type manifestReader struct {
	dec      *json.Decoder
	emit     func(ManifestFile) error
	m        BackupManifest
	listed   bool // Files has been read
	checksum string
}

// object reads a JSON object, calling member after each key.
func (r *manifestReader) object(member func(key string) error) error {
	if err := r.delim('{'); err != nil {
		return err
	}
	for r.dec.More() {
		t, err := r.dec.Token()
		if err != nil {
			return err
		}
		key, _ := t.(string) // the decoder lets nothing else be a key
		if err := member(key); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return r.delim('}')
}

// array reads a JSON array, calling element before each of its elements.
func (r *manifestReader) array(element func() error) error {
	if err := r.delim('['); err != nil {
		return err
	}
	for r.dec.More() {
		if err := element(); err != nil {
			return err
		}
	}
	return r.delim(']')
}

func (r *manifestReader) delim(want json.Delim) error {
	t, err := r.dec.Token()
	if err != nil {
		return err
	}
	if t != want {
		return fmt.Errorf("got %v where %v belongs", t, want)
	}
	return nil
}

func (r *manifestReader) member(key string) error {
	switch key {
	case "PostgreSQL-Backup-Manifest-Version":
		return r.dec.Decode(&r.m.Version)
	case "System-Identifier":
		return r.dec.Decode(&r.m.SystemIdentifier)
	case "Files":
		return r.files()
	case "WAL-Ranges":
		return r.array(r.walRange)
	case "Manifest-Checksum":
		return r.dec.Decode(&r.checksum)
	default:
		return errors.New("unknown member")
	}
}

func (r *manifestReader) files() error {
	if r.listed {
		return errors.New("comes twice")
	}
	r.listed = true
	return r.array(r.file)
}

// file reads one element of Files.
func (r *manifestReader) file() error {
	var line manifestLine
	if err := r.dec.Decode(&line); err != nil {
		return err
	}
	path, err := manifestPath(line.Path, line.EncodedPath)
	if err != nil {
		return err
	}
	f, err := line.file(path)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	return r.emit(f)
}

// manifestLine is an element of Files as it is written.
type manifestLine struct {
	Path         *string
	EncodedPath  *string `json:"Encoded-Path"`
	Size         *int64
	LastModified string `json:"Last-Modified"`
	Algorithm    string `json:"Checksum-Algorithm"`
	Checksum     string
}

func (l manifestLine) file(path string) (f ManifestFile, err error) {
	if l.Size == nil || *l.Size < 0 {
		return f, errors.New("no size")
	}
	f = ManifestFile{Path: path, Size: *l.Size, Checksum: strings.ToLower(l.Checksum)}
	if f.LastModified, err = time.Parse("2006-01-02 15:04:05 GMT", l.LastModified); err != nil {
		return f, err
	}
	f.Algorithm, err = manifestAlgorithm(l.Algorithm, f.Checksum)
	return f, err
}

// manifestPath takes the one of the two that is there. A name that is not UTF-8 comes encoded in hex.
func manifestPath(plain, encoded *string) (string, error) {
	if (plain == nil) == (encoded == nil) {
		return "", errors.New("a file needs either Path or Encoded-Path")
	}
	if plain == nil {
		raw, err := hex.DecodeString(*encoded)
		if err != nil {
			return "", fmt.Errorf("encoded path: %w", err)
		}
		s := string(raw)
		plain = &s
	}
	if strings.IndexByte(*plain, 0) >= 0 {
		return "", fmt.Errorf("path %q has a NUL", *plain)
	}
	for name := range strings.SplitSeq(*plain, "/") {
		if name == "" || name == "." || name == ".." {
			return "", fmt.Errorf("path %q is not one below the data directory", *plain)
		}
	}
	return *plain, nil
}

// checksumSizes are in bytes. The names are checksum_helper.c's.
var checksumSizes = map[string]int{"NONE": 0, "CRC32C": 4, "SHA224": 28, "SHA256": 32, "SHA384": 48, "SHA512": 64}

// manifestAlgorithm checks that sum is a checksum of algorithm, and names the absence of both NONE. The name it
// returns is the table's, so that a million files share it.
func manifestAlgorithm(algorithm, sum string) (string, error) {
	if algorithm == "" {
		algorithm = "NONE"
	}
	for name, size := range checksumSizes {
		if strings.EqualFold(name, algorithm) {
			if raw, err := hex.DecodeString(sum); err != nil || len(raw) != size {
				return "", fmt.Errorf("%q is no %s checksum", sum, name)
			}
			return name, nil
		}
	}
	return "", fmt.Errorf("unknown checksum algorithm %q", algorithm)
}

// NewChecksum computes what a ManifestFile's Checksum says, for the algorithms that have one.
func NewChecksum(algorithm string) (hash.Hash, error) {
	switch algorithm {
	case "CRC32C":
		return crc32c{crc32.New(castagnoli)}, nil
	case "SHA224":
		return sha256.New224(), nil
	case "SHA256":
		return sha256.New(), nil
	case "SHA384":
		return sha512.New384(), nil
	case "SHA512":
		return sha512.New(), nil
	default:
		return nil, fmt.Errorf("no checksum %q", algorithm)
	}
}

// crc32c sums in the byte order of backup_manifest, which is the server's, not hash/crc32's.
type crc32c struct{ hash.Hash32 }

func (c crc32c) Sum(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b, c.Sum32())
}

// walRange reads one element of WAL-Ranges.
func (r *manifestReader) walRange() error {
	var line struct {
		Timeline Timeline
		Start    LSN `json:"Start-LSN"`
		End      LSN `json:"End-LSN"`
	}
	if err := r.dec.Decode(&line); err != nil {
		return err
	}
	if line.Timeline == 0 || line.Start > line.End {
		return fmt.Errorf("timeline %s from %s to %s is no range", line.Timeline, line.Start, line.End)
	}
	r.m.WALRanges = append(r.m.WALRanges, WALRange(line))
	return nil
}
