package repo

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"pgthaw/repo/pg"
)

// CopyOptions of Copy. The zero value copies everything.
type CopyOptions struct {
	Clusters []string // by name; none: all
	Backup   string   // an id, or Latest of each cluster; "": all backups
	Workers  int      // files copied at once; 0: one for each processor

	NotCopied func(NotCopied)                       // called by one goroutine at a time. nil: nobody listens
	Progress  func(phase string, done, total int64) // in bytes as they lay on the server. nil: nobody listens
}

// NotCopied is something that was left out: it is damaged in the source, or the destination has another of its name.
type NotCopied struct {
	Cluster string
	Backup  string     // "": it is no backup
	WAL     pg.WALName // the zero value: it is no WAL file
	Err     error
}

// Copied tells what Copy did.
type Copied struct {
	Backups  []*Manifest // that were copied, as the destination has them
	Images   int         // boot images that were copied
	Present  int         // backups that the destination had already
	Deleted  int         // backups that were deleted in the destination, and stay so
	WALFiles int         // that were copied
	WALBytes int64       // that these have
	WALThere int         // WAL files that the destination had already
}

// Copy copies clusters, their backups and their WAL to another repository, as far as it does not have them yet. The id of a
// copy is that of the original and something of its own, and the original's leads to it, too. All content is verified on its way, digested and sealed anew; what the destination has from an earlier copy is
// not read again. WAL comes before the backups that need it, and the oldest comes first, so what the destination holds can
// be recovered at any moment, and a copy that was interrupted goes on when it is run again.
//
// What is damaged is reported and left out, and the others are copied. The error that Copy returns is that it could not be
// done to its end. ErrSameRepository: both have one id.
func (r *Repository) Copy(ctx context.Context, to *Repository, o CopyOptions) (Copied, error) {
	if r.ID() == to.ID() {
		return Copied{}, fmt.Errorf("%s and %s: %w", r.url, to.url, ErrSameRepository)
	}
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	c := &copier{from: r, to: to, o: o, classes: map[PackID]byte{}}
	err := c.choose(ctx)
	for _, cl := range c.clusters {
		if err == nil {
			err = cl.copy(ctx)
		}
	}
	return c.done, err
}

// copier copies from one repository to another.
type copier struct {
	from, to *Repository
	o        CopyOptions
	clusters []*clusterCopier
	total    int64        // bytes of all that is to be copied
	bytes    atomic.Int64 // of these, dealt with

	mu      sync.Mutex // a leaf, but for NotCopied, which is called under it
	done    Copied
	classes map[PackID]byte // of packs in the source
}

// leftOut is an error that speaks of one thing that cannot be copied, and not of the others.
type leftOut struct{ error }

func (e leftOut) Unwrap() error { return e.error }

// inSource marks an error that reading the source gave, unless it says nothing about what was read.
func inSource(ctx context.Context, err error) error {
	if err == nil || unanswered(ctx, err) != nil {
		return err
	}
	return leftOut{err}
}

