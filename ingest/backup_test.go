package ingest

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

func TestBackup(t *testing.T) {
	bins := installed()
	if testing.Short() || len(bins) == 0 {
		bins = oldestAndNewest(t)
	}
	for _, bin := range bins {
		t.Run(testName(bin), func(t *testing.T) {
			t.Parallel()
			s := startServer(t, bin, "--data-checksums")
			s.sql("create table t as select i, repeat('x', 100) as x from generate_series(1, 40000) i",
				"create unlogged table u as select 1", "create index on t(i)")
			r := newRepository(t)
			var last Progress
			b := backupOf(t, r, s, BackupOptions{Tool: "test", Progress: func(p Progress) { last = p }})
			checkManifest(t, s, b.Manifest)
			if last.Total < 10<<20 || last.Done > last.Total || last.Done == 0 {
				t.Errorf("progress %+v", last)
			}
			checkTree(t, s, b)

			dir := t.TempDir()
			extract(t, b, dir)
			verifyBackup(t, s, filepath.Join(dir, "pgdata"))
		})
	}
}

func checkManifest(t *testing.T, s *testServer, m *repo.Manifest) {
	t.Helper()
	if m.Timeline != 1 || m.FromStandby || m.Label != DefaultLabel || m.Tool != "test" || !m.DataChecksums || m.PageSize != 8192 {
		t.Errorf("manifest %+v", m)
	}
	if m.StartLSN >= m.StopLSN || m.StartedAt.IsZero() || m.StartedAt.After(m.StoppedAt) {
		t.Errorf("from %s %s to %s %s", m.StartLSN, m.StartedAt, m.StopLSN, m.StoppedAt)
	}
	if m.DataDirectory != s.data || m.ConfigFile != s.data+"/postgresql.conf" || m.Settings["max_connections"] != "100" {
		t.Errorf("data_directory %q, config_file %q, settings %q", m.DataDirectory, m.ConfigFile, m.Settings)
	}
	if m.WALFirst == "" || m.WALLast < m.WALFirst {
		t.Errorf("WAL %q to %q", m.WALFirst, m.WALLast)
	}
}

