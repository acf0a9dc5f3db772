package ingest

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
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

	"github.com/jackc/pgx/v5/pgconn"

	"pgthaw/repo"
)

// installed are the bin directories of the PostgreSQL majors that this machine has, oldest first. Rooms' tests make do
// with what is there; integration insists on all.
func installed() (bins []string) {
	for major := 15; major <= 18; major++ {
		m := strconv.Itoa(major)
		for _, bin := range []string{"/usr/lib/postgresql/" + m + "/bin", "/opt/pg" + m + "/bin"} {
			if _, err := os.Stat(bin + "/postgres"); err == nil {
				bins = append(bins, bin)
				break
			}
		}
	}
	return bins
}

func oldest(t testing.TB) string {
	t.Helper()
	bins := installed()
	if len(bins) == 0 {
		t.Skip("no PostgreSQL here")
	}
	return bins[0]
}

// oldestAndNewest is only the oldest in a short run.
func oldestAndNewest(t testing.TB) []string {
	t.Helper()
	all := installed()
	if testing.Short() {
		return []string{oldest(t)}
	}
	return slices.Compact([]string{oldest(t), all[len(all)-1]})
}

var discard = slog.New(slog.DiscardHandler)

// testServer is a PostgreSQL server that lives as long as the test.
type testServer struct {
	t    testing.TB
	bin  string
	top  string // temporary directory of the server's user: data directory, socket, log, archive
	data string
	cmd  *exec.Cmd
}

// initServer makes a cluster that is not started yet.
func initServer(t testing.TB, bin string, initdb ...string) *testServer {
	t.Helper()
	top, err := os.MkdirTemp("", "pgthaw-ingest") // t.TempDir's are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	s := &testServer{t: t, bin: bin, top: top, data: filepath.Join(top, "data")}
	t.Cleanup(s.printLog)
	s.own(top)
	s.initdb(initdb...)
	s.configure("fsync = off", "listen_addresses = ''", "unix_socket_directories = '"+top+"'", "wal_level = replica",
		"max_wal_senders = 10", "wal_keep_size = 64MB", "shared_buffers = 16MB", "log_min_messages = info")
	return s
}

func startServer(t testing.TB, bin string, initdb ...string) *testServer {
	t.Helper()
	s := initServer(t, bin, initdb...)
	s.start()
	return s
}

