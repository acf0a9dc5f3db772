package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// started is a copy whose recovery has ended.
type started struct {
	*cluster
	socketDir string
}

// psql asks over the socket, as user postgres: the only way that the pg_hba.conf of a copy leaves open whose original lay
// outside.
func (s started) psql(t *testing.T, statement string) string {
	t.Helper()
	out := s.run(t, "psql", "-XAtq", "-h", s.socketDir, "-p", strconv.Itoa(s.port), "-U", "postgres", "-d", "postgres", "-c", statement)
	return strings.TrimSuffix(out, "\n")
}

// start makes a copy of the latest backup, started, and recovered to the end of the WAL unless args say otherwise.
func (a archived) start(t *testing.T, v invocation, path string, args ...string) started {
	t.Helper()
	data := newTarget(t)
	var got copied
	a.copyTo(t, v, path, "latest", data, append(args, "--start")...).ok(t).into(t, &got)
	if got.Recovery == nil || got.Recovery.State != "promoted" {
		t.Fatalf("recovery is %+v, want promoted", got.Recovery)
	}
	return started{got.server(t, a.installation, data), got.SocketDir}
}

// done stops the copy and throws it away.
func (s started) done(t *testing.T) {
	t.Helper()
	s.StopImmediate()
	discard(t, s.cluster.data)
}

// TestLayouts restores and thaws clusters of every shape, with WAL behind the backup.
func TestLayouts(t *testing.T) {
	t.Parallel()
	for _, layout := range []struct {
		name string
		o    clusterOptions
	}{
		{"1 MB segments, checksums", clusterOptions{walSegmentMB: 1, checksums: true, pgbenchScale: 1}},
		{"64 MB segments, no checksums", clusterOptions{walSegmentMB: 64, conf: []string{"max_wal_size = 256MB", "min_wal_size = 128MB"}}},
		{"Debian", clusterOptions{walSegmentMB: 1, confOutside: true, conf: []string{"max_connections = 130", "track_commit_timestamp = on"}}},
		{"empty", clusterOptions{walSegmentMB: 1}},
	} {
		for _, p := range majors(t) {
			t.Run(layout.name+"/"+p.String(), func(t *testing.T) {
				t.Parallel()
				testLayout(t, newArchived(t, p, layout.o), layout.o)
			})
		}
	}
}

func testLayout(t *testing.T, a archived, o clusterOptions) {
	empty := o.pgbenchScale == 0 && !o.confOutside && o.walSegmentMB == 1
	segment := strconv.Itoa(o.walSegmentMB << 20)
	a.backup(t)
	if !empty {
		a.fillSegments(3)
	}
	a.Stop()
	for _, path := range paths {
		c := a.start(t, invocation{}, path)
		for query, want := range map[string]string{
			"SHOW wal_segment_size": strconv.Itoa(o.walSegmentMB) + "MB",
			"SHOW data_checksums":   map[bool]string{true: "on", false: "off"}[o.checksums],
			"SHOW data_directory":   c.data,
			"SHOW max_connections":  map[bool]string{true: "130", false: "100"}[o.confOutside],
			"SELECT count(*) FROM pg_class WHERE relname = 'filled'":                                   map[bool]string{true: "0", false: "1"}[empty],
			"SELECT count(*) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$' AND size <> " + segment: "0",
		} {
			if got := c.psql(t, query); got != want {
				t.Errorf("%s: %s: %s, want %s", path, query, got, want)
			}
		}
		if !empty {
			if got := c.psql(t, "SELECT count(*) FROM filled"); got != "3" {
				t.Errorf("%s: filled has %s rows, want 3", path, got)
			}
		}
		c.psql(t, "CREATE TABLE goes_on (i int)")
		if !o.confOutside {
			c.amcheck()
		}
		if o.checksums && path == "restore" {
			c.Stop()
			a.checksums(t, c.data)
		}
		c.done(t)
	}
}

