package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// simServer is the cluster of a simulation: its WAL, on timelines that come out of each other, and what was archived of it.
type simServer struct {
	current pg.Timeline // that it writes
	lines   map[pg.Timeline]*simTimeline
}

// simTimeline is a timeline of a simulation. Numbers are those of segments.
type simTimeline struct {
	parent   pg.Timeline // 0: none
	branch   pg.LSN      // where it left that one
	first    uint64
	written  uint64 // the one that is being written
	archived uint64 // the first that the archiver has not put
}

// simMostWAL is behind the last segment of a timeline, simTimelines the last one that there can be.
const (
	simMostWAL   = 40
	simTimelines = 3
)

func newSimServer() *simServer {
	return &simServer{1, map[pg.Timeline]*simTimeline{1: {first: 1, written: 1, archived: 1}}}
}

// branch begins a timeline that leaves another one in a segment: a promotion where that is the one being written, recovery
// to an earlier point else.
func (v *simServer) branch(from pg.Timeline, no uint64) {
	tli := pg.Timeline(len(v.lines) + 1)
	v.lines[tli] = &simTimeline{parent: from, branch: pg.LSN(no*testSegmentSize + 0x200), first: no, written: no, archived: no}
	v.current = tli
}

// history is the content of a timeline's history file.
func (v *simServer) history(tli pg.Timeline) []byte {
	var all []byte
	for l := v.lines[tli]; l.parent != 0; l = v.lines[l.parent] {
		all = append(fmt.Appendf(nil, "%d\t%s\tno recovery target specified\n", l.parent, l.branch), all...)
	}
	return all
}

// leads tells whether recovery that begins on a timeline, from a backup that ends at stop, may come to a segment.
func (v *simServer) leads(from pg.Timeline, stop pg.LSN, tli pg.Timeline, no uint64) bool {
	if tli == from {
		return true
	}
	l := v.lines[tli]
	if no < l.first {
		return false
	}
	for l.parent != from {
		if l.parent == 0 {
			return false
		}
		l = v.lines[l.parent]
	}
	return l.branch >= stop
}

// needs tells whether a backup needs a segment; alone: to be consistent.
func (v *simServer) needs(b *simBackup, alone bool, tli pg.Timeline, no uint64) bool {
	if b.first == 0 { // it has no WAL
		return false
	}
	own := tli == b.timeline && b.first <= no && no <= b.last
	return own || !alone && b.first <= no && v.leads(b.timeline, b.stop, tli, no)
}

// simWAL is a WAL object as PutWAL would put it.
type simWAL struct {
	head *walHead
	body []byte
}

// encodeSimWAL makes all segments that there can be: what PutWAL does before it asks the store takes most of a run's time.
func encodeSimWAL(t *testing.T, r *Repository) map[string]simWAL {
	c, err := r.Cluster(t.Context(), "main")
	all := map[string]simWAL{}
	for tli := pg.Timeline(1); tli <= simTimelines; tli++ {
		for no := range uint64(simMostWAL) {
			name := testSegment(tli, no)
			head, body, encodeErr := r.encodeWAL(t.Context(), c, name, testSegmentContent(tli, no))
			if err := errors.Join(err, encodeErr); err != nil {
				t.Fatal(err)
			}
			all[name.String()] = simWAL{head, body}
		}
	}
	return all
}

// putWAL is PutWAL.
func (s *simulation) putWAL(r *Repository, name pg.WALName) error {
	if name.Kind == pg.WALHistory {
		return r.PutWAL(s.ctx, "main", name, s.server.history(name.Timeline))
	}
	w := s.template.wal[name.String()]
	err := r.store.Put(s.ctx, walKey("main", name), bytes.Clone(w.body))
	if errors.Is(err, store.ErrExist) {
		err = r.sameWAL(s.ctx, "main", name, w.head)
	}
	return err
}

