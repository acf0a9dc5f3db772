package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// leavingTree has two directories with a file each that is too large to be made whole when it is opened.
func leavingTree() lowerTree {
	rng := rand.New(rand.NewPCG(3, 3))
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	tree.file("pgdata/top", 0o600, random(rng, 100_000))
	for _, dir := range []string{"base", "pg_wal"} {
		tree.dir("pgdata/"+dir, 0o700)
		tree.file("pgdata/"+dir+"/big", 0o600, random(rng, 2*smallFile))
		tree.dir("pgdata/"+dir+"/sub", 0o700)
		tree.file("pgdata/"+dir+"/sub/small", 0o600, random(rng, 10_000))
	}
	return tree
}

// leaving is an overlay whose branches leave, with passthrough and as on a kernel without it.
func leaving(t *testing.T, how Leaving, test func(t *testing.T, v *thawed, passthrough bool)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to bind directories")
	}
	for _, passthrough := range []bool{true, false} {
		t.Run(fmt.Sprintf("passthrough=%v", passthrough), func(t *testing.T) {
			o := OverlayOptions{Passthrough: passthrough, Leave: how, First: []string{"pg_wal"}}
			test(t, thaw(t, leavingTree(), o), passthrough)
		})
	}
}

// leave runs Leave and tells which directories have left.
func (v *thawed) leave() (left []string, all []Branch) {
	v.t.Helper()
	r, err := v.ask("leave")
	if err != nil || r.Err != "" {
		v.t.Fatalf("leave: %v %s", err, r.Err)
	}
	for _, b := range r.Branches {
		if rel, _ := filepath.Rel(v.dir, b.Dir); b.Left {
			left = append(left, rel)
		}
	}
	return left, r.Branches
}

// native tells whether a path leads to the file system of the mount's parent directory.
func native(t *testing.T, path, mount string) bool {
	t.Helper()
	var a, b unix.Stat_t
	if err := errors.Join(unix.Stat(path, &a), unix.Stat(filepath.Dir(mount), &b)); err != nil {
		t.Fatal(err)
	}
	return a.Dev == b.Dev
}

func open(t *testing.T, name string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestLeaveWaitsForCachedHandles(t *testing.T) {
	leaving(t, Directories, func(t *testing.T, v *thawed, passthrough bool) {
		if left, _ := v.leave(); len(left) != 0 {
			t.Errorf("left with holes: %v", left)
		}
		big := filepath.Join(v.dir, "base/big")
		f := open(t, big, os.O_RDWR) // it has holes: cached
		v.do("hydrate")
		left, all := v.leave()
		if !slices.Equal(left, []string{"pg_wal"}) || native(t, big, v.dir) || !native(t, v.dir+"/pg_wal/big", v.dir) {
			t.Fatalf("left: %v", left)
		}
		i := slices.IndexFunc(all, func(b Branch) bool { return b.Dir == v.dir+"/base" })
		if i < 0 || len(all[i].Holders) != 1 || all[i].Holders[0].PID != os.Getpid() {
			t.Errorf("who holds base: %+v", all)
		}
		if _, err := f.WriteAt([]byte("cached"), 0); err != nil {
			t.Error(err)
		}
		// Who comes now must not hold it in turn, where the kernel could serve the file by itself.
		beside := open(t, big, os.O_RDWR)
		checkSameFile(t, f, beside)
		if !passthrough {
			beside.Close()
		}
		f.Close() // beside is no reason to wait
		eventually(t, "base leaves", func() bool { left, all = v.leave(); return len(left) == 2 })
		if !native(t, big, v.dir) || !bytes.HasPrefix(readAll(t, big), []byte("cached")) {
			t.Error("the native file does not have what the mount was given")
		}
		if len(all) != 2 {
			t.Errorf("branches: %+v", all)
		}
		beside.Close()
		v.do("unmount")
		if m := mountsBelow(v.dir); len(m) > 0 {
			t.Errorf("mounts left: %v", m)
		}
		expectQuiet(t, v.c)
	})
}

// Whoever has a file open, or works in a directory, since before it left, sees what is done without the mount and the
// other way round, though the kernel had the mount's names, sizes and pages in memory.
func TestLeaveIsCoherent(t *testing.T) {
	leaving(t, Directories, func(t *testing.T, v *thawed, passthrough bool) {
		v.do("hydrate")
		base := filepath.Join(v.dir, "base")
		dir := open(t, base, unix.O_PATH|os.O_RDONLY)
		inside := func(name string) string { return procPath(int(dir.Fd())) + "/" + name }
		readAll(t, base+"/sub/small")
		readAll(t, base+"/big")
		if _, err := os.Stat(base + "/new"); err == nil {
			t.Fatal("new is there")
		}
		old := make(map[string]*os.File)
		if passthrough {
			old["passthrough"] = open(t, base+"/big", os.O_RDWR)
		}
		eventually(t, "both directories leave", func() bool { left, _ := v.leave(); return len(left) == 2 })
		if !native(t, base+"/big", v.dir) || native(t, inside("big"), v.dir) {
			t.Fatal("base is not bound, or the handle does not lead to the mount")
		}
		old["opened later"] = open(t, inside("big"), os.O_RDWR)
		natively := open(t, base+"/big", os.O_RDWR)
		for how, f := range old {
			t.Run(how, func(t *testing.T) { checkSameFile(t, f, natively) })
		}
		checkSameNames(t, base, inside)
	})
}

// checkSameFile changes a file by two handles in turn.
func checkSameFile(t *testing.T, a, b *os.File) {
	t.Helper()
	for i, h := range [][2]*os.File{{a, b}, {b, a}, {a, b}} {
		from, to := h[0], h[1]
		size, err := to.Seek(0, io.SeekEnd)
		if err != nil {
			t.Fatal(err)
		}
		page := bytes.Repeat([]byte{byte('a' + i)}, 8192)
		for _, at := range []int64{8192, size} { // overwritten, and appended
			if _, err := from.WriteAt(page, at); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(page))
			if _, err := to.ReadAt(got, at); err != nil || !bytes.Equal(got, page) {
				t.Errorf("turn %d at %d: %v, %d bytes wanted, got %.10q", i, at, err, len(page), got)
			}
		}
		if end, err := to.Seek(0, io.SeekEnd); err != nil || end != size+8192 {
			t.Errorf("turn %d: it ends at %d, want %d: %v", i, end, size+8192, err)
		}
		if err := from.Truncate(size - 8192); err != nil {
			t.Fatal(err)
		}
		if st, err := to.Stat(); err != nil || st.Size() != size-8192 {
			t.Errorf("turn %d: truncated to %d, seen as %d: %v", i, size-8192, st.Size(), err)
		}
	}
}

