package recovery

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgthaw/repo/pg"
)

// mark is a moment between two transactions of the source.
type mark struct {
	rows string // that were committed
	time time.Time
	lsn  pg.LSN
	xid  uint32 // of the last of them
	name string // of a restore point
}

// transact commits a row in a transaction of its own and notes the moment after it.
func (s *source) transact(n int) mark {
	s.t.Helper()
	xid := s.sql(fmt.Sprintf("with i as (insert into ledger values (%d)) select pg_current_xact_id()", n))
	name := fmt.Sprintf("point %d", n)
	s.sql(fmt.Sprintf("select pg_create_restore_point('%s')", name))
	m := mark{name: name, rows: s.sql("select count(*) from ledger")}
	v, err := strconv.ParseUint(xid, 10, 32)
	if err == nil {
		m.xid = uint32(v)
		m.lsn, err = pg.ParseLSN(s.sql("select pg_current_wal_insert_lsn()"))
	}
	if err == nil {
		m.time, err = time.Parse("2006-01-02 15:04:05.999999Z07", s.sql("select clock_timestamp()"))
	}
	if err != nil {
		s.t.Fatal(err)
	}
	time.Sleep(2 * time.Millisecond) // so that a time tells this transaction from the next
	return m
}

// ledger makes the table, and transactions from first to last.
func (s *source) ledger(first, last int) (marks []mark) {
	s.t.Helper()
	s.sql("create table if not exists ledger (n int primary key)")
	for n := first; n <= last; n++ {
		marks = append(marks, s.transact(n))
	}
	return marks
}

// in is the source as a subtest uses it that runs beside others; it changes nothing of it.
func (s *source) in(t *testing.T) *source {
	t.Parallel()
	sub := *s
	sub.t = t
	return &sub
}

// restored restores to a target and returns what the ledger then has in it.
func (s *source) restored(o Options) (Result, string) {
	s.t.Helper()
	res, err := Restore(s.t.Context(), s.repo, o)
	s.t.Cleanup(func() { endServer(s.t, res) })
	if err != nil {
		s.t.Fatal(err)
	}
	return res, copySQL(s.t, res, "select count(*) from ledger")
}

func TestRestoreToTargets(t *testing.T) {
	s := newSource(t)
	before := s.ledger(1, 3)
	s.backup()
	s.backup()
	after := s.ledger(4, 8)
	s.switchWAL()
	s.ledger(9, 12)
	s.switchWAL()
	s.push()
	m := after[2]
	for i, c := range []struct {
		name   string
		target Target
		want   string
	}{
		{"everything", Target{}, "12"},
		{"time", Target{Time: m.time}, m.rows},
		{"LSN", Target{LSN: m.lsn, Exclusive: true}, m.rows},
		{"xid", Target{Xid: m.xid}, m.rows},
		{"xid exclusive", Target{Xid: m.xid, Exclusive: true}, "5"},
		{"name", Target{Name: m.name}, m.rows},
		{"immediate", Target{Immediate: true}, "3"},
	} {
		if testing.Short() && i%3 > 0 {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			s := s.in(t)
			o := s.options(filepath.Join(place(t), "copy"))
			o.Target = c.target
			res, got := s.restored(o)
			if got != c.want {
				t.Errorf("%s rows, want %s", got, c.want)
			}
			if r := res.Recovery; r == nil || r.State != "promoted" || r.Timeline != 2 {
				t.Errorf("recovery ended as %+v", r)
			}
		})
	}
	t.Run("pause", func(t *testing.T) {
		s := s.in(t)
		o := s.options(filepath.Join(place(t), "copy"))
		o.Target = Target{Name: m.name, Action: "pause"}
		res, got := s.restored(o)
		if r := res.Recovery; got != m.rows || r == nil || r.State != "paused" || r.Timeline != 1 || r.LSN == 0 {
			t.Errorf("%s rows, recovery ended as %+v", got, r)
		}
	})
	t.Run("shutdown", func(t *testing.T) {
		long(t)
		s := s.in(t)
		o := s.options(filepath.Join(place(t), "copy"))
		o.Target = Target{Name: m.name, Action: "shutdown"}
		res, err := Restore(t.Context(), s.repo, o)
		if r := res.Recovery; err != nil || r == nil || r.State != "shutdown" || r.LSN == 0 {
			t.Errorf("recovery ended as %+v, %v", r, err)
		}
	})
	t.Run("out of reach", func(t *testing.T) { s.in(t).testUnreachable(before[0], after[4]) })
}

