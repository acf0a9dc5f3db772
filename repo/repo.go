package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// Options of an open repository. The zero value works.
type Options struct {
	Log        *slog.Logger // nil: nothing is logged
	CacheBytes int64        // decoded chunks kept; 0: 64 MiB
	Keys       []Key        // of which one opens an encrypted repository; any is refused by one that is not encrypted

	Patience time.Duration // how long readers wait for a store that does not answer; 0: they get what it gives at once

	Memory Memory // of this host; nil: that the repository is rolled back, or replaced, goes unnoticed

	// FindKeys is asked where Keys is empty: by Open if the repository is encrypted, by Init before anything is put. May be nil.
	FindKeys func(Place) ([]Key, error)
}

// Place is where keys are wanted.
type Place struct {
	URL        string // of the repository, canonical
	ID         string // of the repository
	UID        int    // of the user whose it is, or will be
	Passphrase bool   // a passphrase opens it
}

const (
	defaultCacheBytes = 64 << 20
	treeCacheBytes    = 64 << 20
	mapCacheBytes     = 32 << 20
	editionCacheBytes = 16 << 20
)

// Repository is an open repository. Safe for concurrent use.
type Repository struct {
	url     string
	store   store.Store
	config  config
	log     *slog.Logger
	digests *digester
	seals   seals
	codec   *codec

	patient  *store.Patient // the store, as readers wait for it; nil: they do not
	witness  *witness       // the store, as far as this host remembers it; nil: it does not
	replaced *RollbackError // this host has seen another repository at the URL

	read   atomic.Int64       // bytes fetched from the store
	chunks *cache[ID, []byte] // content of chunks and of blocks of WAL: by what it is, never by where it lay
	trees  *cache[ID, *Listing]
	maps   *cache[ID, *fileMap]
	heads  *cache[string, *walHead]

	editions *cache[PackID, *edition] // tables of packs that were compacted
}

// config is the object of the same name: what every reader needs first.
type config struct {
	document
	ID             string    `json:"id"`
	CreatedAt      time.Time `json:"created_at"`
	Encryption     string    `json:"encryption"`
	DigestKey      string    `json:"digest_key,omitempty"`     // if not encrypted
	Authentication string    `json:"authentication,omitempty"` // if encrypted
}

const (
	configKey        = "config"
	configKind       = "pgthaw repository"
	encryptionAESGCM = "aes-256-gcm"
)

// EncryptionNone is the encryption of a repository that is not encrypted.
const EncryptionNone = "none"

// Open opens the repository at the URL. ErrNoRepository: there is none. *FormatError: a newer pgthaw wrote it.
func Open(ctx context.Context, url string, o Options) (*Repository, error) {
	s, canonical, err := store.Open(ctx, url)
	if err != nil {
		return nil, err
	}
	return openStore(ctx, s, canonical, o)
}

func openStore(ctx context.Context, s store.Store, url string, o Options) (*Repository, error) {
	codec, err := newCodec()
	if err != nil {
		return nil, err
	}
	r := &Repository{url: url, store: s, log: o.Log, codec: codec}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = defaultCacheBytes
	}
	if o.Patience > 0 {
		r.patient = store.NewPatient(s, o.Patience, r.log)
		r.store = r.patient
	}
	r.emptyCaches(o.CacheBytes)
	r.remember(o.Memory)
	return r, r.readConfig(ctx, o)
}

func (r *Repository) emptyCaches(chunkBytes int64) {
	r.chunks = newCache[ID, []byte](chunkBytes)
	r.trees = newCache[ID, *Listing](treeCacheBytes)
	r.maps = newCache[ID, *fileMap](mapCacheBytes)
	r.heads = newCache[string, *walHead](treeCacheBytes)
	r.editions = newCache[PackID, *edition](editionCacheBytes)
}

func (r *Repository) readConfig(ctx context.Context, o Options) error {
	b, err := r.get(ctx, configKey, 0, -1)
	if errors.Is(err, store.ErrNotExist) {
		return fmt.Errorf("%s: %w", r.url, ErrNoRepository)
	}
	if err != nil {
		return fmt.Errorf("read repository configuration: %w", err)
	}
	if err := unmarshalDocument(configKey, b, configKind, &r.config); err != nil {
		return err
	}
	if err := decodeHex(r.seals.id[:], []byte(r.config.ID)); err != nil {
		return corrupt(configKey, "id: %v", err)
	}
	r.recognise()
	key, err := r.digestKey(ctx, o)
	if err != nil {
		return errors.Join(r.Replaced(), err)
	}
	r.digests = newDigester(key)
	return nil
}

// digestKey returns the repository's digest key. Where the repository is encrypted it finds the master key for that.
func (r *Repository) digestKey(ctx context.Context, o Options) (key [keySize]byte, err error) {
	switch c := r.config; {
	case c.Encryption == EncryptionNone && len(o.Keys) > 0:
		return key, fmt.Errorf("%s: %w", r.url, ErrNotEncrypted)
	case c.Encryption == EncryptionNone:
		if err := decodeHex(key[:], []byte(c.DigestKey)); err != nil {
			return key, corrupt(configKey, "digest key: %v", err)
		}
		return key, nil
	case c.Encryption == encryptionAESGCM && c.DigestKey == "":
		if r.seals.master, err = r.unlock(ctx, o); err != nil {
			return key, err
		}
		return [keySize]byte(r.seals.master.derive(r.seals.id[:], digestKeyInfo)), nil
	}
	return key, corrupt(configKey, "encryption %q is not known, or not so", r.config.Encryption)
}

// URL is the canonical address of the repository.
func (r *Repository) URL() string { return r.url }