// checkTree holds the tree against the data directory. A file that the server may write meanwhile is only there.
func checkTree(t *testing.T, s *testServer, b *repo.Backup) {
	t.Helper()
	seen := map[string]bool{}
	err := b.Walk(t.Context(), "pgdata", func(path string, e repo.Entry) error {
		name := strings.TrimPrefix(strings.TrimPrefix(path, "pgdata"), "/")
		seen[name] = true
		info, err := os.Lstat(filepath.Join(s.data, name))
		if errors.Is(err, fs.ErrNotExist) {
			if name != "backup_label" && name != "backup_manifest" && !strings.HasPrefix(name, "pg_wal/") {
				t.Errorf("%s is not in the data directory", name)
			}
			return nil
		}
		if err == nil && info.Mode() != e.Mode {
			t.Errorf("%s: mode %s, want %s", name, e.Mode, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"global/pg_control", "base", "pg_wal/archive_status", "pg_replslot", "postgresql.conf", "backup_label"} {
		if !seen[name] {
			t.Errorf("%s is missing", name)
		}
	}
	for _, name := range []string{"postmaster.pid", "postmaster.opts"} {
		if seen[name] {
			t.Errorf("%s should not be there", name)
		}
	}
}

// verifyBackup runs pg_verifybackup, WAL and all, where the installation has it.
func verifyBackup(t *testing.T, s *testServer, dir string) {
	t.Helper()
	bin := filepath.Join(s.bin, "pg_verifybackup")
	if _, err := os.Stat(bin); err != nil {
		t.Logf("no pg_verifybackup in %s", s.bin)
		return
	}
	if out, err := exec.Command(bin, dir).CombinedOutput(); err != nil {
		t.Fatalf("pg_verifybackup: %v\n%s", err, out)
	}
}

func TestSecondBackupStoresChangedPages(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t))
	s.sql("create table t as select i, md5(i::text) || repeat(md5((i*7)::text), 6) as x from generate_series(1, 40000) i", "vacuum freeze t", "checkpoint")
	r := newRepository(t)
	first := backupOf(t, r, s, BackupOptions{}).Manifest
	s.sql("update t set x = reverse(x) where i between 5000 and 6000", "checkpoint")
	second := backupOf(t, r, s, BackupOptions{}).Manifest
	if second.StoredBytes > first.StoredBytes/10 {
		t.Errorf("the first backup stored %d bytes, the second %d", first.StoredBytes, second.StoredBytes)
	}
	full := backupOf(t, r, s, BackupOptions{Full: true}).Manifest
	if full.StoredBytes < first.StoredBytes/2 {
		t.Errorf("a full backup stored %d bytes, the first %d", full.StoredBytes, first.StoredBytes)
	}
}

func TestBackupTablespaces(t *testing.T) {
	for _, bin := range oldestAndNewest(t) {
		t.Run(testName(bin), func(t *testing.T) {
			t.Parallel()
			testTablespaces(t, bin)
		})
	}
}

// testName is a subtest's for an installation.
func testName(bin string) string { return strings.NewReplacer("/", "_").Replace(bin) }

func testTablespaces(t *testing.T, bin string) {
	s := startServer(t, bin)
	dir := s.mkdir("space")
	s.sql("create tablespace far location '"+dir+"'", "create table f tablespace far as select generate_series(1, 1000) i")
	s.sql("set allow_in_place_tablespaces = on", "create tablespace near location ''", "create table n tablespace near as select generate_series(1, 1000) i", "checkpoint")
	far, near := s.sql("select oid from pg_tablespace where spcname = 'far'"), s.sql("select oid from pg_tablespace where spcname = 'near'")
	r := newRepository(t)
	b := backupOf(t, r, s, BackupOptions{})

	link, err := b.Stat(t.Context(), "pgdata/pg_tblspc/"+far)
	if err != nil || link.Link != dir {
		t.Errorf("link to %q (%v), want %q", link.Link, err, dir)
	}
	farFile, nearFile := s.sql("select pg_relation_filepath('f')"), s.sql("select pg_relation_filepath('n')")
	for path, file := range map[string]string{
		"tablespaces/" + strings.TrimPrefix(farFile, "pg_tblspc/"): farFile,
		"pgdata/" + nearFile: nearFile,
	} {
		want, err := os.ReadFile(filepath.Join(s.data, file))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content(t, b, path), want) {
			t.Errorf("%s differs", path)
		}
	}
	// 15 sends an in-place tablespace as a directory like any other.
	if n := len(b.Manifest.Tablespaces); n != 2 && (n != 1 || b.Manifest.PGVersionNum >= 160000) {
		t.Errorf("tablespaces %+v", b.Manifest.Tablespaces)
	}
	for _, ts := range b.Manifest.Tablespaces {
		if (ts.Path == "pg_tblspc/"+near) != ts.InPlace {
			t.Errorf("tablespace %+v", ts)
		}
	}
	restored := t.TempDir()
	extract(t, b, restored)
	relink := filepath.Join(restored, "pgdata/pg_tblspc", far)
	if err := errors.Join(os.Remove(relink), os.Symlink(filepath.Join(restored, "tablespaces", far), relink)); err != nil {
		t.Fatal(err)
	}
	verifyBackup(t, s, filepath.Join(restored, "pgdata"))
}

