package integration

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// newBackupLimit is how long a new backup may take to appear in a mount. It is a second but on a machine that is busy.
const newBackupLimit = 30 * time.Second

// TestMount looks at one backup through the mount in every way that the documentation promises.
func TestMount(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			a := newArchived(t, p, clusterOptions{checksums: true, pgbenchScale: 1, tablespaces: []string{"fast", "slow"}}, plainFor(p, 15)...)
			l := startLedger(t, a.cluster, 2)
			l.waitCommits(50)
			b := a.newest(t)
			l.waitCommits(50)
			l.Stop()
			dir := a.mount(t, invocation{}, "--allow-other")
			latest := filepath.Join(dir, "main", "latest")
			t.Run("tree", func(t *testing.T) { a.checkMountTree(t, dir, b) })
			t.Run("owners", func(t *testing.T) { a.checkMountOwners(t, filepath.Join(latest, "pgdata")) })
			t.Run("programs", func(t *testing.T) { a.checkMountPrograms(t, filepath.Join(latest, "pgdata"), b) })
			t.Run("read-only", func(t *testing.T) { checkReadOnly(t, filepath.Join(latest, "pgdata")) })
			t.Run("copy", func(t *testing.T) { a.checkMountCopy(t, latest, l, b) })
			t.Run("wal", func(t *testing.T) { a.checkMountWAL(t, dir) })
			t.Run("users", func(t *testing.T) { a.checkMountUsers(t) })
			t.Run("new backup", func(t *testing.T) { a.checkMountGrows(t, dir, b) })
			t.Run("umount", func(t *testing.T) { checkUmount(t, dir) })
		})
	}
}

// newest takes a backup of the cluster and gives its line of the list.
func (a archived) newest(t *testing.T, args ...string) listed {
	t.Helper()
	a.backup(t, args...)
	all := a.backups(t)
	return all[len(all)-1]
}

// mount mounts the repository at a new directory until the test ends.
func (a archived) mount(t *testing.T, v invocation, args ...string) string {
	t.Helper()
	dir := filepath.Join(tempDir(t), "m")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if v.postgres {
		ownedByPostgres(t, dir)
	}
	v.env = append(v.env, "PGTHAW_REPO="+a.repo)
	v.run(t, append(append([]string{"mount"}, args...), dir)...).ok(t)
	t.Cleanup(func() {
		if mounted(dir) {
			checkUmount(t, dir)
		}
	})
	return dir
}

func mounted(dir string) bool { return len(mountsBelow(dir)) > 0 }

// checkUmount takes a mount off, after which nobody serves it any more.
func checkUmount(t *testing.T, dir string) {
	t.Helper()
	pgthaw(t, "umount", dir).ok(t)
	if mounted(dir) {
		t.Errorf("%s is still mounted", dir)
	}
	waitFor(t, stopLimit, "end of the mount's process", func() bool { return len(processesNaming(dir)) == 0 })
}

// names lists a directory.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func (a archived) checkMountTree(t *testing.T, dir string, b listed) {
	for path, want := range map[string][]string{
		".":            {"main"},
		"main":         {b.ID, "latest", "wal"},
		"main/" + b.ID: {"manifest.json", "pgdata", "tablespaces"},
		"main/wal":     {"00000001"},
	} {
		if got := names(t, filepath.Join(dir, path)); !slices.Equal(got, want) {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
	}
	if link, err := os.Readlink(filepath.Join(dir, "main", "latest")); link != b.ID {
		t.Errorf("latest leads to %q, %v", link, err)
	}
	oids := names(t, filepath.Join(dir, "main", b.ID, "tablespaces"))
	pgdata := filepath.Join(dir, "main", b.ID, "pgdata")
	if got := names(t, filepath.Join(pgdata, "pg_tblspc")); len(got) != 2 || !slices.Equal(got, oids) {
		t.Errorf("pg_tblspc holds %q, tablespaces %q", got, oids)
	}
	for _, oid := range oids {
		through, err := filepath.EvalSymlinks(filepath.Join(pgdata, "pg_tblspc", oid))
		if err != nil || through != filepath.Join(dir, "main", b.ID, "tablespaces", oid) {
			t.Errorf("pg_tblspc/%s leads to %s, %v", oid, through, err)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "main", b.ID, "manifest.json"))
	if err != nil || !bytes.Contains(text, []byte(b.ID)) {
		t.Errorf("manifest.json is %q, %v", text, err)
	}
}

