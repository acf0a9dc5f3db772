package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// walStopped says what recovery prints when restore_command ends over 125.
const walStopped = "FATAL:  could not restore file"

// fetch runs wal fetch with a path of its own, and gives that.
func (a archived) fetch(t *testing.T, repo, cluster, name string) (r result, path string) {
	t.Helper()
	dir := postgresDir(t)
	path = filepath.Join(dir, "RECOVERYXLOG")
	return asPostgres.run(t, "--repo", repo, "wal", "fetch", cluster, name, path), path
}

// fetchRefused fails the test unless wal fetch exits with code and leaves nothing where the file was to be.
func (a archived) fetchRefused(t *testing.T, repo, cluster, name string, code int) {
	t.Helper()
	r, path := a.fetch(t, repo, cluster, name)
	r.exits(t, code)
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
	if !strings.HasPrefix(r.stderr, "pgthaw: ") {
		t.Errorf("it did not say why:\n%s", r.stderr)
	}
}

// keepingCopies is a cluster that archives both by wal push and by cp, into the directory it gives.
func keepingCopies(t *testing.T, p installation, o clusterOptions) (a archived, copies string) {
	t.Helper()
	copies = postgresDir(t)
	a = newArchived(t, p, o)
	a.appendSetting("archive_command", a.SQL("SHOW archive_command")+` && cp "%p" `+copies+"/%f")
	return a, copies
}

// appendSetting sets what a reload suffices for.
func (c *cluster) appendSetting(name, value string) {
	c.t.Helper()
	c.SQL(fmt.Sprintf("ALTER SYSTEM SET %s = '%s'", name, strings.ReplaceAll(value, "'", "''")))
	c.SQL("SELECT pg_reload_conf()")
	waitFor(c.t, time.Minute, "new "+name, func() bool { return c.SQL("SHOW "+name) == value })
}

// fillSegments writes until n segments more are begun.
func (c *cluster) fillSegments(n int) {
	c.t.Helper()
	for i := range n {
		c.SQL(fmt.Sprintf("CREATE TABLE IF NOT EXISTS filled (i int); INSERT INTO filled VALUES (%d)", i))
		c.SQL("SELECT pg_switch_wal()")
	}
}

// waitArchived waits until the archiver has nothing left to do.
func (c *cluster) waitArchived() {
	c.t.Helper()
	waitFor(c.t, time.Minute, "the archiver", func() bool {
		left, _ := filepath.Glob(filepath.Join(c.data, "pg_wal", "archive_status", "*.ready"))
		return len(left) == 0
	})
}

// sameAs fails the test unless two files have the same bytes.
func sameAs(t *testing.T, got, want string) {
	t.Helper()
	g, err1 := os.ReadFile(got)
	w, err2 := os.ReadFile(want)
	if err1 != nil || err2 != nil || !bytes.Equal(g, w) {
		t.Errorf("%s (%d bytes, %v) is not %s (%d bytes, %v)", got, len(g), err1, want, len(w), err2)
	}
}

