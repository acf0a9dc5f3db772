package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// startPlan is how the server will be started. It is part of the copy's settings, so that pg_ctl restart finds the
// server where it was.
type startPlan struct {
	postgres string // the program
	port     int
	sockets  []string // directories
	owner    owner
	groups   []int // of owner
	alone    bool  // nobody else shall meet it, and it ends with us
}

func (s *startPlan) settings() []setting {
	if s.alone {
		return s.aloneSettings()
	}
	return []setting{
		{"port", strconv.Itoa(s.port)},
		{"listen_addresses", "localhost"},
		{"unix_socket_directories", strings.Join(s.sockets, ", ")},
	}
}

// alonePort names a socket in a directory of its own; nothing listens on the port.
const alonePort = 5432

// aloneSettings are those of a server that recovers and shuts down. What it writes need not survive anything but itself.
func (s *startPlan) aloneSettings() []setting {
	return []setting{
		{"port", strconv.Itoa(s.port)},
		{"listen_addresses", ""},
		{"unix_socket_directories", s.sockets[0]},
		{"fsync", "off"},
		{"logging_collector", "off"},
		{"log_destination", "stderr"},
		{"shared_buffers", "128MB"},
		{"huge_pages", "off"},
		{"autovacuum", "off"},
		{"max_logical_replication_workers", "0"},
	}
}

// socketDirs are where clients look for a server: Debian's default and PostgreSQL's own.
var socketDirs = []string{"/var/run/postgresql", "/tmp"}

func planStart(ctx context.Context, o Options, m *repo.Manifest, files confFiles, own owner) (*startPlan, error) {
	if own.uid == 0 {
		return nil, fmt.Errorf("%w: it does not run as root", ErrServer)
	}
	s := &startPlan{owner: own, groups: own.groups()}
	var err error
	if s.postgres, err = findPostgres(ctx, m.PGVersionNum/10000, o.BinDir); err != nil {
		return nil, err
	}
	if err := s.checkLibraries(files, m); err != nil {
		return nil, err
	}
	if o.sockets != "" {
		s.sockets, s.port, s.alone = []string{o.sockets}, alonePort, true
		return s, nil
	}
	for _, dir := range socketDirs {
		if s.writable(dir) {
			s.sockets = append(s.sockets, dir)
		}
	}
	if len(s.sockets) == 0 {
		return nil, fmt.Errorf("%w: user %s can write to none of %s, where its socket would be", ErrServer, own.name, strings.Join(socketDirs, ", "))
	}
	s.port, err = s.choosePort(o.Port, files.valueOr(m, "port", "5432"))
	return s, err
}

// credential makes a child process the user's, with all its groups.
func (o owner) credential() *syscall.Credential {
	c := &syscall.Credential{Uid: uint32(o.uid), Gid: uint32(o.gid)}
	for _, g := range o.groups() {
		c.Groups = append(c.Groups, uint32(g))
	}
	return c
}

// groups are all that the user is in; the server may need them to read a key.
func (o owner) groups() []int {
	groups := []int{o.gid}
	u, err := user.LookupId(strconv.Itoa(o.uid))
	if err != nil {
		return groups
	}
	ids, _ := u.GroupIds() // without them the server runs all the same
	for _, id := range ids {
		if gid, err := strconv.Atoi(id); err == nil && !slices.Contains(groups, gid) {
			groups = append(groups, gid)
		}
	}
	return groups
}

// writable tells by its permissions whether the server's user may make files in dir.
func (s *startPlan) writable(dir string) bool {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return false
	}
	switch {
	case int(st.Uid) == s.owner.uid:
		return st.Mode&0o300 == 0o300
	case slices.Contains(s.groups, int(st.Gid)):
		return st.Mode&0o030 == 0o030
	default:
		return st.Mode&0o003 == 0o003
	}
}