// testUnreachable asks for what is not there; nothing may be written.
func (s *source) testUnreachable(early, late mark) {
	for name, target := range map[string]Target{
		"time before":   {Time: early.time},
		"time after":    {Time: time.Now().Add(time.Hour)},
		"LSN before":    {LSN: early.lsn},
		"LSN after":     {LSN: late.lsn + 1<<40},
		"xid before":    {Xid: early.xid},
		"xid after":     {Xid: late.xid + 1000},
		"name before":   {Name: early.name},
		"no such name":  {Name: "nothing"},
		"timeline":      {Timeline: "7"},
		"time too late": {Time: time.Now()},
	} {
		dir := filepath.Join(s.top, "never")
		o := s.options(dir)
		o.Target = target
		_, err := Restore(s.t.Context(), s.repo, o)
		if !errors.Is(err, ErrTargetUnreachable) {
			s.t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Lstat(dir); err == nil {
			s.t.Errorf("%s: something was written", name)
		}
		s.t.Logf("%s: %v", name, err)
	}
}

// TestRestoreVerifies looks at what is on disk: PostgreSQL's own check passes, the source's archive stays as it was.
func TestRestoreVerifies(t *testing.T) { oldestAndNewest(t, testRestoreVerifies) }

func testRestoreVerifies(t *testing.T, s *source) {
	tablespace := filepath.Join(s.top, "tablespace")
	if err := os.Mkdir(tablespace, 0o700); err != nil {
		t.Fatal(err)
	}
	own(t, tablespace)
	s.sql("create tablespace side location '"+tablespace+"'", "alter system set archive_library = ''",
		"alter system set recovery_target_name = 'of the source'", "alter system set synchronous_standby_names = ''")
	s.sql("create table ledger tablespace side as select generate_series(1, 1000) n")
	s.backup()
	s.switchWAL()
	s.push()
	copies := place(t)
	o := s.options(filepath.Join(copies, "data"))
	o.Start = false
	o.TablespaceMapping = map[string]string{tablespace: filepath.Join(copies, "side")}
	res, err := Restore(t.Context(), s.repo, o)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"-n"}
	for _, name := range res.Changed {
		args = append(args, "-i", name)
	}
	t.Log(s.run("pg_verifybackup", append(args, res.Target)...))

	archived, _ := os.ReadDir(s.archive)
	own := lookupOwner(os.Getuid(), os.Getgid())
	if c := postgresUser(t); c != nil {
		own = lookupOwner(int(c.Uid), int(c.Gid))
	}
	startPlanned, err := planStart(t.Context(), o, s.manifest(), confFiles{}, own)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(res.Target, autoConf), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range startPlanned.settings() {
		fmt.Fprintf(f, "%s = %s\n", c.name, pg.QuoteConf(c.value))
	}
	f.Close()
	srv, err := startServer(startPlanned, res.Target)
	if err != nil {
		t.Fatal(err)
	}
	res.PID, res.Port, res.SocketDir = srv.pid, startPlanned.port, startPlanned.sockets[0]
	defer endServer(t, res)
	if _, _, err := srv.connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the copy is promoted", func() bool { return copySQL(t, res, "select pg_is_in_recovery()") == "f" })
	if got := copySQL(t, res, "select count(*) from ledger"); got != "1000" {
		t.Errorf("%s rows", got)
	}
	copySQL(t, res, "create table later (n int)")
	copySQL(t, res, "select pg_switch_wal()")
	copySQL(t, res, "checkpoint")
	if now, _ := os.ReadDir(s.archive); len(now) != len(archived) {
		t.Errorf("the copy has archived into the source's archive")
	}
	endServer(t, res)
	_, err = Restore(t.Context(), s.repo, o)
	if !errors.Is(err, ErrTargetDir) {
		t.Errorf("restore over a data directory: %v", err)
	}
	t.Log(err)
	s.run("pg_checksums", "--check", "-D", res.Target)
}