// TestWALFetch asks for every kind of file in every state: right bytes, a certain end, or 200.
func TestWALFetch(t *testing.T) {
	t.Parallel()
	a, copies := keepingCopies(t, postgresql(t, 15), smallSegments)
	a.fillSegments(8)
	a.backup(t)
	a.fillSegments(2)
	a.waitArchived()
	files, _ := os.ReadDir(copies)
	if len(files) < 10 {
		t.Fatalf("archive has %v", files)
	}
	for _, f := range files {
		r, path := a.fetch(t, a.repo, "main", f.Name())
		r.ok(t)
		sameAs(t, path, filepath.Join(copies, f.Name()))
		a.pgthaw(t, "wal", "fetch", "main", f.Name(), path).ok(t) // over the file that is there
		sameAs(t, path, filepath.Join(copies, f.Name()))
	}

	all := a.walObjects(t)
	last := all[len(all)-1]
	after := func(n uint64) string {
		no, _ := strconv.ParseUint(last[16:], 16, 32)
		return fmt.Sprintf("%s%08X", last[:16], no+n)
	}
	t.Run("end", func(t *testing.T) {
		a.fetchRefused(t, a.repo, "main", after(1), 1)
		a.fetchRefused(t, a.repo, "main", after(2), 1)
		a.fetchRefused(t, a.repo, "main", "00000002.history", 1)
		a.fetchRefused(t, a.repo, "main", "00000002"+after(1)[8:], 1)
	})
	t.Run("malformed", func(t *testing.T) {
		for _, name := range []string{"", "x", "00000001", last + "0", "../" + last, last[:20] + "zzzz", "00000000" + last[8:]} {
			a.fetchRefused(t, a.repo, "main", name, 200)
		}
		a.pgthaw(t, "wal", "fetch", "main", last).exits(t, 200)
		a.pgthaw(t, "wal", "fetch", "--no-such-flag", "main", last, "/tmp/x").exits(t, 200)
	})
	t.Run("elsewhere", func(t *testing.T) {
		a.fetchRefused(t, a.repo, "nobody", last, 200)
		a.fetchRefused(t, a.repo+"x", "main", last, 200)
		a.fetchRefused(t, a.repo+"x", "main", after(1), 200)
		a.fetchRefused(t, "", "main", last, 200)
		a.pgthaw(t, "wal", "fetch", "main", last, "/no/such/directory/RECOVERYXLOG").exits(t, 200)
	})
	t.Run("gap", func(t *testing.T) {
		a.removeWAL(t, all[3])
		a.fetchRefused(t, a.repo, "main", all[3], 200)
	})
	t.Run("damaged", func(t *testing.T) { a.testDamagedWAL(t, copies, all[4]) })
	t.Run("unreadable", func(t *testing.T) {
		for _, path := range []string{a.walFile(all[5]), filepath.Dir(a.walFile(all[5])), filepath.Join(a.repo, "wal"), a.repo} {
			a.withoutAccess(t, path, func() {
				a.fetchRefused(t, a.repo, "main", all[5], 200)
				if path != a.walFile(all[5]) {
					a.fetchRefused(t, a.repo, "main", after(1), 200)
				}
			})
		}
	})
	t.Run("directories gone", func(t *testing.T) {
		for _, path := range []string{filepath.Dir(a.walFile(last)), filepath.Join(a.repo, "wal"), a.repo} {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if path == a.repo {
				a.fetchRefused(t, a.repo, "main", last, 200)
			}
		}
	})
}

