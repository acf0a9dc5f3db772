package repo

import (
	"context"
	"errors"
	"io/fs"

	"pgthaw/repo/pg"
)

// listDamage takes in what is recorded as damaged. WAL files that are gone since are entered as if they were there: that they
// are missing is not a gap which archiving left.
func (c *checker) listDamage(ctx context.Context) error {
	objects, err := c.r.damagedObjects(ctx, "")
	if err != nil {
		return err
	}
	c.recorded = map[string]bool{}
	for _, o := range objects {
		c.recorded[o.Key] = true
		cluster, name, err := parseWALKey(o.Key)
		if err != nil {
			continue // a pack
		}
		cl := c.cluster(cluster)
		if cl.wal == nil {
			cl.wal = c.newWAL(cl)
		}
		if !cl.wal.names[name] {
			cl.wal.names[name] = true
			cl.wal.gone = append(cl.wal.gone, name)
		}
	}
	return nil
}

// reportGone reports the WAL files that were damaged and removed, but for history files, which were asked for already.
func (w *clusterWAL) reportGone(ctx context.Context) error {
	for _, name := range w.gone {
		if name.Kind == pg.WALHistory {
			continue
		}
		err := w.c.r.walDamage(ctx, w.cl.name, name)
		if errors.Is(err, ErrNoWAL) {
			continue // forgotten meanwhile
		}
		if err := unanswered(ctx, err); err != nil {
			return err
		}
		if err := w.damaged(ctx, name, err); err != nil {
			return err
		}
	}
	return nil
}

// checkHolds reads the holds. One that cannot be read holds for ever.
func (c *checker) checkHolds(ctx context.Context) error {
	for _, cl := range c.clusters {
		for _, key := range cl.holds {
			_, err := c.r.readHold(ctx, key)
			if err == nil || errors.Is(err, fs.ErrNotExist) { // removed since it was listed
				continue
			}
			name, _, _ := splitBackupKey(key)
			c.report(Finding{Object: key, Cluster: cl.name, Err: err, Backups: []Affected{{Cluster: name.Cluster, Backup: name.Backup}},
				Cost: "The backup is held, until the hold is removed: who holds it, and until when, is not known."})
			if err := unanswered(ctx, err); err != nil {
				return err
			}
		}
	}
	return nil
}
