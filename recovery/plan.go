package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"time"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// Route is a backup and a timeline that lead to a target.
type Route struct {
	Manifest *repo.Manifest
	Timeline pg.Timeline // that recovery follows

	path     *walPath
	line     line   // from the backup's timeline to that one
	end      pg.LSN // of the last segment that is there, or of the backup
	gapAhead bool   // behind it some is missing
	alone    bool   // recovery ends with the backup: what lay behind was pruned
	namedAt  pg.LSN // of the restore point that is the target

	image *repo.Manifest // boot image from which recovery begins; nil: it begins from the backup
}

// timelineAt is the timeline that a place in the WAL belongs to.
func (r Route) timelineAt(lsn pg.LSN) pg.Timeline {
	for _, s := range r.line {
		if lsn <= s.end {
			return s.timeline
		}
	}
	return r.Timeline
}

// target is the one to recover to: the end of all WAL is the backup's end where that is all there is.
func (r Route) target(t Target) Target {
	if kind, _ := t.kind(); r.alone && kind == targetEnd {
		t.Immediate = true
	}
	return t
}

// Plan chooses the backup from which a target can be reached and the way there: the newest such, if backup is "latest" and
// there is a target. Where there is none, it is ErrTargetUnreachable and says what can be reached. Nothing is written.
func Plan(ctx context.Context, r *repo.Repository, cluster, backup string, t Target) (Route, error) {
	kind, err := t.kind()
	if err != nil {
		return Route{}, err
	}
	if backup != repo.Latest || kind == targetEnd || kind == targetImmediate {
		m, err := r.Manifest(ctx, cluster, backup)
		if err != nil {
			return Route{}, err
		}
		return planAlone(ctx, r, m, t)
	}
	all, err := r.Backups(ctx, cluster)
	if len(all) == 0 {
		return Route{}, errors.Join(err, fmt.Errorf("%s has none yet: %w", cluster, repo.ErrNoBackup))
	}
	return planLatest(ctx, r, all, t)
}

func planAlone(ctx context.Context, r *repo.Repository, m *repo.Manifest, t Target) (Route, error) {
	a, err := openArchive(ctx, r, m.Cluster)
	if err != nil {
		return Route{}, err
	}
	return a.plan(ctx, m, t)
}

// planLatest tries the backups, newest first. If none leads to the target, the error is that of the newest from which it
// lies ahead, else that of the oldest.
func planLatest(ctx context.Context, r *repo.Repository, all []*repo.Manifest, t Target) (Route, error) {
	a, err := openArchive(ctx, r, all[0].Cluster)
	if err != nil {
		return Route{}, err
	}
	var ahead, before error
	for _, m := range slices.Backward(all) {
		route, err := a.plan(ctx, m, t)
		var early *beforeEnd
		switch {
		case err == nil:
			return route, nil
		case !errors.Is(err, ErrTargetUnreachable):
			return Route{}, err
		case errors.As(err, &early):
			before = err
		case ahead == nil:
			ahead = err
		}
	}
	if ahead != nil {
		return Route{}, ahead
	}
	return Route{}, before
}

// beforeEnd is an ErrTargetUnreachable that an older backup may cure.
type beforeEnd struct {
	target string
	m      *repo.Manifest
}

func (e *beforeEnd) Error() string {
	return fmt.Sprintf("%v: %s lies before the end of backup %s, which is consistent from LSN %s, %s on",
		ErrTargetUnreachable, e.target, e.m.ID, e.m.StopLSN, formatTime(e.m.StoppedAt))
}

func (e *beforeEnd) Is(target error) bool { return target == ErrTargetUnreachable }

func (e *beforeEnd) Hint() string {
	return "Choose an older backup, or a target after the end of this one; `pgthaw list` shows what each can reach."
}

func unreachable(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrTargetUnreachable, fmt.Sprintf(format, args...))
}

// plan finds out whether a backup leads to a target.
func (a *archive) plan(ctx context.Context, m *repo.Manifest, t Target) (Route, error) {
	alone, err := a.r.Standalone(ctx, m)
	if err != nil {
		return Route{}, err
	}
	p, err := a.pathOf(ctx, m, t.Timeline, alone)
	if err != nil {
		return Route{}, err
	}
	if err := p.reach(ctx, m, t); err != nil {
		return Route{}, err
	}
	return Route{
		Manifest: m,
		Timeline: p.line[len(p.line)-1].timeline,
		path:     p,
		line:     p.line,
		end:      max(a.size.Start(p.end()), m.StopLSN),
		gapAhead: p.gap != nil || p.alone,
		alone:    p.alone,
		namedAt:  p.namedAt,
	}, nil
}

