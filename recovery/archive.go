package recovery

import (
	"context"
	"fmt"
	"math"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// archive is the WAL of one cluster as the repository lists it.
type archive struct {
	r         *repo.Repository
	cluster   string
	size      pg.SegmentSize
	names     []pg.WALName // as listed
	segments  map[segment]bool
	partials  map[segment]bool
	newest    map[pg.Timeline]uint64 // number of the newest segment or partial segment of a timeline
	histories map[pg.Timeline]bool
	removed   map[pg.WALName]bool // among names, but damaged and gone
}

// segment is the place of a WAL segment.
type segment struct {
	timeline pg.Timeline
	no       uint64
}

// openArchive lists the WAL of a cluster. It fails rather than leave out a file.
func openArchive(ctx context.Context, r *repo.Repository, cluster string) (*archive, error) {
	c, err := r.Cluster(ctx, cluster)
	if err != nil {
		return nil, err
	}
	names, err := r.WALNames(ctx, cluster)
	if err != nil {
		return nil, err
	}
	a := &archive{
		r: r, cluster: cluster, size: c.SegmentSize, names: names,
		segments: make(map[segment]bool), partials: make(map[segment]bool),
		newest: make(map[pg.Timeline]uint64), histories: make(map[pg.Timeline]bool),
	}
	if a.removed, err = r.RemovedWAL(ctx, cluster); err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := a.add(name); err != nil {
			return nil, fmt.Errorf("list WAL of %s: %w", cluster, err)
		}
	}
	return a, nil
}

func (a *archive) add(name pg.WALName) error {
	if name.Kind == pg.WALHistory {
		a.histories[name.Timeline] = true
		return nil
	}
	no, err := name.SegmentNo(a.size)
	if err != nil {
		return err
	}
	switch {
	case name.Kind == pg.WALBackupHistory:
		return nil
	case a.removed[name]: // a gap
	case name.Kind == pg.WALSegment:
		a.segments[segment{name.Timeline, no}] = true
	case name.Kind == pg.WALPartial:
		a.partials[segment{name.Timeline, no}] = true
	}
	a.newest[name.Timeline] = max(a.newest[name.Timeline], no)
	return nil
}

// find returns the file that holds a segment. A partial segment stands in for a whole one that never came, because its
// timeline ended there, so that no record of it is lost: it has the size of a segment, and what lies behind its last
// record is not valid WAL. It does not where the timeline went on.
func (a *archive) find(s segment) (pg.WALName, bool) {
	name := pg.SegmentName(s.timeline, s.no, a.size)
	if a.segments[s] {
		return name, true
	}
	name.Kind = pg.WALPartial
	return name, a.partials[s] && a.newest[s.timeline] == s.no
}

func (a *archive) segmentName(s segment) string {
	return pg.SegmentName(s.timeline, s.no, a.size).String()
}

// stretch is the part of a line that belongs to one timeline.
type stretch struct {
	timeline   pg.Timeline
	begin, end pg.LSN // begin inclusive, end exclusive
}

// line is the way from the first timeline known to a certain one, oldest first.
type line []stretch

// line reads the way to a timeline from its history file. Without one it begins there, as readTimeLineHistory has it.
func (a *archive) line(ctx context.Context, tli pg.Timeline) (line, error) {
	var l line
	var begin pg.LSN
	if a.histories[tli] {
		content, err := a.r.WAL(ctx, a.cluster, pg.WALName{Kind: pg.WALHistory, Timeline: tli})
		if err != nil {
			return nil, err
		}
		entries, err := pg.ParseHistory(content)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", pg.HistoryName(tli), err)
		}
		for _, e := range entries {
			if e.Timeline >= tli {
				return nil, fmt.Errorf("%s: it names timeline %s as a parent", pg.HistoryName(tli), e.Timeline)
			}
			l = append(l, stretch{e.Timeline, begin, e.Switch})
			begin = e.Switch
		}
	}
	return append(l, stretch{tli, begin, math.MaxUint64}), nil
}

// from cuts the line off before the backup's timeline. It is not ok where the line leaves that timeline before the
// backup ends, or never was on it.
func (l line) from(m *repo.Manifest) (line, bool) {
	for i, s := range l {
		if s.timeline == m.Timeline {
			return l[i:], s.begin <= m.StopLSN && s.end >= m.StopLSN
		}
	}
	return nil, false
}

// walPath is the WAL that recovery of a backup to the end of a line would replay.
type walPath struct {
	a     *archive
	line  line         // from the backup's timeline on
	first uint64       // number of the segment in which the backup begins
	names []pg.WALName // from there on, one file for each segment, without a gap
	gap   *gap         // behind them; nil if nothing lies there
	alone bool         // it ends with the backup: what lay behind was pruned, or is about to be

	namedAt pg.LSN // of the restore point that was looked for
}

// gap is WAL that the repository does not have although it has some behind it, or knows of some.
type gap struct {
	first, last string // segments that are missing
}

func (g *gap) String() string {
	if g.first == g.last {
		return g.first + " is missing"
	}
	return g.first + " to " + g.last + " are missing"
}

