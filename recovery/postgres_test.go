package recovery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

const cluster = "main"

// installed are the bin directories of the PostgreSQL majors here that can take a base backup, oldest first.
func installed() (all []string) {
	for major := 15; major <= 18; major++ {
		for _, dir := range []string{"/usr/lib/postgresql/%d/bin", "/opt/pg%d/bin"} {
			dir = fmt.Sprintf(dir, major)
			if _, err := os.Stat(dir + "/pg_basebackup"); err == nil {
				all = append(all, dir)
				break
			}
		}
	}
	return all
}

// oldestAndNewest runs a test with sources of two majors, or one in a short run; integration has all.
func oldestAndNewest(t *testing.T, test func(t *testing.T, s *source)) {
	t.Parallel()
	bins := installed()
	for i, bin := range bins {
		if i == 0 || i == len(bins)-1 && !testing.Short() {
			t.Run(strings.Trim(bin, "/abcdefghijklmnopqrstuvwxyz"), func(t *testing.T) {
				t.Parallel()
				test(t, newSourceOf(t, bin))
			})
		}
	}
}

// long is for a test that a short run does without.
func long(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("not in a short run")
	}
}

// postgresUser is whom servers run as; root may not run one.
func postgresUser(t testing.TB) *syscall.Credential {
	t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Skip("no user postgres here")
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// place makes a directory that everybody can reach, unlike t.TempDir's, and that belongs to the server's user.
func place(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgthaw-recovery")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	own(t, dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func own(t testing.TB, paths ...string) {
	t.Helper()
	c := postgresUser(t)
	for _, p := range paths {
		if c == nil {
			return
		}
		if err := os.Lchown(p, int(c.Uid), int(c.Gid)); err != nil {
			t.Fatal(err)
		}
	}
}

// source is a PostgreSQL server whose WAL goes to a directory, and a repository for its backups.
type source struct {
	t                       testing.TB
	bin, top, data, archive string
	cmd                     *exec.Cmd
	repo                    *repo.Repository
}

// newSource starts a server of the oldest PostgreSQL here, with an empty cluster. The test runs beside others.
func newSource(t *testing.T, conf ...string) *source {
	t.Helper()
	t.Parallel()
	bins := installed()
	if len(bins) == 0 {
		t.Skip("no PostgreSQL here")
	}
	return newSourceOf(t, bins[0], conf...)
}

func newSourceOf(t testing.TB, bin string, conf ...string) *source {
	t.Helper()
	s := &source{t: t, bin: bin, top: place(t)}
	s.data, s.archive = filepath.Join(s.top, "data"), filepath.Join(s.top, "archive")
	if err := os.Mkdir(s.archive, 0o755); err != nil {
		t.Fatal(err)
	}
	own(t, s.archive)
	s.initdb()
	s.configure(append([]string{"fsync = off", "listen_addresses = ''", "unix_socket_directories = '" + s.top + "'",
		"archive_mode = on", "archive_command = 'cp %p " + s.top + "/%f && mv " + s.top + "/%f " + s.archive + "/%f'", "shared_buffers = 16MB"}, conf...)...)
	s.start()
	s.openRepository()
	return s
}

func (s *source) openRepository() { s.openRepositoryAt("repo") }

func (s *source) openRepositoryAt(name string) {
	s.t.Helper()
	r, err := repo.Init(s.t.Context(), filepath.Join(s.top, name), repo.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { r.Close() })
	s.repo = r
	c := s.control()
	if _, err := r.BindCluster(s.t.Context(), cluster, c.SystemIdentifier, c.SegmentSize); err != nil {
		s.t.Fatal(err)
	}
}

func (s *source) control() pg.ControlFile {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.data, controlPath))
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := pg.ParseControlFile(b)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

func (s *source) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir = s.top
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC", "PGHOST=" + s.top, "PGUSER=postgres"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: postgresUser(s.t), Pdeathsig: syscall.SIGQUIT}
	return cmd
}