// pathOf is the WAL that lies between a backup and the end of the timeline asked for, which holds at least the backup's own;
// and if the backup stands alone, no more.
func (a *archive) pathOf(ctx context.Context, m *repo.Manifest, timeline string, alone bool) (*walPath, error) {
	if alone {
		timeline = onlyOwn(timeline)
	}
	tli, err := a.resolveTimeline(ctx, m, timeline)
	if err != nil {
		return nil, err
	}
	if alone && tli != m.Timeline {
		return nil, unreachable("backup %s, of timeline %s, is restorable to its own end only: the WAL behind it was pruned", m.ID, m.Timeline)
	}
	l, err := a.line(ctx, tli)
	if err != nil {
		return nil, err
	}
	l, ok := l.from(m)
	if !ok {
		return nil, unreachable("timeline %s did not come out of timeline %s after backup %s ended at %s", tli, m.Timeline, m.ID, m.StopLSN)
	}
	p := a.path(l, m)
	if a.size.Start(p.end()) < m.StopLSN {
		err = p.lastInTree(ctx, m)
	}
	if alone {
		p.cutOff(m)
	}
	return p, err
}

// onlyOwn reads a word of recovery_target_timeline for a backup that leads to no other timeline than its own.
func onlyOwn(timeline string) string {
	if timeline == "" || timeline == "latest" {
		return "current"
	}
	return timeline
}

