package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// encrypted is a cluster that archives into a repository, whose key lies where "repo init" put it.
type encrypted struct {
	archived
	l *ledger
}

// madeRepository is what "repo init --json" says.
type madeRepository struct {
	ID         string `json:"id"`
	Encryption string `json:"encryption"`
	KeyFile    string `json:"key_file"`
}

// withoutHome is the server's user with another environment than the one that made the key: what daemons and servers get that
// are started after a reboot.
var withoutHome = invocation{postgres: true, env: []string{"HOME=/nonexistent", "XDG_CONFIG_HOME=/nonexistent"}}

// TestEncrypted: daemons and restore_command find the key that thaw, restore and mount found or were given, also when a bare
// environment starts them anew.
func TestEncrypted(t *testing.T) {
	t.Parallel()
	p := postgresql(t, 17)
	e := encrypted{archived: newArchived(t, p, clusterOptions{pgbenchScale: 1})}
	e.l = startLedger(t, e.cluster, 2)
	e.l.waitCommits(50)
	e.backup(t)
	e.l.waitCommits(50)
	e.l.Stop()
	e.Stop() // archives the last segment
	e.pgthaw(t, "repo", "check", "--read-data").ok(t)
	key := e.keyFile(t)
	e.in(withoutHome).run(t, "list").exits(t, 12)

	given := filepath.Join(tempDir(t), "given")
	shell(t, "cp -p "+key+" "+given)
	byFlag := e.in(withoutHome, "PGTHAW_KEY_FILE="+given)
	t.Run("restore", func(t *testing.T) { e.testRestore(t, e.in(asPostgres)) })
	t.Run("restore with a key given", func(t *testing.T) { e.testRestore(t, byFlag) })
	t.Run("thaw", func(t *testing.T) { e.testThaw(t, e.in(asPostgres), key) })
	t.Run("thaw with a key given", func(t *testing.T) { e.testThaw(t, byFlag, given) })
	t.Run("mount", func(t *testing.T) { e.testMount(t, byFlag) })
	t.Run("root's key", func(t *testing.T) { e.testForeignKey(t, key) })
	t.Run("recovery sheet", func(t *testing.T) { e.testRecoverySheet(t) })
}

// in adds the repository, and more, to an invocation's environment.
func (e encrypted) in(v invocation, more ...string) invocation {
	v.env = append(append([]string{"PGTHAW_REPO=" + e.repo}, v.env...), more...)
	return v
}

// keyFile is where the repository's key was put.
func (e encrypted) keyFile(t *testing.T) string {
	t.Helper()
	var c madeRepository
	text, err := os.ReadFile(filepath.Join(e.repo, "config"))
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil || c.Encryption != "aes-256-gcm" {
		t.Fatalf("config is\n%s(%v)", text, err)
	}
	return filepath.Join(scratch, "config", "pgthaw", "keys", c.ID+".key")
}

func (e encrypted) testRestore(t *testing.T, v invocation) {
	data := newTarget(t)
	e.copyTo(t, v, "restore", "latest", data).ok(t)
	e.checkCopy(t, adopt(t, e.installation, data))
}

func (e encrypted) checkCopy(t *testing.T, c *cluster) {
	t.Helper()
	c.waitRecovered()
	e.l.check(c, len(e.l.commits), len(e.l.commits))
	c.Stop()
}

// testThaw kills the daemon. The directory is taken up again with the key that it was thawed with, if that is still there.
func (e encrypted) testThaw(t *testing.T, v invocation, key string) {
	data := newTarget(t)
	e.copyTo(t, v, "thaw", "latest", data, "--hydrate", "off").ok(t)
	e.killOverlay(t, data)
	if err := os.Rename(key, key+".away"); err != nil {
		t.Fatal(err)
	}
	r := withoutHome.run(t, "overlay", "resume", data).exits(t, 12)
	if !strings.Contains(r.stderr, key) || !strings.Contains(r.stderr, "HINT: ") {
		t.Errorf("it does not say where it looked for the key:\n%s", r.stderr)
	}
	e.in(withoutHome, "PGTHAW_KEY_FILE="+key+".away").run(t, "overlay", "resume", data).ok(t)
	e.killOverlay(t, data)
	if err := os.Rename(key+".away", key); err != nil {
		t.Fatal(err)
	}
	withoutHome.run(t, "overlay", "resume", data).ok(t)
	e.checkCopy(t, adopt(t, e.installation, data))
	asPostgres.run(t, "overlay", "finish", data).ok(t)
}

func (e encrypted) killOverlay(t *testing.T, data string) {
	t.Helper()
	pid := overlayStatus(t, asPostgres, data).PID
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, stopLimit, "end of the daemon", func() bool { return !alive(pid) })
}

func (e encrypted) testMount(t *testing.T, v invocation) {
	dir := e.mount(t, v)
	text := shellAs(t, "postgres", "cat "+filepath.Join(dir, "main", "latest", "manifest.json"))
	if !strings.Contains(text, `"cluster": "main"`) {
		t.Errorf("manifest.json is\n%s", text)
	}
}

