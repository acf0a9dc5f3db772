package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"pgthaw/repo/pg"
)

// clusterWAL is what a listing tells of a cluster's WAL, and the backups that start in it.
type clusterWAL struct {
	c         *checker
	cl        *checkedCluster
	timelines // without their size until check
	names     map[pg.WALName]bool
	sizes     map[pg.WALName]int64     // of the objects
	segments  map[pg.Timeline][]uint64 // numbers, ascending
	backups   []backupRange            // oldest first; none whose manifest names no WAL
	gaps      []walGap                 // reported
	gone      []pg.WALName             // that were damaged and have been removed, and are among names
}

// backupRange is the WAL that a backup needs to be consistent.
type backupRange struct {
	*Manifest
	first, end uint64 // numbers of the segments, end exclusive. A last one that only its own tree has does not count
	alone      bool   // what lies behind was pruned
}

// checkWAL lists the WAL of all clusters, and looks at each cluster's document and for gaps.
func (c *checker) checkWAL(ctx context.Context) error {
	for _, list := range []func(context.Context) error{c.listWAL, c.listDamage, c.listClusters} {
		if err := list(ctx); err != nil {
			return err
		}
	}
	c.done.Clusters = len(c.clusters)
	for _, cl := range c.clusters {
		if cl.wal == nil {
			cl.wal = c.newWAL(cl)
		}
		if err := c.checkCluster(ctx, cl); err != nil {
			return err
		}
		if cl.size == 0 {
			continue // no backup, no document: what its segments are nobody knows
		}
		if err := cl.wal.check(ctx); err != nil {
			return err
		}
		if err := cl.wal.reportGone(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) newWAL(cl *checkedCluster) *clusterWAL {
	return &clusterWAL{c: c, cl: cl, timelines: newTimelines(0), names: map[pg.WALName]bool{}, sizes: map[pg.WALName]int64{},
		segments: map[pg.Timeline][]uint64{}}
}

// listWAL takes in the names of all WAL objects, in one listing.
func (c *checker) listWAL(ctx context.Context) error {
	for o, err := range c.r.store.List(ctx, walRoot) {
		if err != nil {
			return fmt.Errorf("list %s: %w", walRoot, err)
		}
		cluster, name, err := parseWALKey(o.Key)
		cl := c.cluster(cluster)
		if cl.wal == nil {
			cl.wal = c.newWAL(cl)
		}
		if err != nil {
			c.report(Finding{Object: o.Key, Cluster: cluster, Err: err, Backups: cl.affected(),
				Cost: "No backup of the cluster can be recovered while it is there: its WAL cannot be listed."})
			continue
		}
		c.done.WALFiles++
		cl.wal.names[name] = true
		cl.wal.sizes[name] = o.Size
	}
	return nil
}

// listClusters adds the clusters that have nothing but their document.
func (c *checker) listClusters(ctx context.Context) error {
	for o, err := range c.r.store.List(ctx, clustersPrefix) {
		if err != nil {
			return fmt.Errorf("list clusters: %w", err)
		}
		c.cluster(strings.TrimPrefix(o.Key, clustersPrefix))
	}
	return nil
}

// affected are all backups of a cluster.
func (cl *checkedCluster) affected() []Affected {
	var all []Affected
	for _, id := range cl.ids {
		all = append(all, Affected{Cluster: cl.name, Backup: id})
	}
	return all
}

// checkCluster reads the cluster's document, which was there before anything else of it.
func (c *checker) checkCluster(ctx context.Context, cl *checkedCluster) error {
	doc, err := c.r.Cluster(ctx, cl.name)
	cl.size = doc.SegmentSize
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrNoCluster) {
		err = corrupt(clusterKey(cl.name), "it is missing")
	}
	c.report(Finding{Object: clusterKey(cl.name), Cluster: cl.name, Err: err, Backups: cl.affected(),
		Cost: "Nothing of the cluster can be listed, restored, fetched or added until it is there again; the backups themselves are not hit."})
	if len(cl.backups) > 0 && cl.backups[0].SegmentSize.Valid() {
		cl.size = cl.backups[0].SegmentSize
	}
	return unanswered(ctx, err)
}

// check looks for gaps along every line of timelines.
func (w *clusterWAL) check(ctx context.Context) error {
	w.size = w.cl.size
	if err := w.sort(ctx); err != nil {
		return err
	}
	for name := range w.names {
		if err := w.readHistory(ctx, name); err != nil {
			return err
		}
	}
	for _, m := range w.cl.backups {
		if err := w.addBackup(ctx, m); err != nil {
			return err
		}
	}
	for found := true; found; {
		var err error
		if found, err = w.listAgain(ctx); err != nil {
			return err
		}
	}
	if err := w.awaitArchiver(ctx); err != nil {
		return err
	}
	w.checkHistories()
	unarchived := false
	for _, tli := range w.known() {
		l := w.line(tli)
		archives := w.archives(l)
		for _, g := range w.findGaps(l) {
			if !archives && !w.needed(g) {
				unarchived = true
			} else if err := w.reportGap(ctx, g); err != nil {
				return err
			}
		}
	}
	if unarchived {
		w.c.report(Finding{Object: walPrefix(w.cl.name), Cluster: w.cl.name, Note: true,
			Err:  fmt.Errorf("the repository has no WAL of %s but that of the backups themselves", w.cl.name),
			Cost: "Nothing can be recovered to a time between one backup and the next."})
	}
	return nil
}

// sort orders segments by number. A partial segment stands in for a whole one that never came if its timeline ended there.
func (w *clusterWAL) sort(ctx context.Context) error {
	partial := map[pg.Timeline]uint64{}
	for name := range w.names {
		if name.Kind == pg.WALHistory || name.Kind == pg.WALBackupHistory {
			continue
		}
		no, err := name.SegmentNo(w.cl.size)
		if err != nil {
			key := walKey(w.cl.name, name)
			w.c.report(Finding{Object: key, Cluster: w.cl.name, Err: corrupt(key, "%v", err), Backups: w.cl.affected(),
				Cost: "No backup of the cluster can be recovered while it is there: its WAL cannot be listed."})
			continue
		}
		if name.Kind == pg.WALPartial {
			partial[name.Timeline] = max(no, partial[name.Timeline])
		} else {
			w.segments[name.Timeline] = append(w.segments[name.Timeline], no)
		}
	}
	for tli := range w.segments {
		slices.Sort(w.segments[tli])
	}
	for tli, no := range partial {
		if all := w.segments[tli]; len(all) == 0 || no > all[len(all)-1] {
			w.segments[tli] = append(all, no)
		}
	}
	return ctx.Err()
}

// readHistory reads a file if it is a history file: they are small, and there is one for each timeline.
func (w *clusterWAL) readHistory(ctx context.Context, name pg.WALName) error {
	if name.Kind != pg.WALHistory {
		return nil
	}
	entries, err := w.c.r.history(ctx, w.cl.name, name)
	w.histories[name.Timeline] = entries
	if err != nil {
		w.unread[name.Timeline] = true
		w.reportHistory(name.Timeline, name.Timeline, err)
	}
	return unanswered(ctx, err)
}

// listAgain takes in what the listing lacks, of what is to be there: one that goes on while WAL is put may show a file, and not the
// one that was put before.
func (w *clusterWAL) listAgain(ctx context.Context) (found bool, err error) {
	known, gaps := w.known(), []walGap(nil)
	for _, tli := range known {
		gaps = append(gaps, w.findGaps(w.line(tli))...)
	}
	if len(gaps) == 0 && w.missingHistory() == 0 {
		return false, nil
	}
	for o, err := range w.c.r.store.List(ctx, walPrefix(w.cl.name)) {
		if err != nil {
			return found, fmt.Errorf("list %s: %w", walPrefix(w.cl.name), err)
		}
		_, name, err := parseWALKey(o.Key)
		history := name.Kind == pg.WALHistory && name.Timeline <= known[len(known)-1]
		if err != nil || w.names[name] || !history && !w.within(gaps, name) {
			continue
		}
		found = true
		w.c.done.WALFiles++
		w.names[name], w.sizes[name] = true, o.Size
		if err := w.readHistory(ctx, name); err != nil {
			return found, err
		}
		if no, err := name.SegmentNo(w.size); err == nil {
			w.segments[name.Timeline] = append(w.segments[name.Timeline], no)
			slices.Sort(w.segments[name.Timeline])
		}
	}
	return found, nil
}

// missingHistory finds the history file that recovery misses: it asks for one after the other until one is absent
// (timeline.c, findNewestTimeLine), and would leave out what lies behind such a hole. 0: there is none.
func (w *clusterWAL) missingHistory() pg.Timeline {
	known := w.known()
	if len(known) == 0 || len(w.cl.backups) == 0 {
		return 0
	}
	oldest := w.cl.backups[0].Timeline
	for _, m := range w.cl.backups {
		oldest = min(oldest, m.Timeline)
	}
	for tli := oldest + 1; tli <= known[len(known)-1]; tli++ {
		if !w.names[pg.WALName{Kind: pg.WALHistory, Timeline: tli}] {
			return tli
		}
	}
	return 0
}

func (w *clusterWAL) checkHistories() {
	if tli := w.missingHistory(); tli != 0 {
		known := w.known()
		key := walKey(w.cl.name, pg.WALName{Kind: pg.WALHistory, Timeline: tli})
		w.reportHistory(tli, tli-1, corrupt(key, "it is missing, although there is something of timeline %s", known[len(known)-1]))
	}
}

// reportHistory reports a history file without which recovery does not find its way to a timeline, not from backups of
// timelines up to newest.
func (w *clusterWAL) reportHistory(tli, newest pg.Timeline, err error) {
	f := Finding{Object: walKey(w.cl.name, pg.WALName{Kind: pg.WALHistory, Timeline: tli}), Cluster: w.cl.name, Err: err,
		Cost: fmt.Sprintf("These backups cannot be recovered to timeline %s or later, and not at all unless --timeline names an earlier one. "+
			"Push the file again from a server's pg_wal.", tli)}
	for _, m := range w.cl.backups {
		if m.Timeline <= newest {
			f.Backups = append(f.Backups, Affected{Cluster: m.Cluster, Backup: m.ID})
		}
	}
	w.c.report(f)
}

// known are the timelines of which there is anything, ascending.
func (w *clusterWAL) known() []pg.Timeline {
	known := map[pg.Timeline]bool{}
	for tli := range w.segments {
		known[tli] = true
	}
	for tli := range w.histories {
		known[tli] = true
	}
	for _, m := range w.cl.backups {
		known[m.Timeline] = true
	}
	return slices.Sorted(maps.Keys(known))
}

// addBackup takes in the range of a backup.
func (w *clusterWAL) addBackup(ctx context.Context, m *Manifest) error {
	first, err1 := pg.ParseWALName(m.WALFirst)
	last, err2 := pg.ParseWALName(m.WALLast)
	b := backupRange{Manifest: m, alone: w.cl.alone[m.ID]}
	if err1 != nil || err2 != nil {
		return nil // it needs none
	}
	b.first, err1 = first.SegmentNo(w.cl.size)
	no, err2 := last.SegmentNo(w.cl.size)
	b.end = no + 1
	if err1 != nil || err2 != nil || no < b.first {
		key := manifestKey(m.Cluster, m.ID)
		w.c.report(Finding{Object: key, Cluster: m.Cluster, Err: corrupt(key, "it needs WAL from %q to %q", m.WALFirst, m.WALLast),
			Cost: "The backup cannot be recovered.", Backups: []Affected{{Cluster: m.Cluster, Backup: m.ID}}})
		return nil
	}
	if m.FromStandby && !w.names[last] {
		// A standby cannot switch to a new segment: the last one is in the tree, as far as it went.
		e, err := w.c.r.OpenBackup(m).Stat(ctx, walFileOf(last))
		if err := unanswered(ctx, err); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err == nil && e.content.kind != contentWAL {
			b.end--
		}
	}
	w.backups = append(w.backups, b)
	return nil
}