// putSegment puts a segment, and before a timeline's first ones its history: from where is how far that was done.
func (s *simulation) putSegment(r *Repository, tli pg.Timeline, no uint64) error {
	if tli > 1 {
		if err := s.putWAL(r, pg.WALName{Kind: pg.WALHistory, Timeline: tli}); err != nil {
			return err
		}
	}
	return s.putWAL(r, testSegment(tli, no))
}

// archive is a process that pushes WAL, one segment after the other, each until that is done. By and by there is more, and
// now and then another timeline.
func (s *simulation) archive(h *simHandle, rng *rand.Rand) {
	if s.server == nil {
		return
	}
	for range 2 + rng.IntN(8) {
		if rng.IntN(8) == 0 {
			s.branchOff(rng)
		}
		l, tli := s.server.lines[s.server.current], s.server.current
		if l.archived == l.written && l.written < simMostWAL-1 {
			l.written++
		}
		no := l.archived
		if no == l.written {
			return
		}
		for s.putSegment(s.open(h), tli, no) != nil {
			if h.isDead() || s.violation != nil {
				return
			}
			h.think(s.ctx)
		}
		l.archived = max(l.archived, no+1)
		s.stats["segments archived"]++
		h.think(s.ctx)
	}
}

// branchOff promotes the server, or recovers it to an earlier point first. All that it leaves was archived.
func (s *simulation) branchOff(rng *rand.Rand) {
	v := s.server
	l := v.lines[v.current]
	if len(v.lines) == simTimelines || l.archived < l.written || l.written == l.first {
		return
	}
	no := l.written
	if rng.IntN(2) == 0 {
		no -= uint64(rng.IntN(int(l.written - l.first)))
	}
	v.branch(v.current, no)
	s.stats["timelines"]++
}

// simRange is the WAL of a backup that is being made.
type simRange struct {
	timeline    pg.Timeline
	first, last uint64
	primary     bool // what it needs is not put before the backup's session
	partial     bool // a standby's: the last segment is in the tree only
}

// beginBackup takes where a backup begins: the primary's at the segment that is being written, a standby's behind it.
func (v *simServer) beginBackup(rng *rand.Rand) simRange {
	w := simRange{timeline: v.current, primary: true}
	if rng.IntN(4) == 0 { // a standby of any timeline, where it is
		w.timeline, w.primary = pg.Timeline(1+rng.IntN(len(v.lines))), false
	}
	l := v.lines[w.timeline]
	w.first = l.written
	if rng.IntN(3) == 0 {
		w.first = max(l.first, w.first-min(w.first, uint64(rng.IntN(4))))
		w.partial, w.primary = true, false
	}
	w.last = min(w.first+uint64(rng.IntN(3)), simMostWAL-2)
	w.primary = w.primary && w.first <= w.last
	w.first = min(w.first, w.last)
	if w.partial {
		w.last = min(w.last, l.written)
	} else {
		l.written = max(l.written, w.last+1)
	}
	w.partial = w.partial && w.last == l.written
	return w
}

func (w simRange) names() (all []pg.WALName) {
	if w.timeline > 1 {
		all = append(all, pg.WALName{Kind: pg.WALHistory, Timeline: w.timeline})
	}
	for no := w.first; no <= w.last; no++ {
		if no < w.last || !w.partial {
			all = append(all, testSegment(w.timeline, no))
		}
	}
	return all
}

// manifest is what the backup says of its WAL.
func (w simRange) manifest() Manifest {
	m := testManifest()
	m.SegmentSize, m.Timeline, m.FromStandby = testSegmentSize, w.timeline, w.partial
	m.StartLSN, m.StopLSN = pg.LSN(w.first*testSegmentSize+0x300), pg.LSN(w.last*testSegmentSize+0x400)
	m.WALFirst, m.WALLast = testSegment(w.timeline, w.first).String(), testSegment(w.timeline, w.last).String()
	m.StartedAt, m.StoppedAt = time.Now().UTC(), time.Now().UTC()
	return m
}