// choosePort takes the port asked for, which has to be free; else the cluster's own, or any.
func (s *startPlan) choosePort(asked int, recorded string) (int, error) {
	if asked != 0 {
		if !s.portFree(asked) {
			return 0, withHint(fmt.Errorf("%w: port %d is in use", ErrServer, asked), "Name another port, or none to have one chosen.")
		}
		return asked, nil
	}
	if port, err := strconv.Atoi(recorded); err == nil && s.portFree(port) {
		return port, nil
	}
	for range 20 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return 0, fmt.Errorf("look for a free port: %w", err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		if s.portFree(port) {
			return port, nil
		}
	}
	return 0, fmt.Errorf("%w: found no free port", ErrServer)
}

func (s *startPlan) portFree(port int) bool {
	for _, dir := range s.sockets {
		if postmasterPID(socketPath(dir, port)+".lock") != 0 {
			return false
		}
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return false
	}
	return l.Close() == nil
}

func socketPath(dir string, port int) string {
	return filepath.Join(dir, ".s.PGSQL."+strconv.Itoa(port))
}

// findPostgres looks for the server's program of a major version, in binDir alone if that is given.
func findPostgres(ctx context.Context, major int, binDir string) (string, error) {
	var tried []string
	candidates := postgresPlaces(major)
	if binDir != "" {
		candidates = []string{binDir}
	}
	for _, dir := range candidates {
		program := filepath.Join(dir, "postgres")
		_, found, err := postgresVersion(ctx, program)
		if err == nil && found == major {
			return program, nil
		}
		if err == nil {
			dir += " (which has " + strconv.Itoa(found) + ")"
		}
		tried = append(tried, dir)
	}
	return "", withHint(fmt.Errorf("%w: no PostgreSQL %d in %s", ErrServer, major, strings.Join(tried, ", ")),
		fmt.Sprintf("Install PostgreSQL %d, or say where its programs are: --bindir DIRECTORY.", major))
}

func postgresPlaces(major int) []string {
	places := []string{
		fmt.Sprintf("/usr/lib/postgresql/%d/bin", major), // Debian
		fmt.Sprintf("/usr/pgsql-%d/bin", major),          // PGDG's packages for Red Hat
		fmt.Sprintf("/opt/pg%d/bin", major),
	}
	if program, err := exec.LookPath("postgres"); err == nil {
		if real, err := filepath.EvalSymlinks(program); err == nil {
			program = real // share/ is found beside the program, not beside a link to it
		}
		places = append([]string{filepath.Dir(program)}, places...)
	}
	return places
}

var versionText = regexp.MustCompile(`\(PostgreSQL\) ((\d+)\S*)`)

// postgresVersion is that of a server's program: "16.4", and 16.
func postgresVersion(ctx context.Context, program string) (version string, major int, err error) {
	out, err := exec.CommandContext(ctx, program, "-V").Output()
	if err != nil {
		return "", 0, fmt.Errorf("%s -V: %w", program, err)
	}
	match := versionText.FindSubmatch(out)
	if match == nil {
		return "", 0, fmt.Errorf("%s -V: %q", program, out)
	}
	major, err = strconv.Atoi(string(match[2]))
	return string(match[1]), major, err
}

// server is a PostgreSQL that we started; it outlives us.
type server struct {
	plan *startPlan
	dir  string
	log  string // where it writes before and beside its own log files
	pid  int

	exited bool
	status unix.WaitStatus // once exited
}

// startServer runs postgres in the background, in a session of its own, as the owner of its files.
func startServer(plan *startPlan, dir string) (*server, error) {
	logFile, err := openServerLog(dir, plan.owner)
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	attr := &os.ProcAttr{
		Dir:   "/",
		Env:   serverEnvironment(),
		Files: []*os.File{nil, logFile, logFile},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	if plan.owner.foreign() {
		attr.Sys.Credential = plan.owner.credential()
	}
	if plan.alone {
		attr.Sys.Pdeathsig = syscall.SIGQUIT
	}
	p, err := os.StartProcess(plan.postgres, []string{plan.postgres, "-D", dir}, attr)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrServer, err)
	}
	return &server{plan: plan, dir: dir, log: logFile.Name(), pid: p.Pid}, nil
}