// checkSameNames changes names natively and looks at them through the mount.
func checkSameNames(t *testing.T, base string, inside func(string) string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(base+"/new", []byte("new"), 0o640))
	must(os.Rename(base+"/sub/small", base+"/renamed"))
	must(os.Remove(base + "/sub"))
	must(os.Mkdir(base+"/sub", 0o750))
	must(os.WriteFile(base+"/sub/small", []byte("other"), 0o600))
	for name, want := range map[string]string{"new": "new", "sub/small": "other"} {
		if got := string(readAll(t, inside(name))); got != want {
			t.Errorf("%s through the mount is %.10q, want %q", name, got, want)
		}
	}
	if st, err := os.Stat(inside("sub")); err != nil || st.Mode().Perm() != 0o750 {
		t.Errorf("sub through the mount: %v, %v", st, err)
	}
	must(os.Remove(base + "/new"))
	if _, err := os.Stat(inside("new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was removed natively is there through the mount: %v", err)
	}
	must(os.WriteFile(inside("later"), []byte("later"), 0o600))
	if got := string(readAll(t, base+"/later")); got != "later" {
		t.Errorf("made through the mount, natively it is %q", got)
	}
}

// What has holes must not come to where they would be zeros.
func TestLeaveKeepsBranchesApart(t *testing.T) {
	leaving(t, Directories, func(t *testing.T, v *thawed, _ bool) {
		at := func(name string) string { return filepath.Join(v.dir, name) }
		for _, names := range [][2]string{{"base/big", "pg_wal/moved"}, {"top", "base/moved"}, {"base/big", "moved"}, {"base", "moved"}, {"base/sub", "pg_wal/moved"}} {
			if err := os.Rename(at(names[0]), at(names[1])); !errors.Is(err, unix.EXDEV) {
				t.Errorf("rename %v: %v", names, err)
			}
			if err := os.Link(at(names[0]), at(names[1])); names[0] != "base" && names[0] != "base/sub" && !errors.Is(err, unix.EXDEV) {
				t.Errorf("link %v: %v", names, err)
			}
		}
		for _, names := range [][2]string{{"base/big", "base/sub/big"}, {"base/sub", "base/sub2"}, {"top", "top2"}} {
			if err := os.Rename(at(names[0]), at(names[1])); err != nil {
				t.Errorf("rename %v: %v", names, err)
			}
		}
	})
}

