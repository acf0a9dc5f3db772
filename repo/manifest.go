package repo

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// Manifest describes one base backup: what a person wants to know of it, and where its root tree lies.
//
// Format: docs/format.md, "Manifest".
type Manifest struct {
	document
	ID      string `json:"id"`
	Cluster string `json:"cluster"`
	Tool    string `json:"tool"`  // what wrote it
	Label   string `json:"label"` // the operator's

	SystemIdentifier uint64         `json:"system_identifier,string"`
	PGVersion        string         `json:"pg_version"`     // "15.18"
	PGVersionNum     int            `json:"pg_version_num"` // 150018
	PageSize         int            `json:"block_size"`     // bytes
	SegmentSize      pg.SegmentSize `json:"wal_segment_size"`
	DataChecksums    bool           `json:"data_checksums"`
	FromStandby      bool           `json:"from_standby"`

	Timeline  pg.Timeline `json:"timeline"`
	StartLSN  pg.LSN      `json:"start_lsn"`
	StopLSN   pg.LSN      `json:"stop_lsn"`
	StartedAt time.Time   `json:"started_at"` // the server's clock
	StoppedAt time.Time   `json:"stopped_at"` // not before any commit up to StopLSN
	WALFirst  string      `json:"wal_first"`  // segment of StartLSN
	WALLast   string      `json:"wal_last"`   // segment that ends with, or holds, StopLSN

	DataDirectory string            `json:"data_directory"`
	ConfigFile    string            `json:"config_file"`
	HBAFile       string            `json:"hba_file"`
	IdentFile     string            `json:"ident_file"`
	Settings      map[string]string `json:"settings"`
	Tablespaces   []Tablespace      `json:"tablespaces"`

	Files       int   `json:"files"`
	SizeBytes   int64 `json:"size_bytes"`   // of all files, tablespaces and the backup's WAL included
	StoredBytes int64 `json:"stored_bytes"` // that this backup added to the repository, its WAL not counted

	Root  Ref         `json:"root"` // the root tree
	Packs PackListRef `json:"packs"`

	Image *Image `json:"image,omitempty"` // nil: it is a backup
}

// Name is what the backup is called in the repository.
func (m *Manifest) Name() BackupName { return BackupName{m.Cluster, m.ID} }

// Tablespace is one besides pg_default and pg_global.
type Tablespace struct {
	OID     uint32 `json:"oid"`
	Path    string `json:"path"` // on the server; relative to the data directory if InPlace
	InPlace bool   `json:"in_place"`
}

// PackListRef names the pack list of a backup, which lies beside the manifest.
type PackListRef struct {
	Count int `json:"count"`
	ID    ID  `json:"id"`
}

const (
	manifestKind   = "pgthaw backup"
	manifestSuffix = ".json"
	packListSuffix = ".packs"
)

// backupsRoot begins the keys of all backups.
const backupsRoot = "backups/"

func backupsPrefix(cluster string) string { return backupsRoot + cluster + "/" }
func manifestKey(cluster, id string) string {
	return backupsPrefix(cluster) + id + manifestSuffix
}
func packListKey(cluster, id string) string { return backupsPrefix(cluster) + id + packListSuffix }

var (
	backupID     = regexp.MustCompile(`^[0-9]{8}T[0-9]{6}\.[0-9]{3}Z-[0-9a-f]{4}(-[0-9a-f]{8})?$`)
	beginsWithID = regexp.MustCompile(strings.TrimSuffix(backupID.String(), "$") + `(-i[0-9a-f]{8})?`)
)

const originalIDLength = len("20060102T150405.000Z-0000")

// newBackupID makes the name of a backup that starts now; names sort by time.
func newBackupID(now time.Time, salt [2]byte) string {
	return fmt.Sprintf("%s-%x", now.UTC().Format("20060102T150405.000Z"), salt)
}