// writeWAL receives the WAL of a backup, and puts it into its tree.
func (s *simulation) writeWAL(r *Repository, w *BackupWriter, wal simRange) error {
	err := w.Mkdir("pgdata/pg_wal", Entry{Mode: 0o700})
	for _, name := range wal.names() {
		size := int64(testSegmentSize)
		if name.Kind == pg.WALHistory {
			size = int64(len(s.server.history(name.Timeline)))
		}
		if err == nil {
			err = s.putWAL(r, name)
		}
		if err == nil {
			err = w.AddWAL("pgdata/pg_wal/"+name.String(), Entry{Mode: 0o600, Size: size}, name)
		}
	}
	return err
}

// partialSegment is a standby's last one, in its backup's tree.
func (w simRange) partialSegment() (name string, ok bool) {
	return "pgdata/pg_wal/" + testSegment(w.timeline, w.last).String(), w.partial
}

// fetch is a process that asks for WAL as restore_command does, and is never told that it has ended where it has not.
func (s *simulation) fetch(h *simHandle, rng *rand.Rand) {
	if s.server == nil || s.stale > 0 {
		return
	}
	for range 4 {
		tli := pg.Timeline(1 + rng.IntN(len(s.server.lines)))
		l := s.server.lines[tli]
		name := testSegment(tli, l.first+uint64(rng.IntN(int(l.written-l.first)+2)))
		newest := s.newestWAL(tli)
		err := fetchSegment(s.ctx, s.open(h), name)
		if h.isDead() {
			return
		}
		if errors.Is(err, ErrNoWAL) && name.String() <= newest {
			s.violate("WAL ends before %s, which is asked for, but there was %s", name, newest)
		}
		s.stats["WAL fetched"]++
		h.think(s.ctx)
	}
}

// fetchSegment is recovery.FetchWAL as far as it asks the repository.
func fetchSegment(ctx context.Context, r *Repository, name pg.WALName) error {
	_, err := r.WALHead(ctx, "main", name)
	if !errors.Is(err, ErrNoWAL) {
		return err
	}
	names, listErr := r.WALNames(ctx, "main")
	if listErr != nil {
		return listErr
	}
	for _, n := range names {
		if n.Kind == pg.WALSegment && n.Timeline == name.Timeline && n.String() >= name.String() {
			return errors.New("gap")
		}
	}
	return err
}

// newestWAL is the name of a timeline's newest segment that is there, "" if there is none.
func (s *simulation) newestWAL(tli pg.Timeline) (newest string) {
	for no := range uint64(simMostWAL) {
		if name := testSegment(tli, no); s.object(walKey("main", name)) != nil {
			newest = name.String()
		}
	}
	return newest
}

// hold is a process that holds backups, and lets go of them again.
func (s *simulation) hold(h *simHandle, rng *rand.Rand) {
	for range 10 {
		r := s.open(h)
		m := s.choose(r, rng)
		if m == nil || rng.IntN(2) == 0 {
			h.think(s.ctx)
			continue
		}
		hold, err := r.AddHold(s.ctx, "main", m.ID, "audit", time.Time{})
		if h.isDead() || s.violation != nil {
			return
		}
		if err != nil {
			if errors.Is(err, ErrPruning) || errors.Is(err, ErrDeleted) {
				s.stats["holds that came too late"]++
			}
			continue
		}
		s.stats["holds in force"]++
		held := &simHeld{since: s.asked}
		s.held[m.Name()] = append(s.held[m.Name()], held)
		s.checkHeld(m.Name(), s.asked+1)
		for range rng.IntN(4) {
			h.think(s.ctx)
		}
		if h.isDead() || rng.IntN(3) == 0 {
			return // it stays
		}
		held.over = true
		_ = r.RemoveHold(s.ctx, hold.ID)
	}
}

