package ingest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// errTimelineEnds is what a receiver gives when the server has sent all there is of the timeline.
var errTimelineEnds = errors.New("the timeline ends")

// receiver receives the WAL of one timeline over a connection of its own and puts whole segments into the repository.
type receiver struct {
	conn        *pgconn.PgConn
	repo        *repo.Repository
	cluster     string
	timeline    pg.Timeline
	wal         assembler
	flushed     pg.LSN        // all before it is durable in the repository
	withdraw    bool          // take a reported flush position back at once: commits could wait for the next
	serverTime  time.Time     // of the server's last message, its clock
	replyEvery  time.Duration // the server is told of flushed at least so often
	lastReplyAt time.Time
}

// start begins to stream at the start of segment segno of a timeline. pglogrepl.IsErrEndTimeline tells the error of a
// timeline that ends there.
func (r *receiver) start(ctx context.Context, slot string, timeline pg.Timeline, size pg.SegmentSize, segno uint64) error {
	r.timeline, r.wal, r.flushed = timeline, newAssembler(size, segno), size.Start(segno)
	err := pglogrepl.StartReplication(ctx, r.conn, slot, pglogrepl.LSN(r.flushed),
		pglogrepl.StartReplicationOptions{Mode: pglogrepl.PhysicalReplication, Timeline: int32(timeline)})
	if err != nil {
		return err
	}
	return r.reportFlushed()
}

// step takes in one message of the server. It returns nil without one when wait ends, and when it is time to reply.
func (r *receiver) step(ctx, wait context.Context) error {
	if time.Since(r.lastReplyAt) >= r.replyEvery {
		return r.reply()
	}
	wait, cancel := context.WithDeadline(wait, r.lastReplyAt.Add(r.replyEvery))
	defer cancel()
	message, err := r.conn.ReceiveMessage(wait)
	if err != nil {
		if wait.Err() != nil && !r.conn.IsClosed() {
			return nil
		}
		return lost(err)
	}
	switch m := message.(type) {
	case *pgproto3.CopyData:
		return r.message(ctx, m.Data)
	case *pgproto3.CopyDone:
		return errTimelineEnds
	case *pgproto3.ErrorResponse:
		return pgconn.ErrorResponseToPgError(m)
	case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		return nil
	default:
		return fmt.Errorf("message %T in the WAL stream", m)
	}
}

func (r *receiver) message(ctx context.Context, data []byte) error {
	if len(data) == 0 {
		return errors.New("empty message in the WAL stream")
	}
	switch data[0] {
	case pglogrepl.PrimaryKeepaliveMessageByteID:
		m, err := pglogrepl.ParsePrimaryKeepaliveMessage(data[1:])
		if err != nil {
			return err
		}
		r.serverTime = m.ServerTime.UTC()
		if m.ReplyRequested {
			return r.answer()
		}
		return nil
	case pglogrepl.XLogDataByteID:
		m, err := pglogrepl.ParseXLogData(data[1:])
		if err != nil {
			return err
		}
		r.serverTime = m.ServerTime.UTC()
		return r.wal.add(pg.LSN(m.WALStart), m.WALData, func(segno uint64, content []byte) error {
			return r.put(ctx, segno, content)
		})
	default:
		return fmt.Errorf("message %q in the WAL stream", data[0])
	}
}

// put makes a segment durable and reports it. Meanwhile the server is answered, so that it does not give us up.
func (r *receiver) put(ctx context.Context, segno uint64, content []byte) error {
	done := make(chan error, 1)
	go func() {
		done <- r.repo.PutWAL(ctx, r.cluster, pg.SegmentName(r.timeline, segno, r.wal.size), content)
	}()
	timer := time.NewTicker(r.replyEvery)
	defer timer.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return err
			}
			r.flushed = r.wal.size.Start(segno + 1)
			return r.reportFlushed()
		case <-timer.C:
			if err := r.reply(); err != nil {
				<-done
				return err
			}
		}
	}
}

// reply tells the server how far we are.
func (r *receiver) reply() error {
	if r.withdraw {
		return r.send(0)
	}
	return r.send(r.flushed)
}

// answer is for a server that waits for a reply. One that shuts down waits until all it has sent is flushed, or, if no
// flush position is reported, written (walsender.c, WalSndDone). Ours would let it wait until a segment is full.
func (r *receiver) answer() error {
	if r.wal.next > r.flushed {
		return r.send(0)
	}
	return r.reply()
}

// reportFlushed moves the slot on. The slot keeps that when the position is withdrawn, but the connection is no
// candidate for a synchronous standby any more (syncrep.c, SyncRepGetCandidateStandbys).
func (r *receiver) reportFlushed() error {
	if err := r.send(r.flushed); err != nil || !r.withdraw {
		return err
	}
	return r.send(0)
}

// send reports what is written and flushed; a flushed of 0 reports nothing of it.
func (r *receiver) send(flushed pg.LSN) error {
	r.lastReplyAt = time.Now()
	message, err := (&pgproto3.CopyData{Data: statusUpdate(r.wal.next, flushed, r.lastReplyAt)}).Encode(nil)
	if err != nil {
		return err
	}
	return lost(r.conn.Frontend().SendUnbufferedEncodedCopyData(message))
}

// postgresEpoch is where the protocol's times begin.
var postgresEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// statusUpdate is a standby status update. pglogrepl's own puts the written position where flushed is 0, and makes
// commits wait no more for WAL that is not durable; and it reports WAL as applied, which we never do.
func statusUpdate(written, flushed pg.LSN, now time.Time) []byte {
	b := []byte{pglogrepl.StandbyStatusUpdateByteID}
	b = binary.BigEndian.AppendUint64(b, uint64(written))
	b = binary.BigEndian.AppendUint64(b, uint64(flushed))
	b = binary.BigEndian.AppendUint64(b, 0) // applied
	b = binary.BigEndian.AppendUint64(b, uint64(now.Sub(postgresEpoch).Microseconds()))
	return append(b, 0) // no reply wanted
}

// putHistory puts a timeline's history file.
func putHistory(ctx context.Context, conn *pgconn.PgConn, r *repo.Repository, cluster string, timeline pg.Timeline) (content []byte, err error) {
	h, err := pglogrepl.TimelineHistory(ctx, conn, int32(timeline))
	if err != nil {
		return nil, serverError("ask for the history of timeline "+timeline.String(), err)
	}
	name, err := pg.ParseWALName(h.FileName)
	if err != nil || name.Kind != pg.WALHistory || name.Timeline != timeline {
		return nil, fmt.Errorf("history of timeline %s came as %q", timeline, h.FileName)
	}
	return h.Content, r.PutWAL(ctx, cluster, name, h.Content)
}