// leaveOut reports what cannot be copied. It returns what keeps anything else from being copied, too.
func (c *copier) leaveOut(what NotCopied) error {
	var one leftOut
	if !errors.As(what.Err, &one) {
		return what.Err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.o.NotCopied != nil {
		c.o.NotCopied(what)
	}
	return nil
}

func (c *copier) progress(n int64) {
	if done := c.bytes.Add(n); c.o.Progress != nil {
		c.o.Progress("copy", done, max(done, c.total))
	}
}

// choose finds out what is to be copied, of all clusters.
func (c *copier) choose(ctx context.Context) error {
	names, err := c.clusterNames(ctx)
	if err != nil {
		return err
	}
	found := c.o.Backup == "" || c.o.Backup == Latest
	for _, name := range names {
		cluster, err := c.from.Cluster(ctx, name)
		if err == nil {
			err = c.bind(ctx, cluster)
		} else {
			err = inSource(ctx, err)
		}
		if err != nil {
			if err = c.leaveOut(NotCopied{Cluster: name, Err: err}); err != nil {
				return err
			}
			continue
		}
		cl := &clusterCopier{copier: c, cluster: cluster}
		if err := cl.choose(ctx); err != nil {
			return fmt.Errorf("copy %s: %w", name, err)
		}
		found = found || cl.asked
		c.clusters = append(c.clusters, cl)
	}
	if !found {
		return fmt.Errorf("%s: %w", c.o.Backup, ErrNoBackup)
	}
	return nil
}

// clusterNames are those asked for, or all.
func (c *copier) clusterNames(ctx context.Context) (names []string, err error) {
	for o, err := range c.from.store.List(ctx, clustersPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list clusters: %w", err)
		}
		names = append(names, strings.TrimPrefix(o.Key, clustersPrefix))
	}
	for _, name := range c.o.Clusters {
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("%s: %w", name, ErrNoCluster)
		}
	}
	if len(c.o.Clusters) > 0 {
		names = slices.Compact(slices.Sorted(slices.Values(c.o.Clusters)))
	}
	return names, nil
}

// bind gives the cluster its name in the destination.
func (c *copier) bind(ctx context.Context, cluster Cluster) error {
	_, err := c.to.BindCluster(ctx, cluster.Name, cluster.SystemIdentifier, cluster.SegmentSize)
	if errors.Is(err, ErrOtherCluster) {
		return leftOut{fmt.Errorf("in the destination: %w", err)}
	}
	return err
}

// clusterCopier copies one cluster.
type clusterCopier struct {
	*copier
	cluster Cluster
	asked   bool              // the source has the backup that was asked for
	backups []*Manifest       // to be copied, oldest first
	inFrom  []string          // ids of the source's backups, oldest first
	inTo    map[string]string // ids of the destination's backups by that of the original
	wal     walCopier
}

// choose finds out what of the cluster is to be copied. Backups are listed before WAL: what they need is listed with it.
func (c *clusterCopier) choose(ctx context.Context) error {
	ids, err := c.chooseBackups(ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		m, err := c.from.readManifest(ctx, c.cluster.Name, id)
		if err != nil {
			if err = c.leaveOut(NotCopied{Cluster: c.cluster.Name, Backup: id, Err: inSource(ctx, err)}); err != nil {
				return err
			}
			continue
		}
		c.backups = append(c.backups, m)
		c.total += m.SizeBytes
	}
	c.wal = walCopier{clusterCopier: c, tried: map[pg.WALName]error{}}
	return c.wal.choose(ctx)
}

