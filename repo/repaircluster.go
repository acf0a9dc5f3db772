package repo

import (
	"context"
	"errors"
	"strings"

	"pgthaw/repo/pg"
)

// cluster makes a cluster's document anew from what its manifests say, or else its WAL. Where there is neither, nothing is bound to the
// name, and a damaged document only keeps it from being used.
func (k *repairer) cluster(ctx context.Context, m *Remedy) error {
	name := strings.TrimPrefix(m.Object, clustersPrefix)
	if ValidClusterName(name) != nil {
		m.Next = nextOdd
		return nil
	}
	if !errors.Is(m.Err, ErrCorrupt) {
		m.Next = nextMedium
		return nil
	}
	whole := func() error { return k.clusterDamage(ctx, name) }
	said, any, err := k.deriveCluster(ctx, name)
	switch {
	case err != nil:
		return err
	case !any:
		err = k.remove(ctx, m.Object, whole)
	case said == nil:
		m.Next = nextCluster
		return nil
	default:
		err = k.replaceCluster(ctx, *said, whole)
	}
	if err == nil {
		m.Outcome = Repaired
	}
	return err
}

// clusterDamage is ErrCorrupt of a document that is damaged, or missing.
func (k *repairer) clusterDamage(ctx context.Context, name string) error {
	_, err := k.r.Cluster(ctx, name)
	if errors.Is(err, ErrNoCluster) {
		err = corrupt(clusterKey(name), "it is missing")
	}
	return err
}

func (k *repairer) replaceCluster(ctx context.Context, c Cluster, whole func() error) error {
	if err := k.remove(ctx, clusterKey(c.Name), whole); err != nil {
		return err
	}
	_, err := k.r.BindCluster(ctx, c.Name, c.SystemIdentifier, c.SegmentSize)
	return err
}

// deriveCluster tells what a name is bound to, as far as everything that can be read agrees; nil: it does not, or there is nothing that
// can be. any tells whether there is anything of the cluster.
func (k *repairer) deriveCluster(ctx context.Context, name string) (said *Cluster, any bool, err error) {
	d := clusterWitnesses{r: k.r, name: name}
	if err := d.manifests(ctx); err != nil {
		return nil, false, err
	}
	if len(d.said) == 0 {
		if err := d.wal(ctx); err != nil {
			return nil, false, err
		}
	}
	if len(d.said) != 1 {
		return nil, d.any, nil
	}
	for c := range d.said {
		said = &c
	}
	return said, true, nil
}

// clusterWitnesses gathers what objects of a cluster say of it.
type clusterWitnesses struct {
	r    *Repository
	name string
	any  bool             // there are some
	said map[Cluster]bool // different things that they say
}

func (d *clusterWitnesses) say(systemID uint64, size pg.SegmentSize) {
	if d.said == nil {
		d.said = map[Cluster]bool{}
	}
	if size.Valid() {
		d.said[Cluster{Name: d.name, SystemIdentifier: systemID, SegmentSize: size}] = true
	}
}

func (d *clusterWitnesses) manifests(ctx context.Context) error {
	stored, err := d.r.storedBackups(ctx, backupsPrefix(d.name))
	if err != nil {
		return err
	}
	for _, b := range stored {
		d.any = true
		if !b.manifest {
			continue
		}
		m, err := d.r.readManifest(ctx, b.Cluster, b.Backup)
		if err == nil {
			d.say(m.SystemIdentifier, m.SegmentSize)
		} else if err := unanswered(ctx, err); err != nil && !errors.Is(err, ErrNoBackup) {
			return err
		}
	}
	return nil
}

// wal asks the first segment of each timeline that can be read.
func (d *clusterWitnesses) wal(ctx context.Context) error {
	asked := map[pg.Timeline]bool{}
	for o, err := range d.r.walObjects(ctx, walPrefix(d.name)) {
		if err := unanswered(ctx, err); err != nil {
			return err
		}
		d.any = true
		if err != nil || o.name.Kind != pg.WALSegment && o.name.Kind != pg.WALPartial || asked[o.name.Timeline] {
			continue
		}
		head, err := d.r.WALHead(ctx, d.name, o.name)
		if err == nil {
			asked[o.name.Timeline] = true
			d.say(head.SystemIdentifier, pg.SegmentSize(head.Size))
		} else if err := unanswered(ctx, err); err != nil && !errors.Is(err, ErrNoWAL) {
			return err
		}
	}
	return nil
}
