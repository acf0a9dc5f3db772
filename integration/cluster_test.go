package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

const (
	startLimit = 60 * time.Second
	stopLimit  = 60 * time.Second
	queryLimit = 2 * time.Minute
)

// clusterOptions of the zero value make an empty cluster with initdb's defaults and no checksums.
type clusterOptions struct {
	walSegmentMB int
	checksums    bool
	conf         []string // lines of postgresql.conf
	confOutside  bool     // postgresql.conf, pg_hba.conf and pg_ident.conf in a directory of their own, as on Debian
	pgbenchScale int      // about 15 MB each
	tablespaces  []string // names; each gets a directory beside PGDATA and a table with a thousand rows
}

// cluster is a PostgreSQL server and its PGDATA. It stops with the test.
type cluster struct {
	installation
	t    *testing.T
	dir  string // holds data, sockets, log, tablespaces
	data string // PGDATA
	port int
	args []string // further arguments of postgres

	mayPanic bool // the test provokes a PANIC; any other in the log fails the test

	session *pgconn.PgConn // see inSession

	process *os.Process   // nil when the server was not started by us or is down
	exited  chan struct{} // closed when process has been reaped
	lastPID int           // of a server that others started: postmaster.pid cannot be read under a dead mount
}

// newCluster makes a cluster and starts it, listening on localhost and on a socket in its own directory.
func newCluster(t *testing.T, p installation, o clusterOptions) *cluster {
	t.Helper()
	dir := postgresDir(t)
	c := &cluster{installation: p, t: t, dir: dir, data: filepath.Join(dir, "data")}
	p.run(t, "initdb", c.initdbArgs(o)...)
	c.configure(o)
	c.cleanUp()
	c.Start()
	c.fill(o)
	return c
}

// adopt starts a server on a PGDATA that exists, and keeps its socket and log in a directory of their own.
// Port, socket and listen_addresses are given as arguments, which win over every file.
func adopt(t *testing.T, p installation, data string, args ...string) *cluster {
	t.Helper()
	c := attach(t, p, data, 0, args...)
	c.Start()
	return c
}

// attach describes a server on data without starting it. With a port it is one that others started, whose socket
// directory may be anywhere: connections go to localhost.
func attach(t *testing.T, p installation, data string, port int, args ...string) *cluster {
	t.Helper()
	dir := postgresDir(t)
	c := &cluster{installation: p, t: t, dir: dir, data: data, port: port, args: args}
	c.cleanUp()
	if port != 0 && c.pid() == 0 {
		t.Fatalf("no server runs on %s", data)
	}
	return c
}

func (c *cluster) initdbArgs(o clusterOptions) []string {
	args := []string{"--pgdata", c.data, "--auth", "trust", "--username", "postgres", "--no-sync", "--no-locale", "--encoding", "UTF8"}
	if o.walSegmentMB != 0 {
		args = append(args, "--wal-segsize", strconv.Itoa(o.walSegmentMB))
	}
	switch {
	case o.checksums:
		args = append(args, "--data-checksums")
	case c.major >= 18: // where checksums are initdb's default
		args = append(args, "--no-data-checksums")
	}
	return args
}

// configure writes the settings before the first start.
func (c *cluster) configure(o clusterOptions) {
	c.t.Helper()
	lines := append([]string{"max_wal_senders = 10", "wal_level = replica", "track_commit_timestamp = on"}, o.conf...)
	etc := c.data
	if o.confOutside {
		etc = filepath.Join(c.dir, "etc")
		c.moveConfiguration(etc)
		c.args = append(c.args, "-c", "config_file="+filepath.Join(etc, "postgresql.conf"))
		lines = append(lines, fmt.Sprintf("data_directory = '%s'", c.data),
			fmt.Sprintf("hba_file = '%s/pg_hba.conf'", etc), fmt.Sprintf("ident_file = '%s/pg_ident.conf'", etc))
	}
	appendTo(c.t, filepath.Join(etc, "postgresql.conf"), strings.Join(lines, "\n")+"\n")
}