// withoutAccess takes a path's permissions away while do runs.
func (a archived) withoutAccess(t *testing.T, path string, do func()) {
	t.Helper()
	info, err := os.Stat(path)
	if err == nil {
		err = os.Chmod(path, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	do()
	if err := os.Chmod(path, info.Mode()); err != nil {
		t.Fatal(err)
	}
}

// testDamagedWAL flips a byte in every part of a WAL object and cuts it off everywhere. Some bits of a zstd frame do not
// matter to what comes out of it: the right bytes, verified, will do.
func (a archived) testDamagedWAL(t *testing.T, copies, name string) {
	whole, err := os.ReadFile(a.walFile(name))
	if err != nil {
		t.Fatal(err)
	}
	put := func(t *testing.T, content []byte) {
		if err := os.WriteFile(a.walFile(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range []int{0, 4, 9, 40, len(whole) / 3, len(whole) / 2, len(whole) - 40, len(whole) - 1} {
		t.Run(fmt.Sprintf("byte %d of %d", at, len(whole)), func(t *testing.T) {
			damaged := bytes.Clone(whole)
			damaged[at] ^= 0x10
			put(t, damaged)
			if r, path := a.fetch(t, a.repo, "main", name); r.code == 0 {
				sameAs(t, path, filepath.Join(copies, name))
			} else {
				a.fetchRefused(t, a.repo, "main", name, 200)
			}
		})
	}
	for _, n := range []int{0, 1, 20, len(whole) / 2, len(whole) - 1} {
		t.Run(fmt.Sprintf("cut to %d", n), func(t *testing.T) {
			put(t, whole[:n])
			a.fetchRefused(t, a.repo, "main", name, 200)
		})
	}
}

// TestRecoveryStops starts restored clusters by hand over a gap and over a damaged segment: PostgreSQL must not promote.
func TestRecoveryStops(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			a := newArchived(t, p, smallSegments)
			a.backup(t)
			a.fillSegments(8)
			a.Stop()
			wal := a.walObjects(t)
			victim := wal[len(wal)-4]
			whole, err := os.ReadFile(a.walFile(victim))
			if err != nil {
				t.Fatal(err)
			}
			for _, damage := range []struct {
				name string
				do   func() error
			}{
				{"gap", func() error { return os.Remove(a.walFile(victim)) }},
				{"damaged", func() error {
					damaged := bytes.Clone(whole)
					for i := range 16 {
						damaged[len(damaged)/2+i] ^= 0xff
					}
					return os.WriteFile(a.walFile(victim), damaged, 0o600)
				}},
				{"repository gone", func() error { return os.Rename(a.repo, a.repo+".away") }},
			} {
				t.Run(damage.name, func(t *testing.T) {
					data := newTarget(t)
					a.copyTo(t, asPostgres, "restore", "latest", data).ok(t)
					if err := damage.do(); err != nil {
						t.Fatal(err)
					}
					a.doesNotPromote(t, data)
					_ = os.Rename(a.repo+".away", a.repo)
					if err := os.WriteFile(a.walFile(victim), whole, 0o600); err != nil {
						t.Fatal(err)
					}
					ownedByPostgres(t, a.walFile(victim))
					c := adopt(t, a.installation, data) // nothing is lost: once the repository is well, recovery goes on
					c.waitRecovered()
					if got := c.SQL("SELECT count(*) FROM filled"); got != "8" {
						t.Errorf("filled has %s rows, want 8", got)
					}
				})
			}
		})
	}
}

// doesNotPromote starts a server and fails the test unless it ends by itself, on its old timeline.
func (a archived) doesNotPromote(t *testing.T, data string) {
	t.Helper()
	c := attach(t, a.installation, data, 0)
	if err := c.tryStart(); err == nil { // it answered when it was consistent
		waitFor(t, startLimit, "end of the server", func() bool { return c.pid() == 0 })
	}
	log, _ := os.ReadFile(c.logFile())
	if !strings.Contains(string(log), walStopped) {
		t.Errorf("the server does not say %q:\n%s", walStopped, c.logTail())
	}
	if found, _ := filepath.Glob(filepath.Join(data, "pg_wal", "*.history")); len(found) > 0 {
		t.Errorf("it promoted: %v", found)
	}
}

// TestWALPush pushes by hand what a server would.
func TestWALPush(t *testing.T) {
	t.Parallel()
	a := newArchived(t, postgresql(t, 15), smallSegments)
	other := newCluster(t, postgresql(t, 15), smallSegments)
	a.fillSegments(3)
	a.waitArchived()
	other.fillSegments(1)
	all := a.walObjects(t)
	dir := postgresDir(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, content []byte) string {
		if err := os.WriteFile(in(name), content, 0o644); err != nil {
			t.Fatal(err)
		}
		return in(name)
	}
	push := func(path string) result { return a.pgthaw(t, "wal", "push", "main", path) }
	refused := func(path string) {
		t.Helper()
		if r := push(path); r.code == 0 || r.code > 125 {
			t.Errorf("push of %s: exit code %d\n%s", path, r.code, r.stderr)
		}
	}
	stored := func(name string, want []byte) {
		t.Helper()
		r, path := a.fetch(t, a.repo, "main", name)
		r.ok(t)
		if got, _ := os.ReadFile(path); !bytes.Equal(got, want) {
			t.Errorf("%s has %d bytes, want the %d of before", name, len(got), len(want))
		}
	}

	_, path := a.fetch(t, a.repo, "main", all[0])
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	push(write(all[0], whole)).ok(t) // again
	changed := bytes.Clone(whole)
	changed[len(changed)-5] ^= 1
	refused(write(all[0], changed))
	refused(write(all[0], whole[:len(whole)-8192]))
	refused(write(all[0], nil))
	stored(all[0], whole)

	history := []byte("1\t0/900000\tno recovery target specified\n")
	for name, content := range map[string][]byte{
		"00000002.history":                 history,
		all[0] + ".00000028.backup":        []byte("START WAL LOCATION: 0/800028\n"),
		"0000000100000000000000F0.partial": a.segmentAs(t, whole, "0000000100000000000000F0"),
	} {
		push(write(name, content)).ok(t)
		push(in(name)).ok(t)
		if strings.HasSuffix(name, ".partial") {
			continue
		}
		stored(name, content)
		refused(write(name, append([]byte("2"), content...)))
		stored(name, content)
	}

	foreign, _ := filepath.Glob(filepath.Join(other.data, "pg_wal", "0000000100000000*"))
	slices.Sort(foreign)
	refused(foreign[0])
	refused(in("0000000100000000000000EE")) // not there
	refused(write("postgresql.conf", whole))
	refused(write("0000000100000000000000EE", []byte("no WAL")))
	for _, path := range []string{a.repo + "x", ""} {
		if r := asPostgres.run(t, "--repo", path, "wal", "push", "main", in(all[0])); r.code == 0 || r.code > 125 {
			t.Errorf("push to repository %q: exit code %d", path, r.code)
		}
	}
}

// segmentAs gives a segment's first page the address that another name stands for.
func (a archived) segmentAs(t *testing.T, content []byte, name string) []byte {
	t.Helper()
	moved := bytes.Clone(content)
	at := uint64(segmentStart(t, name, uint64(len(content))))
	for i := range 8 {
		moved[8+i] = byte(at >> (8 * i)) // xlp_pageaddr
	}
	return moved
}

// TestArchiverIsContent runs a server for a while, with a promotion in it: pg_stat_archiver counts no failure.
func TestArchiverIsContent(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			a := newArchived(t, p, clusterOptions{walSegmentMB: 1, pgbenchScale: 1, conf: []string{"fsync = off"}})
			a.backup(t)
			a.cluster.pgbench("--client", "2", "--transactions", "300")
			r := a.Replica()
			a.fillSegments(2)
			r.waitReplayed(a.cluster)
			a.Stop()
			r.SQL("SELECT pg_promote()")
			r.fillSegments(2)
			r.waitArchived()
			if got := r.SQL("SELECT failed_count, archived_count > 2 FROM pg_stat_archiver"); got != "0|t" {
				t.Errorf("pg_stat_archiver says %s, want 0|t\n%s", got, r.logTail())
			}
			if log, _ := os.ReadFile(a.logFile()); bytes.Contains(log, []byte("archive command failed")) {
				t.Errorf("archiving failed:\n%s", a.logTail())
			}
			data := newTarget(t)
			var got copied
			a.copyTo(t, asPostgres, "restore", "latest", data, "--start").ok(t).into(t, &got)
			c := got.server(t, p, data)
			if rows := c.SQL("SELECT count(*) FROM filled"); rows != "4" || got.Recovery.Timeline != 3 {
				t.Errorf("filled has %s rows on timeline %d, want 4 on 3", rows, got.Recovery.Timeline)
			}
			c.StopImmediate()
		})
	}
}

