package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// waitReplayed waits until a standby has replayed what its primary has written.
func (c *cluster) waitReplayed(primary *cluster) {
	c.t.Helper()
	at := primary.SQL("SELECT pg_current_wal_lsn()")
	waitFor(c.t, time.Minute, "the standby to replay "+at, func() bool {
		return c.SQL(fmt.Sprintf("SELECT pg_last_wal_replay_lsn() >= '%s'", at)) == "t"
	})
}

// backUpStandby backs up a standby as main, under its primary's load.
func (a archived) backUpStandby(t *testing.T, standby *cluster) {
	t.Helper()
	a.pgthaw(t, "backup", "main", "--pg-connection", standby.dsn("postgres")).ok(t)
}

// TestBackupOfStandby backs up a standby under load. The copy of it recovers by the primary's WAL, by the backup's own
// alone, and is a standby no more.
func TestBackupOfStandby(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			o := smallSegments
			o.tablespaces = []string{"fast"}
			a := newArchived(t, p, o)
			r := a.Replica()
			l := startLedger(t, a.cluster, 2)
			l.waitCommits(50)
			a.backUpStandby(t, r)
			l.waitCommits(50)
			m := l.Mark("behind")
			l.waitCommits(20)
			l.Stop()
			a.Stop()
			r.StopImmediate()

			stop, err := parseLSN(a.backups(t)[0].StopLSN)
			if err != nil {
				t.Fatal(err)
			}
			least, _ := l.atLSN(stop, false)
			all := len(l.commits)
			for _, path := range paths {
				for _, to := range []point{
					exact(all), exact(m.n, "--to-name", m.name), {[]string{"--to-immediate"}, least, m.n},
				} {
					dir := postgresDir(t)
					args := append(to.args, "--tablespace-mapping", filepath.Join(r.data, "..", "tablespace fast")+"="+filepath.Join(dir, "fast"))
					c := a.start(t, asPostgres, path, args...)
					l.check(c.cluster, to.least, to.most)
					if got := c.SQL("SELECT count(*) FROM in_fast"); got != "1000" {
						t.Errorf("in_fast has %s rows", got)
					}
					if got := c.SQL("SHOW primary_conninfo"); got != "" {
						t.Errorf("primary_conninfo is %q", got)
					}
					c.SQL("CREATE TABLE goes_on (i int)")
					c.done(t)
				}
			}
		})
	}
}

// TestBackupOfStandbyAlone: nothing archives; the backup of the standby is restorable by itself.
func TestBackupOfStandbyAlone(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			dir := postgresDir(t)
			a := archived{newCluster(t, p, smallSegments), filepath.Join(dir, "repo")}
			a.pgthaw(t, append([]string{"repo", "init", a.repo}, plainFor(p, 18)...)...).ok(t)
			r := a.Replica()
			l := startLedger(t, a.cluster, 2)
			l.waitCommits(50)
			known := l.acknowledged()
			r.waitReplayed(a.cluster)
			a.backUpStandby(t, r)
			l.Stop()
			a.pgthaw(t, "list", "main", "--json").ok(t)
			for _, path := range paths {
				c := a.start(t, asPostgres, path)
				l.check(c.cluster, known, len(l.commits))
				c.amcheck()
				c.done(t)
			}
			a.testBehindTheStandbysEnd(t, l)
		})
	}
}

