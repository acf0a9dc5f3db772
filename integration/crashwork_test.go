package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/jackc/pgx/v5/pgconn"
)

// work is what a server, or a daemon, does when it is killed.
type work struct {
	name string

	// What a session does again and again. The kill is aimed at the statement with the number aim, while the server says that
	// it runs it. A loop may begin where an earlier one was killed. @ is the copy's directory.
	loop []string
	aim  int
	seen string // the server's word for it, by the session's PID; "": what pg_stat_activity says of it

	// Or what the daemon does: watch returns a function that tells when it is under way, or cannot be any more.
	watch func(k *life) func() (seen string, over bool)
	lazy  bool // only while the copy is hydrated; slowly, so that it can be hit

	holds    string // a query that gives one of either, whatever was killed; "": none
	either   []string
	database string // in which it does, if that is there; "": postgres
}

// early orders the work in a life.
func (w *work) early() int {
	if w.lazy {
		return 1
	}
	return 0
}

const (
	clusterPhase  = "SELECT command || ', ' || phase FROM pg_stat_progress_cluster WHERE pid = %d"
	truncatePhase = "SELECT phase FROM pg_stat_progress_vacuum WHERE pid = %d AND phase = 'truncating heap'"
	atCheckpoint  = "SELECT wait_event FROM pg_stat_activity WHERE pid = %d AND wait_event LIKE 'Checkpoint%%'"
)

func makeDatabase(strategy string) []string {
	return []string{"DROP DATABASE IF EXISTS made", "CREATE DATABASE made TEMPLATE template1 STRATEGY " + strategy}
}

var makeTablespace = []string{"DROP TABLESPACE IF EXISTS spare", "CREATE TABLESPACE spare LOCATION '@/spare'",
	"CREATE TABLE in_spare TABLESPACE spare AS SELECT 1 AS i", "DROP TABLE in_spare"}

// rowsOf asks for what a table of manyRows holds that is written only as a whole.
func rowsOf(table string) string {
	return "SELECT count(*), sum(i), count(*) FILTER (WHERE x = " + ofRow + ") FROM " + table
}

const allRows, halfRows, noRows = "20000|200010000|20000", "10000|50005000|10000", "0||0"

// transfer is a transaction of pgbench's.
const transfer = `BEGIN; UPDATE pgbench_accounts SET abalance = abalance + 3 WHERE aid = (SELECT 1 + (random() * 49999)::int);
	UPDATE pgbench_tellers SET tbalance = tbalance + 3 WHERE tid = (SELECT 1 + (random() * 9)::int);
	UPDATE pgbench_branches SET bbalance = bbalance + 3; INSERT INTO pgbench_history (tid, bid, aid, delta) VALUES (1, 1, 1, 3); COMMIT`

var works = []*work{
	{name: "commit", loop: []string{transfer}},
	{name: "checkpoint", loop: []string{"UPDATE pgbench_accounts SET filler = 'x' WHERE aid % 50 = 0", "CHECKPOINT"}, aim: 1, seen: atCheckpoint},
	{name: "hydrate", watch: watchHydration, lazy: true},
	{name: "vacuum truncates", seen: truncatePhase, aim: 0, loop: []string{"VACUUM shrunk",
		"INSERT INTO shrunk SELECT i + 20000, x FROM (" + manyRows + ") AS more", "DELETE FROM shrunk WHERE i > 10000"},
		holds: rowsOf("shrunk WHERE i <= 10000"), either: []string{halfRows}},
	{name: "truncate", loop: []string{"TRUNCATE cut", "INSERT INTO cut " + manyRows}, holds: rowsOf("cut"), either: []string{allRows, noRows}},
	{name: "create database, wal_log", loop: makeDatabase("wal_log"), aim: 1, database: "made", holds: rowsOf("inside"), either: []string{allRows}},
	{name: "create database, file_copy", loop: makeDatabase("file_copy"), aim: 1, database: "made", holds: rowsOf("inside"), either: []string{allRows}},
	{name: "drop database", loop: makeDatabase("file_copy"), database: "made", holds: rowsOf("inside"), either: []string{allRows}},
	{name: "vacuum full", loop: []string{"VACUUM FULL packed"}, seen: clusterPhase, holds: rowsOf("packed"), either: []string{allRows}},
	{name: "cluster", loop: []string{"CLUSTER sorted USING sorted_i"}, seen: clusterPhase, holds: rowsOf("sorted"), either: []string{allRows}},
	{name: "set tablespace", loop: []string{"ALTER TABLE moved SET TABLESPACE fast", "ALTER TABLE moved SET TABLESPACE pg_default", "ALTER TABLE moved SET TABLESPACE slow"},
		holds: rowsOf("moved"), either: []string{allRows}},
	{name: "create tablespace", loop: makeTablespace, aim: 1},
	{name: "drop tablespace", loop: makeTablespace},
}