// postgresUser is whom servers run as; root may not run one.
func postgresUser() *syscall.Credential {
	if os.Getuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func (s *testServer) own(path string) {
	s.t.Helper()
	if c := postgresUser(); c != nil {
		if err := os.Chown(path, int(c.Uid), int(c.Gid)); err != nil {
			s.t.Fatal(err)
		}
	}
}

// mkdir makes a directory of the server's user beside the data directory.
func (s *testServer) mkdir(name string) string {
	s.t.Helper()
	dir := filepath.Join(s.top, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	s.own(dir)
	return dir
}

func (s *testServer) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir = s.top
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC", "PGHOST=" + s.top, "PGUSER=postgres"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: postgresUser(), Pdeathsig: syscall.SIGQUIT}
	return cmd
}

func (s *testServer) run(name string, args ...string) string {
	s.t.Helper()
	out, err := s.command(name, args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

func (s *testServer) configure(lines ...string) {
	s.t.Helper()
	f, err := os.OpenFile(filepath.Join(s.data, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(strings.Join(lines, "\n") + "\n"); err != nil {
		s.t.Fatal(err)
	}
}

func (s *testServer) start() {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.top, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd = s.command("postgres", "-D", s.data)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { s.stop(syscall.SIGQUIT) })
	eventually(s.t, "the server answers", func() bool {
		conn, err := pgconn.Connect(s.t.Context(), s.connString())
		if err == nil {
			conn.Close(s.t.Context())
		}
		return err == nil
	})
}

// printLog is for the cleanup of a test that failed.
func (s *testServer) printLog() {
	if !s.t.Failed() {
		return
	}
	b, _ := os.ReadFile(filepath.Join(s.top, "log"))
	s.t.Logf("server log:\n%s", b[max(0, len(b)-8000):])
}

// stop ends the server: SIGINT is a fast shutdown, SIGQUIT an immediate one, and what becomes of one that takes too long.
func (s *testServer) stop(sig syscall.Signal) {
	if s.cmd == nil {
		return
	}
	process := s.cmd.Process
	_ = process.Signal(sig)
	late := time.AfterFunc(time.Minute, func() {
		s.t.Errorf("the server has not ended a minute after %s", sig)
		_ = process.Signal(syscall.SIGQUIT)
	})
	_ = s.cmd.Wait()
	late.Stop()
	s.cmd = nil
}

func (s *testServer) connString() string { return "host=" + s.top + " user=postgres dbname=postgres" }

// sql runs statements and returns the last one's first value.
func (s *testServer) sql(statements ...string) string {
	s.t.Helper()
	ctx := context.WithoutCancel(s.t.Context())
	conn, err := pgconn.Connect(ctx, s.connString())
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(ctx)
	value := ""
	for _, q := range statements {
		results, err := conn.Exec(ctx, q).ReadAll()
		if err != nil {
			s.t.Fatalf("%s: %v", q, err)
		}
		for _, r := range results {
			if len(r.Rows) > 0 {
				value = string(r.Rows[0][0])
			}
		}
	}
	return value
}

// standby is a running standby of s.
func (s *testServer) standby() *testServer {
	s.t.Helper()
	sb := &testServer{t: s.t, bin: s.bin, top: s.top + "-standby"}
	if err := os.Mkdir(sb.top, 0o700); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { os.RemoveAll(sb.top) })
	s.t.Cleanup(sb.printLog)
	sb.own(sb.top)
	sb.data = filepath.Join(sb.top, "data")
	s.copyTo(sb.data)
	sb.configure("unix_socket_directories = '"+sb.top+"'", "primary_conninfo = 'host="+s.top+" user=postgres application_name=standby'")
	if err := os.WriteFile(filepath.Join(sb.data, "standby.signal"), nil, 0o644); err != nil {
		s.t.Fatal(err)
	}
	sb.start()
	return sb
}

// copyTo makes a copy of the cluster while it stands still.
func (s *testServer) copyTo(dir string) {
	s.t.Helper()
	s.stop(syscall.SIGINT)
	if out, err := exec.Command("cp", "-a", s.data, dir).CombinedOutput(); err != nil {
		s.t.Fatalf("cp: %v\n%s", err, out)
	}
	s.start()
}

// eventually polls until ok, for at most a minute.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func newRepository(t testing.TB) *repo.Repository {
	t.Helper()
	r, err := repo.Init(t.Context(), filepath.Join(t.TempDir(), "repo"), repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// objects lists what lies in a repository's directory below one of its names, packs or backups, say.
func objects(t testing.TB, r *repo.Repository, below string) (names []string) {
	t.Helper()
	root := filepath.Join(strings.TrimPrefix(r.URL(), "file://"), below)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			names = append(names, path)
		}
		if os.IsNotExist(err) {
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func backupOf(t testing.TB, r *repo.Repository, s *testServer, o BackupOptions) *repo.Backup {
	t.Helper()
	o.Cluster, o.ConnString = "main", s.connString()
	m, err := Backup(t.Context(), r, o)
	if err != nil {
		t.Fatal(err)
	}
	return r.OpenBackup(m)
}

// content reads a whole file of a backup.
func content(t testing.TB, b *repo.Backup, path string) []byte {
	t.Helper()
	e, err := b.Stat(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := b.Open(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, f.Size())
	if _, err := f.ReadAt(p, 0); err != nil && fmt.Sprint(err) != "EOF" {
		t.Fatalf("read %s: %v", path, err)
	}
	return p
}

// extract writes a backup's tree below dir.
func extract(t testing.TB, b *repo.Backup, dir string) {
	t.Helper()
	err := b.Walk(t.Context(), ".", func(path string, e repo.Entry) error {
		to := filepath.Join(dir, path)
		switch {
		case path == ".":
			return nil
		case e.IsDir():
			return os.Mkdir(to, e.Mode.Perm())
		case e.Mode.Type() == fs.ModeSymlink:
			return os.Symlink(e.Link, to)
		default:
			return os.WriteFile(to, content(t, b, path), e.Mode.Perm())
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}
