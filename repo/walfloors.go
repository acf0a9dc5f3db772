package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"pgthaw/repo/pg"
)

// walFloors are floors below which WAL was pruned, or may be at any time, for good: a prune that stood still, or a request that is
// carried out late, may delete what was put again under a name that was pruned.
type walFloors map[walFloorOf]pg.LSN

type walFloorOf struct {
	cluster  string
	timeline pg.Timeline
}

const floorsOperation = "WAL pruned"

func (i *SessionInfo) floors() walFloors {
	all := walFloors{}
	if i != nil {
		all.raise(i.Floors...)
	}
	return all
}

func (f walFloors) raise(floors ...WALFloor) {
	for _, l := range floors {
		of := walFloorOf{l.Cluster, l.Timeline}
		f[of] = max(f[of], l.Before)
	}
}

// cover tells whether none of the others is higher.
func (f walFloors) cover(others walFloors) bool {
	for of, before := range others {
		if f[of] < before {
			return false
		}
	}
	return true
}

func (f walFloors) sorted() (all []WALFloor) {
	for of, before := range f {
		all = append(all, WALFloor{of.cluster, of.timeline, before})
	}
	slices.SortFunc(all, func(a, b WALFloor) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Timeline, b.Timeline))
	})
	return all
}

// superseded tells whether another session has all the floors of one. Of two that have the same one stays.
func (s *listedSession) superseded(by []*listedSession) bool {
	own := s.info.floors()
	return slices.ContainsFunc(by, func(o *listedSession) bool {
		others := o.info.floors()
		return o.id != s.id && others.cover(own) && (!own.cover(others) || o.id.String() > s.id.String())
	})
}

// putFloors announces, for good, that WAL below some floors is about to be deleted, unless that was announced already.
func (r *Repository) putFloors(ctx context.Context, there []*listedSession, floors walFloors) error {
	all := walFloors{}
	for _, s := range there {
		all.raise(s.info.Floors...)
		if s.info.floors().cover(floors) {
			return nil
		}
	}
	all.raise(floors.sorted()...)
	s, err := r.announce(ctx, SessionInfo{Operation: floorsOperation, Floors: all.sorted()})
	s.Leave()
	return err
}

// checkFloors refuses a backup that needs WAL which was pruned, or may be at any time.
func (r *Repository) checkFloors(ctx context.Context, m *Manifest) error {
	sessions, err := r.sessions(ctx)
	if err != nil {
		return err
	}
	for _, s := range sessions {
		for of, before := range s.info.floors() {
			wants, err := r.wantsWAL(ctx, m, of, before)
			if err != nil {
				return err
			}
			if wants {
				return fmt.Errorf("%w: that of timeline %s before %s; the backup begins at %s", ErrWALPruned, of.timeline, before, m.StartLSN)
			}
		}
	}
	return nil
}

// wantsWAL tells whether recovery of a backup may want WAL of a timeline before an LSN.
func (r *Repository) wantsWAL(ctx context.Context, m *Manifest, of walFloorOf, before pg.LSN) (bool, error) {
	if of.cluster != m.Cluster || of.timeline < m.Timeline || m.StartLSN >= before {
		return false, nil
	}
	if of.timeline == m.Timeline {
		return true, nil
	}
	entries, err := r.history(ctx, m.Cluster, pg.WALName{Kind: pg.WALHistory, Timeline: of.timeline})
	if errors.Is(err, ErrNoWAL) || errors.Is(err, ErrCorrupt) { // recovery does not find its way there either
		return false, nil
	}
	t := newTimelines(0)
	t.histories[of.timeline] = entries
	return t.line(of.timeline).from(m) != nil, err
}