// testForeignKey has root keep the key to himself, in his own home: a restored server could not fetch WAL, which is said before
// anything is written; a thawed one gets it through the daemon.
func (e encrypted) testForeignKey(t *testing.T, key string) {
	home := filepath.Join(tempDir(t), "home")
	own := filepath.Join(home, ".config", "pgthaw", "keys", filepath.Base(key))
	shell(t, "install -D -m 600 -o root -g root "+key+" "+own)
	root := e.in(invocation{}, "HOME="+home, "XDG_CONFIG_HOME=")
	data := newTarget(t)
	if r := e.copyTo(t, root, "restore", "latest", data).exits(t, 18); !strings.Contains(r.stderr, own) || !strings.Contains(r.stderr, "its key") {
		t.Errorf("nothing tells of the key:\n%s", r.stderr)
	}
	absent(t, data)
	var got copied
	e.copyTo(t, root, "thaw", "latest", data, "--start", "--hydrate", "off").exits(t, 0).into(t, &got)
	e.checkCopy(t, got.server(t, e.installation, data))
}

// testRecoverySheet has a new host, which has the repository and the sheet, follow what the sheet says.
func (e encrypted) testRecoverySheet(t *testing.T) {
	sheet := e.pgthaw(t, "repo", "key", "export").ok(t).stdout
	home := postgresDir(t)
	var key, commands []string
	for line := range strings.Lines(sheet) {
		line, indented := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "    ")
		switch {
		case !indented:
		case len(key) < 3:
			key = append(key, line)
		default:
			commands = append(commands, line)
		}
	}
	script := "export HOME=" + home + " PATH=" + filepath.Join(scratch, "bin") + ":$PATH; unset XDG_CONFIG_HOME; cd\n" +
		strings.Replace(strings.Join(commands, "\n"), "> recovery.key)", "> recovery.key) <<TYPED\n"+strings.ToLower(strings.Join(key, "\n"))+"\nTYPED", 1) +
		"\nrm recovery.key; pgthaw --repo " + e.repo + " restore main latest --target " + home + "/data"
	cmd := exec.Command("sh", "-ec", script)
	becomePostgres(t, cmd)
	out, err := cmd.CombinedOutput()
	if err != nil || len(commands) != 3 {
		t.Fatalf("%v\n%s\nof the sheet\n%s", err, out, sheet)
	}
	e.checkCopy(t, adopt(t, e.installation, filepath.Join(home, "data")))
}

// TestKeyOfTheOwner: a repository that root makes in somebody's directory has its key in that user's home, and is that user's in
// everything; root finds it there. Nothing is made with root's rights in a home that leads elsewhere.
func TestKeyOfTheOwner(t *testing.T) {
	dir := tempDir(t)
	repo := filepath.Join(dir, "repo")
	if err := os.Mkdir(repo, 0o700); err != nil {
		t.Fatal(err)
	}
	ownedByPostgres(t, repo)
	var made madeRepository
	pgthaw(t, "repo", "init", repo, "--json").ok(t).into(t, &made)
	home := strings.TrimSpace(shell(t, "getent passwd postgres | cut -d: -f6"))
	want := filepath.Join(home, ".config", "pgthaw", "keys", made.ID+".key")
	if made.KeyFile != want {
		t.Fatalf("the key is in %s, want %s", made.KeyFile, want)
	}
	t.Cleanup(func() {
		shell(t, "cd "+home+" && rm -f "+want+" && rmdir --ignore-fail-on-non-empty -p .config/pgthaw/keys")
	})
	if got := strings.TrimSpace(shell(t, "stat -c '%U %a' "+want)); got != "postgres 600" {
		t.Errorf("the key file is of %s", got)
	}
	pgthaw(t, "--repo", repo, "repo", "check").ok(t)
	invocation{postgres: true, env: []string{"HOME=/root", "XDG_CONFIG_HOME="}}.run(t, "--repo", repo, "list").ok(t)
	invocation{postgres: true, env: []string{"HOME=" + home, "XDG_CONFIG_HOME="}}.run(t, "--repo", repo, "list").ok(t)
}

// TestKeyOfTheHost: root's repositories have their keys in the host's directory, where the server's user reads them, too: also
// when the repository is given to that user afterwards.
func TestKeyOfTheHost(t *testing.T) {
	repo := filepath.Join(tempDir(t), "repo")
	root := invocation{env: []string{"HOME=" + strings.TrimSpace(shell(t, "getent passwd root | cut -d: -f6")), "XDG_CONFIG_HOME="}}
	var made madeRepository
	root.run(t, "repo", "init", repo, "--json").ok(t).into(t, &made)
	t.Cleanup(func() {
		shell(t, "rm -f "+made.KeyFile+" && rmdir --ignore-fail-on-non-empty -p "+filepath.Dir(made.KeyFile))
	})
	if want := "/etc/pgthaw/keys/" + made.ID + ".key"; made.KeyFile != want {
		t.Fatalf("the key is in %s, want %s", made.KeyFile, want)
	}
	if got := strings.TrimSpace(shell(t, "stat -c '%U %G %a' "+made.KeyFile)); got != "root postgres 640" {
		t.Errorf("the key file is of %s", got)
	}
	shell(t, "chown -R postgres "+repo)
	root.run(t, "--repo", repo, "list").ok(t)
	invocation{postgres: true, env: []string{"HOME=/nonexistent", "XDG_CONFIG_HOME="}}.run(t, "--repo", repo, "list").ok(t)
}