// TestSettingsLeadOutside: postgresql.conf lies in PGDATA and names the data directory and hba_file elsewhere.
func TestSettingsLeadOutside(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			a := newArchived(t, p, clusterOptions{walSegmentMB: 1})
			a.Stop()
			etc := filepath.Join(a.dir, "etc")
			if err := os.Mkdir(etc, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"pg_hba.conf", "pg_ident.conf"} {
				if err := os.Rename(filepath.Join(a.data, name), filepath.Join(etc, name)); err != nil {
					t.Fatal(err)
				}
			}
			appendTo(t, filepath.Join(a.data, "postgresql.conf"), fmt.Sprintf(
				"data_directory = '%s'\nhba_file = '%s/pg_hba.conf'\nident_file = '%[2]s/pg_ident.conf'\nexternal_pid_file = '%[2]s/pid'\ninclude_if_exists '%[2]s/more.conf'\n",
				a.data, etc))
			ownedByPostgres(t, etc)
			a.Start()
			a.backup(t)
			for _, path := range paths { // the original keeps running: a copy that took its directory would be refused
				data := newTarget(t)
				var got copied
				a.copyTo(t, asPostgres, path, "latest", data, "--start").ok(t).into(t, &got)
				c := got.server(t, p, data)
				if hba, err := os.ReadFile(filepath.Join(data, "pg_hba.conf")); path == "restore" && (err != nil || !strings.Contains(string(hba), "peer")) {
					t.Errorf("%s: pg_hba.conf is %q, %v", path, hba, err)
				}
				c.StopImmediate()
				discard(t, data)
			}
		})
	}
}

// TestCopyKeepsToItself: what ALTER SYSTEM set on the source for the outside world does nothing on a copy.
func TestCopyKeepsToItself(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			a, copies := keepingCopies(t, p, smallSegments)
			for name, value := range map[string]string{
				"archive_mode": "always", "primary_conninfo": "host=127.0.0.1 port=1", "primary_slot_name": "s",
				"archive_cleanup_command": "touch " + copies + "/cleaned", "recovery_end_command": "touch " + copies + "/ended",
			} {
				a.SQL(fmt.Sprintf("ALTER SYSTEM SET %s = '%s'", name, value))
			}
			a.Restart()
			a.fillSegments(1)
			a.SQL("ALTER SYSTEM SET synchronous_standby_names = '*'") // not in force here, but in the file
			a.backup(t)
			a.waitArchived()
			before := append(filesBelow(t, filepath.Join(a.repo, "wal")), filesBelow(t, copies)...)
			a.StopImmediate() // so that nothing but a copy could archive
			for _, path := range paths {
				c := a.start(t, asPostgres, path)
				if _, err := c.query("postgres", "SET statement_timeout = '20s'; CREATE TABLE committed (i int)"); err != nil {
					t.Errorf("%s: a commit: %v", path, err)
				}
				c.fillSegments(2)
				c.SQL("CHECKPOINT")
				if got := c.SQL("SELECT archived_count + failed_count FROM pg_stat_archiver"); got != "0" {
					t.Errorf("%s: the copy has archived %s times", path, got)
				}
				c.done(t)
			}
			if after := append(filesBelow(t, filepath.Join(a.repo, "wal")), filesBelow(t, copies)...); !slices.Equal(before, after) {
				t.Errorf("the copies left traces in the source's archive: before\n%s\nafter\n%s", before, after)
			}
		})
	}
}

// filesBelow lists the regular files below a directory.
func filesBelow(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			all = append(all, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestSettingsOfTheCommandLine: recovery needs them as large as they were, and no file of the backup has them.
func TestSettingsOfTheCommandLine(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			a := newArchived(t, p, clusterOptions{walSegmentMB: 1})
			a.args = append(a.args, "-c", "max_connections=150", "-c", "max_locks_per_transaction=80", "-c", "max_prepared_transactions=5", "-c", "max_worker_processes=12")
			a.Restart()
			a.backup(t)
			a.fillSegments(2)
			a.Stop()
			for _, path := range paths {
				c := a.start(t, asPostgres, path)
				if got := c.SQL("SELECT count(*) FROM filled"); got != "2" {
					t.Errorf("%s: filled has %s rows, want 2", path, got)
				}
				c.done(t)
			}
		})
	}
}

