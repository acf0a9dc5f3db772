package recovery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"pgthaw/fusefs"
)

// thawed thaws and starts; the daemon and the server are ended with the test.
func (s *source) thawed(d *daemons, o ThawOptions) Result {
	s.t.Helper()
	o.SpawnDaemon = d.spawn
	res, err := Thaw(s.t.Context(), s.repo, o)
	s.t.Cleanup(func() { endServer(s.t, res) })
	if err != nil {
		s.t.Fatal(err)
	}
	return res
}

func status(t testing.TB, dir string) OverlayStatus {
	t.Helper()
	s, err := Status(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// withTablespace makes a ledger of n rows in a tablespace, and returns where that is.
func (s *source) withTablespace(n int) string {
	s.t.Helper()
	dir := filepath.Join(s.top, "tablespace")
	if err := os.Mkdir(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	own(s.t, dir)
	s.sql("create tablespace side location '"+dir+"'",
		fmt.Sprintf("create table ledger tablespace side as select generate_series(1, %d) n", n))
	return dir
}

func TestThaw(t *testing.T) { oldestAndNewest(t, testThaw) }

func testThaw(t *testing.T, s *source) {
	tablespace := s.withTablespace(30000)
	s.backup()
	s.sql("insert into ledger values (0)")
	s.switchWAL()
	s.push()
	copies := place(t)
	o := ThawOptions{Options: s.options(filepath.Join(copies, "data"))}
	o.TablespaceMapping = map[string]string{tablespace: filepath.Join(copies, "side")}
	res := s.thawed(newDaemons(t), o)
	if got := copySQL(t, res, "select count(*) from ledger"); got != "30001" {
		t.Errorf("%s rows", got)
	}
	st := status(t, res.Target)
	if !st.Mounted || st.ServerPID != res.PID || st.BytesTotal < res.SizeBytes/2 {
		t.Errorf("%+v", st)
	}
	if got := slices.Contains(st.Native, filepath.Join(res.Target, "pg_wal")); got != (os.Geteuid() == 0) {
		t.Errorf("pg_wal is reached without the mount: %v; these are: %v", got, st.Native)
	}
	if err := Discard(t.Context(), res.Target); !errors.Is(err, ErrServerRunning) {
		t.Errorf("discard under a server: %v", err)
	}
	if err := Finish(t.Context(), res.Target, nil); !errors.Is(err, ErrServerRunning) {
		t.Errorf("finish under a server: %v", err)
	}
	if _, err := Restart(t.Context(), res.Target, nil); !errors.Is(err, ErrServerRunning) || !strings.Contains(err.Error(), "which started it") {
		t.Errorf("restart of a server whose parent lives: %v", err)
	}
	copySQL(t, res, "insert into ledger values (-1)")
	endServer(t, res)
	if err := Finish(t.Context(), res.Target, nil); err != nil {
		t.Fatal(err)
	}
	if st := status(t, res.Target); st.Mounted || st.State != stateHydrated {
		t.Errorf("%+v", st)
	}
	for _, dir := range []string{res.Target, filepath.Join(copies, "side")} {
		if ours, _, err := fusefs.IsMount(dir); ours || err != nil {
			t.Errorf("%s is still mounted: %v", dir, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(res.Target, privateDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", privateDir, err)
	}
	s.run("pg_checksums", "--check", "-D", res.Target)
	s.data = res.Target
	s.stop()
	s.start("-c", "unix_socket_directories="+s.top, "-c", "port=5432", "-c", "listen_addresses=")
	if got := s.sql("select count(*) from ledger"); got != "30002" {
		t.Errorf("%s rows on the ordinary directory", got)
	}
	if err := Discard(t.Context(), res.Target); !errors.Is(err, ErrNoOverlay) {
		t.Errorf("discard of an ordinary data directory: %v", err)
	}
}

// TestThawedIsRestored compares a thaw that became whole, without a server, with a restore.
func TestThawedIsRestored(t *testing.T) {
	long(t)
	s := newSource(t)
	tablespace := s.withTablespace(30000)
	s.backup()
	copies := place(t)
	restored, thawed := filepath.Join(copies, "restored"), filepath.Join(copies, "thawed")
	for _, dir := range []string{restored, thawed} {
		o := s.options(dir)
		o.Start = false
		o.TablespaceMapping = map[string]string{tablespace: dir + "-side"}
		if dir == restored {
			if _, err := Restore(t.Context(), s.repo, o); err != nil {
				t.Fatal(err)
			}
			continue
		}
		s.thawed(newDaemons(t), ThawOptions{Options: o})
		if err := Finish(t.Context(), dir, nil); err != nil {
			t.Fatal(err)
		}
	}
	for _, side := range []string{"", "-side"} {
		if a, b := tree(t, restored+side), tree(t, thawed+side); a != b {
			t.Errorf("trees differ:\n%s", diff(t, a, b))
		}
		if out, err := exec.Command("diff", "-r", "--no-dereference", "-x", "pg_tblspc", restored+side, thawed+side).CombinedOutput(); err != nil {
			t.Errorf("contents differ: %s", out)
		}
	}
}

// tree lists all below a directory but symbolic links, with permissions, owners, sizes and times.
func tree(t testing.TB, dir string) string {
	t.Helper()
	cmd := exec.Command("bash", "-c", `find . -mindepth 1 ! -type l \( -type d -printf '%P %m %u\n' -o -printf '%P %m %u %s %T@\n' \) |
		grep -v -e '^postgresql.auto.conf' -e '^recovery.signal' | sort`)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func diff(t testing.TB, a, b string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"a": a, "b": b} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("diff", "a", "b")
	cmd.Dir = dir
	out, _ := cmd.Output()
	return string(bytes.TrimSpace(out))
}

func TestThawKilledDaemon(t *testing.T) {
	s := newSource(t)
	tablespace := s.withTablespace(30000)
	s.backup()
	s.push()
	copies := place(t)
	o := ThawOptions{Options: s.options(filepath.Join(copies, "data")), Hydrate: "off"}
	o.TablespaceMapping = map[string]string{tablespace: filepath.Join(copies, "side")}
	d := newDaemons(t)
	res := s.thawed(d, o)
	if st := status(t, res.Target); st.Hydrate != "off" || st.BytesPerSecond != 0 || st.SecondsLeft != 0 {
		t.Errorf("not to be hydrated: %+v", st)
	}
	copySQL(t, res, "insert into ledger values (0)")
	_ = d.last.Process.Kill()
	_ = d.last.Wait()
	if st := status(t, res.Target); st.State != stateLost {
		t.Errorf("%+v", st)
	}
	if err := Finish(t.Context(), res.Target, nil); !errors.Is(err, ErrLost) {
		t.Errorf("finish without a daemon: %v", err)
	}
	_ = syscall.Kill(res.PID, syscall.SIGQUIT)
	endServer(t, res)
	if out, err := combinedOutput(s.command("postgres", "-D", res.Target)); err == nil {
		t.Errorf("a server started under a dead mount: %s", out)
	}
	if err := Resume(t.Context(), res.Target, d.spawn); err != nil {
		t.Fatal(err)
	}
	if err := Resume(t.Context(), res.Target, d.spawn); err != nil {
		t.Errorf("resume of what runs: %v", err)
	}
	s.stop()
	s.data = res.Target
	s.start("-c", "unix_socket_directories="+s.top, "-c", "port=5432", "-c", "listen_addresses=")
	if got := s.sql("select count(*) from ledger"); got != "30001" {
		t.Errorf("%s rows after the crash", got)
	}
	s.stop()

	_ = d.last.Process.Signal(syscall.SIGTERM)
	_ = d.last.Wait()
	if st := status(t, res.Target); st.State != stateLost || st.BytesHydrated >= st.BytesTotal {
		t.Errorf("%+v", st)
	}
	if out, err := combinedOutput(s.command("postgres", "-D", res.Target)); err == nil || !bytes.Contains(out, []byte("PG_VERSION")) {
		t.Errorf("a server on the bare directory: %s", out)
	}
	if err := Resume(t.Context(), res.Target, d.spawn); err != nil {
		t.Fatal(err)
	}
	if err := Discard(t.Context(), res.Target); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(copies); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestThawLeavesNothingOnFailure(t *testing.T) {
	long(t)
	s := newSource(t)
	s.sql("create table ledger (n int)")
	s.backup()
	dir := filepath.Join(place(t), "copy")
	o := ThawOptions{Options: s.options(dir)}
	failure := errors.New("no daemon today")
	o.SpawnDaemon = func(context.Context, string) error { return failure }
	if _, err := Thaw(t.Context(), s.repo, o); !errors.Is(err, failure) {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there: %v", dir, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Thaw(ctx, s.repo, o); err == nil {
		t.Error("thawed though cancelled")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	own(t, dir)
	if _, err := Thaw(t.Context(), s.repo, o); !errors.Is(err, failure) {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestOrdinaryUser runs tests again as the server's user, who mounts with fusermount3.
func TestOrdinaryUser(t *testing.T) {
	long(t)
	t.Parallel()
	c := postgresUser(t)
	if c == nil {
		t.Skip("this is one")
	}
	cmd := exec.Command(helperProgram(t), "-test.run", "^(TestThaw|TestThawKilledDaemon)$/^15$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=/var/lib/postgresql"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