// simHeld is a hold of which AddHold said that it is in force.
type simHeld struct {
	since int // the last operation that was asked for then
	over  bool
}

// checkHeld is called when a hold began to be in force, and when a backup is marked as deleted, with the number of the operation. What
// was on its way when the hold came nothing keeps from arriving.
func (s *simulation) checkHeld(name BackupName, no int) {
	broken := func(h *simHeld) bool { return !h.over && h.since < no }
	if s.stale == 0 && !s.byHand[name] && s.marked(name) && slices.ContainsFunc(s.held[name], broken) {
		s.violate("%s is held, and deleted", name)
	}
}

// deletingWAL is called before a WAL object is deleted.
func (s *simulation) deletingWAL(key string) {
	s.stats["WAL deleted"]++
	_, name, err := parseWALKey(key)
	no, noErr := name.SegmentNo(testSegmentSize)
	if err := errors.Join(err, noErr); err != nil {
		s.violate("%s is deleted: %w", key, err)
	}
	for _, b := range s.published {
		if !s.staysRecoverable(b) {
			continue
		}
		alone := s.object(standaloneKey(b.name.Cluster, b.name.Backup)) != nil
		if s.listed(b.name) && s.server.needs(b, alone, name.Timeline, no) {
			s.violate("%s is deleted, which recovery of %s needs; it stands alone: %v", key, b.name, alone)
		}
	}
	if s.stale > 0 {
		return
	}
	for _, p := range s.protecting {
		if b := s.published[p.name]; b != nil && !p.over && s.server.needs(b, p.alone, name.Timeline, no) {
			s.violate("%s is deleted, which recovery of %s needs, which is being restored", key, p.name)
		}
	}
	if s.newestWAL(name.Timeline) == name.String() {
		s.violate("%s is deleted, the newest of its timeline", key)
	}
}

// staysRecoverable tells whether docs/format.md promises that WAL of a backup stays: where listings are stale, that of one of a primary.
func (s *simulation) staysRecoverable(b *simBackup) bool { return b.primary || s.stale == 0 }

// checkRecovery looks, when a backup is published, for WAL that its recovery needs and that is gone already.
func (s *simulation) checkRecovery(b *simBackup) {
	if s.server == nil || !s.staysRecoverable(b) {
		return
	}
	for tli := range s.server.lines {
		for no := range uint64(simMostWAL) {
			key := walKey("main", testSegment(tli, no))
			if s.server.needs(b, false, tli, no) && s.object(key) == nil && len(s.objects[key]) > 0 {
				s.violate("%s is published, but %s is gone, which its recovery needs", b.name, key)
			}
		}
	}
}

// notArchivedYet tells whether a finding is about WAL that was not in the repository when WAL was listed last: what is archived late lies behind
// what backups have put.
func (s *simulation) notArchivedYet(f Finding, listed int) bool {
	return strings.HasPrefix(f.Object, walRoot) && (len(s.objects[f.Object]) == 0 || s.objects[f.Object][0].putSeq > listed)
}

// leftoverWAL tells whether a WAL object should be gone.
func (s *simulation) leftoverWAL(key string) bool {
	_, name, err := parseWALKey(key)
	no, noErr := name.SegmentNo(testSegmentSize)
	if errors.Join(err, noErr) != nil || s.newestWAL(name.Timeline) == name.String() {
		return false
	}
	ahead := uint64(0)
	for _, b := range s.published {
		if !s.listed(b.name) {
			continue
		}
		if s.server.needs(b, s.object(standaloneKey(b.name.Cluster, b.name.Backup)) != nil, name.Timeline, no) {
			return false
		}
		ahead = max(ahead, b.first)
	}
	return ahead > 0 && no < ahead
}

// isFloor tells whether an object is the word that WAL was pruned.
func (s *simulation) isFloor(key string) bool {
	info, err := s.open(observer{s.simStore}).sessionInfo(s.ctx, key)
	return err == nil && len(info.Floors) > 0
}
