package integration

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestBackupFails ends a backup in the middle in three ways: the repository is as before, and says so, and the next
// backup works.
func TestBackupFails(t *testing.T) {
	t.Parallel()
	a := newArchived(t, postgresql(t, 15), clusterOptions{pgbenchScale: 5, conf: []string{"fsync = off"}})
	a.backup(t)
	for _, way := range []struct {
		name string
		fail func(b backupUnderWay)
	}{
		{"interrupted", func(b backupUnderWay) { b.failed(t, syscall.SIGINT, 130) }},
		{"terminated", func(b backupUnderWay) { b.failed(t, syscall.SIGTERM, 130) }},
		{"server killed", func(b backupUnderWay) {
			a.Kill()
			b.failed(t, 0, 18)
			a.Start()
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			before := objects(t, a.repo)
			b := a.startBackup(t)
			way.fail(b)
			a.checkUnchanged(t, before)
		})
	}
}

// backupUnderWay is a backup that has begun to store.
type backupUnderWay struct{ *running }

// startBackup starts a backup that takes a while, and returns when its first pack is being filled.
func (a archived) startBackup(t *testing.T) backupUnderWay {
	t.Helper()
	b := invocation{postgres: true, env: []string{"PGTHAW_REPO=" + a.repo}}.start(t, "backup", "main", "--full", "--max-rate", "8M",
		"--pg-connection", a.dsn("postgres"))
	waitFor(t, time.Minute, "the backup to stream", func() bool {
		streaming, _ := a.query("postgres", "SELECT count(*) FROM pg_stat_progress_basebackup WHERE backup_streamed > 20000000")
		return streaming == "1" || b.down()
	})
	if b.down() {
		t.Fatalf("the backup has ended:\n%s", b.text())
	}
	return backupUnderWay{b}
}

// failed fails the test unless the backup, sent a signal, ends with one of codes and an error.
func (b backupUnderWay) failed(t *testing.T, s syscall.Signal, codes ...int) {
	t.Helper()
	code := b.end(s)
	if !slices.Contains(codes, code) || !strings.Contains(b.text(), "pgthaw: error: ") || strings.Contains(b.text(), "goroutine ") {
		t.Errorf("the backup ended with exit code %d, want one of %v\n%s", code, codes, b.text())
	}
	t.Logf("exit code %d: %s", code, b.text())
}

// objects lists a repository's objects but for WAL, with their sizes. What a wal push that was killed with its server
// leaves in tmp is no object.
func objects(t *testing.T, repo string) map[string]int64 {
	t.Helper()
	found := map[string]int64{}
	err := filepath.WalkDir(repo, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		key, _ := filepath.Rel(repo, path)
		if err == nil && !strings.HasPrefix(key, "wal/") && !strings.HasPrefix(key, "tmp/") {
			found[key] = info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// checkUnchanged: a backup that failed has left nothing, and the next one works.
func (a archived) checkUnchanged(t *testing.T, before map[string]int64) {
	t.Helper()
	if after := objects(t, a.repo); !maps.Equal(after, before) {
		t.Errorf("the repository holds %v, want %v", after, before)
	}
	a.pgthaw(t, "repo", "check", "--read-data").ok(t)
	whole := len(a.backups(t))
	a.backup(t)
	a.waitArchived() // what is not pushed yet is a gap between backups
	a.pgthaw(t, "repo", "check").ok(t)
	if n := len(a.backups(t)); n != whole+1 {
		t.Errorf("%d backups are listed after the next one, want %d", n, whole+1)
	}
}

// TestBackupDisk fills the repository's file system, makes it read-only and unmounts it under a backup.
func TestBackupDisk(t *testing.T) {
	t.Parallel()
	c := newCluster(t, postgresql(t, 15), clusterOptions{conf: []string{"fsync = off"}})
	dir := postgresDir(t) // what is below the mount could be written to
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=48m,mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil && err != syscall.EINVAL {
			t.Error(err)
		}
	})
	ownedByPostgres(t, dir)
	a := archived{c, filepath.Join(dir, "repo")}
	asPostgres.run(t, "repo", "init", a.repo).ok(t)
	a.backup(t)
	before := objects(t, a.repo)
	a.SQL("CREATE TABLE noise AS SELECT md5(i::text) || md5((i * 7)::text) AS x FROM generate_series(1, 1500000) i")
	a.backupFails(t, "no space left on device")
	a.SQL("DROP TABLE noise; CHECKPOINT")
	a.checkUnchanged(t, before)

	before = objects(t, a.repo)
	remount := func(flags uintptr) {
		if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	remount(syscall.MS_RDONLY)
	a.backupFails(t, "read-only file system")
	remount(0)
	a.checkUnchanged(t, before)

	b := a.startBackup(t)
	if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if b.failed(t, 0, 20); strings.Contains(b.text(), "nothing of it is left") {
		t.Errorf("of a repository that is gone it says\n%s", b.text())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("where the repository was there is now %v, %v", left, err)
	}
	a.pgthaw(t, "list").exits(t, 10)
}

// backupFails fails the test unless a backup fails with exit code 1 and names the errno.
func (a archived) backupFails(t *testing.T, errno string) {
	t.Helper()
	r := a.pgthaw(t, "backup", "main", "--pg-connection", a.dsn("postgres"))
	if r.exits(t, 1); !strings.Contains(r.stderr, errno) {
		t.Errorf("it does not say %q:\n%s", errno, r.stderr)
	}
	t.Logf("exit code %d: %s", r.code, r.stderr)
}