// TestWALStream streams under load, is killed again and again, and follows a promotion: its segments are the archiver's.
func TestWALStream(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			testStream(t, p)
		})
	}
}

func testStream(t *testing.T, p installation) {
	copies, dir := postgresDir(t), postgresDir(t)
	conf := []string{"fsync = off", "archive_mode = on", `archive_command = 'cp "%p" ` + copies + `/%f'`, "max_wal_size = 32MB", "min_wal_size = 4MB"}
	c := newCluster(t, p, clusterOptions{walSegmentMB: 1, conf: conf, pgbenchScale: 1})
	a := archived{c, filepath.Join(dir, "repo")}
	a.pgthaw(t, "repo", "init", a.repo).ok(t)
	stream := func(server *cluster, args ...string) *running {
		args = append([]string{"--repo", a.repo, "wal", "stream", "main", "--pg-connection", server.dsn("postgres")}, args...)
		return asPostgres.start(t, args...)
	}
	s := stream(c, "--create-slot")
	waitFor(t, time.Minute, "the slot", func() bool {
		return c.SQL("SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name = 'pgthaw'") == "1"
	})
	first := c.SQL("SELECT pg_walfile_name(restart_lsn) FROM pg_replication_slots")
	l := startLedger(t, c, 2)
	for range 3 {
		l.waitCommits(200)
		c.SQL("SELECT pg_switch_wal()")
		l.waitCommits(100)
		if code := s.end(syscall.SIGKILL); code != 128+int(syscall.SIGKILL) {
			t.Fatalf("the stream ended by itself, exit code %d:\n%s", code, s.text())
		}
		l.waitCommits(100)
		c.SQL("SELECT pg_switch_wal(); CHECKPOINT")
		s = stream(c)
	}
	l.Stop()
	last := c.SQL("SELECT pg_walfile_name(pg_switch_wal() - 1)")
	waitFor(t, time.Minute, "segment "+last+" in the repository", func() bool { return exists(a.walFile(last)) })
	if code := s.end(syscall.SIGTERM); code != 0 {
		t.Errorf("on SIGTERM it exits with %d\n%s", code, s.text())
	}
	c.waitArchived()
	a.sameSegments(t, copies, first, last)

	a.backup(t)
	r := c.Replica()
	r.SQL("SELECT pg_create_physical_replication_slot('pgthaw', true)")
	s = stream(r)
	c.fillSegments(2)
	c.waitArchived()
	r.waitReplayed(c)
	c.Stop()
	r.SQL("SELECT pg_promote()")
	r.fillSegments(1)
	r.SQL("INSERT INTO filled VALUES (9)")
	last = r.SQL("SELECT pg_walfile_name(pg_switch_wal() - 1)")
	waitFor(t, time.Minute, "segment "+last+" in the repository\n"+s.text(), func() bool { return exists(a.walFile(last)) })
	if code := s.end(syscall.SIGINT); code != 0 {
		t.Errorf("on SIGINT it exits with %d\n%s", code, s.text())
	}
	r.waitArchived()
	a.sameSegments(t, copies, "00000002"+first[8:], last)
	sameFetched(t, a, copies, "00000002.history")

	data := newTarget(t)
	var got copied
	a.copyTo(t, asPostgres, "restore", "latest", data, "--start").ok(t).into(t, &got)
	back := got.server(t, p, data)
	l.check(back, len(l.commits), len(l.commits))
	if rows := back.SQL("SELECT count(*) FROM filled"); rows != "4" {
		t.Errorf("filled has %s rows, want 4", rows)
	}
	back.StopImmediate()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// sameSegments fails the test unless the repository has the same segments of a timeline as the directory, from first to last.
func (a archived) sameSegments(t *testing.T, copies, first, last string) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(copies, first[:8]+strings.Repeat("[0-9A-F]", 16)))
	n := 0
	for _, f := range files {
		if name := filepath.Base(f); name >= first && name <= last {
			sameFetched(t, a, copies, name)
			n++
		}
	}
	if n < 2 {
		t.Errorf("the server archived %d segments from %s to %s", n, first, last)
	}
}

func sameFetched(t *testing.T, a archived, copies, name string) {
	t.Helper()
	r, path := a.fetch(t, a.repo, "main", name)
	r.ok(t)
	sameAs(t, path, filepath.Join(copies, name))
	_ = os.Remove(path)
}
