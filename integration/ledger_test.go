package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// ledger is a table, and the client's own record of every commit to it that the server acknowledged.
//
// Its writers insert concurrently but commit one after another, so the record is in commit order, and
// the table, recovered to whatever point, must hold exactly the first n commits of the record. What n is for a time,
// a transaction or an LSN, the record tells: atTime, atXID, atLSN; check compares a server with it.
// Every tenth transaction rolls back, and must never be seen.
type ledger struct {
	t       *testing.T
	source  *cluster
	cancel  context.CancelFunc // has the writers end
	writers sync.WaitGroup

	mu      sync.Mutex // held over a commit's round trip: it makes the order
	commits []commit
	doubt   []row // commits whose answer did not come: the server went away
	err     error // of a writer, beside the server's going away
}

// row is what one commit adds to the table.
type row struct {
	id   int64
	note string
}

// commit is one acknowledged transaction.
type commit struct {
	row
	xid    uint64    // full transaction id
	at     time.Time // as in the commit record: recovery_target_time compares with it
	before lsn       // insert position before the commit record
	after  lsn       // and after it: the record lies between
}

// lsn is a position in the WAL as a number.
type lsn uint64

func (l lsn) String() string { return fmt.Sprintf("%X/%X", uint64(l)>>32, uint32(l)) }

func parseLSN(text string) (lsn, error) {
	high, low, found := strings.Cut(text, "/")
	h, err1 := strconv.ParseUint(high, 16, 32)
	l, err2 := strconv.ParseUint(low, 16, 32)
	if !found || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("not an LSN: %q", text)
	}
	return lsn(h<<32 | l), nil
}

// startLedger makes the table and has writers write until Stop. c must have track_commit_timestamp on, as newCluster's have.
func startLedger(t *testing.T, c *cluster, writers int) *ledger {
	t.Helper()
	c.SQL(`CREATE TABLE IF NOT EXISTS ledger (
		id bigserial PRIMARY KEY,
		at timestamptz NOT NULL DEFAULT clock_timestamp(),
		xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
		lsn pg_lsn NOT NULL DEFAULT pg_current_wal_insert_lsn(),
		note text NOT NULL)`)
	l := &ledger{t: t, source: c}
	l.write(writers)
	t.Cleanup(l.halt)
	return l
}

// write starts writers; after a crash and a restart of the server they go on with the same record.
func (l *ledger) write(writers int) {
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	for i := range writers {
		l.writers.Go(func() { l.writer(ctx, uint64(i)) })
	}
}

func (l *ledger) halt() {
	l.cancel()
	l.writers.Wait()
}

// Stop ends the writers and fails the test if one had an error of its own.
func (l *ledger) Stop() {
	l.t.Helper()
	l.halt()
	if l.err != nil {
		l.t.Fatalf("ledger: %v", l.err)
	}
}

// writer inserts until ctx is done or the server goes away.
func (l *ledger) writer(ctx context.Context, seed uint64) {
	conn, err := pgconn.Connect(context.Background(), l.source.dsn("postgres"))
	if err != nil {
		l.fail(err)
		return
	}
	defer conn.Close(context.Background())
	random := rand.New(rand.NewPCG(seed, uint64(l.source.port)))
	for n := 0; ctx.Err() == nil; n++ {
		note := fmt.Sprintf("%d/%d %0*d", seed, n, 1+random.IntN(200), n)
		r, xid, err := insert(conn, note)
		if err == nil && n%10 == 9 {
			_, err = exec1(conn, "ROLLBACK")
		} else if err == nil {
			err = l.commit(conn, r, xid)
		}
		if err != nil {
			l.fail(err)
			return
		}
	}
}