// chooseBackups gives the ids of the backups that are asked for and that the destination neither has nor had.
func (c *clusterCopier) chooseBackups(ctx context.Context) (ids []string, err error) {
	if c.inFrom, err = c.from.BackupIDs(ctx, c.cluster.Name); err != nil {
		return nil, err
	}
	c.inFrom = slices.CompactFunc(c.inFrom, sameOriginal)
	to, err := c.to.storedBackups(ctx, backupsPrefix(c.cluster.Name))
	if err != nil {
		return nil, err
	}
	deleted, err := c.list(ctx, to)
	if err != nil {
		return nil, err
	}
	for _, id := range c.askedFor() {
		c.asked = true
		switch {
		case c.inTo[OriginalID(id)] != "":
			c.done.Present++
		case deleted[OriginalID(id)]:
			c.done.Deleted++
		default:
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func sameOriginal(a, b string) bool { return OriginalID(a) == OriginalID(b) }

// askedFor are the ids of the backups that are to be in the destination in the end.
func (c *clusterCopier) askedFor() []string {
	switch c.o.Backup {
	case "":
		return c.inFrom
	case Latest:
		return c.inFrom[max(0, len(c.inFrom)-1):]
	}
	return slices.DeleteFunc(slices.Clone(c.inFrom), func(id string) bool { return id != c.o.Backup && OriginalID(id) != c.o.Backup })
}

// list takes in what the destination has, and tells what was deleted there after it had been made.
func (c *clusterCopier) list(ctx context.Context, to []*storedBackup) (deleted map[string]bool, err error) {
	c.inTo, deleted = map[string]string{}, map[string]bool{}
	for _, b := range to {
		switch {
		case isImage(b.Backup): // copied by what it is, not by its id
		case b.listed():
			c.inTo[OriginalID(b.Backup)] = b.Backup
		case !b.deleted.IsZero():
			d, err := c.to.deletion(ctx, b.BackupName)
			if err := unanswered(ctx, err); err != nil {
				return nil, err
			}
			deleted[OriginalID(b.Backup)] = deleted[OriginalID(b.Backup)] || !d.Unmade
		}
	}
	return deleted, nil
}

// copy copies the cluster: before each backup the WAL up to its end, so that the destination never has a gap in it.
func (c *clusterCopier) copy(ctx context.Context) error {
	for _, m := range c.backups {
		var err error
		if last, no := pg.ParseWALName(m.WALLast); no == nil {
			err = c.wal.upTo(ctx, &last)
		}
		if err == nil {
			err = c.backup(ctx, m)
		}
		if err != nil {
			return fmt.Errorf("copy backup %s of %s: %w", m.ID, m.Cluster, err)
		}
	}
	if err := c.images(ctx); err != nil {
		return err
	}
	return c.wal.upTo(ctx, nil)
}

// backup copies one backup, or reports why not.
func (c *clusterCopier) backup(ctx context.Context, m *Manifest) error {
	defer c.bytes.Store(c.bytes.Load() + m.SizeBytes)
	prior := c.prior(ctx, m.ID)
	copied, err := c.protected(ctx, m, prior)
	if prior != nil && (errors.Is(err, ErrDeleted) || errors.Is(err, ErrCorrupt) && !errors.As(err, new(leftOut))) {
		c.to.log.Warn("nothing is compared with an earlier copy, for that was deleted, or is damaged", "backup", prior.to.ID, "error", err)
		copied, err = c.protected(ctx, m, nil)
	}
	if errors.Is(err, ErrDeleted) {
		return nil // since it was listed
	}
	if errors.Is(err, ErrWALPruned) {
		err = leftOut{fmt.Errorf("in the destination: %w", err)}
	}
	if err != nil {
		return c.leaveOut(NotCopied{Cluster: m.Cluster, Backup: m.ID, Err: err})
	}
	c.inTo[OriginalID(m.ID)] = copied.ID
	c.done.Backups = append(c.done.Backups, copied)
	return nil
}

// protected copies one backup while no prune in the source reclaims it. The destination's prior one WriteBackup protects.
func (c *clusterCopier) protected(ctx context.Context, m *Manifest, prior *pair) (*Manifest, error) {
	uses := []BackupName{m.Name()}
	if prior != nil {
		uses = append(uses, prior.from.Name())
	}
	s, err := c.from.Use(ctx, "copy", uses...)
	if err != nil {
		return nil, err
	}
	defer func() { _ = s.End(context.WithoutCancel(ctx)) }() // what is left of it prune takes away
	return c.writeBackup(ctx, m, prior)
}

// pair is one backup in both repositories.
type pair struct{ from, to *Manifest }

// prior is the backup that a new copy is compared with: of those in both repositories the newest before, or the oldest
// behind. nil: there is none, or it cannot be read.
func (c *clusterCopier) prior(ctx context.Context, id string) *pair {
	chosen := ""
	for _, other := range c.inFrom {
		if c.inTo[OriginalID(other)] != "" && (other < id || chosen == "") {
			chosen = other
		}
	}
	if chosen == "" {
		return nil
	}
	from, err := c.from.readManifest(ctx, c.cluster.Name, chosen)
	to, toErr := c.to.readManifest(ctx, c.cluster.Name, c.inTo[OriginalID(chosen)])
	if err := errors.Join(err, toErr); err != nil {
		c.to.log.Warn("an earlier copy, or its original, cannot be read; nothing is compared with it", "backup", chosen, "error", err)
		return nil
	}
	return &pair{from, to}
}