func (c *cluster) moveConfiguration(etc string) {
	c.t.Helper()
	if err := os.Mkdir(etc, 0o755); err != nil {
		c.t.Fatal(err)
	}
	for _, name := range []string{"postgresql.conf", "pg_hba.conf", "pg_ident.conf"} {
		if err := os.Rename(filepath.Join(c.data, name), filepath.Join(etc, name)); err != nil {
			c.t.Fatal(err)
		}
	}
}

// fill makes what the options ask for inside the server.
func (c *cluster) fill(o clusterOptions) {
	c.t.Helper()
	for _, name := range o.tablespaces {
		location := filepath.Join(c.dir, "tablespace "+name) // a space, for whoever forgets to quote
		if err := os.Mkdir(location, 0o700); err != nil {
			c.t.Fatal(err)
		}
		ownedByPostgres(c.t, location)
		c.SQL(fmt.Sprintf("CREATE TABLESPACE %s LOCATION '%s'", name, location))
		c.SQL(fmt.Sprintf("CREATE TABLE in_%s TABLESPACE %[1]s AS SELECT i, repeat('x', i %% 300) AS x FROM generate_series(1, 1000) i", name))
	}
	if o.pgbenchScale > 0 {
		c.pgbench("--initialize", "--quiet", "--scale", strconv.Itoa(o.pgbenchScale))
	}
}

// Start starts the server and waits until it answers a query.
func (c *cluster) Start() {
	c.t.Helper()
	if err := c.tryStart(); err != nil {
		c.t.Fatalf("start PostgreSQL %d on %s: %v\n%s", c.major, c.data, err, c.logTail())
	}
}

// tryStart is Start for a server that may refuse. A port that someone else took in the meantime is not a refusal.
func (c *cluster) tryStart() error {
	for attempt := 1; ; attempt++ {
		err := c.startOnce()
		if err == nil || attempt == 3 || !strings.Contains(c.logTail(), "Address already in use") {
			return err
		}
	}
}

func (c *cluster) startOnce() error {
	if err := c.launch(); err != nil {
		return err
	}
	return c.waitReady()
}

// launch starts the server and does not wait for it.
func (c *cluster) launch() error {
	c.port = freePort(c.t)
	log, err := os.OpenFile(c.logFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(c.bin, "postgres"), append([]string{"-D", c.data, "-p", strconv.Itoa(c.port),
		"-k", c.dir, "-c", "listen_addresses=127.0.0.1", "-c", "logging_collector=off"}, c.args...)...)
	becomePostgres(c.t, cmd)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	c.process, c.exited = cmd.Process, make(chan struct{})
	go func(exited chan struct{}) {
		_ = cmd.Wait()
		close(exited)
	}(c.exited)
	return nil
}

// waitReady returns once the server answers, or with an error when it exits or takes too long.
func (c *cluster) waitReady() error {
	var last error
	answered := poll(startLimit, func() bool {
		if last = c.claimsReady(); last == nil {
			_, last = c.query("postgres", "SELECT 1")
		}
		return last == nil || c.down()
	})
	if answered && last != nil {
		c.process = nil
		return fmt.Errorf("the server exited: %w", last)
	}
	return last
}

// claimsReady is nil when the server that we started says in postmaster.pid that it takes connections, in the line that pg_ctl
// reads (miscadmin.h). A connection that it would turn away costs it a process. Where it cannot be read, in a mount of the server's
// user, the server has to be asked.
func (c *cluster) claimsReady() error {
	content, err := os.ReadFile(filepath.Join(c.data, "postmaster.pid"))
	if errors.Is(err, fs.ErrPermission) {
		return nil
	}
	lines := strings.Split(string(content), "\n")
	if err == nil && (len(lines) < 8 || lines[0] != strconv.Itoa(c.process.Pid) || strings.TrimSpace(lines[7]) != "ready") {
		err = fmt.Errorf("postmaster.pid is %q", content)
	}
	return err
}

