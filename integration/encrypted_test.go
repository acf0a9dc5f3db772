package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// encrypted is a cluster that archives into an encrypted repository. Only the flags that its test gives carry the key.
type encrypted struct {
	archived
	key invocation
	l   *ledger
}

// TestEncrypted: daemons and restore_command find the key that thaw, restore and mount were given, also when a bare
// environment starts the server anew.
func TestEncrypted(t *testing.T) {
	p := postgresql(t, 17)
	dir := tempDir(t)
	ownedByPostgres(t, dir)
	repo, key := filepath.Join(dir, "repo"), filepath.Join(dir, "key")
	asPostgres.run(t, "repo", "init", repo, "--key-file", key).ok(t)
	archive := fmt.Sprintf("archive_command = '%s --repo %s --key-file %s wal push main \"%%p\"'", filepath.Join(scratch, "bin", "pgthaw"), repo, key)
	e := encrypted{archived: archived{newCluster(t, p, clusterOptions{pgbenchScale: 1, conf: []string{"archive_mode = on", archive}}), repo}}
	e.key = invocation{postgres: true, env: []string{"PGTHAW_REPO=" + repo, "PGTHAW_KEY_FILE=" + key}}
	e.l = startLedger(t, e.cluster, 2)
	e.l.waitCommits(50)
	e.key.run(t, "backup", "main", "--pg-connection", e.dsn("postgres")).ok(t)
	e.l.waitCommits(50)
	e.l.Stop()
	e.Stop() // archives the last segment
	e.pgthaw(t, "list").exits(t, 12)
	e.key.run(t, "repo", "check", "--read-data").ok(t)

	t.Run("restore", e.testRestore)
	t.Run("thaw", e.testThaw)
	t.Run("mount", e.testMount)
	t.Run("key of another user", func(t *testing.T) { e.testForeignKey(t, key) })
}

func (e encrypted) testRestore(t *testing.T) {
	data := newTarget(t)
	e.copyTo(t, e.key, "restore", "latest", data).ok(t)
	e.checkCopy(t, adopt(t, e.installation, data))
}

func (e encrypted) checkCopy(t *testing.T, c *cluster) {
	t.Helper()
	waitFor(t, startLimit, "end of recovery", func() bool { return c.SQL("SELECT pg_is_in_recovery()") == "f" })
	e.l.check(c, len(e.l.commits), len(e.l.commits))
	c.Stop()
}

// testThaw kills the daemon: it takes the key to take the directory up again.
func (e encrypted) testThaw(t *testing.T) {
	data := newTarget(t)
	e.copyTo(t, e.key, "thaw", "latest", data, "--hydrate", "off").ok(t)
	pid := overlayStatus(t, asPostgres, data).PID
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, stopLimit, "end of the daemon", func() bool { return !alive(pid) })
	asPostgres.run(t, "overlay", "resume", data).exits(t, 12)
	e.key.run(t, "overlay", "resume", data).ok(t)
	e.checkCopy(t, adopt(t, e.installation, data))
	asPostgres.run(t, "overlay", "finish", data).ok(t)
}

func (e encrypted) testMount(t *testing.T) {
	dir := e.mount(t, e.key)
	text := shellAs(t, "postgres", "cat "+filepath.Join(dir, "main", "latest", "manifest.json"))
	if !strings.Contains(text, `"cluster": "main"`) {
		t.Errorf("manifest.json is\n%s", text)
	}
}

// testForeignKey has root keep the key to himself: a restored server could not fetch WAL, which is said before anything
// is written; a thawed one gets it through the daemon.
func (e encrypted) testForeignKey(t *testing.T, path string) {
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(tempDir(t), "key")
	if err := os.WriteFile(own, b, 0o600); err != nil {
		t.Fatal(err)
	}
	root := invocation{env: []string{"PGTHAW_KEY_FILE=" + own}}
	data := newTarget(t)
	if r := e.copyTo(t, root, "restore", "latest", data).exits(t, 18); !strings.Contains(r.stderr, "key") {
		t.Errorf("nothing tells of the key:\n%s", r.stderr)
	}
	absent(t, data)
	var got copied
	e.copyTo(t, root, "thaw", "latest", data, "--start", "--hydrate", "off").ok(t).into(t, &got)
	e.checkCopy(t, got.server(t, e.installation, data))
}
