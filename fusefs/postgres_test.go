package fusefs

import (
	"fmt"
	iofs "io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgthaw/repo"
)

const postgresBin = "/usr/lib/postgresql/15/bin"

// TestOverlayPostgres runs PostgreSQL on a mount whose daemon is killed under pgbench, while files are hydrated: no
// acknowledged transaction may be missing, and each page's checksum must be right.
func TestOverlayPostgres(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a server through much")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to run PostgreSQL as user postgres on a mount of root's")
	}
	if _, err := os.Stat(postgresBin + "/postgres"); err != nil {
		t.Fatalf("PostgreSQL 15 is not here: %v; integration/setup.sh test installs it", err)
	}
	p := newServer(t)
	tree := p.source()
	for name, o := range map[string]OverlayOptions{
		"passthrough": {Passthrough: true, AllowOther: true, SyncBefore: []string{"postmaster.pid"}},
		"fill":        {FillOnRead: true, AllowOther: true},
	} {
		t.Run(name, func(t *testing.T) {
			p.t = t
			p.onOverlay(thawAs(t, tree, o, &Owner{p.as.Uid, p.as.Gid}))
		})
	}
}

// server is a PostgreSQL server of the user postgres that is reached by a socket in its room.
type server struct {
	t    *testing.T
	room string
	as   *syscall.Credential
	data string

	postmaster *exec.Cmd     // the one that was started last
	gone       chan struct{} // closed when it has ended
}

func newServer(t *testing.T) *server {
	t.Helper()
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	room, err := os.MkdirTemp("", "TestOverlay")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(room) })
	if err := os.Chown(room, uid, gid); err != nil {
		t.Fatal(err)
	}
	return &server{t: t, room: room, as: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
}

func (p *server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(postgresBin, name), args...)
	cmd.Dir = p.room
	cmd.Env = append(os.Environ(), "PGHOST="+p.room, "PGUSER=postgres", "PGDATABASE=postgres", "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.as}
	return cmd
}

func (p *server) run(name string, args ...string) string {
	p.t.Helper()
	out, err := p.command(name, args...).CombinedOutput()
	if err != nil {
		log, _ := os.ReadFile(p.room + "/log")
		p.t.Fatalf("%s %s: %v\n%s\n%s", name, strings.Join(args, " "), err, out, log)
	}
	return strings.TrimSpace(string(out))
}