// insert begins a transaction and inserts one row.
func insert(conn *pgconn.PgConn, note string) (r row, xid uint64, err error) {
	fields, err := exec1(conn, fmt.Sprintf("BEGIN; INSERT INTO ledger (note) VALUES ('%s') RETURNING id, xid", note))
	if err != nil {
		return r, 0, err
	}
	r.note = note
	if r.id, err = strconv.ParseInt(fields[0], 10, 64); err != nil {
		return r, 0, err
	}
	xid, err = strconv.ParseUint(fields[1], 10, 64)
	return r, xid, err
}

// commit commits the connection's transaction and records it, or puts it in doubt.
func (l *ledger) commit(conn *pgconn.PgConn, r row, xid uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	before, err := exec1(conn, "SELECT pg_current_wal_insert_lsn()")
	if err != nil {
		return err
	}
	if _, err := exec1(conn, "COMMIT"); err != nil {
		l.doubt = append(l.doubt, r)
		return err
	}
	c := commit{row: r, xid: xid}
	// The commit is acknowledged whatever becomes of the following; the record stands even without its time.
	defer func() { l.commits = append(l.commits, c) }()
	after, err := exec1(conn, fmt.Sprintf("SELECT pg_current_wal_insert_lsn(), (extract(epoch FROM pg_xact_commit_timestamp('%d'::xid)) * 1000000)::bigint", uint32(xid)))
	if err != nil {
		return err
	}
	return c.place(before[0], after[0], after[1])
}

// place fills in where and when, as the server printed it. The time is in microseconds since 1970.
func (c *commit) place(before, after, micros string) (err error) {
	if c.before, err = parseLSN(before); err != nil {
		return err
	}
	if c.after, err = parseLSN(after); err != nil {
		return err
	}
	us, err := strconv.ParseInt(micros, 10, 64)
	c.at = time.UnixMicro(us).UTC()
	return err
}

// fail keeps a writer's error unless it only says that the server went away, which is the test's doing.
func (l *ledger) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil && !serverWentAway(err) && !(l.source.mayPanic && mountWentAway(err)) {
		l.err = err
	}
}

// mountWentAway tells what a server reports whose data directory's daemon is dead, or dies while it answers.
func mountWentAway(err error) bool {
	var reported *pgconn.PgError
	return errors.As(err, &reported) && slices.ContainsFunc([]error{syscall.ENOTCONN, syscall.ECONNABORTED, syscall.EIO},
		func(why error) bool { return strings.HasSuffix(strings.ToLower(reported.Message), ": "+why.Error()) })
}

// serverWentAway: class 57P is the server's own good-bye, and a broken connection has no SQLSTATE at all.
func serverWentAway(err error) bool {
	var refused *pgconn.PgError
	if errors.As(err, &refused) {
		return strings.HasPrefix(refused.Code, "57P")
	}
	return true
}

// moment is a point between two commits.
type moment struct {
	n    int // commits before it
	at   time.Time
	lsn  lsn
	name string // of the restore point
}

// Mark sets a restore point between two commits.
func (l *ledger) Mark(name string) moment {
	l.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	text := l.source.SQL(fmt.Sprintf("SELECT pg_create_restore_point('%s'), (extract(epoch FROM clock_timestamp()) * 1000000)::bigint", name))
	position, micros, _ := strings.Cut(text, "|")
	at, err := parseLSN(position)
	us, err2 := strconv.ParseInt(micros, 10, 64)
	if err != nil || err2 != nil {
		l.t.Fatalf("restore point %s: %q", name, text)
	}
	return moment{n: len(l.commits), at: time.UnixMicro(us).UTC(), lsn: at, name: name}
}

// acknowledged is the number of commits so far.
func (l *ledger) acknowledged() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.commits)
}

// waitCommits waits until n more commits are acknowledged.
func (l *ledger) waitCommits(n int) {
	l.t.Helper()
	goal := l.acknowledged() + n
	waitFor(l.t, time.Minute, fmt.Sprintf("%d commits to the ledger", n), func() bool { return l.acknowledged() >= goal })
}

