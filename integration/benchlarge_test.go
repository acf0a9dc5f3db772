//go:build bench

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestBenchLarge measures what reads metadata on a repository of a cluster of 10 TiB with 100 backups, and on one of a cluster
// with a million files in one directory, which can be read and is copied. It prints the table of docs/benchmarks.md. The repositories are
// made by repo's TestMakeSynthetic and take 23 GB; PGTHAW_SYNTHETIC_SHARE=0.1 makes a tenth.
func TestBenchLarge(t *testing.T) {
	b := &largeBench{bench: bench{t: t, dir: tempDir(t)}}
	b.make("large")
	b.commands()
	b.browse("main/latest/pgdata/base/1", "5000000", "a directory of 50,000 files")
	b.prune()
	b.make("flat", "PGTHAW_SYNTHETIC_FLAT=1")
	b.browse("main/latest/pgdata/base/1", "16384", "a directory of a million files")
	b.copy()
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

// commands measures those that look at the whole repository. What they read lies in the page cache, but for the tables of contents.
func (b *largeBench) commands() {
	b.row("list", b.measure("list"), "")
	b.row("show", b.measure("show", "main", "latest"), "")
	b.row("repo info", b.measure("repo", "info"), "< 512 MiB")
	b.row("repo check", b.measure("repo", "check"), "<= 60 s, < 512 MiB")
	b.row("repo check --maps", b.measure("repo", "check", "--maps"), "< 512 MiB")
}

// prune deletes half of the backups, and the packs and WAL that only they need.
func (b *largeBench) prune() {
	prune := []string{"repo", "prune", "--keep-last", "50", "--keep-window", "50d", "--grace", "0"}
	b.row("repo prune, the preview", b.measure(prune...), "<= 60 s, < 512 MiB")
	packs := b.objects("packs")
	took := b.measure(append(prune, "--yes")...)
	b.row(fmt.Sprintf("repo prune of half of the backups, and of %d packs", packs-b.objects("packs")), took, "<= 60 s, < 512 MiB")
	b.row("repo check then", b.measure("repo", "check"), "")
}

// objects counts the files below a directory of the repository.
func (b *largeBench) objects(dir string) (n int) {
	err := filepath.WalkDir(filepath.Join(b.repo, dir), func(_ string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
		}
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}

// copy copies the repository, twice.
func (b *largeBench) copy() {
	to := filepath.Join(b.dir, "copy")
	pgthaw(b.t, "repo", "init", "--no-encryption", to).ok(b.t)
	b.row("repo copy of a million files", b.measure("repo", "copy", to), "< 512 MiB")
	b.row("repo copy again", b.measure("repo", "copy", to), "")
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

// browse mounts the repository and looks into it as people do: once for a directory, and once for all.
func (b *largeBench) browse(directory, file, what string) {
	b.mounted("mount, and list pgdata ("+what+")", [][3]string{
		{"find one file in " + what, "stat %s/" + directory + "/" + file},
		{"open it and read a page", "head -c 8192 %s/" + directory + "/" + file},
		{"ls " + what, "ls -f %s/" + directory},
		{"then ls -l of it", "ls -l %s/" + directory},
	})
	b.mounted("mount again", [][3]string{{"ls -lR of the backup, a million files", "ls -lR %s/main/latest/", "<= 30 s, "}})
}

// mounted mounts, and measures shell commands: their names, with %s for the directory, and their bars.
func (b *largeBench) mounted(what string, steps [][3]string) {
	dir := filepath.Join(b.dir, "mnt")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	var pid int
	measured := func(what, bar string, do func()) {
		var before time.Duration
		if pid != 0 {
			before = processorTime(b.t, pid)
		}
		took := b.timed(do)
		for pid = range processesNaming(dir) {
		}
		b.row(what, fmt.Sprintf("%.2f s, %.2f s of the daemon's processor time, %d MiB", took.Seconds(),
			(processorTime(b.t, pid)-before).Seconds(), peakMemory(b.t, pid)>>20), bar+"< 512 MiB")
	}
	measured(what, "<= 1 s, ", func() {
		pgthaw(b.t, "--repo", b.repo, "mount", dir).ok(b.t)
		b.shell("ls -f %s/main/latest/pgdata > /dev/null", dir)
	})
	defer func() { pgthaw(b.t, "umount", dir).ok(b.t) }()
	for _, step := range steps {
		measured(step[0], step[2], func() { b.shell(step[1]+" > /dev/null", dir) })
	}
}

// processorTime is what a process has used.
func processorTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	if !alive(pid) {
		t.Fatalf("process %d has ended", pid)
	}
	return statTimes(pid, 2)
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