// newCopyID makes the name of a copy of a backup, or of a copy of one. Each attempt has its own, as each backup has.
func newCopyID(of string) string { return OriginalID(of) + "-" + eightDigits() }

// eightDigits are random, and hexadecimal.
func eightDigits() string {
	var b [4]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// OriginalID is the id that a backup had where it was made; its own unless it is a copy.
func OriginalID(id string) string { return id[:originalIDLength] }

// Backups lists a cluster's backups, oldest first. Where a manifest cannot be read, the good ones come with an error.
func (r *Repository) Backups(ctx context.Context, cluster string) ([]*Manifest, error) {
	if _, err := r.Cluster(ctx, cluster); err != nil {
		return nil, err
	}
	ids, err := r.BackupIDs(ctx, cluster)
	if err != nil {
		return nil, err
	}
	return readManifests(ids, func(id string) (*Manifest, error) { return r.readManifest(ctx, cluster, id) })
}

// readManifests reads many at once, in their order. Those that cannot be read are left out, and the error says why.
func readManifests[T any](of []T, read func(T) (*Manifest, error)) ([]*Manifest, error) {
	all, bad := make([]*Manifest, len(of)), make([]error, len(of))
	var g errgroup.Group
	g.SetLimit(atOnce)
	for i, one := range of {
		g.Go(func() error { all[i], bad[i] = read(one); return nil })
	}
	_ = g.Wait() // the errors are in bad
	return slices.DeleteFunc(all, func(m *Manifest) bool { return m == nil }), errors.Join(bad...)
}

// BackupIDs lists the ids of a cluster's backups, oldest first. It is one listing; no manifest is read.
func (r *Repository) BackupIDs(ctx context.Context, cluster string) ([]string, error) {
	all, err := r.storedBackups(ctx, backupsPrefix(cluster))
	var ids []string
	for _, b := range all {
		if b.listed() {
			ids = append(ids, b.Backup)
		}
	}
	return ids, err
}

// Latest stands for the newest backup of a cluster.
const Latest = "latest"

// Manifest returns one backup's, by id or Latest. ErrNoCluster, ErrNoBackup.
func (r *Repository) Manifest(ctx context.Context, cluster, id string) (*Manifest, error) {
	_, m, err := r.findManifest(ctx, cluster, id)
	return m, err
}

// DeletedManifest returns the manifest of a backup that is deleted, as long as it is there: for who has begun to read it
// before that. ErrNoBackup.
func (r *Repository) DeletedManifest(ctx context.Context, cluster, id string) (*Manifest, error) {
	if !backupID.MatchString(id) {
		return nil, fmt.Errorf("%s %s: %w", cluster, id, ErrNoBackup)
	}
	return r.readManifest(ctx, cluster, id)
}

func (r *Repository) resolveBackup(ctx context.Context, cluster, id string) (string, error) {
	if _, err := r.Cluster(ctx, cluster); err != nil {
		return "", err
	}
	if backupID.MatchString(id) {
		return id, r.undeleted(ctx, BackupName{cluster, id})
	}
	if id != Latest {
		return "", fmt.Errorf("%s %s: %w", cluster, id, ErrNoBackup)
	}
	ids, err := r.BackupIDs(ctx, cluster)
	if err != nil {
		return "", err
	}
	if len(ids) == 0 {
		return "", fmt.Errorf("%s has none yet: %w", cluster, ErrNoBackup)
	}
	return ids[len(ids)-1], nil
}

// ManifestJSON returns a manifest's document, verified. id may be Latest.
func (r *Repository) ManifestJSON(ctx context.Context, cluster, id string) ([]byte, error) {
	b, _, err := r.findManifest(ctx, cluster, id)
	return b, err
}

// findManifest reads a backup's manifest, or that of a copy of it.
func (r *Repository) findManifest(ctx context.Context, cluster, id string) ([]byte, *Manifest, error) {
	id, err := r.resolveBackup(ctx, cluster, id)
	if err != nil {
		return nil, nil, err
	}
	b, m, err := r.fetchManifest(ctx, cluster, id)
	if !errors.Is(err, ErrNoBackup) || len(id) > originalIDLength {
		return b, m, err
	}
	copies, listErr := r.storedBackups(ctx, backupsPrefix(cluster)+id+"-")
	for _, c := range copies {
		if c.listed() {
			return r.fetchManifest(ctx, cluster, c.Backup) // all of them are the same
		}
	}
	return nil, nil, errors.Join(err, listErr)
}

func (r *Repository) readManifest(ctx context.Context, cluster, id string) (*Manifest, error) {
	_, m, err := r.fetchManifest(ctx, cluster, id)
	return m, err
}

func (r *Repository) fetchManifest(ctx context.Context, cluster, id string) ([]byte, *Manifest, error) {
	key := manifestKey(cluster, id)
	m := &Manifest{}
	text, err := r.getDocument(ctx, key, manifestKind, m)
	if errors.Is(err, store.ErrNotExist) {
		return nil, nil, fmt.Errorf("%s %s: %w", cluster, id, ErrNoBackup)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read manifest of %s: %w", id, err)
	}
	if m.ID != id || m.Cluster != cluster {
		return nil, nil, corrupt(key, "it describes backup %s of %s", m.ID, m.Cluster)
	}
	return text, m, nil
}

// packUse is one pack that a backup needs.
type packUse struct {
	pack PackID
	size packSize
	live uint64 // stored bytes that the backup's files refer to, at most the pack's size
}

// encodePackList makes the object that lists the packs of a backup.
//
// Format: docs/format.md, "Pack list".
func (r *Repository) encodePackList(key string, uses []packUse) (object []byte, id ID) {
	b := binary.AppendUvarint(nil, uint64(len(uses)))
	for _, u := range uses {
		b = append(b, u.pack[:]...)
		b = binary.AppendUvarint(b, uint64(u.size.size))
		b = binary.AppendUvarint(b, uint64(u.size.toc))
		b = binary.AppendUvarint(b, u.live)
	}
	id, _ = r.digests.sum(b, nil)
	salt := newSalt()
	object = r.codec.compress(r.seals.header(kindPackList, [8]byte{}, salt), b)
	return r.seals.object(kindPackList, key, salt).seal(object, objectHeaderSize), id
}

func (r *Repository) packList(ctx context.Context, m *Manifest) ([]packUse, error) {
	key := packListKey(m.Cluster, m.ID)
	b, err := r.get(ctx, key, 0, -1)
	if errors.Is(err, store.ErrNotExist) {
		return nil, corrupt(key, "it is missing")
	}
	if err != nil {
		return nil, fmt.Errorf("read pack list of %s: %w", m.ID, err)
	}
	salt, err := r.seals.checkHeader(key, b, kindPackList)
	if err != nil {
		return nil, err
	}
	frame, err := r.seals.object(kindPackList, key, salt).open(b[objectHeaderSize:], objectHeaderSize)
	if err != nil {
		return nil, err
	}
	content, err := r.codec.decompress(frame, maxPieceSize)
	if err != nil {
		return nil, corrupt(key, "%v", err)
	}
	if !r.digests.verify(content, m.Packs.ID) {
		return nil, corrupt(key, "it does not match its digest")
	}
	uses, err := decodePackList(content)
	if err != nil {
		return nil, corrupt(key, "%v", err)
	}
	return uses, nil
}

func decodePackList(b []byte) ([]packUse, error) {
	d := decoder{b: b}
	uses := make([]packUse, d.count(len(PackID{})+3))
	for i := range uses {
		u := &uses[i]
		copy(u.pack[:], d.bytes(len(u.pack)))
		u.size.size, u.size.toc = d.uint32(), d.uint32()
		u.live = d.uvarint()
	}
	return uses, d.end()
}
