package ingest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pglogrepl"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// StreamOptions of StreamWAL.
type StreamOptions struct {
	Cluster    string // its name in the repository
	ConnString string // as BackupOptions.ConnString
	Slot       string // physical replication slot; default: DefaultSlot
	CreateSlot bool   // if it is missing
	Log        *slog.Logger
}

// DefaultSlot is the replication slot of a stream that was given none.
const DefaultSlot = "pgthaw"

func (o *StreamOptions) setDefaults() {
	if o.Slot == "" {
		o.Slot = DefaultSlot
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}

// StreamWAL receives WAL as the server writes it and puts whole segments into the repository, until ctx ends; then it
// returns nil. The server is told of what is durable in the repository, and keeps the rest for its slot. A connection
// or a store that is lost after the first success is tried again for ever; what no retry can mend is an error.
func StreamWAL(ctx context.Context, r *repo.Repository, o StreamOptions) error {
	o.setDefaults()
	if !slotName.MatchString(o.Slot) {
		return &Error{err: fmt.Errorf("invalid replication slot name %q", o.Slot),
			hint: "Slot names have lower-case letters, digits and underscores, at most 63."}
	}
	st := &stream{repo: r, o: o}
	delay := minRetryDelay
	for {
		st.streaming = false
		err := st.session(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case st.skipGap(err):
			continue
		case !st.proven || hopeless(err):
			return err
		case st.streaming:
			delay = minRetryDelay
		}
		o.Log.Warn("WAL stream interrupted", "error", err, "retry_in", delay)
		pause(ctx, delay)
		delay = min(2*delay, maxRetryDelay)
	}
}

const (
	minRetryDelay = time.Second
	maxRetryDelay = 30 * time.Second
)

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// hopeless says whether an error stays whatever is tried.
func hopeless(err error) bool {
	return errors.Is(err, repo.ErrWALConflict) || errors.Is(err, repo.ErrOtherCluster) || errors.Is(err, errNoSlot) ||
		isState(err, stateUndefinedFile) || isState(err, stateUndefinedObject) || isState(err, stateNotInPrerequisite)
}

// stream is a StreamWAL that runs.
type stream struct {
	repo *repo.Repository
	o    StreamOptions

	proven    bool // it has streamed, so it can
	streaming bool // this session has
	early     bool // this session began before what the slot keeps
	slotOnly  bool // do not try that again
}

// skipGap goes on from where the slot is when the server has removed WAL between that and the repository's newest.
func (st *stream) skipGap(err error) bool {
	if !st.early || !isState(err, stateUndefinedFile) {
		return false
	}
	st.o.Log.Error("the server has removed WAL that the repository lacks: no recovery can pass this gap; make a new backup", "error", err)
	st.early, st.slotOnly = false, true
	return true
}

// session streams over one connection until something ends it.
func (st *stream) session(ctx context.Context) error {
	s, err := connect(ctx, st.o.ConnString, st.o.Log)
	if err != nil {
		return err
	}
	defer s.close(ctx)
	if _, err := st.repo.BindCluster(ctx, st.o.Cluster, s.systemID, s.segmentSize); err != nil {
		return err
	}
	if s.mayBeSynchronous() {
		st.o.Log.Warn("synchronous_standby_names may choose this connection, which cannot serve as a synchronous standby",
			"synchronous_standby_names", s.settings["synchronous_standby_names"])
	}
	from, err := st.choose(ctx, s)
	if err != nil {
		return err
	}
	rec := &receiver{conn: s.conn, repo: st.repo, cluster: st.o.Cluster, replyEvery: s.replyEvery, withdraw: s.mayBeSynchronous()}
	for {
		if from, err = st.timeline(ctx, rec, s.segmentSize, from); err != nil {
			return err
		}
	}
}

// place is a segment on a timeline.
type place struct {
	timeline pg.Timeline
	segno    uint64
}

// timeline streams from a place to the end of its timeline, and returns where the next one begins. The history file
// of a timeline comes before its segments, so that recovery never finds one without the other.
func (st *stream) timeline(ctx context.Context, rec *receiver, size pg.SegmentSize, from place) (next place, err error) {
	if from.timeline > 1 {
		if _, err := putHistory(ctx, rec.conn, st.repo, st.o.Cluster, from.timeline); err != nil {
			return next, err
		}
	}
	err = rec.start(ctx, st.o.Slot, from.timeline, size, from.segno)
	if timeline, lsn, ended := pglogrepl.IsErrEndTimeline(err); ended {
		return place{pg.Timeline(timeline), size.Segment(pg.LSN(lsn))}, nil
	}
	if err != nil {
		return next, serverError("stream WAL", err)
	}
	st.proven, st.streaming = true, true
	st.o.Log.Info("WAL stream starts", "timeline", from.timeline, "lsn", rec.flushed, "slot", st.o.Slot)
	for err == nil {
		if err = ctx.Err(); err == nil {
			err = rec.step(ctx, ctx)
		}
	}
	if !errors.Is(err, errTimelineEnds) {
		return next, serverError("receive WAL", err)
	}
	return st.endTimeline(ctx, rec, size)
}

// endTimeline asks where the next timeline begins and puts what there is of the last segment, as .partial, for its
// name is the next timeline's whole segment's too.
func (st *stream) endTimeline(ctx context.Context, rec *receiver, size pg.SegmentSize) (next place, err error) {
	unblock := context.AfterFunc(ctx, func() { _ = rec.conn.Conn().Close() }) // pglogrepl reads without ctx here
	end, err := pglogrepl.SendStandbyCopyDone(ctx, rec.conn)
	unblock()
	if err != nil {
		return next, serverError("end timeline "+rec.timeline.String(), err)
	}
	if end == nil || end.Timeline <= int32(rec.timeline) {
		return next, fmt.Errorf("timeline %s ended, and the server names none that follows", rec.timeline)
	}
	next = place{pg.Timeline(end.Timeline), size.Segment(pg.LSN(end.LSN))}
	st.o.Log.Info("timeline ends", "timeline", rec.timeline, "next", next.timeline, "lsn", pg.LSN(end.LSN))
	if _, err := putHistory(ctx, rec.conn, st.repo, st.o.Cluster, next.timeline); err != nil {
		return next, err
	}
	if segno, content, ok := rec.wal.partial(); ok {
		name := pg.SegmentName(rec.timeline, segno, size)
		name.Kind = pg.WALPartial
		err = putWAL(ctx, st.repo, st.o.Cluster, name, content)
	}
	return next, err
}