// session is one that does work until the server goes away or it is told to end.
type session struct {
	k    *life
	w    *work
	conn *pgconn.PgConn
	stop context.CancelFunc
	done chan struct{}

	mu       sync.Mutex
	sent     int // statements so far, from 1
	answered int
	killed   bool // errors are to be expected from now on
	err      error
}

func (k *life) startSession(w *work) *session {
	k.t.Helper()
	conn, err := pgconn.Connect(context.Background(), k.c.dsn("postgres"))
	if err != nil {
		k.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &session{k: k, w: w, conn: conn, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		defer conn.Close(context.Background())
		for n := 0; ctx.Err() == nil; n++ {
			if err := s.do(w.loop[n%len(w.loop)]); err != nil {
				return
			}
		}
	}()
	return s
}

func (s *session) do(statement string) error {
	if strings.HasPrefix(statement, "CREATE TABLESPACE") {
		s.k.clearPlace()
	}
	s.mu.Lock()
	s.sent++
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), queryLimit)
	defer cancel()
	_, err := s.conn.Exec(ctx, strings.ReplaceAll(statement, "@", s.k.dir)).ReadAll()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.answered = s.sent
		return nil
	}
	if !s.killed {
		s.err = fmt.Errorf("%s: %w", statement, err)
	}
	return err
}

// clearPlace removes what a CREATE TABLESPACE made that was killed before its record was written: it refuses what it finds.
func (k *life) clearPlace() {
	if n, err := k.c.query("postgres", "SELECT count(*) FROM pg_tablespace WHERE spcname = 'spare'"); err != nil || n != "0" {
		return
	}
	made, _ := filepath.Glob(filepath.Join(k.dir, "spare", "PG_*"))
	for _, dir := range made {
		_ = os.RemoveAll(dir)
	}
}

// running is the number of the statement that the server is at, if it is the one that is aimed at; else 0.
func (s *session) running() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sent == s.answered || (s.sent-1)%len(s.w.loop) != s.w.aim || s.err != nil {
		return 0
	}
	return s.sent
}

// aimed returns a function that tells what the server says of the statement while it is under way.
func (s *session) aimed(monitor *pgconn.PgConn) func() (seen string, over bool) {
	query := s.w.seen
	if query == "" {
		query = "SELECT query || ', ' || coalesce(wait_event, 'running') FROM pg_stat_activity WHERE pid = %d AND state = 'active'"
	}
	query = fmt.Sprintf(query, s.conn.PID())
	return func() (string, bool) {
		number := s.running()
		if number == 0 {
			return "", s.failed()
		}
		seen, err := exec1(monitor, query)
		if err != nil || len(seen) == 0 || s.running() != number {
			return "", false
		}
		return strings.ReplaceAll(seen[0], s.k.dir, "@"), false
	}
}

func (s *session) failed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err != nil
}

// end waits for the session's end: it errs if the session failed before anybody was killed.
func (s *session) end() error {
	s.stop()
	<-s.done
	return s.err
}

func (s *session) expectDeath() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.killed = true
}

// watchHydration tells when a directory is hydrated and not yet whole: the data directory's base, or a tablespace, whose turn
// comes when somebody wants all of it, unless it is whole by then.
func watchHydration(k *life) func() (string, bool) {
	name := []string{"data/base", "data/base", "fast", "slow"}[k.r.IntN(4)]
	before, lacking := k.local(name)
	if lacking == 0 {
		name = "data/base"
		before, _ = k.local(name)
	}
	if name != "data/base" {
		invocation{}.start(k.t, "overlay", "finish", k.data)
	}
	grown := int64(64<<10 + k.r.IntN(512<<10))
	return func() (string, bool) {
		now, lacking := k.local(name)
		if now < before+grown || lacking == 0 {
			return "", lacking == 0
		}
		return fmt.Sprintf("%s has %d kB more than before, and %d files that are not whole", name, (now-before)>>10, lacking), false
	}
}

func (k *life) mounts() string {
	return strings.ReplaceAll(strings.Join(mountsBelow(k.dir), " "), k.dir+"/", "")
}