func startupLog(dir string) string { return dir + ".startup.log" }

// openServerLog makes the file that the server's standard error goes to, beside the data directory, or where that
// cannot be written to, in the directory for temporary files.
func openServerLog(dir string, o owner) (*os.File, error) {
	f, err := os.OpenFile(startupLog(dir), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
		f, err = os.CreateTemp("", filepath.Base(dir)+".startup.*.log")
	}
	if err != nil {
		return nil, fmt.Errorf("make the server's log: %w", err)
	}
	if o.foreign() {
		if err := f.Chown(o.uid, o.gid); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return f, nil
}

// serverEnvironment is ours without libpq's and the server's own variables, which are about another server.
func serverEnvironment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "PG") || strings.HasPrefix(v, "NOTIFY_SOCKET=")
	})
}

// running looks whether the server has exited meanwhile.
func (s *server) running() bool {
	if s.exited {
		return false
	}
	pid, err := unix.Wait4(s.pid, &s.status, unix.WNOHANG, nil)
	s.exited = pid == s.pid || errors.Is(err, unix.ECHILD)
	return !s.exited
}

// stopLimit is how long a server may take for its last checkpoint.
const stopLimit = 10 * time.Minute

// stop ends a server as pg_ctl stop -m fast does.
func (s *server) stop(ctx context.Context) error { return s.end(ctx, syscall.SIGINT, stopLimit) }

// kill ends a server at once, if it still runs. What it did is of no use to anybody.
func (s *server) kill() {
	if s == nil {
		return
	}
	const patience = 5 * time.Second // as pg_ctl's and the postmaster's own (SIGKILL_CHILDREN_AFTER_SECS)
	if s.end(context.Background(), syscall.SIGQUIT, patience) != nil {
		_ = s.end(context.Background(), syscall.SIGKILL, patience)
	}
}

func (s *server) end(ctx context.Context, signal syscall.Signal, limit time.Duration) error {
	if !s.running() {
		return nil
	}
	if err := syscall.Kill(s.pid, signal); err != nil {
		return fmt.Errorf("stop PostgreSQL (PID %d): %w", s.pid, err)
	}
	deadline := time.Now().Add(limit)
	for pause := newPause(); s.running(); {
		if err := pause.sleep(ctx); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: it does not shut down (PID %d)", ErrServer, s.pid)
		}
	}
	return nil
}

// failed says why the server exited, in its own words.
func (s *server) failed() error {
	err := fmt.Errorf("%w, or not to the end of recovery; the last it wrote:\n%s", ErrServer, s.lastWords())
	return withHint(err, "More is in "+s.log+" and in the server's own log directory.")
}

const (
	lastLines = 12
	lastBytes = 16 << 10
)

// lastWords are the last lines of the newest log file of the server.
func (s *server) lastWords() string {
	files := []string{s.log}
	more, err := filepath.Glob(filepath.Join(s.dir, "log", "*"))
	if err == nil {
		files = append(files, more...)
	}
	newest := slices.MaxFunc(files, func(a, b string) int { return modTime(a).Compare(modTime(b)) })
	return tail(newest)
}

func modTime(path string) time.Time {
	info, err := os.Stat(path)
	if err != nil {
		return time.Time{}
	}
	return info.ModTime()
}

func tail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err.Error()
	}
	buf := make([]byte, min(lastBytes, info.Size()))
	n, _ := f.ReadAt(buf, info.Size()-int64(len(buf))) // what can be read of it is better than nothing
	lines := strings.Split(strings.TrimSpace(string(buf[:n])), "\n")
	return strings.Join(lines[max(0, len(lines)-lastLines):], "\n")
}

// control reads the server's pg_control.
func (s *server) control() (pg.ControlFile, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, controlPath))
	if err != nil {
		return pg.ControlFile{}, err
	}
	return pg.ParseControlFile(b)
}