// path collects segments as XLogFileReadAnyTLI does: of every segment the file of the newest timeline that has begun by
// then and has one, and never of an older timeline than before.
func (a *archive) path(l line, m *repo.Manifest) *walPath {
	p := &walPath{a: a, line: l, first: a.size.Segment(m.StartLSN)}
	at := 0
	no := p.first
	for ; ; no++ {
		i, name, ok := p.find(at, no)
		if !ok {
			break
		}
		at = i
		p.names = append(p.names, name)
	}
	p.gap = p.findGap(at, no)
	return p
}

// cutOff leaves no more of the path than what makes the backup consistent.
func (p *walPath) cutOff(m *repo.Manifest) {
	last := p.a.size.Segment(m.StopLSN - 1)
	if name, err := pg.ParseWALName(m.WALLast); err == nil {
		if no, err := name.SegmentNo(p.a.size); err == nil {
			last = max(last, no)
		}
	}
	p.names = p.names[:min(uint64(len(p.names)), last-p.first+1)]
	p.gap, p.alone = nil, true
}

func (p *walPath) find(at int, no uint64) (int, pg.WALName, bool) {
	for i := len(p.line) - 1; i >= at; i-- {
		if !p.covers(p.line[i], no) {
			continue
		}
		if name, ok := p.a.find(segment{p.line[i].timeline, no}); ok {
			return i, name, true
		}
	}
	return 0, pg.WALName{}, false
}

// covers tells whether segment no holds WAL of the stretch.
func (p *walPath) covers(s stretch, no uint64) bool {
	return no >= p.a.size.Segment(s.begin) && p.a.size.Start(no) < s.end
}

// findGap looks for WAL of the line behind segment missing, the first that is not there.
func (p *walPath) findGap(at int, missing uint64) *gap {
	next, found := uint64(math.MaxUint64), false
	for i, s := range p.line[at:] {
		if i > 0 && p.a.size.Start(missing) < s.begin { // the history says that there was more
			next, found = min(next, p.a.size.Segment(s.begin)+1), true
		}
		for name := range p.a.removed {
			no, err := name.SegmentNo(p.a.size)
			if err == nil && name.Kind == pg.WALSegment && name.Timeline == s.timeline && no >= missing && p.covers(s, no) {
				next, found = min(next, no+1), true
			}
		}
		for seg := range p.a.segments {
			if seg.timeline == s.timeline && seg.no > missing && p.covers(s, seg.no) {
				next, found = min(next, seg.no), true
			}
		}
	}
	if !found {
		return nil
	}
	return &gap{p.missingName(missing), p.missingName(max(next-1, missing))}
}

// missingName is the name that segment no would have, on the timeline that is current at its end.
func (p *walPath) missingName(no uint64) string {
	tli := p.line[0].timeline
	for _, s := range p.line {
		if p.covers(s, no) {
			tli = s.timeline
		}
	}
	return p.a.segmentName(segment{tli, no})
}

// end is the number of the first segment that is not in the path.
func (p *walPath) end() uint64 { return p.first + uint64(len(p.names)) }

// headsAtOnce is how many heads are read in parallel: each is a small read, which takes an object store tens of
// milliseconds.
const headsAtOnce = 16

// heads reads the heads of names[from:to].
func (p *walPath) heads(ctx context.Context, from, to int) ([]repo.WALHead, error) {
	heads := make([]repo.WALHead, to-from)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(headsAtOnce)
	for i := range heads {
		g.Go(func() (err error) {
			heads[i], err = p.a.r.WALHead(ctx, p.a.cluster, p.names[from+i])
			return err
		})
	}
	return heads, g.Wait()
}

// newestFirst calls fn with the index and the summary of each segment of the path from its end on, until fn is done. It
// reads one head first, then more at a time.
func (p *walPath) newestFirst(ctx context.Context, fn func(i int, s pg.WALSummary) (done bool, err error)) error {
	for to, n := len(p.names), 1; to > 0; n = headsAtOnce {
		from := max(0, to-n)
		heads, err := p.heads(ctx, from, to)
		if err != nil {
			return err
		}
		for i := len(heads) - 1; i >= 0; i-- {
			if done, err := fn(from+i, heads[i].Summary); done || err != nil {
				return err
			}
		}
		to = from
	}
	return nil
}

// prefix summarises the records of names[i] that begin before lsn, which lies in it.
func (p *walPath) prefix(ctx context.Context, i int, lsn pg.LSN) (pg.WALSummary, error) {
	name := p.names[i]
	content, err := p.a.r.WAL(ctx, p.a.cluster, name)
	if err != nil {
		return pg.WALSummary{}, err
	}
	start := p.a.size.Start(p.first + uint64(i))
	if lsn >= start && lsn-start < pg.LSN(len(content)) {
		clear(content[lsn-start:])
	}
	return pg.ScanWAL(content, name, p.a.size)
}

// lastRecord is where the last record begins that lies in the path as a whole; 0 if none does.
func (p *walPath) lastRecord(ctx context.Context) (last pg.LSN, err error) {
	err = p.newestFirst(ctx, func(i int, s pg.WALSummary) (bool, error) {
		if s.Continues {
			var err error
			if s, err = p.prefix(ctx, i, s.LastRecord); err != nil {
				return false, err
			}
		}
		last = s.LastRecord
		return s.FirstRecord != 0, nil
	})
	return last, err
}
