// Package integration drives the built pgthaw against real PostgreSQL servers of every supported major, as root.
//
// The pieces of its harness:
//
//	installation  PostgreSQL of one major; majors(t) gives all four and fails when one is missing
//	cluster       a server in a directory of its own; newCluster, adopt, Replica; stopped and removed with the test
//	ledger        concurrent writers that remember what the server acknowledged, so that a test knows what
//	              must be there at a time, LSN, transaction or name
//	invocation    one run of pgthaw: pgthaw(t, ...), asPostgres.run(t, ...), start for what stays
//	waitFor       polling with a deadline
//
// Tests run side by side, but for those that touch what the whole host has only one of.
// Whatever a run makes lies below one scratch directory. A mount, a process or a file that is left there when all tests
// have ended fails the run.
package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// scratch is the run's directory, made by TestMain: bin/pgthaw, home (HOME of every pgthaw), config (XDG_CONFIG_HOME of every
// pgthaw, where the keys of repositories lie that are made without a word about keys), state (stateHome), tmp (what tests make).
// It is short, because a unix socket's path has 107 bytes, and open to the server's user.
var scratch string

// orphanLimit is how long a program may run on after the server that started it.
const orphanLimit = 5 * time.Second

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if err := prepareScratch(); err != nil {
		os.RemoveAll(scratch)
		fmt.Fprintln(os.Stderr, "integration:", err)
		return 1
	}
	code := m.Run()
	// What a server ran when it was stopped ends a moment after it.
	poll(orphanLimit, func() bool { return len(processesNaming(scratch)) == 0 })
	left := leftovers()
	for _, what := range left {
		fmt.Fprintln(os.Stderr, "left behind:", what)
		code = 1
	}
	if err := os.RemoveAll(scratch); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	return code
}

func prepareScratch() (err error) {
	if os.Geteuid() != 0 {
		return fmt.Errorf("these tests start servers as user postgres and mount file systems: run them as root")
	}
	syscall.Umask(0o022)
	if scratch, err = os.MkdirTemp("", "pgthaw-it"); err != nil {
		return err
	}
	for dir, mode := range map[string]os.FileMode{"": 0o755, "bin": 0o755, "home": 0o1777, "state": 0o1777, "tmp": 0o1777, "config": 0o755, "config/pgthaw/keys": 0o1777} {
		path := filepath.Join(scratch, dir)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		if err := syscall.Chmod(path, uint32(mode)); err != nil {
			return fmt.Errorf("chmod %s: %w", path, err)
		}
	}
	return placeBinary(filepath.Join(scratch, "bin", "pgthaw"))
}

// stateHome is an XDG_STATE_HOME, where pgthaw remembers what it has seen of repositories: one for each test and user. A test that
// puts an older repository in the place of a newer one, and does not mean to be told, takes another.
func stateHome(t *testing.T, user string) string {
	test, _, _ := strings.Cut(t.Name(), "/")
	return "XDG_STATE_HOME=" + filepath.Join(scratch, "state", test+"."+user)
}

// unseen is the environment in which nobody has seen a repository, nor the one that it is a copy of.
func unseen(repo string) []string {
	return []string{"PGTHAW_REPO=" + repo, "XDG_STATE_HOME=" + repo + ".state"}
}

// placeBinary builds the pgthaw under test, or takes the one that PGTHAW_BINARY names: a release, for instance.
func placeBinary(path string) error {
	if given := os.Getenv("PGTHAW_BINARY"); given != "" {
		return os.Symlink(given, path)
	}
	// Without -buildvcs=false a clone of another owner does not build: git refuses to read it.
	build := exec.Command("go", "build", "-buildvcs=false", "-o", path, "pgthaw/cmd/pgthaw")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build pgthaw: %w\n%s", err, out)
	}
	return nil
}

// tempDir is a directory for one test that any user may enter, removed with the test.
// t.TempDir will not do: its parent is closed to the server's user.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(filepath.Join(scratch, "tmp"), "t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, mount := range mountsBelow(dir) {
			t.Errorf("still mounted: %s", mount)
			unmount(mount)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// mountTemp mounts a new file system of the kernel's until the test ends.
func mountTemp(t *testing.T, kind, options string) string {
	t.Helper()
	dir := tempDir(t)
	if err := syscall.Mount("none", dir, kind, 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// fileBytes adds up the sizes of the files below a directory.
func fileBytes(t *testing.T, dir string) (n int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				n += info.Size()
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// leftovers names, and takes away, every mount, process and file below scratch that should be gone by now.
func leftovers() []string {
	var left []string
	for pid, cmdline := range processesNaming(scratch) {
		left = append(left, fmt.Sprintf("process %d: %s", pid, cmdline))
		syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, mount := range mountsBelow(scratch) {
		left = append(left, "mount "+mount)
		unmount(mount)
	}
	files, err := os.ReadDir(filepath.Join(scratch, "tmp"))
	if err != nil {
		left = append(left, err.Error())
	}
	for _, f := range files {
		left = append(left, "file "+filepath.Join(scratch, "tmp", f.Name()))
	}
	return left
}

// mountsBelow lists mount points below dir, the latest first.
func mountsBelow(dir string) []string {
	var points []string
	table, _ := os.ReadFile("/proc/mounts")
	for line := range strings.Lines(string(table)) {
		if point := strings.Fields(line)[1]; point == dir || strings.HasPrefix(point, dir+"/") {
			points = append([]string{point}, points...)
		}
	}
	return points
}

// unmount detaches a mount that its owner has left; it serves cleaning up only.
func unmount(point string) { _ = syscall.Unmount(point, syscall.MNT_DETACH) }

// processesNaming finds every process but this one whose command line contains text.
func processesNaming(text string) map[int]string {
	found := map[int]string{}
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		cmdline, _ := os.ReadFile(file)
		if pid != os.Getpid() && bytes.Contains(cmdline, []byte(text)) {
			found[pid] = string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))
		}
	}
	return found
}
