package ingest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"pgthaw/repo/pg"
)

// applicationName is ours in pg_stat_replication unless the connection string gives another.
const applicationName = "pgthaw"

// server is a PostgreSQL server that we have a physical replication connection to.
type server struct {
	conn   *pgconn.PgConn
	config *pgconn.Config
	addr   *address
	log    *slog.Logger

	systemID    uint64
	timeline    pg.Timeline
	flushed     pg.LSN // how far its WAL was on disk when it was asked
	inRecovery  bool
	versionNum  int // 150018
	segmentSize pg.SegmentSize
	pageSize    int // bytes
	settings    map[string]string
	replyEvery  time.Duration
}

// address is where a dial has succeeded last. With it, a second connection goes to the same server where the
// connection string names several.
type address struct {
	network, addr string
}

// connect opens a replication connection and asks the server who it is.
func connect(ctx context.Context, connString string, log *slog.Logger) (*server, error) {
	config, err := replicationConfig(connString)
	if err != nil {
		return nil, &Error{err: err, hint: "See the PostgreSQL manual, \"Connection Strings\"."}
	}
	s := &server{config: config, addr: &address{}, log: log}
	s.rememberAddress()
	if s.conn, err = pgconn.ConnectConfig(ctx, config); err != nil {
		return nil, connectError(ctx, err)
	}
	if err := s.identify(ctx); err != nil {
		s.close(ctx)
		return nil, err
	}
	return s, nil
}

// replicationConfig asks for the walsender. As pg_basebackup does, it takes "replication" for the database, which
// the server ignores and ~/.pgpass is searched for.
func replicationConfig(connString string) (*pgconn.Config, error) {
	config, err := pgconn.ParseConfig(withDatabase(connString, "replication"))
	if err != nil {
		return nil, err
	}
	config.RuntimeParams["replication"] = "true"
	if config.RuntimeParams["application_name"] == "" {
		config.RuntimeParams["application_name"] = applicationName
	}
	return config, nil
}

// withDatabase sets the database of a connection URI or of keywords and values: the last of equal names counts, and a
// URI's parameters count after its path (fe-connect.c).
func withDatabase(connString, database string) string {
	setting := "dbname=" + database
	switch {
	case !strings.HasPrefix(connString, "postgres://") && !strings.HasPrefix(connString, "postgresql://"):
		return connString + " " + setting
	case strings.HasSuffix(connString, "?"), strings.HasSuffix(connString, "&"):
		return connString + setting
	case strings.Contains(connString, "?"):
		return connString + "&" + setting
	default:
		return connString + "?" + setting
	}
}

func (s *server) rememberAddress() {
	dial := s.config.DialFunc
	s.config.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err == nil {
			*s.addr = address{network, addr}
		}
		return conn, err
	}
}

// again opens another connection to the same server.
func (s *server) again(ctx context.Context) (*pgconn.PgConn, error) {
	config := s.config.Copy()
	dial, addr := config.DialFunc, *s.addr
	config.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dial(ctx, addr.network, addr.addr)
	}
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return nil, connectError(ctx, err)
	}
	return conn, nil
}

func connectError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = serverError("connect to PostgreSQL", err)
	if refused, ok := err.(*Error); ok {
		return refused
	}
	return &Error{err: err, hint: "Is the server running, and does --pg-connection lead to it?", refused: true}
}

// close ends the connection politely; what lives with it (a temporary slot, a running backup) ends on the server.
func (s *server) close(ctx context.Context) { closeConn(ctx, s.conn) }

// closeConn also runs when ctx has ended, so it waits by a deadline of its own.
func closeConn(ctx context.Context, conn *pgconn.PgConn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = conn.Close(ctx) // the server notices the lost connection anyway
}

// identify asks all that does not change while we are connected, but for a promotion.
func (s *server) identify(ctx context.Context) error {
	id, err := pglogrepl.IdentifySystem(ctx, s.conn)
	if err != nil {
		return serverError("identify the server", err)
	}
	if s.systemID, err = strconv.ParseUint(id.SystemID, 10, 64); err != nil {
		return fmt.Errorf("system identifier %q: %w", id.SystemID, err)
	}
	if id.Timeline <= 0 {
		return fmt.Errorf("identify the server: timeline %d", id.Timeline)
	}
	s.timeline, s.flushed = pg.Timeline(id.Timeline), pg.LSN(id.XLogPos)
	s.inRecovery = s.conn.ParameterStatus("in_hot_standby") == "on"
	if err := s.readSettings(ctx); err != nil {
		return err
	}
	return s.check()
}

// minVersion is the first server with the BASE_BACKUP syntax and framing that we speak.
const minVersion = 150000

// check refuses a server that can be neither backed up nor streamed, and reads what both need.
func (s *server) check() (err error) {
	if s.versionNum, err = s.number("server_version_num"); err != nil {
		return err
	}
	if s.versionNum < minVersion {
		return refuse("Upgrade the server to PostgreSQL 15 or later.",
			"server is PostgreSQL %s", s.settings["server_version"])
	}
	if s.settings["wal_level"] == "minimal" {
		return refuse("Set wal_level = replica and restart the server.", "wal_level is minimal")
	}
	if s.pageSize, err = s.number("block_size"); err != nil {
		return err
	}
	if s.segmentSize, err = readSegmentSize(s.settings["wal_segment_size"]); err != nil {
		return err
	}
	s.replyEvery, err = replyInterval(s.settings["wal_sender_timeout"])
	return err
}

// mayBeSynchronous says whether commits may wait for the flush position that a connection of ours reports.
func (s *server) mayBeSynchronous() bool {
	names := strings.ToLower(s.settings["synchronous_standby_names"])
	return strings.Contains(names, "*") ||
		strings.Contains(names, strings.ToLower(s.config.RuntimeParams["application_name"]))
}
