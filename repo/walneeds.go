package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"pgthaw/repo/pg"
)

// walTimes is how a cluster's timelines came out of each other, and when each ended.
type walTimes struct {
	timelines
	last map[pg.Timeline]time.Time // of the timelines that have WAL: when the last commit was; zero: not known
}

// walListing is what there is of a cluster's WAL.
type walListing struct {
	walTimes
	cluster string
	objects []walObject // by timeline and name
}

// lost tells whether nobody knows which timelines a timeline came out of, of which any may be one that has backups; oldest is
// the lowest that has. A timeline without a history file is one that came out of none, or the file is missing.
func (t *timelines) lost(tli, oldest pg.Timeline) bool {
	_, known := t.histories[tli]
	return tli > oldest && (t.unread[tli] || !known)
}

// listWAL lists a cluster's WAL and reads its history files.
func (r *Repository) listWAL(ctx context.Context, c Cluster) (*walListing, error) {
	w := &walListing{walTimes: walTimes{newTimelines(c.SegmentSize), map[pg.Timeline]time.Time{}}, cluster: c.Name}
	for o, err := range r.walObjects(ctx, walPrefix(c.Name)) {
		if err != nil {
			return nil, err
		}
		w.objects = append(w.objects, o)
	}
	for _, o := range w.objects {
		if o.name.Kind != pg.WALHistory {
			continue
		}
		entries, err := r.history(ctx, c.Name, o.name)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			return nil, err
		}
		w.histories[o.name.Timeline], w.unread[o.name.Timeline] = entries, err != nil
	}
	return w, nil
}

// readLast finds out when each timeline had its last commit. A timeline whose newest segments tell of none is one of which
// that is not known.
func (r *Repository) readLast(ctx context.Context, w *walListing) error {
	asked := map[pg.Timeline]int{}
	for _, o := range slices.Backward(w.objects) {
		tli := o.name.Timeline
		if _, err := o.name.SegmentNo(w.size); err != nil || o.name.Kind == pg.WALBackupHistory || asked[tli] == headsBack {
			continue
		}
		asked[tli]++
		head, err := r.WALHead(ctx, w.cluster, o.name)
		switch {
		case errors.Is(err, ErrCorrupt), errors.Is(err, ErrNoWAL):
			head.Summary.LastCommit = time.Time{}
		case err != nil:
			return err
		}
		w.last[tli] = head.Summary.LastCommit
		if !head.Summary.LastCommit.IsZero() {
			asked[tli] = headsBack
		}
	}
	return nil
}

// walUser is a backup that is kept, and what it needs of the WAL.
type walUser struct {
	*Manifest
	alone bool // only what makes it consistent, not what recovery could follow behind
}

// WALRange is a run of WAL files of one timeline that go or stay together.
type WALRange struct {
	Cluster     string
	Timeline    pg.Timeline
	First, Last string // names
	Files       int
	Bytes       int64 // stored
	Fate        WALFate
	Reason      string // words for a person
}

// WALFate is what becomes of WAL files.
type WALFate int

const (
	WALStays WALFate = iota
	WALWaits         // it goes when it, and what is deleted already or restorable to its own end only, has waited for the grace period
	WALGoes          // now
)

const (
	reasonUseless  = "no backup can use it"
	reasonRecovery = "recovery needs it, from backup %s on"
	reasonOwn      = "backup %s needs it to be consistent"
	reasonHistory  = "history files stay"
	reasonNewest   = "the newest of its timeline, which tells a gap from the end of WAL"
	reasonAhead    = "not older than the newest backup"
	reasonLost     = "which backups can use it is not known: the history of timeline %s is missing or damaged"
	reasonNameless = "no server of this cluster gives a file this name"
	reasonEmpty    = "the cluster has no backup"
	reasonYoung    = "it has not been there for the grace period"
)

// needs says why each of the WAL objects stays, or "". One goes only if none of the backups can ever need it, whatever timeline
// its recovery follows.
func (w *walListing) needs(users []walUser) []string {
	d := newWALDecider(w, users)
	all := make([]string, len(w.objects))
	for i, o := range w.objects {
		all[i] = d.stays(o.name)
	}
	return all
}

// ranges shows what becomes of the WAL, given why it stays now and why it stays later.
func (w *walListing) ranges(now, later []string) []WALRange {
	var all []WALRange
	for i, o := range w.objects {
		r := WALRange{Cluster: w.cluster, Timeline: o.name.Timeline, First: o.name.String(), Fate: WALStays, Reason: later[i]}
		switch {
		case now[i] == "":
			r.Fate, r.Reason = WALGoes, reasonUseless
		case later[i] == "":
			r.Fate, r.Reason = WALWaits, now[i]
		}
		if last := len(all) - 1; last < 0 || all[last].Timeline != r.Timeline || all[last].Reason != r.Reason || all[last].Fate != r.Fate {
			all = append(all, r)
		}
		into := &all[len(all)-1]
		into.Last = o.name.String()
		into.Files++
		into.Bytes += o.bytes
	}
	return all
}