func TestCancelledBackupLeavesNothing(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t))
	s.sql("create table t as select i, repeat('x', 1000) as x from generate_series(1, 20000) i")
	r := newRepository(t)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Backup(ctx, r, BackupOptions{Cluster: "main", ConnString: s.connString(), MaxRate: 8192, Progress: func(p Progress) {
		if p.Done > 8<<20 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	checkNothingLeft(t, r, s)
}

func checkNothingLeft(t *testing.T, r *repo.Repository, s *testServer) {
	t.Helper()
	for _, below := range []string{"packs", "backups"} {
		if left := objects(t, r, below); left != nil {
			t.Errorf("left behind: %q", left)
		}
	}
	if s.cmd != nil {
		eventually(t, "the slot is gone", func() bool { return s.sql("select count(*) from pg_replication_slots") == "0" })
	}
}

// TestCaptureAfterTheFiles: a small backup's files may all be there before the capture takes in its first message.
func TestCaptureAfterTheFiles(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t), "--wal-segsize=1")
	r := newRepository(t)
	server, err := connect(t.Context(), s.connString(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer server.close(t.Context())
	if _, err := r.BindCluster(t.Context(), "main", server.systemID, server.segmentSize); err != nil {
		t.Fatal(err)
	}
	wal, err := server.openCapture(t.Context(), r, "main")
	if err != nil {
		t.Fatal(err)
	}
	defer closeConn(t.Context(), wal.conn)
	s.sql("select pg_switch_wal()", "create table t ()")
	lsn, err := pg.ParseLSN(s.sql("select pg_current_wal_insert_lsn()"))
	if err != nil {
		t.Fatal(err)
	}
	s.sql("select pg_switch_wal()")
	wal.stopLSN.Store(uint64(lsn))
	ended, end := context.WithCancel(t.Context())
	end()
	got, err := wal.run(t.Context(), ended, position{lsn: lsn, timeline: 1}, server.segmentSize)
	if err != nil {
		t.Fatal(err)
	}
	if want := server.segmentSize.Segment(lsn); got.first != want || got.last != want || got.partial != nil {
		t.Errorf("got segments %d to %d, %d bytes of a partial one, want all of %d", got.first, got.last, len(got.partial), want)
	}
}

func TestBackupByReplicationRole(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t))
	s.sql("create role copier login replication")
	r := newRepository(t)
	m, err := Backup(t.Context(), r, BackupOptions{Cluster: "main", ConnString: "host=" + s.top + " user=copier"})
	if err != nil {
		t.Fatal(err)
	}
	if m.Settings["max_connections"] != "100" || m.PGVersionNum < minVersion || m.SegmentSize != pg.DefaultSegmentSize {
		t.Errorf("manifest %+v", m)
	}
	if _, visible := m.Settings["data_directory"]; visible {
		t.Error("data_directory is visible to an ordinary role")
	}
}

func TestBackupFromStandby(t *testing.T) {
	for _, bin := range oldestAndNewest(t) {
		t.Run(testName(bin), func(t *testing.T) {
			t.Parallel()
			s := startServer(t, bin, "--wal-segsize=1")
			sb := s.standby()
			s.sql("create table t as select generate_series(1, 50000) i", "checkpoint")
			target := s.sql("select pg_current_wal_lsn()")
			eventually(t, "the standby has replayed everything", func() bool {
				return sb.sql("select pg_last_wal_replay_lsn() >= '"+target+"'") == "t"
			})
			r := newRepository(t)
			b := backupOf(t, r, sb, BackupOptions{})
			if !b.Manifest.FromStandby || b.Manifest.StoppedAt.IsZero() {
				t.Errorf("manifest %+v", b.Manifest)
			}
			last, err := b.Stat(t.Context(), walDir+"/"+b.Manifest.WALLast)
			if err != nil || last.Size != 1<<20 {
				t.Errorf("last segment %d bytes, %v", last.Size, err)
			}
			dir := t.TempDir()
			extract(t, b, dir)
			verifyBackup(t, s, filepath.Join(dir, "pgdata"))
		})
	}
}