// testBehindTheStandbysEnd archives a segment behind the last one of the backup, of which that has only the beginning: a
// gap, until the whole segment is there too.
func (a archived) testBehindTheStandbysEnd(t *testing.T, l *ledger) {
	a.fillSegments(3)
	a.SQL("CREATE TABLE behind ()") // pg_walfile_name names the segment before, where one has only just begun
	segments := strings.Fields(a.SQL(`SELECT name FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$' AND name < pg_walfile_name(pg_current_wal_lsn())
		AND name >= pg_walfile_name('` + a.backups(t)[0].StopLSN + `') ORDER BY name`))
	push := func(name string) { a.pgthaw(t, "wal", "push", "main", filepath.Join(a.data, "pg_wal", name)).ok(t) }
	push(segments[len(segments)-1])
	for _, path := range paths {
		for _, args := range [][]string{nil, {"--to-immediate"}} {
			data := newTarget(t)
			a.copyTo(t, asPostgres, path, "latest", data, args...).exits(t, 15)
			absent(t, data)
		}
	}
	for _, name := range segments {
		push(name)
	}
	c := a.start(t, asPostgres, "restore")
	l.check(c.cluster, len(l.commits), len(l.commits))
	if got := c.SQL("SELECT count(*) FROM filled"); got != "3" {
		t.Errorf("filled has %s rows, want 3", got)
	}
	c.done(t)
}

// TestTimelines follows a promotion, and goes to places on both sides of it.
func TestTimelines(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			testTimelines(t, newArchived(t, p, smallSegments))
		})
	}
}

// testTimelines: rows 1 to 3 are common to both timelines, 11 and 12 are the old primary's alone, 21 and 22 the new one's.
func testTimelines(t *testing.T, a archived) {
	add := func(c *cluster, i int) {
		c.SQL(fmt.Sprintf("CREATE TABLE IF NOT EXISTS rows (i int); INSERT INTO rows VALUES (%d)", i))
		c.SQL(fmt.Sprintf("SELECT pg_create_restore_point('row %d')", i))
	}
	add(a.cluster, 1)
	a.backup(t)
	add(a.cluster, 2)
	a.fillSegments(1)
	r := a.Replica()
	add(a.cluster, 3)
	r.waitReplayed(a.cluster)
	r.SQL("SELECT pg_promote()")
	add(a.cluster, 11)
	a.fillSegments(1)
	add(a.cluster, 12)
	a.Stop()
	add(r, 21)
	r.fillSegments(1)
	a.backUpStandby(t, r)
	add(r, 22)
	r.Stop()

	first := a.backups(t)[0].ID
	for _, to := range []struct {
		backup string
		args   []string
		rows   string
	}{
		{"latest", nil, "1,2,3,21,22"},
		{first, nil, "1,2,3,21,22"},
		{first, []string{"--timeline", "2"}, "1,2,3,21,22"},
		{first, []string{"--timeline", "current"}, "1,2,3,11,12"},
		{first, []string{"--timeline", "1", "--to-name", "row 11"}, "1,2,3,11"},
		{first, []string{"--to-name", "row 21"}, "1,2,3,21"},
		{"latest", []string{"--to-name", "row 2"}, "1,2"},
		{"latest", []string{"--timeline", "current", "--to-name", "row 12"}, "1,2,3,11,12"},
	} {
		for _, path := range paths {
			t.Run(path+" "+strings.Join(to.args, " "), func(t *testing.T) {
				data := newTarget(t)
				var got copied
				a.copyTo(t, asPostgres, path, to.backup, data, append(to.args, "--start")...).ok(t).into(t, &got)
				c := got.server(t, a.installation, data)
				if rows := c.SQL("SELECT string_agg(i::text, ',' ORDER BY i) FROM rows"); rows != to.rows {
					t.Errorf("rows are %s, want %s", rows, to.rows)
				}
				c.StopImmediate()
				discard(t, data)
			})
		}
	}
	a.testUnreachableTimelines(t, first)
}

// testUnreachableTimelines: what lies on the other timeline, or before it began, is out of reach.
func (a archived) testUnreachableTimelines(t *testing.T, first string) {
	for _, to := range [][]string{
		{first, "--to-name", "row 11"},
		{first, "--timeline", "1", "--to-name", "row 21"},
		{a.backups(t)[1].ID, "--timeline", "1"},
		{a.backups(t)[1].ID, "--to-name", "row 3"},
		{"latest", "--timeline", "3"},
	} {
		for _, path := range paths {
			data := newTarget(t)
			a.copyTo(t, asPostgres, path, to[0], data, to[1:]...).exits(t, 15)
			absent(t, data)
		}
	}
}
