package ingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"unicode"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"pgthaw/repo/pg"
)

// baseBackup is a BASE_BACKUP command that runs.
type baseBackup struct {
	conn net.Conn
	m    *messages

	start      position
	archives   []tablespaceRow // in the server's order; the data directory itself comes last
	totalBytes int64           // the server's estimate
}

// position is a place in the WAL of a timeline.
type position struct {
	lsn      pg.LSN
	timeline pg.Timeline
}

// tablespaceRow is a line of BASE_BACKUP's second result set.
type tablespaceRow struct {
	oid       uint32 // 0: the data directory
	path      string
	sizeBytes int64
}

// startBaseBackup sends BASE_BACKUP and reads what comes before the archives. That takes as long as the server's
// checkpoint does. It takes s.conn over, and closes it when ctx ends, for reads of it know nothing of ctx.
func (s *server) startBaseBackup(ctx context.Context, o BackupOptions) (*baseBackup, error) {
	command, err := baseBackupCommand(o)
	if err != nil {
		return nil, err
	}
	if err := s.conn.SyncConn(ctx); err != nil { // asked for by Hijack
		return nil, fmt.Errorf("prepare the connection: %w", err)
	}
	hijacked, err := s.conn.Hijack()
	if err != nil {
		return nil, fmt.Errorf("prepare the connection: %w", err)
	}
	b := &baseBackup{conn: hijacked.Conn}
	b.m = newMessages(b.conn, s.warn)
	context.AfterFunc(ctx, b.close)
	if err := b.begin(command); err != nil {
		b.close()
		return nil, b.explain(ctx, "start the base backup", err)
	}
	return b, nil
}

// warn hands the server's notices on: a page whose checksum is wrong comes as one.
func (s *server) warn(n *pgconn.Notice) {
	s.log.Warn("from the server: "+n.Message, "severity", n.Severity, "detail", n.Detail)
}

func (b *baseBackup) close() { _ = b.conn.Close() } // nothing of ours is waiting to be sent

// explain tells why a read failed: because ctx has ended, which closed the connection, or because of the server.
func (b *baseBackup) explain(ctx context.Context, attempted string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return serverError(attempted, err)
}

// baseBackupCommand is the command in the syntax of PostgreSQL 15 and later. The WAL comes over a connection of its
// own, so the server need not wait for its archiver. Without TABLESPACE_MAP the links in pg_tblspc come as links.
func baseBackupCommand(o BackupOptions) (string, error) {
	if strings.ContainsFunc(o.Label, unicode.IsControl) {
		return "", fmt.Errorf("backup label %q holds a control character", o.Label)
	}
	options := []string{
		"LABEL '" + strings.ReplaceAll(o.Label, "'", "''") + "'",
		"PROGRESS true",
		"WAIT false",
		"MANIFEST 'yes'",
		"MANIFEST_CHECKSUMS 'CRC32C'",
	}
	if !o.SlowCheckpoint {
		options = append(options, "CHECKPOINT 'fast'")
	}
	if o.NoVerifyChecksums {
		options = append(options, "VERIFY_CHECKSUMS false")
	}
	if o.MaxRate != 0 {
		options = append(options, "MAX_RATE "+strconv.Itoa(o.MaxRate))
	}
	return "BASE_BACKUP (" + strings.Join(options, ", ") + ")", nil
}

func (b *baseBackup) begin(command string) error {
	query, err := (&pgproto3.Query{String: command}).Encode(nil)
	if err != nil {
		return err
	}
	if _, err := b.conn.Write(query); err != nil {
		return err
	}
	return b.readStart()
}

// readStart reads what comes before the COPY stream.
func (b *baseBackup) readStart() (err error) {
	if b.start, err = b.position(); err != nil {
		return err
	}
	rows, err := b.m.rows(3)
	if err != nil {
		return err
	}
	for _, row := range rows {
		t, err := parseTablespaceRow(row)
		if err != nil {
			return err
		}
		b.archives = append(b.archives, t)
		b.totalBytes += t.sizeBytes
	}
	return b.m.expect(msgCopyOutResponse)
}

// position reads a result set of recptr and tli.
func (b *baseBackup) position() (p position, err error) {
	rows, err := b.m.rows(2)
	if err != nil {
		return p, err
	}
	if len(rows) != 1 {
		return p, fmt.Errorf("%d rows where one position belongs", len(rows))
	}
	if p.lsn, err = pg.ParseLSN(string(rows[0][0])); err != nil {
		return p, err
	}
	tli, err := strconv.ParseUint(string(rows[0][1]), 10, 31)
	if err == nil && tli == 0 {
		err = errors.New("timeline 0")
	}
	p.timeline = pg.Timeline(tli)
	return p, err
}

func parseTablespaceRow(row [][]byte) (t tablespaceRow, err error) {
	kib, err := strconv.ParseInt(string(row[2]), 10, 53)
	if err != nil {
		return t, fmt.Errorf("size of a tablespace: %w", err)
	}
	t.sizeBytes = kib << 10
	if row[0] == nil {
		return t, nil
	}
	oid, err := strconv.ParseUint(string(row[0]), 10, 32)
	if err != nil {
		return t, fmt.Errorf("oid of a tablespace: %w", err)
	}
	t.oid, t.path = uint32(oid), string(row[1])
	return t, nil
}

// receive hands each archive, then backup_manifest, to a function, and returns where the backup ends. progress is told
// of the bytes as they come. The server's error at the end, that of a page with a wrong checksum among them, is ours.
func (b *baseBackup) receive(progress func(n int), archive func(io.Reader, tablespaceRow) error, manifest func(io.Reader) error) (stop position, err error) {
	parts := &copyOut{m: b.m, progress: progress}
	for _, row := range b.archives {
		if err := parts.expect(row.archiveName()); err != nil {
			return stop, err
		}
		if err := archive(parts, row); err != nil {
			return stop, err
		}
	}
	if err := parts.expect(""); err != nil {
		return stop, err
	}
	if err := manifest(parts); err != nil {
		return stop, err
	}
	if _, err := parts.next(); err != io.EOF {
		return stop, errors.Join(errors.New("more follows backup_manifest"), err)
	}
	return b.finish()
}

// finish reads what comes after the COPY stream.
func (b *baseBackup) finish() (position, error) {
	stop, err := b.position()
	if err != nil {
		return stop, err
	}
	if err := b.m.expect(msgCommandComplete); err != nil {
		return stop, err
	}
	return stop, b.m.expect(msgReadyForQuery)
}