// A mount that somebody takes off a branch comes back, and the mount's own end takes all of them along.
func TestLeaveLastsAsLongAsTheMount(t *testing.T) {
	leaving(t, Directories, func(t *testing.T, v *thawed, _ bool) {
		v.do("hydrate")
		if left, _ := v.leave(); len(left) != 2 {
			t.Fatalf("left: %v", left)
		}
		eventually(t, "nobody uses what is bound", func() bool { return unix.Unmount(v.dir+"/base", 0) == nil })
		if native(t, v.dir+"/base", v.dir) {
			t.Fatal("base is bound twice")
		}
		v.leave()
		if !native(t, v.dir+"/base", v.dir) {
			t.Error("base is not bound again")
		}

		// Whoever works in the mount keeps it on; who works in what has left does not.
		inMount, inBase := sleeper(t, v.dir), sleeper(t, v.dir+"/base")
		r, err := v.ask("unmount")
		if err != nil || !strings.Contains(r.Err, fmt.Sprintf("process %d", inMount.Process.Pid)) {
			t.Errorf("unmount in use: %v %q", err, r.Err)
		}
		if !native(t, v.dir+"/base", v.dir) {
			t.Error("base was uncovered in vain")
		}
		inMount.Process.Kill()
		inMount.Wait()
		v.do("unmount")
		if m := mountsBelow(v.dir); len(m) > 0 {
			t.Errorf("mounts left: %v", m)
		}
		inBase.Process.Kill()
		inBase.Wait()

		v.mount()
		if left, _ := v.leave(); len(left) != 2 {
			t.Errorf("left at once: %v", left)
		}
		if err := os.WriteFile(v.dir+"/base/late", []byte("late"), 0o600); err != nil {
			t.Fatal(err)
		}
		v.crash()
		if m := mountsBelow(v.dir); len(m) > 0 {
			t.Errorf("mounts left after a crash: %v", m)
		}
		v.mount()
		if got := string(readAll(t, v.dir+"/base/late")); got != "late" {
			t.Errorf("after a crash: %q", got)
		}
	})
}

// sleeper is a process that works in a directory.
func sleeper(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	cmd.Dir = dir
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

// mountsBelow lists the mounts at and below a directory.
func mountsBelow(dir string) (found []string) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	for line := range strings.Lines(string(b)) {
		if at := strings.Fields(line)[4]; at == dir || strings.HasPrefix(at, dir+"/") {
			found = append(found, at)
		}
	}
	return found
}

// A tablespace leaves as one, under those who have files of it open.
func TestLeaveWhole(t *testing.T) {
	leaving(t, Whole, func(t *testing.T, v *thawed, passthrough bool) {
		v.do("hydrate")
		f := open(t, v.dir+"/base/big", os.O_RDWR)
		if !passthrough {
			if left, all := v.leave(); len(left) != 0 || len(all) != 1 {
				t.Fatalf("left with a cached handle: %+v", all)
			}
			f.Close()
		}
		eventually(t, "all leaves", func() bool {
			_, err := v.ask("leave")
			ours, _, mountErr := IsMount(v.dir)
			return err == nil && mountErr == nil && !ours
		})
		if err := os.Rename(v.dir+"/base", v.dir+"/moved"); err != nil {
			t.Error(err)
		}
		if passthrough {
			checkSameFile(t, f, open(t, v.dir+"/moved/big", os.O_RDWR))
			if r, err := v.ask("unmount"); err != nil || !strings.Contains(r.Err, "open") {
				t.Errorf("unmount under an open file: %v %q", err, r.Err)
			}
			f.Close()
		}
		eventually(t, "the end", func() bool { r, err := v.ask("unmount"); return err == nil && r.Err == "" })
	})
}

// A daemon that is killed while it looks at its own mount is gone all the same, and the mount dead: nothing waits for an
// answer that nobody gives any more.
func TestLeaveKilled(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to bind directories")
	}
	v := thaw(t, leavingTree(), OverlayOptions{Passthrough: true, Leave: Directories})
	for i := range rounds(40) {
		if i%4 == 1 {
			v.do("hydrate")
		}
		go v.ask("leave forever")
		time.Sleep(time.Duration(rand.IntN(10_000)) * time.Microsecond)
		v.c.cmd.Process.Kill()
		select {
		case <-v.c.waited:
		case <-time.After(10 * time.Second):
			t.Errorf("round %d: the daemon was killed and has not ended", i)
			if err := unix.Unmount(v.dir, unix.MNT_FORCE); err != nil { // it lets go of whoever waits
				t.Log(err)
			}
		}
		v.crash()
		if t.Failed() {
			return
		}
		v.mount()
	}
}