// start starts the server as a child of ours, for whoever waits for it to be gone must be its parent.
func (p *server) start() {
	p.t.Helper()
	p.postmaster = p.command("postgres", "-D", p.data, "-c", "listen_addresses=", "-c", "unix_socket_directories="+p.room,
		"-c", "shared_buffers=16MB", "-c", "recovery_init_sync_method=syncfs", "-c", "max_wal_size=64MB")
	log, err := os.OpenFile(p.room+"/log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	defer log.Close()
	p.postmaster.Stdout, p.postmaster.Stderr = log, log
	if err := p.postmaster.Start(); err != nil {
		p.t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() { defer close(gone); p.postmaster.Wait() }()
	p.gone = gone
	p.t.Cleanup(func() { p.signal(syscall.SIGQUIT) })
	eventually(p.t, "the server's readiness", func() bool { return p.command("pg_isready", "-q").Run() == nil || p.ended() })
	if p.ended() {
		p.t.Fatalf("the server did not start:\n%s", readAll(p.t, p.room+"/log"))
	}
}

func (p *server) ended() bool {
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}

// signal ends the server: SIGINT is a fast shutdown, SIGQUIT an immediate one.
func (p *server) signal(sig os.Signal) {
	if !p.ended() {
		p.postmaster.Process.Signal(sig)
	}
	<-p.gone
}

func (p *server) stop() {
	p.t.Helper()
	p.signal(syscall.SIGINT)
	if state := p.run("pg_controldata", p.data); !strings.Contains(state, "shut down\n") {
		p.t.Fatalf("the server did not shut down:\n%s", state)
	}
}

// source makes a cluster and returns its files.
func (p *server) source() lowerTree {
	p.t.Helper()
	p.data = p.room + "/source"
	p.run("initdb", "--data-checksums", "-D", p.data)
	p.start()
	p.run("pgbench", "-q", "-i", "-s", "4")
	p.stop()
	tree := lowerTree{}
	err := filepath.WalkDir(p.data, func(name string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(p.data, name)
		f := lowerFile{e: repo.Entry{Mode: st.Mode(), UID: p.as.Uid, GID: p.as.Gid, ModTime: st.ModTime().Truncate(time.Second)}}
		if st.Mode().IsRegular() {
			f.e.Size = st.Size()
			f.content, err = os.ReadFile(name)
		}
		tree[filepath.Join("pgdata", rel)] = f
		return err
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return tree
}

func (p *server) onOverlay(v *thawed) {
	p.t.Helper()
	p.data = v.dir
	p.admit(v.dir)
	p.start()
	p.checkLedger(0)
	history := filepath.Join(v.dir, p.run("psql", "-XAtqc", "select pg_relation_filepath('pgbench_history')"))
	acknowledged := p.benchUntil(func() {
		hydrating := make(chan struct{})
		go func() { defer close(hydrating); v.ask("crawl") }()
		eventually(p.t, "ten pages of history", func() bool {
			st, err := os.Stat(history)
			return err == nil && st.Size() >= 10*8192
		})
		v.c.kill()
		<-hydrating
	})
	p.signal(syscall.SIGQUIT)
	if err := ForceUnmount(v.dir); err != nil {
		p.t.Fatal(err)
	}
	v.mount()
	p.start()
	p.checkLedger(acknowledged)
	p.run("pgbench", "-n", "-c", "4", "-t", "200")
	if s := v.do("hydrate"); !s.Whole {
		p.t.Errorf("hydrated %+v", s)
	}
	p.run("psql", "-Xq", "-c", "vacuum full pgbench_accounts", "-c", "create database x", "-c", "drop database x", "-c", "checkpoint")
	p.checkLedger(acknowledged)
	p.stop()
	v.do("unmount")
	checkNoAttribute(p.t, v.dir)
	p.t.Log(p.run("pg_checksums", "--check", "-D", v.dir))
	p.start()
	p.checkLedger(acknowledged)
	p.stop()
	expectQuiet(p.t, v.c)
}

// admit lets everybody pass through the temporary directories above a directory.
func (p *server) admit(dir string) {
	p.t.Helper()
	for dir = filepath.Dir(dir); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			p.t.Fatal(err)
		}
	}
}

var processed = regexp.MustCompile(`number of transactions actually processed: (\d+)`)

// benchUntil runs pgbench until disturb has made it end, and returns how many transactions it knows to be committed.
func (p *server) benchUntil(disturb func()) int {
	p.t.Helper()
	cmd := p.command("pgbench", "-n", "-c", "4", "-j", "2", "-T", "600")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	disturb()
	cmd.Wait()
	m := processed.FindStringSubmatch(out.String())
	if m == nil {
		p.t.Fatalf("pgbench told no number:\n%s", out.String())
	}
	n, _ := strconv.Atoi(m[1])
	p.t.Logf("%d transactions were acknowledged", n)
	return n
}

// checkLedger wants at least so many transactions, and that every table has all of each.
func (p *server) checkLedger(least int) {
	p.t.Helper()
	got := p.run("psql", "-XAtqc", `select (select count(*) from pgbench_history), count(distinct s) from (
		select sum(abalance) s from pgbench_accounts union all select sum(bbalance) from pgbench_branches
		union all select sum(tbalance) from pgbench_tellers union all select coalesce(sum(delta), 0) from pgbench_history) x`)
	var rows, sums int
	if _, err := fmt.Sscanf(got, "%d|%d", &rows, &sums); err != nil || rows < least || sums != 1 {
		p.t.Errorf("the ledger says %s (rows, different sums), want at least %d rows and one sum", got, least)
	}
}
