package recovery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"pgthaw/repo/pg"
)

// startServer starts the server, if that was asked for, waits for its first answer and then for the end of recovery.
// res is filled in as far as it comes.
func (j *job) startServer(ctx context.Context, res *Result) error {
	if j.start == nil {
		return nil
	}
	s, err := startServer(j.start, j.dir())
	if err != nil {
		return err
	}
	j.server = s
	res.Port, res.SocketDir, res.PID, res.ServerLog = j.start.port, j.start.sockets[0], s.pid, s.log
	w := recoveryWait{job: j, server: s}
	var refused error
	w.conn, refused, err = s.connect(ctx)
	if err != nil && !s.running() {
		res.Recovery, err = w.exit()
	}
	if err != nil || res.Recovery != nil {
		return s.interrupted(ctx, err)
	}
	res.ReadyMS = j.since()
	if refused != nil {
		res.NoLogin = refused.Error()
	}
	res.Recovery, err = w.wait(ctx)
	if j.recovered != nil {
		j.recovered(ctx)
	}
	if w.conn != nil {
		err = errors.Join(err, w.conn.Close(ctx))
	}
	return s.interrupted(ctx, err)
}

// interrupted says that the server lives on when only the waiting ended.
func (s *server) interrupted(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil && s.running() && !s.plan.alone {
		return fmt.Errorf("%w; PostgreSQL goes on running in %s (PID %d)", err, s.dir, s.pid)
	}
	return err
}

// recoveryWait watches a server until its recovery has ended. pg_ctl -w would be content with consistency, from which
// recovery can still fail.
type recoveryWait struct {
	job    *job
	server *server
	conn   *pgx.Conn // nil: nobody can log in
}

func (w *recoveryWait) wait(ctx context.Context) (*RecoveryEnd, error) {
	look := w.ask
	if w.conn == nil {
		look = w.readControl
		if w.job.Target.action() == "pause" {
			return nil, nil // pg_control does not tell
		}
	}
	for pause := newPause(); ; {
		end, err := look(ctx)
		if end != nil || err != nil {
			return end, err
		}
		if !w.server.running() {
			return w.exit()
		}
		if err := pause.sleep(ctx); err != nil {
			return nil, err
		}
	}
}

// exit tells the end that recovery_target_action = shutdown makes from failure.
func (w *recoveryWait) exit() (*RecoveryEnd, error) {
	c, err := w.server.control()
	if err != nil || w.job.Target.action() != "shutdown" || c.State != pg.DBShutdownedInRecovery {
		return nil, errors.Join(w.server.failed(), err)
	}
	return &RecoveryEnd{State: "shutdown", LSN: c.MinRecoveryPoint, Timeline: c.MinRecoveryTimeline}, nil
}

// readControl is for those who cannot ask.
func (w *recoveryWait) readControl(context.Context) (*RecoveryEnd, error) {
	c, err := w.server.control()
	if err != nil || c.State != pg.DBInProduction {
		return nil, nil // it may have been read while it was written
	}
	return &RecoveryEnd{State: "promoted", LSN: c.Redo, Timeline: c.Timeline}, nil
}

// recoveryQuery is good on both sides of promotion, but not in the moment of it.
const recoveryQuery = `select pg_is_in_recovery(),
	case when pg_is_in_recovery() then pg_get_wal_replay_pause_state() else '' end,
	coalesce(pg_last_wal_replay_lsn(), '0/0')::text,
	pg_last_xact_replay_timestamp(),
	case when pg_is_in_recovery() then '' else substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) end`

// ask looks once. A query that fails is asked again: the server may be about to promote, or to exit.
func (w *recoveryWait) ask(ctx context.Context) (*RecoveryEnd, error) {
	var recovering bool
	var paused, lsn, tli string
	var at *time.Time
	err := w.conn.QueryRow(ctx, recoveryQuery).Scan(&recovering, &paused, &lsn, &at, &tli)
	if err != nil {
		return nil, w.reconnect(ctx)
	}
	end := &RecoveryEnd{Time: at}
	if end.LSN, err = pg.ParseLSN(lsn); err != nil {
		return nil, err
	}
	switch {
	case !recovering:
		end.State = "promoted"
		_, err = fmt.Sscanf(tli, "%x", (*uint32)(&end.Timeline))
		return end, err
	case paused == "paused":
		end.State, end.Timeline = "paused", w.job.route.timelineAt(end.LSN)
		return end, nil
	}
	start := w.job.route.Manifest.StartLSN
	w.job.progress("recover", int64(end.LSN-min(start, end.LSN)), int64(w.job.route.end-start))
	return nil, nil
}

// reconnect opens a new connection if the old one is gone and the server is not.
func (w *recoveryWait) reconnect(ctx context.Context) error {
	if !w.conn.IsClosed() || !w.server.running() {
		return ctx.Err()
	}
	conn, refused, err := w.server.connect(ctx)
	if conn != nil {
		w.conn = conn
	}
	if err != nil && !w.server.running() {
		return ctx.Err() // the caller says why it exited
	}
	return errors.Join(err, refused)
}

// pause grows from a few milliseconds, so that a start that takes a fraction of a second is seen at once and a
// recovery that takes an hour is not disturbed.
type pause struct{ next time.Duration }

func newPause() *pause { return &pause{5 * time.Millisecond} }

func (p *pause) sleep(ctx context.Context) error {
	t := time.NewTimer(p.next)
	defer t.Stop()
	p.next = min(p.next+p.next/50, 100*time.Millisecond)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