// atTime is how many commits a recovery to this time must show. Call it and its like when the writers have ended.
func (l *ledger) atTime(at time.Time, inclusive bool) int {
	return l.first(func(c commit) bool { return c.at.After(at) || !inclusive && c.at.Equal(at) })
}

// atXID is how many commits a recovery to this transaction must show.
func (l *ledger) atXID(xid uint64, inclusive bool) int {
	n := l.first(func(c commit) bool { return c.xid == xid })
	if inclusive && n < len(l.commits) {
		n++
	}
	return n
}

// atLSN is how many commits a recovery to this LSN must show, at least and at most.
//
// The record of commit c starts in [before, after). Recovery stops before the first record that starts at the LSN or
// later, or, inclusive, after that record, which may be the commit (xlogrecovery.c, recoveryStopsBefore and -After).
func (l *ledger) atLSN(at lsn, inclusive bool) (least, most int) {
	least = l.first(func(c commit) bool { return c.after > at })
	most = l.first(func(c commit) bool { return c.before >= at })
	if inclusive && most < len(l.commits) {
		most++
	}
	return least, most
}

// first is the index of the first commit for which late holds, or their number.
func (l *ledger) first(late func(commit) bool) int {
	if i := slices.IndexFunc(l.commits, late); i >= 0 {
		return i
	}
	return len(l.commits)
}

// check fails the test unless c's ledger holds exactly the first n commits for some n between least and most.
// It returns n.
func (l *ledger) check(c *cluster, least, most int) (n int) {
	l.t.Helper()
	have := l.read(c)
	if err := l.prefix(have, least, most); err != nil {
		l.t.Fatal(err)
	}
	return len(have)
}

// prefix compares a table's rows with the first commits of the record.
func (l *ledger) prefix(have map[int64]string, least, most int) error {
	n := len(have)
	if n < least || n > most {
		return fmt.Errorf("the ledger has %d rows, want %d to %d", n, least, most)
	}
	for i, c := range l.commits[:n] {
		if note, there := have[c.id]; !there || note != c.note {
			return fmt.Errorf("commit %d of %d (id %d, at %v, before %v) is lost: %q", i, n, c.id, c.at, c.after, note)
		}
	}
	return nil
}

// checkDurable fails the test if c lacks an acknowledged commit, or has a row that is neither acknowledged nor in doubt.
func (l *ledger) checkDurable(c *cluster) {
	l.t.Helper()
	if err := l.durable(l.read(c)); err != nil {
		l.t.Fatal(err)
	}
}

func (l *ledger) durable(have map[int64]string) error {
	for _, c := range l.commits {
		if have[c.id] != c.note {
			return fmt.Errorf("acknowledged commit of id %d at %v is lost", c.id, c.at)
		}
		delete(have, c.id)
	}
	for _, r := range l.doubt {
		if note, there := have[r.id]; there && note == r.note {
			delete(have, r.id)
		}
	}
	if len(have) > 0 {
		return fmt.Errorf("%d rows that nobody committed: %v", len(have), have)
	}
	return nil
}

// read gives a server's ledger, notes by id.
func (l *ledger) read(c *cluster) map[int64]string {
	l.t.Helper()
	rows := map[int64]string{}
	for line := range strings.Lines(c.SQL("SELECT id, note FROM ledger")) {
		id, note, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "|")
		n, err := strconv.ParseInt(id, 10, 64)
		if err != nil {
			l.t.Fatalf("ledger row %q: %v", line, err)
		}
		rows[n] = note
	}
	return rows
}

// exec1 runs statements and gives the first row of the last one.
func exec1(conn *pgconn.PgConn, statements string) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), queryLimit)
	defer cancel()
	results, err := conn.Exec(ctx, statements).ReadAll()
	if err != nil || len(results) == 0 || len(results[len(results)-1].Rows) == 0 {
		return nil, err
	}
	var fields []string
	for _, field := range results[len(results)-1].Rows[0] {
		fields = append(fields, string(field))
	}
	return fields, nil
}