// TestTablespaces: two of them, to other places, and refused where the original ones are.
func TestTablespaces(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			o := smallSegments
			o.tablespaces = []string{"fast", "slow"}
			a := newArchived(t, p, o)
			a.backup(t)
			a.SQL("INSERT INTO in_slow SELECT i, 'new' FROM generate_series(1001, 1500) i")
			original := filepath.Join(a.dir, "tablespace slow")
			before := filesBelow(t, original)
			for _, path := range paths {
				data := newTarget(t)
				mapping := func(name string) string {
					return filepath.Join(a.dir, "tablespace "+name) + "=" + filepath.Join(filepath.Dir(data), "new "+name)
				}
				for _, args := range [][]string{nil, {"--tablespace-mapping", mapping("fast")}} {
					r := a.copyTo(t, asPostgres, path, "latest", data, args...).exits(t, 17)
					if !strings.Contains(r.stderr, "HINT: ") || !strings.Contains(r.stderr, "--tablespace-mapping") {
						t.Errorf("%s: no hint names the option:\n%s", path, r.stderr)
					}
					absent(t, data)
				}
				a.copyTo(t, asPostgres, path, "latest", data, "--tablespace-mapping", "/no/such=/tmp/x").exits(t, 2)
				a.copyTo(t, asPostgres, path, "latest", data, "--tablespace-mapping", "fast").exits(t, 2)
				a.SQL("SELECT pg_switch_wal()")
				a.waitArchived()
				t.Cleanup(func() { discard(t, data) })
				var got copied
				a.copyTo(t, asPostgres, path, "latest", data, "--start", "--tablespace-mapping", mapping("fast"), "--tablespace-mapping", mapping("slow")).ok(t).into(t, &got)
				c := got.server(t, p, data)
				if got := c.SQL("SELECT (SELECT count(*) FROM in_fast), (SELECT count(*) FROM in_slow)"); got != "1000|1500" {
					t.Errorf("%s: in_fast and in_slow have %s rows", path, got)
				}
				if got := c.SQL("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'slow'"); got != filepath.Join(filepath.Dir(data), "new slow") {
					t.Errorf("%s: slow is at %s", path, got)
				}
				c.SQL("INSERT INTO in_slow VALUES (0, 'of the copy'); CHECKPOINT")
				c.StopImmediate()
				discard(t, data)
			}
			if after := filesBelow(t, original); !slices.Equal(before, after) {
				t.Errorf("the original tablespace had %v, and has %v", before, after)
			}
			if got := a.SQL("SELECT count(*), count(*) FILTER (WHERE i = 0) FROM in_slow"); got != "1500|0" {
				t.Errorf("the original has %s rows", got)
			}
		})
	}
}