func TestPromotionDuringBackup(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t))
	s.sql("create table t as select i, repeat('x', 1000) as x from generate_series(1, 20000) i", "checkpoint")
	sb := s.standby()
	r := newRepository(t)
	var once sync.Once
	_, err := Backup(t.Context(), r, BackupOptions{Cluster: "main", ConnString: sb.connString(), MaxRate: 8192, Progress: func(p Progress) {
		if p.Done > 4<<20 {
			once.Do(func() { sb.sql("select pg_promote()") })
		}
	}})
	if err == nil || !strings.Contains(err.Error(), "promoted") {
		t.Errorf("got %v", err)
	}
	checkNothingLeft(t, r, sb)
}

func TestBackupOnLaterTimeline(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t))
	sb := s.standby()
	sb.sql("select pg_promote()", "create table t as select 1")
	r := newRepository(t)
	b := backupOf(t, r, sb, BackupOptions{})
	if b.Manifest.Timeline != 2 {
		t.Errorf("timeline %s", b.Manifest.Timeline)
	}
	want, err := os.ReadFile(filepath.Join(sb.data, "pg_wal/00000002.history"))
	if err != nil {
		t.Fatal(err)
	}
	if got := content(t, b, walDir+"/00000002.history"); !bytes.Equal(got, want) {
		t.Errorf("history %q, want %q", got, want)
	}
}

func TestKilledServer(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t))
	s.sql("create table t as select i, repeat('x', 1000) as x from generate_series(1, 20000) i")
	r := newRepository(t)
	var once sync.Once
	_, err := Backup(t.Context(), r, BackupOptions{Cluster: "main", ConnString: s.connString(), MaxRate: 8192, Progress: func(p Progress) {
		if p.Done > 4<<20 {
			once.Do(func() { s.stop(syscall.SIGQUIT) })
		}
	}})
	if err == nil {
		t.Error("a backup of a server that was killed")
	}
	t.Log(err)
	checkNothingLeft(t, r, s)
}

// A page whose checksum is wrong fails the backup at its end, unless that is wanted.
func TestWrongChecksum(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t), "--data-checksums")
	s.sql("create table t as select generate_series(1, 10000) i", "checkpoint")
	path := filepath.Join(s.data, s.sql("select pg_relation_filepath('t')"))
	s.stop(syscall.SIGINT)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damaged"), 8192+4000); err != nil {
		t.Fatal(err)
	}
	f.Close()
	s.start()
	r := newRepository(t)
	var log bytes.Buffer
	o := BackupOptions{Cluster: "main", ConnString: s.connString(), Log: slog.New(slog.NewTextHandler(&log, nil))}
	_, err = Backup(t.Context(), r, o)
	wantRefused(t, err, "checksum", "--no-verify-checksums")
	if !strings.Contains(log.String(), "checksum verification failed in file") {
		t.Errorf("log %q", log.String())
	}
	checkNothingLeft(t, r, s)
	o.NoVerifyChecksums = true
	if _, err := Backup(t.Context(), r, o); err != nil {
		t.Error(err)
	}
}

// Commits must not wait for us where any standby may be a synchronous one, and a shutdown must not either.
func TestSynchronousStandbyNames(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t))
	sb := s.standby()
	s.configure("synchronous_standby_names = '*'", "statement_timeout = 1min", "wal_sender_timeout = 1min") // ends of such waits
	s.sql("select pg_reload_conf()", "create table t(i int)")
	r := newRepository(t)
	startStream(t, r, s)
	s.switchWAL(1)
	arrives(t, r, s)
	b := backupOf(t, r, s, BackupOptions{})
	began := time.Now()
	for n := 0; n < 50 && time.Since(began) < time.Minute; n++ {
		s.sql("insert into t values (1)")
	}
	s.stop(syscall.SIGINT)
	if d := time.Since(began); d > 50*time.Second {
		t.Errorf("fifty commits and a shutdown took %s", d)
	}
	if b.Manifest.StoppedAt.IsZero() {
		t.Error("no time")
	}
	sb.stop(syscall.SIGQUIT)
}