func (s *source) run(name string, args ...string) string {
	s.t.Helper()
	out, err := combinedOutput(s.command(name, args...))
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

func (s *source) configure(lines ...string) {
	s.t.Helper()
	f, err := os.OpenFile(filepath.Join(s.data, confFile), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(strings.Join(lines, "\n") + "\n"); err != nil {
		s.t.Fatal(err)
	}
}

// children are started by one thread that lasts as long as the tests do: Pdeathsig comes when the thread that started a
// child ends, not the process, and what is tested ends threads on which it took another user's rights.
var children = sync.OnceValue(func() chan<- func() {
	starts := make(chan func())
	go func() {
		runtime.LockOSThread()
		for start := range starts {
			start()
		}
	}()
	return starts
})

func startChild(cmd *exec.Cmd) error {
	done := make(chan error)
	children() <- func() { done <- cmd.Start() }
	return <-done
}

// combinedOutput is exec.Cmd's, of a child that startChild started.
func combinedOutput(cmd *exec.Cmd) ([]byte, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := startChild(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	return out.Bytes(), err
}

func (s *source) start(args ...string) {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.top, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd = s.command("postgres", append([]string{"-D", s.data}, args...)...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := startChild(s.cmd); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(s.stop)
	eventually(s.t, "the server answers", func() bool {
		conn, err := pgconn.Connect(context.Background(), "host="+s.top+" user=postgres dbname=postgres")
		if err == nil {
			conn.Close(context.Background())
		}
		return err == nil
	})
}

func (s *source) stop() {
	if s.cmd != nil {
		_ = s.cmd.Process.Signal(syscall.SIGINT)
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

func (s *source) sql(statements ...string) string {
	s.t.Helper()
	return sql(s.t, "host="+s.top+" user=postgres dbname=postgres", statements...)
}

// sql runs statements one after the other and returns the last value.
func sql(t testing.TB, connString string, statements ...string) string {
	t.Helper()
	ctx := context.Background()
	c, err := pgconn.ParseConfig(connString)
	if err != nil {
		t.Fatal(err)
	}
	if user := postgresUser(t); user != nil {
		c.DialFunc = dialAs(int(user.Uid)) // peer authentication
	}
	conn, err := pgconn.ConnectConfig(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	value := ""
	for _, q := range statements {
		results, err := conn.Exec(ctx, q).ReadAll()
		if err != nil {
			t.Fatalf("%s: %v", q, err)
		}
		for _, r := range results {
			if len(r.Rows) > 0 {
				value = string(r.Rows[0][0])
			}
		}
	}
	return value
}

// switchWAL ends the current segment and waits until it is archived.
func (s *source) switchWAL() {
	s.t.Helper()
	name := s.sql("select pg_create_restore_point('so that there is something to switch from')",
		"select pg_walfile_name(pg_current_wal_insert_lsn())")
	s.sql("select pg_switch_wal()")
	eventually(s.t, name+" is archived", func() bool {
		_, err := os.Stat(filepath.Join(s.archive, name))
		return err == nil
	})
}

// push puts what the server has archived into the repository, but for the files named.
func (s *source) push(except ...string) {
	s.t.Helper()
	entries, err := os.ReadDir(s.archive)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains(except, e.Name()) {
			s.put(filepath.Join(s.archive, e.Name()))
		}
	}
}

func (s *source) put(path string) pg.WALName {
	s.t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	name, err := pg.ParseWALName(filepath.Base(path))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.repo.PutWAL(s.t.Context(), cluster, name, content); err != nil {
		s.t.Fatal(err)
	}
	return name
}

// backup takes a base backup into the repository.
func (s *source) backup(args ...string) *repo.Manifest {
	s.t.Helper()
	dir := filepath.Join(s.top, "backup")
	defer os.RemoveAll(dir)
	m := repo.Manifest{StartedAt: time.Now().UTC()}
	spaces := filepath.Join(s.top, "spaces")
	defer os.RemoveAll(spaces)
	for i, old := range s.tablespaces(&m) {
		args = append(args, "-T", fmt.Sprintf("%s=%s/%d", old, spaces, i))
	}
	s.run("pg_basebackup", append([]string{"-D", dir, "-c", "fast", "-X", "stream", "--no-sync"}, args...)...)
	m.StoppedAt = time.Now().UTC()
	s.describe(&m, dir)
	got, err := s.repo.WriteBackup(s.t.Context(), cluster, repo.BackupOptions{}, func(_ context.Context, w *repo.BackupWriter) (repo.Manifest, error) {
		err := s.writeTree(w, dir, "pgdata", m.Tablespaces)
		err = errors.Join(err, w.Mkdir("tablespaces", repo.Entry{Mode: 0o700}))
		for i, t := range m.Tablespaces {
			err = errors.Join(err, s.writeTree(w, fmt.Sprintf("%s/%d", spaces, i), fmt.Sprintf("tablespaces/%d", t.OID), nil))
		}
		return m, err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return got
}

// tablespaces fills in the manifest's, and returns where they are.
func (s *source) tablespaces(m *repo.Manifest) (places []string) {
	list := s.sql("select coalesce(string_agg(oid || ' ' || pg_tablespace_location(oid), ','), '') from pg_tablespace where oid > 16383")
	for item := range strings.SplitSeq(list, ",") {
		oid, path, ok := strings.Cut(item, " ")
		if !ok {
			continue
		}
		n, _ := strconv.Atoi(oid)
		m.Tablespaces = append(m.Tablespaces, repo.Tablespace{OID: uint32(n), Path: path})
		places = append(places, path)
	}
	return places
}

func (s *source) describe(m *repo.Manifest, dir string) {
	s.t.Helper()
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			s.t.Fatal(err)
		}
		return b
	}
	label, err := pg.ParseBackupLabel(read("backup_label"))
	if err != nil {
		s.t.Fatal(err)
	}
	manifest, err := pg.ParseBackupManifest(read("backup_manifest"))
	if err != nil {
		s.t.Fatal(err)
	}
	c := s.control()
	m.SystemIdentifier, m.SegmentSize = c.SystemIdentifier, c.SegmentSize
	m.PGVersionNum, _ = strconv.Atoi(s.sql("show server_version_num"))
	m.Timeline, m.StartLSN = label.Timeline, label.StartWAL
	m.StopLSN = manifest.WALRanges[len(manifest.WALRanges)-1].End
	m.ConfigFile = s.sql("show config_file")
	m.Settings = make(map[string]string)
	for name := range hotStandbyDefaults {
		m.Settings[name] = s.sql("show " + name)
	}
}

// writeTree writes a directory to the backup; WAL segments become WAL objects.
func (s *source) writeTree(w *repo.BackupWriter, dir, to string, spaces []repo.Tablespace) error {
	if parent := filepath.Dir(to); parent == "tablespaces" {
		to = parent + "/" + filepath.Base(to)
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		e := repo.Entry{Mode: info.Mode(), UID: st.Uid, GID: st.Gid, Size: info.Size(), ModTime: info.ModTime()}
		name := to + strings.TrimPrefix(path, dir)
		wal, walErr := pg.ParseWALName(d.Name())
		switch {
		case d.IsDir():
			return w.Mkdir(name, e)
		case d.Type() == fs.ModeSymlink:
			e.Link = originalPlace(d.Name(), spaces)
			return w.Symlink(name, e)
		case walErr == nil && wal.Kind == pg.WALSegment:
			s.put(path)
			return w.AddWAL(name, e, wal)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := w.Create(name, e, false)
		if err != nil {
			return err
		}
		_, err = f.Write(content)
		return errors.Join(err, f.Close())
	})
}

func originalPlace(oid string, spaces []repo.Tablespace) string {
	for _, t := range spaces {
		if oid == strconv.Itoa(int(t.OID)) {
			return t.Path
		}
	}
	return "nowhere"
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

// freePort is one that nobody listens on.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// manifest is that of the newest backup.
func (s *source) manifest() *repo.Manifest {
	s.t.Helper()
	m, err := s.repo.Manifest(s.t.Context(), cluster, repo.Latest)
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}