// down reports whether the process we started has ended.
func (c *cluster) down() bool {
	select {
	case <-c.exited:
		return true
	default:
		return false
	}
}

// Stop shuts down fast, which leaves a clean PGDATA.
func (c *cluster) Stop() { c.t.Helper(); c.signal(syscall.SIGINT) }

// StopImmediate shuts down as after a crash, but orderly: no checkpoint.
func (c *cluster) StopImmediate() { c.t.Helper(); c.signal(syscall.SIGQUIT) }

func (c *cluster) Restart() { c.t.Helper(); c.Stop(); c.Start() }

// signal sends the postmaster a signal that ends it, and waits for the end.
func (c *cluster) signal(s syscall.Signal) {
	c.t.Helper()
	pid := c.pid()
	if pid == 0 {
		return
	}
	if err := syscall.Kill(pid, s); err != nil {
		c.t.Fatalf("signal postmaster %d: %v", pid, err)
	}
	c.waitGone(pid)
	c.process = nil
}

// Kill ends the postmaster and each of its children with SIGKILL, and removes the shared memory that this leaves.
func (c *cluster) Kill() {
	c.t.Helper()
	pid := c.pid()
	if pid == 0 {
		return
	}
	_ = syscall.Kill(pid, syscall.SIGSTOP) // so that it starts no further child
	all := append([]int{pid}, childrenOf(pid)...)
	segments := sharedMemoryOf(pid)
	for _, p := range all {
		_ = syscall.Kill(p, syscall.SIGKILL)
	}
	for _, p := range all {
		c.waitGone(p)
	}
	for _, file := range segments {
		_ = os.Remove(file)
	}
	removeSystemV(c.data)
	c.process = nil
}

func (c *cluster) waitGone(pid int) {
	c.t.Helper()
	waitFor(c.t, stopLimit, fmt.Sprintf("end of process %d of PostgreSQL %d", pid, c.major), func() bool {
		if c.process != nil && pid == c.process.Pid {
			return c.down()
		}
		return !alive(pid)
	})
}

// waitRecovered waits until a server that recovers may be written to.
func (c *cluster) waitRecovered() {
	c.t.Helper()
	waitFor(c.t, startLimit, "end of recovery", func() bool { return c.SQL("SELECT pg_is_in_recovery()") == "f" })
}

// pid is the postmaster's, ours or the one that postmaster.pid names; 0 when the server is down.
func (c *cluster) pid() int {
	if c.process != nil {
		if c.down() {
			c.process = nil
			return 0
		}
		return c.process.Pid
	}
	content, _ := os.ReadFile(filepath.Join(c.data, "postmaster.pid"))
	first, _, _ := strings.Cut(string(content), "\n")
	if pid, _ := strconv.Atoi(first); pid > 0 {
		c.lastPID = pid
	}
	if c.lastPID == 0 || !alive(c.lastPID) {
		return 0
	}
	return c.lastPID
}

// cleanUp has the server stopped with the test, its log shown if the test failed, and a PANIC in the log reported.
func (c *cluster) cleanUp() {
	c.t.Cleanup(func() {
		c.StopImmediate()
		log, _ := os.ReadFile(c.logFile())
		if !c.mayPanic && strings.Contains(string(log), "PANIC:") {
			c.t.Errorf("PostgreSQL %d panicked", c.major)
		}
		if c.t.Failed() {
			c.t.Logf("log of PostgreSQL %d on %s ends:\n%s", c.major, c.data, c.logTail())
		}
	})
}

func (c *cluster) logFile() string { return filepath.Join(c.dir, "log") }

// logTail is the end of the server's log, without what polling it adds.
func (c *cluster) logTail() string {
	const lines = 40
	log, _ := os.ReadFile(c.logFile())
	var tail []string
	for line := range strings.Lines(string(log)) {
		if !strings.Contains(line, "the database system is starting up") {
			tail = append(tail, line)
		}
	}
	return strings.Join(tail[max(0, len(tail)-lines):], "")
}

