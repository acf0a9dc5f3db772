package ingest

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// capture receives the WAL that makes a base backup consistent, beside the backup, so that it can be restored where
// nothing archives. A temporary slot keeps that WAL on the server until we have it.
type capture struct {
	receiver
	standby bool
	slot    string
	stopLSN atomic.Uint64 // where the backup ends; 0: not known yet
	moved   time.Time     // when WAL has come last
}

// capturedWAL is what a capture has got.
type capturedWAL struct {
	first, last uint64 // segments; whole ones are in the repository
	partial     []byte // the last segment, padded with zeros, if it is not whole
	history     []byte // of the timeline; nil on timeline 1
	startedAt   time.Time
	stoppedAt   time.Time
}

// captureTimeout is how long a capture waits for more WAL once the backup has ended.
const captureTimeout = time.Minute

// openCapture connects, and makes the server keep its WAL from now on.
func (s *server) openCapture(ctx context.Context, r *repo.Repository, cluster string) (*capture, error) {
	conn, err := s.again(ctx)
	if err != nil {
		return nil, err
	}
	c := &capture{
		receiver: receiver{
			conn:       conn,
			repo:       r,
			cluster:    cluster,
			withdraw:   s.mayBeSynchronous(),
			replyEvery: s.replyEvery,
		},
		standby: s.inRecovery,
		slot:    fmt.Sprintf("pgthaw_backup_%d", conn.PID()),
	}
	if err := createSlot(ctx, conn, c.slot, "TEMPORARY"); err != nil {
		closeConn(ctx, conn)
		return nil, err
	}
	return c, nil
}

// run receives the WAL from the segment of start on, to stopLSN, which is known when untilStop ends.
func (c *capture) run(ctx, untilStop context.Context, start position, size pg.SegmentSize) (w capturedWAL, err error) {
	if start.timeline > 1 {
		if w.history, err = putHistory(ctx, c.conn, c.repo, c.cluster, start.timeline); err != nil {
			return w, err
		}
	}
	w.first = size.Segment(start.lsn)
	if err := c.start(ctx, c.slot, start.timeline, size, w.first); err != nil {
		return w, serverError("stream WAL", err)
	}
	c.moved = time.Now()
	for !c.complete() {
		if err := c.receive(ctx, untilStop); err != nil {
			return w, c.explain(ctx, err)
		}
		if w.startedAt.IsZero() {
			w.startedAt = c.serverTime
		}
	}
	return w, c.finish(ctx, &w)
}

// receive takes in one message, or notices that the backup has ended.
func (c *capture) receive(ctx, untilStop context.Context) error {
	if untilStop.Err() == nil {
		c.moved = time.Now()
		return c.step(ctx, untilStop)
	}
	if time.Since(c.moved) > captureTimeout {
		return fmt.Errorf("no more WAL has come for %s: the backup needs it up to %s, the server sent it up to %s",
			captureTimeout, pg.LSN(c.stopLSN.Load()), c.wal.next)
	}
	wait, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	before := c.wal.next
	err := c.step(ctx, wait)
	if c.wal.next != before {
		c.moved = time.Now()
	}
	if err == nil {
		err = ctx.Err()
	}
	return err
}

// complete says whether all WAL up to the backup's end is there. A primary switches to a new segment at the end of a
// backup (xlog.c, do_pg_backup_stop), so the last one becomes whole too; a standby cannot.
func (c *capture) complete() bool {
	stop := pg.LSN(c.stopLSN.Load())
	if stop == 0 {
		return false
	}
	if c.standby {
		return c.wal.next >= stop
	}
	return c.wal.next >= c.wal.size.Start(c.wal.size.Segment(stop-1)+1)
}

func (c *capture) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, errTimelineEnds) {
		return &Error{
			err:  fmt.Errorf("timeline %s has ended: the standby was promoted during the backup", c.timeline),
			hint: "Start the backup again.",
		}
	}
	return serverError("receive WAL", err)
}

// finish takes what there is of the last segment, and the time of the end.
func (c *capture) finish(ctx context.Context, w *capturedWAL) error {
	size := c.wal.size
	w.last = size.Segment(pg.LSN(c.stopLSN.Load()) - 1)
	if segno, content, ok := c.wal.partial(); ok && segno == w.last {
		w.partial = content
	}
	w.stoppedAt = c.serverTime
	if !c.standby {
		return nil
	}
	last, err := c.lastCommit(ctx, w)
	if last.After(w.stoppedAt) {
		w.stoppedAt = last
	}
	return err
}

// lastCommit is the newest commit that the last segment tells of. Its time is the primary's, whose clock may be ahead
// of the standby's.
func (c *capture) lastCommit(ctx context.Context, w *capturedWAL) (time.Time, error) {
	name := pg.SegmentName(c.timeline, w.last, c.wal.size)
	if w.partial != nil {
		summary, err := pg.ScanWAL(w.partial, name, c.wal.size)
		return summary.LastCommit, err
	}
	head, err := c.repo.WALHead(ctx, c.cluster, name)
	return head.Summary.LastCommit, err
}
