package recovery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"pgthaw/fusefs"
	"pgthaw/repo"
)

// roleVariable makes the test binary play another program: restore_command, or an overlay's daemon.
const roleVariable = "PGTHAW_RECOVERY_TEST"

// noSleep is the race detector's option not to sleep for a second at each exit, for races that are under way.
const noSleep = "GORACE=atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "fetch":
		os.Exit(fetchMain(os.Args[1], os.Args[2], os.Args[3], os.Args[4]))
	case "serve":
		os.Exit(serveMain(os.Args[1]))
	}
	code := m.Run()
	removeTemplates()
	if helper.path != "" {
		os.RemoveAll(filepath.Dir(helper.path))
	}
	os.Exit(code)
}

func fetchMain(url, cluster, name, path string) int {
	ctx := context.Background()
	r, err := repo.Open(ctx, url, repo.Options{})
	if err == nil {
		defer r.Close()
		err = FetchWAL(ctx, r, cluster, name, path)
	}
	switch {
	case err == nil:
		return 0
	case errors.Is(err, repo.ErrNoWAL):
		return 1
	}
	fmt.Fprintln(os.Stderr, err)
	return 200
}

// helper is a copy of the test binary that the server's user can run.
var helper struct {
	once sync.Once
	path string
}

func helperProgram(t testing.TB) string {
	t.Helper()
	helper.once.Do(func() {
		dir, err := os.MkdirTemp("", "pgthaw-helper")
		if err != nil {
			t.Fatal(err)
		}
		helper.path = filepath.Join(dir, "helper")
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		// Were it written here, a process that is being started would have it open still, and execve(2) give ETXTBSY.
		if out, err := exec.Command("cp", self, helper.path).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v\n%s", err, out)
		}
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(helper.path, 0o755)); err != nil {
			t.Fatal(err)
		}
	})
	return helper.path
}

// options are those of a restore that the server's user can finish: it has to read the repository.
func (s *source) options(dir string) Options {
	s.t.Helper()
	if c := postgresUser(s.t); c != nil {
		out, err := exec.Command("chown", "-R", fmt.Sprintf("%d:%d", c.Uid, c.Gid), filepath.Join(s.top, "repo")).CombinedOutput()
		if err != nil {
			s.t.Fatalf("chown: %v\n%s", err, out)
		}
	}
	return Options{
		Cluster: cluster, Backup: repo.Latest, Dir: dir, BinDir: s.bin, Port: freePort(s.t), Start: true,
		RestoreCommand: fmt.Sprintf(`%s=fetch %s '%s' '%s' %s "%%f" "%%p"`, roleVariable, noSleep, helperProgram(s.t), s.repo.URL(), cluster),
	}
}

// copySQL queries a server that was started.
func copySQL(t testing.TB, res Result, q string) string {
	t.Helper()
	return sql(t, fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres", res.SocketDir, res.Port), q)
}

// endServer stops a server that Restore or Thaw started.
func endServer(t testing.TB, res Result) {
	t.Helper()
	if res.PID == 0 {
		return
	}
	_ = syscall.Kill(res.PID, syscall.SIGINT)
	var status syscall.WaitStatus
	eventually(t, "the copy's server stops", func() bool {
		pid, err := syscall.Wait4(res.PID, &status, syscall.WNOHANG, nil)
		return pid == res.PID || err != nil
	})
}

// serveMain is the daemon; file descriptor 3 is a pipe that hears when it is ready.
func serveMain(dir string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	syscall.CloseOnExec(3)
	pipe := os.NewFile(3, "ready")
	open := func(ctx context.Context, url string, _ KeyFiles) (*repo.Repository, error) {
		return repo.Open(ctx, url, repo.Options{})
	}
	ready := func() error {
		_, err := pipe.WriteString("ready")
		return errors.Join(err, pipe.Close())
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := Serve(ctx, dir, open, ready, log); err != nil {
		log.Error("serve", "error", err)
		return 1
	}
	return 0
}

// daemons starts daemons and waits for all of them at the end of the test.
type daemons struct {
	t    testing.TB
	last *exec.Cmd
}

func newDaemons(t testing.TB) *daemons { return &daemons{t: t} }

func (d *daemons) spawn(_ context.Context, dir string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(helperProgram(d.t), dir)
	cmd.Env = append(os.Environ(), roleVariable+"=serve", noSleep)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{w}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	d.last = cmd
	d.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if ours, _, _ := fusefs.IsMount(dir); ours {
			d.t.Errorf("%s is still mounted", dir)
			_ = fusefs.ForceUnmount(dir)
		}
	})
	if said, err := io.ReadAll(r); err != nil || string(said) != "ready" {
		return fmt.Errorf("daemon said %q: %w", said, err)
	}
	return nil
}