// dsn is a connection string for pgx, libpq and pgthaw alike.
func (c *cluster) dsn(database string) string {
	return fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=%s sslmode=disable", c.port, database)
}

// SQL runs statements in database postgres. The last one's result is given as psql -At prints it.
func (c *cluster) SQL(statements string) string {
	c.t.Helper()
	return c.SQLIn("postgres", statements)
}

func (c *cluster) SQLIn(database, statements string) string {
	c.t.Helper()
	out, err := c.query(database, statements)
	if err != nil {
		c.t.Fatalf("PostgreSQL %d: %s: %v", c.major, statements, err)
	}
	return out
}

// inSession has the queries of one goroutine to database postgres share a session, which costs the server less than one each.
func (c *cluster) inSession(do func()) {
	c.t.Helper()
	conn, err := pgconn.Connect(context.Background(), c.dsn("postgres"))
	if err != nil {
		c.t.Fatalf("PostgreSQL %d: %v", c.major, err)
	}
	defer conn.Close(context.Background())
	c.session = conn
	defer func() { c.session = nil }()
	do()
}

// query is SQLIn for statements that may fail.
func (c *cluster) query(database, statements string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), queryLimit)
	defer cancel()
	conn := c.session
	if conn == nil || database != "postgres" {
		var err error
		if conn, err = pgconn.Connect(ctx, c.dsn(database)); err != nil {
			return "", err
		}
		defer conn.Close(ctx)
	}
	results, err := conn.Exec(ctx, statements).ReadAll()
	if err != nil || len(results) == 0 {
		return "", err
	}
	return unaligned(results[len(results)-1].Rows), nil
}

// unaligned prints rows as psql -At does: columns apart by |, rows by newline.
func unaligned(rows [][][]byte) string {
	var lines []string
	for _, row := range rows {
		var fields []string
		for _, field := range row {
			fields = append(fields, string(field))
		}
		lines = append(lines, strings.Join(fields, "|"))
	}
	return strings.Join(lines, "\n")
}

// Replica makes a standby by pg_basebackup and starts it.
func (c *cluster) Replica() *cluster {
	c.t.Helper()
	dir := tempDir(c.t)
	ownedByPostgres(c.t, dir)
	c.basebackup(dir, "--write-recovery-conf")
	// 17's pg_basebackup, borrowed for 16, writes a connection string that 16 does not understand.
	return adopt(c.t, c.installation, filepath.Join(dir, "data"), "-c", "primary_conninfo="+c.dsn("postgres"))
}

// basebackup has PostgreSQL's own pg_basebackup copy the cluster to dir/data, and its tablespaces beside that.
func (c *cluster) basebackup(dir string, args ...string) {
	c.t.Helper()
	args = append([]string{"--pgdata", filepath.Join(dir, "data"), "--checkpoint", "fast", "--no-sync", "--dbname", c.dsn("postgres")}, args...)
	for location := range strings.Lines(c.SQL("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname !~ '^pg_'")) {
		location = strings.TrimSuffix(location, "\n")
		args = append(args, "--tablespace-mapping", location+"="+filepath.Join(dir, filepath.Base(location)))
	}
	c.run(c.t, "pg_basebackup", args...)
}

// pgbench runs pgbench to its end, and gives its report.
func (c *cluster) pgbench(args ...string) string {
	c.t.Helper()
	return c.run(c.t, "pgbench", append(args, c.dsn("postgres"))...)
}

// nextPort goes on below those that the kernel gives to clients (ip_local_port_range), so that no test's connection takes one
// that another test's server is about to listen on.
var (
	nextPort atomic.Int32
	firstOne = rand.Int32N(ports) // of this run: another may be under way
)

const lowestPort, ports = 10000, 20000

// freePort is one that nobody listens on, and that no other test gets.
func freePort(t *testing.T) int {
	t.Helper()
	for range ports {
		port := lowestPort + (firstOne+nextPort.Add(1))%ports
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			l.Close()
			return int(port)
		}
	}
	t.Fatal("no port is free")
	return 0
}

func appendTo(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
}