// checkMountOwners compares with the server's own files, as far as there are both.
func (a archived) checkMountOwners(t *testing.T, pgdata string) {
	compared := 0
	err := filepath.WalkDir(pgdata, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(pgdata, path)
		want, err := os.Lstat(filepath.Join(a.data, name))
		if err != nil {
			return nil // the server has removed it since
		}
		got, err := os.Lstat(path)
		if err != nil {
			return err
		}
		g, w := got.Sys().(*syscall.Stat_t), want.Sys().(*syscall.Stat_t)
		if got.Mode() != want.Mode() || g.Uid != w.Uid || g.Gid != w.Gid {
			t.Errorf("%s is %v %d:%d, want %v %d:%d", name, got.Mode(), g.Uid, g.Gid, want.Mode(), w.Uid, w.Gid)
		}
		compared++
		return nil
	})
	if err != nil || compared < 500 {
		t.Errorf("compared %d files, %v", compared, err)
	}
}

// checkMountPrograms runs what people run on a PGDATA.
func (a archived) checkMountPrograms(t *testing.T, pgdata string, b listed) {
	a.verifyBackup(t, pgdata)
	control := a.run(t, "pg_controldata", pgdata)
	if id := a.SQL("SELECT system_identifier FROM pg_control_system()"); !strings.Contains(control, id) {
		t.Errorf("pg_controldata does not show %s:\n%s", id, control)
	}
	if !a.borrows(t, "pg_waldump") {
		out := a.run(t, "pg_waldump", "--path", filepath.Join(pgdata, "pg_wal"), "--start", b.StartLSN, "--end", b.StopLSN)
		if !strings.Contains(out, "BACKUP_END") {
			t.Errorf("pg_waldump finds no end of backup:\n%s", out)
		}
	}
	if out := shell(t, "grep -rl 'START WAL LOCATION' "+pgdata); out != pgdata+"/backup_label" {
		t.Errorf("grep finds %q", out)
	}
	files, _ := strconv.Atoi(shell(t, "find -L "+pgdata+" -type f | wc -l"))
	listed, _ := strconv.Atoi(shell(t, "grep -c '\"Path\"' "+pgdata+"/backup_manifest"))
	if files < listed || listed < 500 {
		t.Errorf("find sees %d files, backup_manifest lists %d", files, listed)
	}
}

// shell gives what a command line prints, without the newline.
func shell(t *testing.T, line string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSuffix(string(out), "\n")
}

func checkReadOnly(t *testing.T, pgdata string) {
	version := filepath.Join(pgdata, "PG_VERSION")
	for what, err := range map[string]error{
		"create":   os.WriteFile(filepath.Join(pgdata, "new"), nil, 0o600),
		"write":    os.WriteFile(version, []byte("99"), 0o600),
		"truncate": os.Truncate(version, 0),
		"remove":   os.Remove(version),
		"rename":   os.Rename(version, version+".old"),
		"mkdir":    os.Mkdir(filepath.Join(pgdata, "new"), 0o700),
		"chmod":    os.Chmod(version, 0o777),
		"link":     os.Link(version, version+".link"),
		"symlink":  os.Symlink(version, version+".link"),
	} {
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: %v, want EROFS", what, err)
		}
	}
}