// lastInTree returns nil if the WAL that the archive lacks up to the backup's end lies in its pg_wal: a standby cannot
// switch to a new segment, so the last one of its backup is there as far as it went (docs/format.md, wal_last).
// PostgreSQL takes that when restore_command has none, and where more would follow FetchWAL stops it.
func (p *walPath) lastInTree(ctx context.Context, m *repo.Manifest) error {
	missing := p.a.segmentName(segment{m.Timeline, p.end()})
	err := fs.ErrNotExist
	if missing == m.WALLast {
		b := p.a.r.OpenBackup(m)
		var e repo.Entry
		if e, err = b.Stat(ctx, "pgdata/pg_wal/"+missing); err == nil {
			_, err = b.Open(ctx, e) // fails where the tree only names the archive's
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: WAL file %s, which backup %s needs, is missing", repo.ErrCorrupt, missing, m.ID)
	case err == nil && p.gap != nil:
		return unreachable("backup %s has no more than the beginning of %s: %s", m.ID, missing, p.gap)
	}
	return err
}

// resolveTimeline is the number of the timeline that a word of recovery_target_timeline means for a backup.
func (a *archive) resolveTimeline(ctx context.Context, m *repo.Manifest, word string) (pg.Timeline, error) {
	switch word {
	case "current":
		return m.Timeline, nil
	case "", "latest":
		return a.latestTimeline(ctx, m)
	}
	n, err := strconv.ParseUint(word, 0, 32)
	if err != nil {
		return 0, err
	}
	tli := pg.Timeline(n)
	if tli != m.Timeline && !a.histories[tli] {
		return 0, unreachable("%s of timeline %s is not in the repository", pg.HistoryName(tli), tli)
	}
	return tli, nil
}

// latestTimeline is the newest timeline that descends from the backup's, among those that findNewestTimeLine would come
// upon: it asks for one history file after the other until one is absent. Whatever the repository holds behind such a
// hole would be left out without a word, so that is an error.
func (a *archive) latestTimeline(ctx context.Context, m *repo.Manifest) (pg.Timeline, error) {
	newest, next := m.Timeline, m.Timeline+1
	for ; a.histories[next]; next++ {
		l, err := a.line(ctx, next)
		if err != nil {
			return 0, err
		}
		if _, ok := l.from(m); ok {
			newest = next
		}
	}
	for _, tli := range slices.Sorted(maps.Keys(a.known())) {
		if tli > next || tli == next && !a.histories[tli] {
			err := unreachable("%s is not in the repository, but there is WAL of timeline %s", pg.HistoryName(next), tli)
			return 0, withHint(err, "Push the history file from a server's pg_wal with `pgthaw wal push`, or name the timeline: --timeline current, or a number.")
		}
	}
	return newest, nil
}

// known are the timelines of which the repository holds anything.
func (a *archive) known() map[pg.Timeline]bool {
	known := maps.Clone(a.histories)
	for tli := range a.newest {
		known[tli] = true
	}
	return known
}

// reach returns nil if recovery of the backup along the path comes to the target.
func (p *walPath) reach(ctx context.Context, m *repo.Manifest, t Target) error {
	kind, err := t.kind()
	if err != nil {
		return err
	}
	switch kind {
	case targetTime:
		return p.reachTime(ctx, m, t)
	case targetLSN:
		return p.reachLSN(ctx, m, t)
	case targetXid:
		return p.reachXid(ctx, m, t)
	case targetName:
		return p.reachName(ctx, m, t)
	case targetEnd:
		return p.reachEnd(ctx)
	default:
		return nil
	}
}

// reachEnd refuses to recover "everything" where part of it is missing.
func (p *walPath) reachEnd(ctx context.Context) error {
	if p.gap == nil {
		return nil
	}
	last, err := p.lastRecord(ctx)
	if err != nil {
		return err
	}
	return withHint(unreachable("the end of WAL lies behind a gap: %s", p.gap),
		fmt.Sprintf("To recover up to the gap, say --to-lsn %s; to the end of the backup alone, --to-immediate.", last))
}

// behind says why the WAL ends where it does, for messages.
func (p *walPath) behind() string {
	if p.alone {
		return "the WAL behind the backup was pruned"
	}
	if p.gap == nil {
		return "the repository has no WAL after that"
	}
	return "behind that is a gap: " + p.gap.String()
}

// reachTime holds if a commit or abort later than the target is there, for only that ends recovery (recoveryStopsBefore).
func (p *walPath) reachTime(ctx context.Context, m *repo.Manifest, t Target) error {
	if t.Time.Before(m.StoppedAt) {
		return &beforeEnd{t.describe(), m}
	}
	last, err := p.lastCommit(ctx)
	if err != nil {
		return err
	}
	if last.After(t.Time) || t.Exclusive && last.Equal(t.Time) {
		return nil
	}
	err = unreachable("no transaction ended after %s: the last one did at %s, and %s", t.describe(), formatCommit(last), p.behind())
	if p.alone {
		return withHint(err, aloneHint)
	}
	if p.gap == nil {
		return withHint(err, "To recover everything, give no target; to recover to this time, archive more WAL first (pg_switch_wal).")
	}
	return err
}

const aloneHint = "This backup is restorable to its own end only, which is what it recovers to without a target; \"pgthaw list\" shows what others can reach."

func formatCommit(t time.Time) string {
	if t.IsZero() {
		return "no time"
	}
	return formatTime(t)
}

// lastCommit is the latest time in the newest segment that has a commit or an abort in it. Clocks that go back apart,
// those of older segments are not later.
func (p *walPath) lastCommit(ctx context.Context) (last time.Time, err error) {
	err = p.newestFirst(ctx, func(_ int, s pg.WALSummary) (bool, error) {
		last = s.LastCommit
		return !last.IsZero(), nil
	})
	return last, err
}

// reachLSN holds if a record begins at the target or behind it (recoveryStopsAfter).
func (p *walPath) reachLSN(ctx context.Context, m *repo.Manifest, t Target) error {
	if t.LSN < m.StopLSN {
		return &beforeEnd{t.describe(), m}
	}
	last, err := p.lastRecord(ctx)
	if err != nil {
		return err
	}
	if t.LSN > last {
		return withHint(unreachable("the last record before %s begins at %s, and %s", t.describe(), last, p.behind()),
			fmt.Sprintf("The farthest that can be asked for is --to-lsn %s.", last))
	}
	return nil
}

// reachXid looks for segments whose transactions' range covers the target. A transaction within a range may still have
// no record in it; that only PostgreSQL finds out.
func (p *walPath) reachXid(ctx context.Context, m *repo.Manifest, t Target) error {
	found := -1
	var newest pg.WALSummary
	err := p.newestFirst(ctx, func(i int, s pg.WALSummary) (bool, error) {
		if s.Xids > 0 && newest.Xids == 0 {
			newest = s
		}
		if s.Xids > 0 && int32(t.Xid-s.MinXid) >= 0 && int32(s.MaxXid-t.Xid) >= 0 {
			found = i
		}
		return found >= 0, nil
	})
	if err != nil {
		return err
	}
	if found < 0 {
		return p.xidNotFound(m, t, newest)
	}
	before, err := p.xidsBeforeEnd(ctx, m, found)
	if err == nil && before {
		err = &beforeEnd{t.describe(), m}
	}
	return err
}

func (p *walPath) xidNotFound(m *repo.Manifest, t Target, newest pg.WALSummary) error {
	if newest.Xids == 0 {
		return unreachable("no transaction ended in the WAL behind backup %s, and %s", m.ID, p.behind())
	}
	if int32(t.Xid-newest.MaxXid) < 0 {
		return &beforeEnd{t.describe(), m}
	}
	return unreachable("%s did not end in the WAL behind backup %s: the last one there is %d, and %s", t.describe(), m.ID, newest.MaxXid, p.behind())
}

// xidsBeforeEnd tells whether all commits and aborts of segment i lie before the backup's end.
func (p *walPath) xidsBeforeEnd(ctx context.Context, m *repo.Manifest, i int) (bool, error) {
	start := p.a.size.Start(p.first + uint64(i))
	if start >= m.StopLSN {
		return false, nil
	}
	if start+pg.LSN(p.a.size) <= m.StopLSN {
		return true, nil
	}
	before, err := p.prefix(ctx, i, m.StopLSN)
	if err != nil {
		return false, err
	}
	whole, err := p.a.r.WALHead(ctx, p.a.cluster, p.names[i])
	return before.Xids == whole.Summary.Xids, err
}

// reachName holds if the first restore point of that name that recovery comes to lies behind the backup's end.
func (p *walPath) reachName(ctx context.Context, m *repo.Manifest, t Target) error {
	var at pg.LSN
	err := p.newestFirst(ctx, func(_ int, s pg.WALSummary) (bool, error) {
		for _, point := range slices.Backward(s.RestorePoints) {
			if point.Name == t.Name && point.LSN > m.StartLSN {
				at = point.LSN
			}
		}
		return false, nil
	})
	switch {
	case err != nil:
		return err
	case at == 0:
		return unreachable("%s is not in the WAL behind backup %s, and %s", t.describe(), m.ID, p.behind())
	case at <= m.StopLSN:
		return &beforeEnd{t.describe(), m}
	default:
		p.namedAt = at
		return nil
	}
}

// Point is a place in the history of a cluster.
type Point struct {
	LSN  pg.LSN    `json:"lsn"`
	Time time.Time `json:"time"`
}

// Window is what can be recovered from a backup on the latest timeline: from its end to the end of the WAL that follows
// without a gap. To.Time is that of the last commit, or From.Time if none came later.
type Window struct {
	From       Point `json:"from"`
	To         Point `json:"to"`
	Standalone bool  `json:"standalone"` // it is the backup's end: the WAL behind was pruned
}

// Windows finds those of some backups of one cluster, whose WAL it lists once. Where one cannot be found it is nil, and the
// others come with an error.
func Windows(ctx context.Context, r *repo.Repository, cluster string, backups []*repo.Manifest) ([]*Window, error) {
	all := make([]*Window, len(backups))
	a, err := openArchive(ctx, r, cluster)
	var alone map[string]bool
	if err == nil {
		alone, err = r.StandaloneIDs(ctx, cluster)
	}
	if err != nil {
		return all, fmt.Errorf("recoverable windows of %s: %w", cluster, err)
	}
	var bad []error
	for i, m := range backups {
		if all[i], err = a.window(ctx, m, alone[m.ID]); err != nil {
			bad = append(bad, fmt.Errorf("recoverable window of %s: %w", m.ID, err))
		}
	}
	return all, errors.Join(bad...)
}

func (a *archive) window(ctx context.Context, m *repo.Manifest, alone bool) (*Window, error) {
	p, err := a.pathOf(ctx, m, "", alone)
	if err != nil {
		return nil, err
	}
	from := Point{m.StopLSN, m.StoppedAt.UTC()}
	if alone {
		return &Window{from, from, true}, nil
	}
	to, err := p.endPoint(ctx, from)
	if err != nil {
		return nil, err
	}
	return &Window{From: from, To: to}, nil
}

// endPoint is the end of the last record of the path, and the time of its last commit, but not before from.
func (p *walPath) endPoint(ctx context.Context, from Point) (Point, error) {
	to := from
	err := p.newestFirst(ctx, func(i int, s pg.WALSummary) (bool, error) {
		to.LSN = max(to.LSN, s.EndOfRecords)
		if s.LastCommit.After(to.Time) {
			to.Time = s.LastCommit.UTC()
		}
		return !s.LastCommit.IsZero(), nil
	})
	return to, err
}