// Place is where keys of the repository would be looked for.
func (r *Repository) Place() (p Place, err error) {
	p = Place{URL: r.url, ID: r.config.ID}
	p.UID, err = store.Owner(r.medium())
	return p, err
}

// ID is the repository's own name, made when it was.
func (r *Repository) ID() string { return r.config.ID }

// Encryption is how the repository is encrypted: EncryptionNone or "aes-256-gcm".
func (r *Repository) Encryption() string { return r.config.Encryption }

// ReadBytes is how many bytes were fetched from the store since the repository was opened.
func (r *Repository) ReadBytes() int64 { return r.read.Load() }

// Close releases what the repository holds.
func (r *Repository) Close() error {
	r.codec.dec.Close()
	if c, ok := r.store.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// Waiting tells what a reader has waited for in vain for a while.
func (r *Repository) Waiting() (w store.Wait, long bool) {
	if r.patient == nil {
		return w, false
	}
	return r.patient.Waiting()
}

// get reads from the store and counts. Lengths come from verified objects: one that ends too early is damaged.
func (r *Repository) get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	b, err := r.store.Get(ctx, key, off, n)
	r.read.Add(int64(len(b)))
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, &CorruptError{Object: key, Offset: off, Length: n, Detail: "it ends before"}
	}
	return b, err
}

// Cluster is a name bound to one PostgreSQL cluster.
type Cluster struct {
	Name             string
	SystemIdentifier uint64
	SegmentSize      pg.SegmentSize
	CreatedAt        time.Time
}

type clusterDocument struct {
	document
	Name             string         `json:"name"`
	SystemIdentifier uint64         `json:"system_identifier,string"`
	SegmentSize      pg.SegmentSize `json:"wal_segment_size"`
	CreatedAt        time.Time      `json:"created_at"`
}

const (
	clustersPrefix = "clusters/"
	clusterKind    = "pgthaw cluster"
)

func clusterKey(name string) string { return clustersPrefix + name }

var clusterName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// ValidClusterName refuses what cannot be a directory's name everywhere.
func ValidClusterName(name string) error {
	if !clusterName.MatchString(name) {
		return fmt.Errorf("%q cannot name a cluster: letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 63", name)
	}
	return nil
}

// Clusters lists all clusters by name. Where one cannot be read, the good ones come with an error.
func (r *Repository) Clusters(ctx context.Context) ([]Cluster, error) {
	var all []Cluster
	var bad []error
	for o, err := range r.store.List(ctx, clustersPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list clusters: %w", err)
		}
		c, err := r.Cluster(ctx, strings.TrimPrefix(o.Key, clustersPrefix))
		if err != nil {
			bad = append(bad, err)
			continue
		}
		all = append(all, c)
	}
	return all, errors.Join(bad...)
}

// Cluster returns what a name is bound to. ErrNoCluster: nothing.
func (r *Repository) Cluster(ctx context.Context, name string) (Cluster, error) {
	if err := ValidClusterName(name); err != nil {
		return Cluster{}, err
	}
	var d clusterDocument
	_, err := r.getDocument(ctx, clusterKey(name), clusterKind, &d)
	if errors.Is(err, store.ErrNotExist) {
		return Cluster{}, fmt.Errorf("%s: %w", name, ErrNoCluster)
	}
	if err != nil {
		return Cluster{}, fmt.Errorf("read cluster %s: %w", name, err)
	}
	if d.Name != name || !d.SegmentSize.Valid() {
		return Cluster{}, corrupt(clusterKey(name), "it describes cluster %q with WAL segments of %d bytes", d.Name, d.SegmentSize)
	}
	return Cluster{Name: name, SystemIdentifier: d.SystemIdentifier, SegmentSize: d.SegmentSize, CreatedAt: d.CreatedAt}, nil
}

// BindCluster binds a name to a PostgreSQL cluster, or compares it with what it is bound to. ErrOtherCluster: another.
func (r *Repository) BindCluster(ctx context.Context, name string, systemID uint64, size pg.SegmentSize) (Cluster, error) {
	c, err := r.Cluster(ctx, name)
	if errors.Is(err, ErrNoCluster) {
		if err := r.createCluster(ctx, name, systemID, size); err != nil && !errors.Is(err, store.ErrExist) {
			return Cluster{}, fmt.Errorf("bind cluster %s: %w", name, err)
		}
		c, err = r.Cluster(ctx, name)
	}
	if err != nil {
		return Cluster{}, err
	}
	if c.SystemIdentifier != systemID {
		return Cluster{}, fmt.Errorf("%w: %s has system identifier %d, not %d", ErrOtherCluster, name, c.SystemIdentifier, systemID)
	}
	if c.SegmentSize != size {
		return Cluster{}, fmt.Errorf("%w: %s has WAL segments of %d bytes, not %d", ErrOtherCluster, name, c.SegmentSize, size)
	}
	return c, nil
}

// ensureCluster makes sure that what a name is bound to survives a power cut: it can be read before.
func (r *Repository) ensureCluster(ctx context.Context, name string) error {
	c, err := r.Cluster(ctx, name)
	if err != nil {
		return err
	}
	err = r.createCluster(ctx, name, c.SystemIdentifier, c.SegmentSize)
	if err != nil && !errors.Is(err, store.ErrExist) {
		return fmt.Errorf("bind cluster %s: %w", name, err)
	}
	return nil
}

func (r *Repository) createCluster(ctx context.Context, name string, systemID uint64, size pg.SegmentSize) error {
	return r.putDocument(ctx, clusterKey(name), clusterDocument{
		document: document{clusterKind, formatVersion}, Name: name, SystemIdentifier: systemID, SegmentSize: size,
		CreatedAt: time.Now().UTC().Truncate(time.Second),
	})
}