// checkMountCopy starts a copy of the mounted backup, which recovers from the WAL in its own pg_wal.
func (a archived) checkMountCopy(t *testing.T, latest string, l *ledger, b listed) {
	dir := filepath.Join(tempDir(t), "copy")
	shell(t, "cp -a "+latest+"/. "+dir)
	got, want := tree(t, dir), tree(t, latest+"/.")
	delete(got, "manifest.json") // its owner is who mounts
	delete(want, "manifest.json")
	delete(got, ".")
	delete(want, ".")
	sameTrees(t, got, want)
	data := filepath.Join(dir, "pgdata")
	c := adopt(t, a.installation, data, "-c", "archive_mode=off")
	stop, err := parseLSN(b.StopLSN)
	if err != nil {
		t.Fatal(err)
	}
	least, most := l.atLSN(stop, true)
	l.check(c, least, most)
	for _, query := range []string{"SELECT count(*), sum(i), md5(string_agg(x, ',' ORDER BY i)) FROM in_slow", "SELECT count(*), sum(abalance) FROM pgbench_accounts"} {
		if got, want := c.SQL(query), a.SQL(query); got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
	c.amcheck()
	c.Stop()
	a.checksums(t, data)
}

// checkMountWAL compares the WAL in the mount with what the server still has of it.
func (a archived) checkMountWAL(t *testing.T, dir string) {
	timeline := filepath.Join(dir, "main", "wal", "00000001")
	before := len(names(t, timeline))
	a.SQL("SELECT pg_switch_wal()")
	waitFor(t, newBackupLimit+startLimit, "the switched segment in the mount", func() bool { return len(names(t, timeline)) > before })
	compared := 0
	for _, name := range names(t, timeline) {
		want, err := os.ReadFile(filepath.Join(a.data, "pg_wal", name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // recycled
		}
		got, err2 := os.ReadFile(filepath.Join(timeline, name))
		if err := errors.Join(err, err2); err != nil {
			t.Error(err)
		} else if !bytes.Equal(got, want) {
			t.Errorf("%s differs from the server's", name)
		}
		compared++
		if len(want) >= 1<<20 && !a.borrows(t, "pg_waldump") {
			shell(t, a.tool(t, "pg_waldump")+" --quiet --limit 10 "+filepath.Join(timeline, name)) // owned by who mounts
		}
	}
	if compared == 0 {
		t.Error("the server has none of the archived segments any more")
	}
}

// checkMountUsers mounts as the server's user, through fusermount3, and for another user that could not read the files.
func (a archived) checkMountUsers(t *testing.T) {
	dir := a.mount(t, asPostgres)
	if out := shellAs(t, "postgres", "cat "+dir+"/main/latest/pgdata/PG_VERSION"); out != a.String() {
		t.Errorf("PG_VERSION is %q", out)
	}
	checkUmount(t, dir)

	dir = a.mount(t, invocation{}, "--allow-other", "--as-user", "nobody")
	if out := shellAs(t, "nobody", "cat "+dir+"/main/latest/pgdata/PG_VERSION && find -L "+dir+"/main/latest/ ! -user nobody"); out != a.String() {
		t.Errorf("nobody sees %q", out)
	}
	checkUmount(t, dir)
}

// shellAs is shell as another user.
func shellAs(t *testing.T, name, line string) string {
	t.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("setpriv", "--reuid="+u.Uid, "--regid="+u.Gid, "--clear-groups", "sh", "-ec", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSuffix(string(out), "\n")
}

// checkMountGrows takes another backup while the mount is looked at.
func (a archived) checkMountGrows(t *testing.T, dir string, first listed) {
	a.SQL("CREATE TABLE later AS SELECT 1")
	second := a.newest(t)
	began := time.Now()
	waitFor(t, newBackupLimit, "the new backup to appear", func() bool {
		return slices.Contains(names(t, filepath.Join(dir, "main")), second.ID)
	})
	waitFor(t, newBackupLimit, "latest to move", func() bool {
		link, _ := os.Readlink(filepath.Join(dir, "main", "latest"))
		return link == second.ID
	})
	t.Logf("the new backup appeared after %v", time.Since(began))
	a.verifyBackup(t, filepath.Join(dir, "main", "latest", "pgdata"))
	a.verifyBackup(t, filepath.Join(dir, "main", first.ID, "pgdata"))
	was := tree(t, filepath.Join(dir, "main", first.ID, "pgdata"))
	is := tree(t, filepath.Join(dir, "main", second.ID, "pgdata"))
	if maps.Equal(was, is) {
		t.Error("both backups are the same")
	}
}
