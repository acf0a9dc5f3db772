package ingest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// archiveLimit is how long ArchiveCheckpoint waits for the archiver.
const archiveLimit = 30 * time.Second

// ArchiveCheckpoint asks the server for a checkpoint behind a backup's end, and waits until the WAL with it is in the repository. That
// takes a role that may say CHECKPOINT (pg_checkpoint) and pg_switch_wal, and a server that archives.
func ArchiveCheckpoint(ctx context.Context, r *repo.Repository, m *repo.Manifest, connString string) error {
	if m.FromStandby {
		return fmt.Errorf("a standby makes none of its own")
	}
	config, err := pgconn.ParseConfig(connString)
	if err != nil {
		return &Error{err: err}
	}
	config.RuntimeParams["application_name"] = applicationName
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return connectError(ctx, err)
	}
	defer closeConn(ctx, conn)
	if archives, err := ask(ctx, conn, archiving); err != nil || archives != "t" {
		return errors.Join(err, errors.New("nobody archives what this server writes"))
	}
	if _, err := ask(ctx, conn, "CHECKPOINT"); err != nil {
		return err
	}
	file, err := ask(ctx, conn, "SELECT pg_walfile_name(pg_switch_wal())")
	if err != nil {
		return err
	}
	name, err := pg.ParseWALName(file)
	if err != nil {
		return err
	}
	return awaitWAL(ctx, r, m.Cluster, name)
}

// archiving tells whether WAL may leave the server on a way that ends in a repository.
const archiving = `SELECT current_setting('archive_mode') <> 'off' OR EXISTS (SELECT FROM pg_replication_slots WHERE slot_type = 'physical' AND active)`

// ask runs one statement and gives the first value of its result, "" if it has none.
func ask(ctx context.Context, conn *pgconn.PgConn, statement string) (string, error) {
	results, err := conn.Exec(ctx, statement).ReadAll()
	if err != nil {
		return "", serverError("ask for a checkpoint", err)
	}
	if len(results) == 0 || len(results[0].Rows) == 0 {
		return "", nil
	}
	return string(results[0].Rows[0][0]), nil
}

// awaitWAL waits until a WAL file is in the repository.
func awaitWAL(ctx context.Context, r *repo.Repository, cluster string, name pg.WALName) error {
	ctx, cancel := context.WithTimeoutCause(ctx, archiveLimit, fmt.Errorf("%s was not archived within %s", name, archiveLimit))
	defer cancel()
	tick := time.NewTicker(archiveLimit / 300)
	defer tick.Stop()
	for {
		if _, err := r.WALHead(ctx, cluster, name); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
