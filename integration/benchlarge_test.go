//go:build bench

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestBenchLarge measures what only reads metadata on a repository of a cluster of 10 TiB with 100 backups, and on one of a cluster
// with a million files in one directory. It prints the table of docs/benchmarks.md. The repositories, whose chunks are holes, are
// made by repo's TestMakeSynthetic and take 20 GB; PGTHAW_SYNTHETIC_SHARE=0.1 makes a tenth.
func TestBenchLarge(t *testing.T) {
	b := &largeBench{bench: bench{t: t, dir: tempDir(t)}}
	b.make("large")
	b.commands()
	b.browse("main/latest/pgdata/base/1", "a directory of 50,000 files")
	b.make("flat", "PGTHAW_SYNTHETIC_FLAT=1")
	b.browse("main/latest/pgdata/base/1", "a directory of a million files")
	fmt.Println(b.table())
}

type largeBench struct{ bench }

// make makes a repository.
func (b *largeBench) make(name string, env ...string) {
	b.t.Helper()
	b.repo = filepath.Join(b.dir, name)
	cmd := exec.Command("go", "test", "-count=1", "-timeout", "60m", "-run", "^TestMakeSynthetic$", "pgthaw/repo")
	cmd.Env = append(append(os.Environ(), "PGTHAW_SYNTHETIC="+b.repo), env...)
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("make the repository: %v\n%s", err, out)
	}
	b.t.Logf("%s: made in %v", name, time.Since(began))
}

// commands measures those that look at the whole repository, everything in the page cache; the check also without.
func (b *largeBench) commands() {
	for _, args := range [][]string{{"list"}, {"show", "main", "latest"}, {"repo", "info"}} {
		b.row(strings.Join(args, " "), b.measure(args...), "")
	}
	b.row("repo check", b.measure("repo", "check"), "<= 60 s")
	forgetBelow(b.t, filepath.Join(b.repo, "packs"))
	b.row("repo check, packs not in the page cache", b.measure("repo", "check"), "")
	b.row("repo check --maps", b.measure("repo", "check", "--maps"), "")
}

// measure runs pgthaw and tells its time, processor time and peak of memory.
func (b *largeBench) measure(args ...string) string {
	b.t.Helper()
	cmd := exec.Command(filepath.Join(scratch, "bin", "pgthaw"), args...)
	cmd.Env = environment("PGTHAW_REPO=" + b.repo)
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	took, s := time.Since(began), cmd.ProcessState
	return fmt.Sprintf("%.2f s, %.2f s of processor time, %d MiB", took.Seconds(), (s.UserTime() + s.SystemTime()).Seconds(),
		s.SysUsage().(*syscall.Rusage).Maxrss>>10)
}

// forgetBelow drops files from the page cache.
func forgetBelow(t *testing.T, dir string) {
	t.Helper()
	unix.Sync() // what is dirty is not dropped
	err := filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		return dropCache(f)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// browse mounts the repository and looks into it as people do.
func (b *largeBench) browse(directory, what string) {
	dir := filepath.Join(b.dir, "mnt")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	took := b.timed(func() { pgthaw(b.t, "--repo", b.repo, "mount", dir).ok(b.t) })
	defer func() { pgthaw(b.t, "umount", dir).ok(b.t) }()
	var pid int
	for pid = range processesNaming(dir) {
	}
	mib := func() string { return fmt.Sprintf("%d MiB", peakMemory(b.t, pid)>>20) }
	ls := b.timed(func() { b.shell("ls -f %s/main/latest/pgdata > /dev/null", dir) })
	b.row(fmt.Sprintf("mount, and list pgdata (%s)", what), fmt.Sprintf("%.2f s, %s", (took+ls).Seconds(), mib()), "<= 1 s, < 512 MiB")
	for _, step := range [][2]string{
		{"find one file in " + what, "stat %s/" + directory + "/5000000 > /dev/null"},
		{"open it and read a page", "head -c 8192 %s/" + directory + "/5000000 > /dev/null"},
		{"ls " + what, "ls -f %s/" + directory + " > /dev/null"},
		{"ls -l " + what, "ls -l %s/" + directory + " > /dev/null"},
		{"find all files of a backup", "find %s/main/latest/ -type f | wc -l > /dev/null"},
	} {
		took := b.timed(func() { b.shell(step[1], dir) })
		b.row(step[0], fmt.Sprintf("%.2f s, %s", took.Seconds(), mib()), "< 512 MiB")
	}
}

func (b *largeBench) timed(fn func()) time.Duration {
	began := time.Now()
	fn()
	return time.Since(began)
}

func (b *largeBench) shell(format string, args ...any) {
	b.t.Helper()
	line := fmt.Sprintf(format, args...)
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		b.t.Fatalf("%s: %v\n%s", line, err, out)
	}
}