// TestTargetDirectory: what holds anything already is refused, and left as it was.
func TestTargetDirectory(t *testing.T) {
	t.Parallel()
	a := newArchived(t, postgresql(t, 15), smallSegments)
	other := newCluster(t, postgresql(t, 15), smallSegments)
	a.backup(t)
	full := filepath.Join(tempDir(t), "full") // discard waits until nothing is mounted beside it
	if err := errors.Join(os.Mkdir(full, 0o755), os.WriteFile(filepath.Join(full, "letter"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	ownedByPostgres(t, full)
	other.Stop()
	for name, dir := range map[string]string{
		"not empty": full, "running server's": a.data, "another cluster's": other.data, "file": filepath.Join(full, "letter"),
		"parent is missing": filepath.Join(full, "no", "data"), "in the repository": filepath.Join(a.repo, "packs"),
	} {
		before := append(filesBelow(t, full), a.notWAL(t)...)
		for _, path := range paths {
			t.Run(path+", "+name, func(t *testing.T) {
				for _, v := range []invocation{{}, asPostgres} {
					a.copyTo(t, v, path, "latest", dir).exits(t, 17)
				}
			})
		}
		if after := append(filesBelow(t, full), a.notWAL(t)...); !slices.Equal(after, before) {
			t.Errorf("%s: files were %v, and are %v", name, before, after)
		}
	}
	if a.SQL("SELECT 1") != "1" {
		t.Error("the source does not answer")
	}
	t.Run("twice", func(t *testing.T) {
		for _, path := range paths {
			data := newTarget(t)
			a.copyTo(t, asPostgres, path, "latest", data).ok(t)
			for _, again := range paths {
				if r := a.copyTo(t, asPostgres, again, "latest", data).exits(t, 17); !strings.Contains(r.stderr, "HINT: ") {
					t.Errorf("%s over %s: no hint:\n%s", again, path, r.stderr)
				}
			}
			discard(t, data)
		}
	})
	t.Run("empty directory that is there", func(t *testing.T) {
		data := newTarget(t)
		if err := os.Mkdir(data, 0o755); err != nil {
			t.Fatal(err)
		}
		ownedByPostgres(t, data)
		a.copyTo(t, asPostgres, "restore", "latest", data).ok(t)
		if info, err := os.Stat(data); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s is %v, %v", data, info, err)
		}
	})
}

// TestInterrupted sends SIGINT to restore and to backup at many moments: 130, and nothing half that looks whole.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	a := newArchived(t, postgresql(t, 15), clusterOptions{walSegmentMB: 1, pgbenchScale: 12, conf: []string{"fsync = off"}})
	t.Run("backup", a.testInterruptedBackup)
	t.Run("server killed", a.testServerKilled)
	a.backup(t)
	t.Run("restore", a.testInterruptedRestore)
	t.Run("thaw", a.testInterruptedThaw)
}

// notWAL lists the repository's objects that are none of WAL.
func (a archived) notWAL(t *testing.T) []string {
	t.Helper()
	return slices.DeleteFunc(filesBelow(t, a.repo), func(path string) bool {
		return strings.HasPrefix(path, filepath.Join(a.repo, "wal")+"/")
	})
}

func (a archived) testInterruptedBackup(t *testing.T) {
	a.fillSegments(1)
	a.waitArchived() // binds the cluster
	before := a.notWAL(t)
	for _, after := range []time.Duration{50, 120, 200, 300, 450} {
		r := a.startSlowBackup(t)
		poll(after*time.Millisecond, r.down)
		a.interrupt(t, r, before)
	}
	r := a.startSlowBackup(t)
	a.waitStreams(t, r)
	if a.interrupt(t, r, before); !strings.Contains(r.text(), "nothing of it is left") {
		t.Errorf("when it had begun it says only\n%s", r.text())
	}
	if n := len(a.backups(t)); n != 0 {
		t.Errorf("%d backups are listed", n)
	}
}

// startSlowBackup starts a backup that takes seconds, once the server has done with the one before.
func (a archived) startSlowBackup(t *testing.T) *running {
	t.Helper()
	waitFor(t, time.Minute, "end of the backup before", func() bool {
		return a.SQL("SELECT (SELECT count(*) FROM pg_stat_progress_basebackup) + (SELECT count(*) FROM pg_replication_slots)") == "0"
	})
	return asPostgres.start(t, "--repo", a.repo, "backup", "main", "--max-rate", "30M", "--pg-connection", a.dsn("postgres"))
}

// waitStreams waits until a backup has begun to receive files.
func (a archived) waitStreams(t *testing.T, backup *running) {
	t.Helper()
	waitFor(t, time.Minute, "the base backup", func() bool {
		return backup.down() || a.SQL("SELECT count(*) FROM pg_stat_progress_basebackup WHERE backup_streamed > 10000000") == "1"
	})
}

// interrupt sends SIGINT to a backup, which leaves the repository as it was before.
func (a archived) interrupt(t *testing.T, r *running, before []string) {
	t.Helper()
	if code := r.end(syscall.SIGINT); code != 130 || !r.killed() && !strings.Contains(r.text(), "interrupted") {
		t.Errorf("interrupted, a backup exits with %d and says\n%s", code, r.text())
	}
	if got := a.notWAL(t); !slices.Equal(got, before) {
		t.Fatalf("the repository has %v, and had %v\n%s", got, before, r.text())
	}
}

// testServerKilled: the server goes away under a backup, which leaves nothing. pgthaw killed so leaves no backup.
func (a archived) testServerKilled(t *testing.T) {
	before := a.notWAL(t)
	r := a.startSlowBackup(t)
	a.waitStreams(t, r)
	a.Kill()
	waitFor(t, time.Minute, "end of the backup", r.down)
	if code := exitCode(r.cmd.ProcessState); code == 0 || code >= 128 || !strings.Contains(r.text(), "nothing of it is left") {
		t.Errorf("exit code %d\n%s", code, r.text())
	}
	if got := a.notWAL(t); !slices.Equal(got, before) {
		t.Errorf("the repository has %v, and had %v", got, before)
	}
	a.Start()
	r = a.startSlowBackup(t)
	a.waitStreams(t, r)
	r.end(syscall.SIGKILL)
	if n := len(a.backups(t)); n != 0 {
		t.Errorf("%d backups are listed", n)
	}
}

func (a archived) testInterruptedRestore(t *testing.T) {
	for _, after := range []time.Duration{20, 60, 90, 120, 150, 200, 250} {
		a.interruptRestore(t, func(r *running, _ string) { poll(after*time.Millisecond, r.down) })
	}
	onItsWay := a.interruptRestore(t, func(r *running, data string) {
		waitFor(t, time.Minute, "the first files", func() bool { return r.down() || exists(filepath.Join(data, "base")) })
	})
	if !onItsWay {
		t.Error("no restore was interrupted on its way")
	}
}

// interruptRestore interrupts a restore when wait returns, and tells whether it had begun to write and had not ended.
func (a archived) interruptRestore(t *testing.T, wait func(r *running, data string)) bool {
	t.Helper()
	data := newTarget(t)
	r := asPostgres.start(t, "--repo", a.repo, "restore", "main", "latest", "--target", data)
	wait(r, data)
	if r.end(syscall.SIGINT) != 130 {
		return false
	}
	if !r.killed() && !strings.Contains(r.text(), "interrupted") {
		t.Errorf("interrupted, it says only\n%s", r.text())
	}
	if !exists(data) {
		return false
	}
	if exists(filepath.Join(data, "global", "pg_control")) || !strings.Contains(r.text(), "incomplete") {
		t.Errorf("pg_control is there, or nothing is said of what is:\n%s", r.text())
	}
	if err := attach(t, a.installation, data, 0).tryStart(); err == nil {
		t.Error("PostgreSQL starts on what is there")
	}
	a.copyTo(t, asPostgres, "restore", "latest", data).exits(t, 17)
	return true
}

// testInterruptedThaw: a thaw that is interrupted takes back all it made.
func (a archived) testInterruptedThaw(t *testing.T) {
	for _, after := range []time.Duration{10, 30, 50, 70, 90} {
		data := newTarget(t)
		t.Cleanup(func() { discard(t, data) })
		r := asPostgres.start(t, "--repo", a.repo, "thaw", "main", "latest", "--target", data)
		if poll(after*time.Millisecond, r.down) || r.end(syscall.SIGINT) != 130 {
			continue
		}
		if len(mountsBelow(data)) > 0 {
			t.Errorf("after %d ms it is still mounted", after)
		}
		absent(t, data)
	}
}
