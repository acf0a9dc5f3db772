package recovery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"
)

// login is a role and a database to try.
type login struct{ user, database string }

// logins are tried in order: initdb names its superuser after whoever ran it.
func (s *server) logins() []login {
	users := []string{"postgres"}
	if name := s.plan.owner.name; name != "" && name != "postgres" {
		users = []string{name, "postgres"}
	}
	var all []login
	for _, u := range users {
		all = append(all, login{u, "postgres"}, login{u, "template1"})
	}
	return all
}

// connect waits until the server answers a query. Where it answers but lets nobody in, refused says so and conn is nil.
func (s *server) connect(ctx context.Context) (conn *pgx.Conn, refused, err error) {
	for pause := newPause(); ; {
		if s.accepts() {
			conn, err := s.logIn(ctx)
			if err == nil {
				return conn, nil, nil
			}
			if code := sqlState(err); code != "" && code != "57P03" { // cannot_connect_now
				return nil, fmt.Errorf("the server answers, but lets neither %s nor postgres in: %w", s.plan.owner.name, err), nil
			}
		}
		if !s.running() {
			return nil, nil, s.failed()
		}
		if err := pause.sleep(ctx); err != nil {
			return nil, nil, err
		}
	}
}

// accepts looks at the status line of postmaster.pid, as pg_ctl does (pidfile.h): every attempt before its time would
// cost the server a process and leave a line in its log.
func (s *server) accepts() bool {
	text, err := os.ReadFile(filepath.Join(s.dir, "postmaster.pid"))
	if err != nil {
		return false
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 8 || strings.TrimSpace(lines[0]) != strconv.Itoa(s.pid) {
		return false
	}
	status := strings.TrimSpace(lines[7])
	return status == "ready" || status == "standby"
}

// logIn tries the logins until the server has another objection than to who comes.
func (s *server) logIn(ctx context.Context) (conn *pgx.Conn, err error) {
	for _, l := range s.logins() {
		conn, err = s.try(ctx, l)
		if code := sqlState(err); code == "" || code == "57P03" {
			break
		}
	}
	return conn, err
}

func (s *server) try(ctx context.Context, l login) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig("application_name=pgthaw")
	if err != nil {
		return nil, err
	}
	c.Host, c.Port = s.plan.sockets[0], uint16(s.plan.port)
	c.User, c.Database = l.user, l.database
	c.Password, c.TLSConfig, c.Fallbacks = "", nil, nil
	c.ConnectTimeout = 5 * time.Second
	c.DialFunc = dialAs(s.plan.owner.uid)
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		return nil, err
	}
	var one int
	if err := conn.QueryRow(ctx, "select 1").Scan(&one); err != nil {
		return nil, errors.Join(err, conn.Close(ctx))
	}
	return conn, nil
}

// sqlState is the server's code for an error, "" if it is not the server's.
func sqlState(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// dialAs connects to a Unix socket as another user, for peer authentication looks at who connects. User ids belong to
// threads in Linux: one thread changes its own, connects and changes back.
func dialAs(uid int) pgconn.DialFunc {
	if uid == os.Geteuid() {
		return new(net.Dialer).DialContext
	}
	return func(_ context.Context, _, addr string) (net.Conn, error) {
		type result struct {
			conn net.Conn
			err  error
		}
		done := make(chan result)
		go func() {
			runtime.LockOSThread()
			conn, err, clean := connectAs(uid, addr)
			if clean {
				runtime.UnlockOSThread() // else the thread ends with the goroutine
			}
			done <- result{conn, err}
		}()
		r := <-done
		return r.conn, r.err
	}
}

// connectAs is called on a locked thread. clean: the thread has its own user again.
func connectAs(uid int, addr string) (conn net.Conn, err error, clean bool) {
	own := os.Geteuid()
	if err := setThreadUser(uid); err != nil {
		return nil, err, true
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: addr})
	}
	if err := setThreadUser(own); err != nil {
		return nil, err, false
	}
	if fd < 0 {
		return nil, err, true
	}
	f := os.NewFile(uintptr(fd), addr)
	defer f.Close()
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "unix", Err: err}, true
	}
	conn, err = net.FileConn(f)
	return conn, err, true
}

// setThreadUser sets the effective user of this thread alone, unlike syscall.Seteuid.
func setThreadUser(uid int) error {
	_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
	if errno != 0 {
		return fmt.Errorf("become user %s: %w", strconv.Itoa(uid), errno)
	}
	return nil
}
