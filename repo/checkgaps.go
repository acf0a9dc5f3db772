package repo

import (
	"context"
	"errors"
	"math"
	"slices"
	"time"

	"pgthaw/repo/pg"
)

// walGap is a run of segments of a line that are missing or damaged.
type walGap struct {
	line        walLine
	first, last uint64
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
	return pg.SegmentName(tli, no, w.cl.size)
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

// ownOf tells whether a segment is one of those that backups need to be consistent.
func ownOf(backups []backupRange, no uint64) bool {
	return slices.ContainsFunc(backups, func(b backupRange) bool { return b.first <= no && no < b.end })
}

// within tells whether gaps have the segment of a name.
func (w *clusterWAL) within(gaps []walGap, name pg.WALName) bool {
	no, err := name.SegmentNo(w.size)
	return err == nil && slices.ContainsFunc(gaps, func(g walGap) bool { return g.first <= no && no <= g.last && w.nameOf(g.line, no) == name })
}

// needed tells whether a backup needs a segment that lies in a gap.
func (w *clusterWAL) needed(g walGap) bool {
	return slices.ContainsFunc(w.on(g.line), func(b backupRange) bool { return b.first <= g.last && b.end > g.first })
}

// archiverTime is how long after a backup's end an archiver that is well may still be about to push what was before the backup.
const archiverTime = 15 * time.Second

// awaitArchiver waits for that.
func (w *clusterWAL) awaitArchiver(ctx context.Context) error {
	for w.archiverBehind() {
		w.c.progress("waiting for the archiver of "+w.cl.name, 0, 0)
		if err := sleep(ctx, time.Second); err != nil {
			return err
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
