package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

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

// walGap is a run of segments of a line that are missing or damaged.
type walGap struct {
	line        walLine
	first, last uint64
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

// needed tells whether a backup needs a segment that lies in a gap.
func (w *clusterWAL) needed(g walGap) bool {
	return slices.ContainsFunc(w.on(g.line), func(b backupRange) bool { return b.first <= g.last && b.end > g.first })
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

// archiverTime is how long after a backup's end an archiver that is well may still be about to push what was before the backup.
const archiverTime = 15 * time.Second

// awaitArchiver waits for that.
func (w *clusterWAL) awaitArchiver(ctx context.Context) error {
	for w.archiverBehind() {
		w.c.progress("waiting for the archiver of "+w.cl.name, 0, 0)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
		if _, err := w.listAgain(ctx); err != nil {
			return err
		}
	}
	return nil
}

// archiverBehind tells whether there is a gap that may be what has not been pushed yet: behind it lies the WAL of a backup that ended
// just now, and none but backups' own.
func (w *clusterWAL) archiverBehind() bool {
	for _, tli := range w.known() {
		l := w.line(tli)
		gaps := w.findGaps(l)
		if len(gaps) == 0 || !w.archives(l) {
			continue
		}
		g, backups := gaps[len(gaps)-1], w.on(l)
		fresh := slices.ContainsFunc(backups, func(b backupRange) bool { return b.first > g.last && time.Since(b.StoppedAt) < archiverTime })
		if fresh && !slices.ContainsFunc(w.numbers(l), func(no uint64) bool { return no > g.last && !ownOf(backups, no) }) {
			return true
		}
	}
	return false
}

// ownOf tells whether a segment is one of those that backups need to be consistent.
func ownOf(backups []backupRange, no uint64) bool {
	return slices.ContainsFunc(backups, func(b backupRange) bool { return b.first <= no && no < b.end })
}

// within tells whether gaps have the segment of a name.
func (w *clusterWAL) within(gaps []walGap, name pg.WALName) bool {
	no, err := name.SegmentNo(w.size)
	return err == nil && slices.ContainsFunc(gaps, func(g walGap) bool { return g.first <= no && no <= g.last && w.nameOf(g.line, no) == name })
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

// on are the backups from which recovery can follow the line, oldest first.
func (w *clusterWAL) on(l walLine) []backupRange {
	var all []backupRange
	for _, b := range w.backups {
		if l.from(b.Manifest) != nil {
			all = append(all, b)
		}
	}
	return all
}

// numbers are those of the segments that the line has, ascending.
func (w *clusterWAL) numbers(l walLine) []uint64 {
	var all []uint64
	for _, s := range l {
		for _, no := range w.segments[s.timeline] {
			if w.covers(s, no) {
				all = append(all, no)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// findGaps looks for missing segments: between the first of the oldest backup that recovery may go on from and the newest one
// that is there, or is needed; and before that, within the backups that need no more than their own.
func (w *clusterWAL) findGaps(l walLine) []walGap {
	alone, followed := apart(w.on(l))
	numbers := w.numbers(l)
	var gaps []walGap
	next := uint64(math.MaxUint64)
	if len(followed) > 0 {
		// What is to be there: all that backups need, and what leads to the timeline's beginning.
		end := w.cl.size.Segment(l[len(l)-1].begin)
		for _, b := range followed {
			next, end = min(next, b.first), max(end, b.end)
		}
		if len(numbers) > 0 {
			end = max(end, numbers[len(numbers)-1]+1)
		}
		gaps = missing(l, numbers, next, end)
	}
	for _, b := range alone {
		gaps = append(gaps, missing(l, numbers, b.first, min(b.end, next))...)
	}
	return gaps
}

// apart tells the backups whose WAL behind was pruned from those that recovery may go on from.
func apart(backups []backupRange) (alone, followed []backupRange) {
	for _, b := range backups {
		if b.alone {
			alone = append(alone, b)
		} else {
			followed = append(followed, b)
		}
	}
	return alone, followed
}

// missing are the gaps in numbers, which ascend, from next on to end, which is exclusive.
func missing(l walLine, numbers []uint64, next, end uint64) (gaps []walGap) {
	for _, no := range numbers {
		if no > next && next < end {
			gaps = append(gaps, walGap{l, next, min(no, end) - 1})
		}
		next = max(next, no+1)
	}
	if end > next {
		gaps = append(gaps, walGap{l, next, end - 1})
	}
	return gaps
}

// nameOf is the name that segment no of the line has, on the timeline that is current at its end.
func (w *clusterWAL) nameOf(l walLine, no uint64) pg.WALName {
	tli := l[0].timeline
	for _, s := range l {
		if w.covers(s, no) {
			tli = s.timeline
		}
	}
	name, _ := pg.ParseWALName(pg.SegmentName(tli, no, w.cl.size)) // it reads what it wrote
	return name
}

// knownMissing tells whether a WAL file lies in a gap that was reported.
func (w *clusterWAL) knownMissing(name pg.WALName) bool {
	return len(w.gaps) > 0 && w.within(w.gaps, name) // without any the size of segments may not be known
}

// reportGap reports missing segments, once however many lines they are missing on.
func (w *clusterWAL) reportGap(ctx context.Context, g walGap) error {
	first, last := w.nameOf(g.line, g.first), w.nameOf(g.line, g.last)
	if w.knownMissing(first) && w.knownMissing(last) {
		return nil
	}
	w.gaps = append(w.gaps, g)
	key, err := walKey(w.cl.name, first), error(nil)
	if first == last {
		err = corrupt(key, "it is missing")
	} else {
		err = corrupt(key, "it and all up to %s, %d segments, are missing", last, g.last-g.first+1)
	}
	f, unread := w.cost(ctx, g, key, err)
	w.c.report(f)
	return unread
}

// archives tells whether the WAL of a line goes on behind, or begins before, a backup's own. Where it never does, nobody
// archives, and what lies between two backups was never to be there.
func (w *clusterWAL) archives(l walLine) bool {
	numbers, backups := w.numbers(l), w.on(l)
	for from := 0; from < len(numbers); {
		to := from + 1
		for to < len(numbers) && numbers[to] == numbers[to-1]+1 {
			to++
		}
		own, others := 0, 0
		for _, no := range numbers[from:to] {
			if ownOf(backups, no) {
				own++
			} else {
				others++
			}
		}
		if own > 0 && others > 0 {
			return true
		}
		from = to
	}
	return false
}

// cost finds out what segments cost that cannot be had: which backups need them, and from which others recovery ends there.
// The error says that the rest of the WAL could not be asked for the time of that.
func (w *clusterWAL) cost(ctx context.Context, g walGap, key string, what error) (Finding, error) {
	f := Finding{Object: key, Cluster: w.cl.name, Err: what}
	lost := LostWindow{From: Moment{LSN: w.cl.size.Start(g.first)}}
	for _, b := range w.on(g.line) {
		switch {
		case b.first > g.last:
			if lost.To.LSN == 0 || b.StopLSN < lost.To.LSN {
				lost.To = Moment{b.StopLSN, b.StoppedAt.UTC()}
			}
		case b.end > g.first:
			f.Backups = append(f.Backups, w.needs(b, g))
		case !b.alone:
			lost.Backups = append(lost.Backups, b.ID)
		}
	}
	if len(f.Backups) > 0 {
		f.Cost = "These backups cannot be recovered: they need it to be consistent."
	}
	if len(lost.Backups) == 0 {
		if len(f.Backups) == 0 {
			f.Cost = costNothing
		}
		return f, nil
	}
	var err error
	lost.From.Time, err = w.lastCommit(ctx, g)
	f.Window = &lost
	return f, err
}

// needs names the files of a backup that lie in a gap.
func (w *clusterWAL) needs(b backupRange, g walGap) Affected {
	a := Affected{Cluster: b.Cluster, Backup: b.ID}
	for no := max(b.first, g.first); no < b.end && no <= g.last; no++ {
		if len(a.Files) < maxNamed {
			a.Files = append(a.Files, walFileOf(w.nameOf(g.line, no)))
		}
		a.Total++
	}
	return a
}

// headsBack is how many segments before a gap are asked for the last commit before it.
const headsBack = 16

// lastCommit is the time of the last commit before a gap; zero if the segments just before it have none, or cannot be read.
func (w *clusterWAL) lastCommit(ctx context.Context, g walGap) (time.Time, error) {
	for no := g.first; no > 0 && g.first-no < headsBack; {
		no--
		head, err := w.c.r.WALHead(ctx, w.cl.name, w.nameOf(g.line, no))
		if errors.Is(err, ErrNoWAL) {
			break
		}
		if err != nil {
			return time.Time{}, unanswered(ctx, err)
		}
		if !head.Summary.LastCommit.IsZero() {
			return head.Summary.LastCommit.UTC(), nil
		}
	}
	return time.Time{}, nil
}

// damaged reports a WAL object that cannot be read, and what that costs: a segment that cannot be had is a gap.
func (w *clusterWAL) damaged(ctx context.Context, name pg.WALName, err error) error {
	key := walKey(w.cl.name, name)
	f := Finding{Object: key, Cluster: w.cl.name, Err: err, Cost: costNothing}
	if len(w.backups) == 0 { // and the size of segments may not be known
		w.c.report(f)
		return nil
	}
	no, notSegment := name.SegmentNo(w.cl.size)
	for _, tli := range w.known() {
		g := walGap{w.line(tli), no, no}
		if notSegment != nil || !w.uses(g.line, name, no) {
			continue
		}
		cost, e := w.cost(ctx, g, key, err)
		if e != nil {
			return e
		}
		if cost.Cost != costNothing {
			f = cost
			break
		}
	}
	w.c.report(f)
	return nil
}

// uses tells whether recovery along a line would ask for a segment.
func (w *clusterWAL) uses(l walLine, name pg.WALName, no uint64) bool {
	if _, ok := slices.BinarySearch(w.segments[name.Timeline], no); !ok || name.Kind == pg.WALBackupHistory {
		return false
	}
	whole := name
	whole.Kind = pg.WALSegment
	if name.Kind == pg.WALPartial && w.names[whole] {
		return false
	}
	return slices.ContainsFunc(l, func(s walStretch) bool { return s.timeline == name.Timeline && w.covers(s, no) })
}
