package ingest

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/jackc/pglogrepl"

	"pgthaw/repo/pg"
)

// choose finds where to go on: after the newest whole segment in the repository if the server may still have that
// WAL, else at the first segment that the repository lacks from where the slot is.
func (st *stream) choose(ctx context.Context, s *server) (from place, err error) {
	slot, err := st.slot(ctx, s)
	if err != nil {
		return from, err
	}
	if slot.lsn == 0 { // it keeps nothing yet
		slot = position{s.flushed, s.timeline}
	}
	c, err := readCourse(ctx, s)
	if err != nil {
		return from, err
	}
	names, err := st.repo.WALNames(ctx, st.o.Cluster)
	if err != nil {
		return from, err
	}
	from, st.early = c.resume(place{slot.timeline, s.segmentSize.Segment(slot.lsn)}, newArchived(names, s.segmentSize), st.slotOnly)
	return from, nil
}

// errNoSlot is final: a slot that went away while it was used has let WAL go.
var errNoSlot = errors.New("replication slot does not exist")

// slot asks where the slot is, and makes it if that is wanted.
func (st *stream) slot(ctx context.Context, s *server) (position, error) {
	p, exists, err := readSlot(ctx, s.conn, st.o.Slot)
	if err != nil || exists {
		return p, err
	}
	if !st.o.CreateSlot {
		return p, refuse("Create it with --create-slot, or with pg_create_physical_replication_slot().", "%q: %w", st.o.Slot, errNoSlot)
	}
	if err := createSlot(ctx, s.conn, st.o.Slot, ""); err != nil {
		return p, err
	}
	p, _, err = readSlot(ctx, s.conn, st.o.Slot)
	return p, err
}

// archived are the whole segments in the repository.
type archived struct {
	has      map[place]bool
	segments map[pg.Timeline][]uint64 // ascending
}

func newArchived(names []pg.WALName, size pg.SegmentSize) archived {
	a := archived{map[place]bool{}, map[pg.Timeline][]uint64{}}
	for _, name := range names {
		segno, err := name.SegmentNo(size)
		if err != nil || name.Kind != pg.WALSegment {
			continue
		}
		a.has[place{name.Timeline, segno}] = true
		a.segments[name.Timeline] = append(a.segments[name.Timeline], segno)
	}
	return a
}

// upTo is the newest segment of a timeline that is not after last.
func (a archived) upTo(timeline pg.Timeline, last uint64) (segno uint64, ok bool) {
	all := a.segments[timeline]
	for i := len(all) - 1; i >= 0; i-- {
		if all[i] <= last {
			return all[i], true
		}
	}
	return 0, false
}

// course is the way that the server's WAL has taken, its own timeline first.
type course []leg

// leg is a timeline on a course.
type leg struct {
	timeline pg.Timeline
	last     uint64 // the segment in which the course leaves it, so that it has no whole one
}

func readCourse(ctx context.Context, s *server) (course, error) {
	c := course{{s.timeline, math.MaxUint64}}
	if s.timeline == 1 {
		return c, nil
	}
	h, err := pglogrepl.TimelineHistory(ctx, s.conn, int32(s.timeline))
	if err != nil {
		return nil, serverError("ask for the history of timeline "+s.timeline.String(), err)
	}
	entries, err := pg.ParseHistory(h.Content)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.FileName, err)
	}
	for i := len(entries) - 1; i >= 0; i-- {
		c = append(c, leg{entries[i].Timeline, s.segmentSize.Segment(entries[i].Switch)})
	}
	return c, nil
}

// resume is where a stream whose slot is at a place should begin. early: that is before the slot, and the server need
// not have it.
func (c course) resume(slot place, have archived, slotOnly bool) (from place, early bool) {
	if after, ok := c.afterNewest(have); ok && after.segno < slot.segno && !slotOnly {
		return after, true
	}
	from = slot
	for have.has[from] && from.segno < c.last(from.timeline) {
		from.segno++
	}
	return from, false
}

// afterNewest is what follows the newest whole segment on the course.
func (c course) afterNewest(have archived) (place, bool) {
	for _, l := range c {
		if segno, ok := have.upTo(l.timeline, l.last-1); ok {
			return place{l.timeline, segno + 1}, true
		}
	}
	return place{}, false
}

func (c course) last(timeline pg.Timeline) uint64 {
	for _, l := range c {
		if l.timeline == timeline {
			return l.last
		}
	}
	return 0
}