// TestRestoreDebian has the configuration files outside of the data directory.
func TestRestoreDebian(t *testing.T) {
	long(t)
	s := newSource(t)
	s.stop()
	etc := filepath.Join(s.top, "etc")
	if err := os.Mkdir(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{confFile, hbaFile, identFile} {
		if err := os.Rename(filepath.Join(s.data, name), filepath.Join(etc, name)); err != nil {
			t.Fatal(err)
		}
	}
	s.start("-c", "config_file="+etc+"/"+confFile, "-c", "hba_file="+etc+"/"+hbaFile, "-c", "ident_file="+etc+"/"+identFile,
		"-c", "max_connections=150", "-c", "max_worker_processes=12", "-c", "max_prepared_transactions=5")
	s.ledger(1, 3)
	s.backup()
	s.ledger(4, 5)
	s.switchWAL()
	s.push()
	res, got := s.restored(s.options(filepath.Join(place(t), "copy")))
	if got != "5" {
		t.Errorf("%s rows", got)
	}
	if got := copySQL(t, res, "show max_connections"); got != "150" {
		t.Errorf("max_connections is %s", got)
	}
}

// TestRestoreAcrossGap has no WAL between two backups, as where nothing archives.
func TestRestoreAcrossGap(t *testing.T) {
	long(t)
	s := newSource(t)
	s.ledger(1, 3)
	first := s.backup()
	s.ledger(4, 6)
	s.switchWAL()
	missing := s.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")
	s.ledger(7, 9)
	s.switchWAL()
	s.ledger(10, 12)
	s.switchWAL()
	s.push(missing)

	o := s.options(filepath.Join(place(t), "copy"))
	o.Backup = first.ID
	_, err := Restore(t.Context(), s.repo, o)
	if !errors.Is(err, ErrTargetUnreachable) || !strings.Contains(err.Error(), missing) {
		t.Fatal(err)
	}
	var h interface{ Hint() string }
	if !errors.As(err, &h) {
		t.Fatal("no hint")
	}
	t.Log(err, h.Hint())
	_, rest, _ := strings.Cut(h.Hint(), "--to-lsn ")
	text, _, _ := strings.Cut(rest, ";")
	lsn, err := pg.ParseLSN(text)
	if err != nil {
		t.Fatal(err)
	}
	for want, target := range map[string]Target{"6": {LSN: lsn}, "3": {Immediate: true}} {
		t.Run(target.describe(), func(t *testing.T) {
			s := s.in(t)
			o := s.options(filepath.Join(place(t), "copy"))
			o.Backup, o.Target = first.ID, target
			if _, got := s.restored(o); got != want {
				t.Errorf("%s rows, want %s", got, want)
			}
		})
	}
}

// TestRestoreTimelines has a promotion in the archive.
func TestRestoreTimelines(t *testing.T) {
	long(t)
	s := newSource(t, "restore_command = 'exit 1'")
	s.ledger(1, 3)
	s.backup()
	s.ledger(4, 6)
	s.stop()
	if err := os.WriteFile(filepath.Join(s.data, recoverySignal), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	own(t, filepath.Join(s.data, recoverySignal))
	s.start()
	eventually(t, "the source is promoted", func() bool { return s.sql("select pg_is_in_recovery()") == "f" })
	s.ledger(7, 9)
	s.switchWAL()
	eventually(t, "all is archived", func() bool {
		_, err := os.Stat(filepath.Join(s.archive, pg.HistoryName(2)))
		return err == nil && s.sql("select last_archived_wal > '0000000200' from pg_stat_archiver") == "t"
	})
	entries, _ := os.ReadDir(s.archive)
	for _, e := range entries {
		t.Log(e.Name())
	}
	s.push()
	for timeline, want := range map[string]string{"": "9", "2": "9", "current": "6"} {
		t.Run("timeline "+timeline, func(t *testing.T) {
			s := s.in(t)
			o := s.options(filepath.Join(place(t), "copy"))
			o.Target.Timeline = timeline
			res, got := s.restored(o)
			if got != want || res.Recovery.Timeline != 3 {
				t.Errorf("%s rows, want %s; %+v", got, want, res.Recovery)
			}
		})
	}
}

// TestRestoreInterrupted: what is left cannot start, and says what it is.
func TestRestoreInterrupted(t *testing.T) {
	s := newSource(t)
	s.sql("create table ledger as select generate_series(1, 30000) n")
	s.backup()
	o := s.options(filepath.Join(place(t), "copy"))
	ctx, cancel := context.WithCancel(t.Context())
	o.Progress = func(p Progress) {
		if p.Done > p.Total/2 {
			cancel()
		}
	}
	if _, err := Restore(ctx, s.repo, o); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "incomplete") {
		t.Errorf("interrupted: %v", err)
	}
	if out, err := combinedOutput(s.command("postgres", "-D", o.Dir)); err == nil {
		t.Errorf("half a restore started: %s", out)
	}
	if _, err := Restore(t.Context(), s.repo, o); !errors.Is(err, ErrTargetDir) || !strings.Contains(err.Error(), "interrupted restore") {
		t.Errorf("again: %v", err)
	}
}