// walDecider knows what backups need of the WAL.
type walDecider struct {
	w        *walListing
	own      []ownWAL
	followed map[pg.Timeline]map[walStretch]follower
	oldest   pg.Timeline            // lowest that recovery of a backup begins on; 0: none
	newest   map[pg.Timeline]uint64 // number of a timeline's newest segment
	ahead    uint64                 // number of the segment in which the newest backup starts
}

// ownWAL is what makes a backup consistent. One of a standby may begin on one timeline and end on the next.
type ownWAL struct {
	id              string
	first, last     uint64 // numbers of segments
	lowest, highest pg.Timeline
}

// follower is the backup whose recovery comes first to a stretch of a timeline, of those that do.
type follower struct {
	id   string
	from uint64 // number of its first segment
}

func newWALDecider(w *walListing, users []walUser) *walDecider {
	d := &walDecider{w: w, followed: map[pg.Timeline]map[walStretch]follower{}, newest: map[pg.Timeline]uint64{}}
	known := map[pg.Timeline]bool{}
	for _, o := range w.objects {
		known[o.name.Timeline] = true
		if no, err := o.name.SegmentNo(w.size); err == nil && o.name.Kind != pg.WALBackupHistory {
			d.newest[o.name.Timeline] = max(d.newest[o.name.Timeline], no)
		}
	}
	for _, u := range users {
		known[u.Timeline] = true
		own := w.own(u.Manifest)
		d.own = append(d.own, own)
		d.ahead = max(d.ahead, own.first)
	}
	for i, u := range users {
		if u.alone {
			continue
		}
		if d.oldest == 0 || u.Timeline < d.oldest {
			d.oldest = u.Timeline
		}
		for tli := range known {
			d.follow(w.line(tli).from(u.Manifest), d.own[i])
		}
	}
	return d
}

// own is what makes a backup consistent, by its LSNs and by the names in its manifest.
func (w *walListing) own(m *Manifest) ownWAL {
	o := ownWAL{m.ID, w.size.Segment(m.StartLSN), w.size.Segment(m.StopLSN), m.Timeline, m.Timeline}
	for _, file := range []string{m.WALFirst, m.WALLast} {
		name, err := pg.ParseWALName(file)
		if err != nil {
			continue
		}
		if no, err := name.SegmentNo(w.size); err == nil {
			o.first, o.last = min(o.first, no), max(o.last, no)
			o.lowest, o.highest = min(o.lowest, name.Timeline), max(o.highest, name.Timeline)
		}
	}
	return o
}

// follow enters a line that recovery of a backup can follow.
func (d *walDecider) follow(l walLine, own ownWAL) {
	for _, s := range l {
		if d.followed[s.timeline] == nil {
			d.followed[s.timeline] = map[walStretch]follower{}
		}
		if first, ok := d.followed[s.timeline][s]; !ok || own.first < first.from || own.first == first.from && own.id < first.id {
			d.followed[s.timeline][s] = follower{own.id, own.first}
		}
	}
}

// stays says why a WAL file stays, or "". A partial segment and a backup's .backup file go and stay as their segment does.
func (d *walDecider) stays(name pg.WALName) string {
	no, err := name.SegmentNo(d.w.size)
	switch {
	case len(d.own) == 0:
		return reasonEmpty
	case name.Kind == pg.WALHistory: // recovery asks for one after the other, and takes the first that is missing for the end
		return reasonHistory
	case err != nil:
		return reasonNameless
	}
	if first, ok := d.follower(name.Timeline, no); ok {
		return fmt.Sprintf(reasonRecovery, first.id)
	}
	for _, o := range d.own {
		if o.first <= no && no <= o.last && o.lowest <= name.Timeline && name.Timeline <= o.highest {
			return fmt.Sprintf(reasonOwn, o.id)
		}
	}
	switch {
	case d.oldest != 0 && d.w.lost(name.Timeline, d.oldest):
		return fmt.Sprintf(reasonLost, name.Timeline)
	case no >= d.ahead:
		return reasonAhead
	case no == d.newest[name.Timeline]:
		return reasonNewest
	}
	return ""
}

// follower is the backup whose recovery comes first to a segment.
func (d *walDecider) follower(tli pg.Timeline, no uint64) (first follower, ok bool) {
	for s, f := range d.followed[tli] {
		if no >= f.from && d.w.covers(s, no) && (!ok || f.from < first.from || f.from == first.from && f.id < first.id) {
			first, ok = f, true
		}
	}
	return first, ok
}
