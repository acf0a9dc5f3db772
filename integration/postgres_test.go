package integration

import (
	"context"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// toolLimit bounds every client tool; the slowest here is pgbench's initialization.
const toolLimit = 5 * time.Minute

// installation is PostgreSQL of one major version.
type installation struct {
	major int
	bin   string // directory of postgres, initdb ...
}

func (p installation) String() string { return strconv.Itoa(p.major) }

// majors gives every supported PostgreSQL. One that is missing fails the test: it was promised to be tested.
func majors(t *testing.T) []installation {
	t.Helper()
	var all []installation
	for _, major := range []int{15, 16, 17, 18} {
		all = append(all, postgresql(t, major))
	}
	return all
}

// postgresql finds one major where Debian, or setup.sh, puts it.
func postgresql(t *testing.T, major int) installation {
	t.Helper()
	prefix := os.Getenv("PGTHAW_PG_PREFIX")
	if prefix == "" {
		prefix = "/opt"
	}
	m := strconv.Itoa(major)
	for _, bin := range []string{filepath.Join("/usr/lib/postgresql", m, "bin"), filepath.Join(prefix, "pg"+m, "bin")} {
		if executable(filepath.Join(bin, "postgres")) {
			return installation{major, bin}
		}
	}
	t.Fatalf("PostgreSQL %d is missing: run integration/setup.sh test as root", major)
	return installation{}
}

// tool is the path of a server or client program. Our 16 has none but initdb, pg_ctl and postgres, and borrows: what
// reads PGDATA from 15, whose pg_control has the same version (1300), what talks to the server from 17.
func (p installation) tool(t *testing.T, name string) string {
	t.Helper()
	lender := p
	if !executable(filepath.Join(p.bin, name)) {
		lender = postgresql(t, 17)
		if name == "pg_checksums" || name == "pg_controldata" {
			lender = postgresql(t, 15)
		}
	}
	return filepath.Join(lender.bin, name)
}

// borrows reports whether tool comes from another major.
func (p installation) borrows(t *testing.T, name string) bool {
	return filepath.Dir(p.tool(t, name)) != p.bin
}

// run runs one of the installation's programs as user postgres, and gives what it printed. A failure fails the test.
func (p installation) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := p.try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

// try is run for a program that may fail.
func (p installation) try(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), toolLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.tool(t, name), args...)
	becomePostgres(t, cmd)
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// becomePostgres has cmd run as user postgres, and end with this process: a run that is killed leaves no server.
func becomePostgres(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: postgresUser(t), Pdeathsig: syscall.SIGQUIT}
	cmd.Env = environment("HOME="+filepath.Join(scratch, "home"), stateHome(t, "postgres"))
}

func postgresUser(t *testing.T) *syscall.Credential {
	t.Helper()
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

// ownedByPostgres hands a path to the server's user.
func ownedByPostgres(t *testing.T, path string) {
	t.Helper()
	u := postgresUser(t)
	if err := os.Chown(path, int(u.Uid), int(u.Gid)); err != nil {
		t.Fatal(err)
	}
}

// postgresDir is a temporary directory of user postgres.
func postgresDir(t *testing.T) string {
	t.Helper()
	dir := tempDir(t)
	ownedByPostgres(t, dir)
	return dir
}

// environment is that of every program tests run: no PG* or PGTHAW_* of whoever runs them.
func environment(more ...string) []string {
	return append([]string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "TZ=UTC", "TMPDIR=" + filepath.Join(scratch, "tmp"),
		"XDG_CONFIG_HOME=" + filepath.Join(scratch, "config")}, more...)
}
