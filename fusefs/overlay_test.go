package fusefs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

// overlayChild mounts: arguments are the repository, the directory, a socket for commands and options as JSON.
func overlayChild(ctx context.Context, args []string, ready func()) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	var o OverlayOptions
	if err := json.Unmarshal([]byte(args[3]), &o); err != nil {
		return err
	}
	o.Log = log
	r, err := repo.Open(ctx, args[0], repo.Options{Log: log})
	if err != nil {
		return err
	}
	defer r.Close()
	m, err := r.Manifest(ctx, "main", repo.Latest)
	if err != nil {
		return err
	}
	b := r.OpenBackup(m)
	v, err := MountOverlay(context.WithoutCancel(ctx), args[1], b, o)
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", args[2])
	if err != nil {
		return err
	}
	defer l.Close()
	go answer(l, v, b)
	ready()
	<-ctx.Done()
	if err := v.Unmount(); errors.Is(err, unix.EBUSY) {
		return errors.Join(err, ForceUnmount(args[1]))
	} else if err != nil {
		return err
	}
	return nil
}

// answer runs one command of each connection: "hydrate", "status", "leave", "leave forever", "unmount", "prefetch".
func answer(l net.Listener, v *Overlay, b *repo.Backup) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			command, _ := bufio.NewReader(c).ReadString('\n')
			var err error
			switch command {
			case "hydrate\n":
				err = v.Hydrate(context.Background(), 0)
			case "crawl\n":
				err = v.Hydrate(context.Background(), 10<<20)
			case "prefetch\n":
				err = prefetchAll(v, b)
			case "leave\n":
				err = v.Leave()
			case "leave forever\n":
				for err == nil {
					err = v.Leave()
				}
			case "unmount\n":
				err = v.Unmount()
			}
			text := ""
			if err != nil {
				text = err.Error()
			}
			r := reply{Err: text}
			if command != "unmount\n" || err != nil {
				r.Status, r.Branches = v.Status(), v.Branches()
			}
			json.NewEncoder(c).Encode(r)
		}()
	}
}

type reply struct {
	Err      string
	Status   Status
	Branches []Branch
}

// thawed is a mounted overlay in a child.
type thawed struct {
	t          *testing.T
	repository string
	dir        string // the mount
	o          OverlayOptions
	edit       func(*exec.Cmd)
	c          *child
	socket     string
}

// thaw makes the bare tree of the tree's pgdata and mounts it.
func thaw(t *testing.T, tree lowerTree, o OverlayOptions) *thawed {
	t.Helper()
	return thawAs(t, tree, o, nil)
}

// thawAs gives all that is laid to an owner.
func thawAs(t *testing.T, tree lowerTree, o OverlayOptions, owner *Owner) *thawed {
	t.Helper()
	return thawAt(t, t.TempDir(), tree, o, owner)
}

// thawIn thaws below a directory of another file system.
func thawIn(t *testing.T, dir string, tree lowerTree, o OverlayOptions) *thawed {
	t.Helper()
	return thawAt(t, dir, tree, o, nil)
}

func thawAt(t *testing.T, dir string, tree lowerTree, o OverlayOptions, owner *Owner) *thawed {
	t.Helper()
	r, repository := newRepository(t)
	m := backUp(t, r, tree)
	v := &thawed{t: t, repository: repository, dir: filepath.Join(dir, "pgdata"), o: o}
	if err := os.Mkdir(v.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Lay(t.Context(), r.OpenBackup(m), "pgdata", v.dir, LayOptions{Owner: owner}); err != nil {
		t.Fatal(err)
	}
	v.mount()
	return v
}

func (v *thawed) mount() {
	v.t.Helper()
	options, err := json.Marshal(v.o)
	if err != nil {
		v.t.Fatal(err)
	}
	v.socket = filepath.Join(filepath.Dir(v.repository), fmt.Sprintf("s%d", rand.Uint32()))
	v.c = startChild(v.t, "overlay", v.edit, v.repository, v.dir, v.socket, string(options))
}

// crash kills the child and takes the dead mount off.
func (v *thawed) crash() {
	v.t.Helper()
	v.c.kill()
	if _, err := os.ReadDir(v.dir); !errors.Is(err, unix.ENOTCONN) {
		v.t.Errorf("reading under a dead mount gives %v, want ENOTCONN", err)
	}
	if ours, alive, err := IsMount(v.dir); !ours || alive || err != nil {
		v.t.Errorf("dead mount: ours %v, alive %v, %v", ours, alive, err)
	}
	if err := ForceUnmount(v.dir); err != nil {
		v.t.Fatal(err)
	}
}

// do runs a command in the child.
func (v *thawed) do(command string) Status {
	v.t.Helper()
	r, err := v.ask(command)
	if err != nil {
		v.t.Fatal(err)
	}
	if r.Err != "" {
		v.t.Fatalf("%s: %s", command, r.Err)
	}
	return r.Status
}

func (v *thawed) ask(command string) (r reply, err error) {
	c, err := net.Dial("unix", v.socket)
	if err != nil {
		return r, err
	}
	defer c.Close()
	fmt.Fprintln(c, command)
	return r, json.NewDecoder(c).Decode(&r)
}

// modes are the ways to serve, each with the options that choose it. A short run has each option off and on.
func modes(t *testing.T, test func(t *testing.T, o OverlayOptions)) {
	t.Helper()
	for name, o := range map[string]OverlayOptions{
		"passthrough": {Passthrough: true},
		"cached":      {},
		"fill":        {FillOnRead: true},
		"all":         {Passthrough: true, FillOnRead: true},
	} {
		if testing.Short() && o.Passthrough != o.FillOnRead {
			continue
		}
		t.Run(name, func(t *testing.T) { test(t, o) })
	}
}

func readAll(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// under returns the part of a tree below a directory, by path relative to it.
func (tree lowerTree) under(dir string) lowerTree {
	part := lowerTree{}
	for name, f := range tree {
		if rel, ok := strings.CutPrefix(name, dir+"/"); ok {
			part[rel] = f
		}
	}
	return part
}

func TestOverlayShowsWhatWasBackedUp(t *testing.T) {
	modes(t, func(t *testing.T, o OverlayOptions) {
		tree := sampleTree(rand.New(rand.NewPCG(seed(t), 0)))
		v := thaw(t, tree, o)
		s := v.do("status")
		if s.Whole || s.BytesHydrated > s.BytesTotal/2 {
			t.Errorf("at first %+v", s)
		}
		checkOverlay(t, v.dir, tree.under("pgdata"))
		s = v.do("hydrate")
		if !s.Whole || s.BytesHydrated != s.BytesTotal || s.FilesWhole != s.FilesTotal {
			t.Errorf("hydrated %+v", s)
		}
		checkOverlay(t, v.dir, tree.under("pgdata"))
		v.do("unmount")
		if ours, _, err := IsMount(v.dir); ours || err != nil {
			t.Errorf("unmounted: ours %v, %v", ours, err)
		}
		checkOverlay(t, v.dir, tree.under("pgdata"))
		checkNoAttribute(t, v.dir)
		expectQuiet(t, v.c)
	})
}

// checkOverlay compares all below dir with a tree: content, type, permissions, times of change; and nothing else is there.
func checkOverlay(t *testing.T, dir string, want lowerTree) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(dir, func(name string, d iofs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		seen++
		rel, _ := filepath.Rel(dir, name)
		f, ok := want[rel]
		if !ok {
			return fmt.Errorf("%s is not in the backup", rel)
		}
		return checkEntry(name, f)
	})
	if err != nil || seen != len(want) {
		t.Errorf("%d of %d entries: %v", seen, len(want), err)
	}
}

func checkEntry(name string, want lowerFile) error {
	st, err := os.Lstat(name)
	if err != nil {
		return err
	}
	if st.Mode() != want.e.Mode || !st.ModTime().Equal(want.e.ModTime) || want.e.Mode.IsRegular() && st.Size() != want.e.Size {
		return fmt.Errorf("%s: %v %v %d, want %v %v %d", name, st.Mode(), st.ModTime(), st.Size(), want.e.Mode, want.e.ModTime, want.e.Size)
	}
	if want.e.Link != "" {
		if link, err := os.Readlink(name); err != nil || link != want.e.Link {
			return fmt.Errorf("%s leads to %q, %v; want %q", name, link, err, want.e.Link)
		}
	}
	if !st.Mode().IsRegular() {
		return nil
	}
	b, err := os.ReadFile(name)
	if err == nil && !bytes.Equal(b, want.content) {
		return fmt.Errorf("%s: %d bytes that differ from the %d in the backup", name, len(b), len(want.content))
	}
	return err
}

func checkNoAttribute(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, d iofs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		p, err := readPlaceholder(name)
		if p.limit > 0 {
			return fmt.Errorf("%s is still a placeholder: %v", name, p)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestOverlayNames(t *testing.T) {
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	tree.file("pgdata/PG_VERSION", 0o600, []byte("15\n"))
	tree.file("pgdata/big", 0o600, random(rand.New(rand.NewPCG(1, 1)), 100_000))
	r, repository := newRepository(t)
	m := backUp(t, r, tree)
	v := &thawed{t: t, repository: repository, dir: t.TempDir(), o: OverlayOptions{
		Hidden: []string{".pgthaw"}, Moved: map[string]string{"PG_VERSION": ".pgthaw/PG_VERSION"}, SyncBefore: []string{"postmaster.pid"},
	}}
	_, err := Lay(t.Context(), r.OpenBackup(m), "pgdata", v.dir, LayOptions{
		Rename: func(name string) string {
			if name == "pgdata/PG_VERSION" {
				return ".pgthaw/PG_VERSION"
			}
			return ""
		},
		Skip: func(name string) bool { return name == "pgdata/big" },
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(v.dir + "/PG_VERSION"); !errors.Is(err, iofs.ErrNotExist) {
		t.Errorf("PG_VERSION in the bare directory: %v", err)
	}
	v.mount()
	if got := names(t, v.dir); !slices.Equal(got, []string{"PG_VERSION"}) {
		t.Errorf("shows %q", got)
	}
	if got := string(readAll(t, v.dir+"/PG_VERSION")); got != "15\n" {
		t.Errorf("PG_VERSION is %q", got)
	}
	if _, err := os.Stat(v.dir + "/.pgthaw"); !errors.Is(err, iofs.ErrNotExist) {
		t.Errorf("the hidden name: %v", err)
	}
	if err := os.Mkdir(v.dir+"/.pgthaw", 0o700); !errors.Is(err, unix.EPERM) {
		t.Errorf("mkdir of the hidden name: %v", err)
	}
	if err := os.WriteFile(v.dir+"/postmaster.pid", []byte("1"), 0o600); err != nil {
		t.Error(err)
	}
	if err := os.Rename(v.dir+"/postmaster.pid", v.dir+"/.pgthaw"); !errors.Is(err, unix.EPERM) {
		t.Errorf("rename onto the hidden name: %v", err)
	}
	if err := os.Rename(v.dir+"/postmaster.pid", v.dir+"/PG_VERSION"); err != nil {
		t.Errorf("rename onto the moved name: %v", err)
	}
	v.do("unmount")
	if got := string(readAll(t, v.dir+"/.pgthaw/PG_VERSION")); got != "1" {
		t.Errorf("the moved name's file beneath is %q", got)
	}
}

// TestOverlaySwitch holds a handle of each mode while others come: the kernel must refuse none of them.
func TestOverlaySwitch(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	tree.file("pgdata/big", 0o600, random(rng, 3<<20+77))
	modes(t, func(t *testing.T, o OverlayOptions) {
		v := thaw(t, tree, o)
		want := bytes.Clone(tree["pgdata/big"].content)
		name := v.dir + "/big"
		old, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		writeBoth(t, old, want, random(rng, 5000), 1_000_001)
		v.do("hydrate")
		second, err := os.OpenFile(name, os.O_RDWR, 0) // whole by now, but cached handles are left
		if err != nil {
			t.Fatal(err)
		}
		writeBoth(t, second, want, random(rng, 5000), 2_000_001)
		old.Close()
		second.Close()
		for range 3 { // the kernel sends RELEASE some time after close(2)
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			writeBoth(t, f, want, random(rng, 5000), int64(rng.IntN(3<<20-5000)))
			if got := readAll(t, name); !bytes.Equal(got, want) {
				t.Error("content differs")
			}
		}
		expectQuiet(t, v.c)
	})
}

func writeBoth(t *testing.T, f *os.File, want, p []byte, off int64) {
	t.Helper()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
	copy(want[off:], p)
}

func TestOverlayMap(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	tree.file("pgdata/big", 0o600, random(rng, 3<<20+77))
	modes(t, func(t *testing.T, o OverlayOptions) {
		v := thaw(t, tree, o)
		want := bytes.Clone(tree["pgdata/big"].content)
		f, err := os.OpenFile(v.dir+"/big", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		m, err := unix.Mmap(int(f.Fd()), 0, len(want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			off := rng.IntN(len(want) - 3000)
			p := random(rng, 3000)
			copy(want[off:], p)
			copy(m[off:], p)
		}
		if !bytes.Equal(m, want) {
			t.Error("the mapping differs")
		}
		if err := errors.Join(unix.Munmap(m), f.Close()); err != nil {
			t.Fatal(err)
		}
		v.crash()
		v.mount()
		if got := readAll(t, v.dir+"/big"); !bytes.Equal(got, want) {
			t.Errorf("after a crash byte %d differs", firstDifference(got, want))
		}
	})
}

// TestOverlayDamage wants an error, never other bytes, where the repository is damaged; and the rest hydrated.
func TestOverlayDamage(t *testing.T) {
	modes(t, func(t *testing.T, o OverlayOptions) {
		rng := rand.New(rand.NewPCG(seed(t), 0))
		tree := lowerTree{}
		tree.dir("pgdata", 0o700)
		tree.file("pgdata/bad", 0o600, random(rng, 3<<20))
		tree.file("pgdata/good", 0o600, random(rng, 3<<20))
		tree.file("pgdata/small", 0o600, random(rng, 300_000))
		v := thaw(t, tree, o)
		flip(t, v.repository, tree["pgdata/bad"].content[2<<20:2<<20+64])
		flip(t, v.repository, tree["pgdata/small"].content[200_000:200_064])
		for name, at := range map[string]int64{"bad": 2 << 20, "small": 200_000} {
			f, err := os.OpenFile(v.dir+"/"+name, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.ReadAt(make([]byte, 64), at); !errors.Is(err, unix.EIO) {
				t.Errorf("reading damage in %s gives %v, want EIO", name, err)
			}
			p := make([]byte, 64)
			if _, err := f.ReadAt(p, 1000); err != nil || !bytes.Equal(p, tree["pgdata/"+name].content[1000:1064]) {
				t.Errorf("reading beside the damage in %s: %v", name, err)
			}
		}
		r, err := v.ask("hydrate")
		if err != nil || !strings.Contains(r.Err, repo.ErrCorrupt.Error()) || r.Status.FilesWhole != r.Status.FilesTotal-2 {
			t.Errorf("hydrating gave %+v, %v", r, err)
		}
		if got := readAll(t, v.dir+"/good"); !bytes.Equal(got, tree["pgdata/good"].content) {
			t.Error("the good file differs")
		}
		if lines := v.c.lines(); len(lines) == 0 {
			t.Error("nothing was logged")
		}
	})
}

func TestOverlayBusy(t *testing.T) {
	tree := sampleTree(rand.New(rand.NewPCG(1, 1)))
	v := thaw(t, tree, OverlayOptions{Passthrough: true})
	f, err := os.Open(v.dir + "/base/5/1010")
	if err != nil {
		t.Fatal(err)
	}
	r, err := v.ask("unmount")
	if err != nil || !strings.Contains(r.Err, unix.EBUSY.Error()) {
		t.Errorf("unmounting with a file open: %+v, %v", r, err)
	}
	if s := v.do("status"); s.OpenHandles != 1 {
		t.Errorf("%d handles are open, want 1", s.OpenHandles)
	}
	f.Close()
	eventually(t, "the handle's release", func() bool { return v.do("status").OpenHandles == 0 })
}

// TestOverlayAsOrdinaryUser lays, mounts and hydrates as a user of no rights, through fusermount3.
func TestOverlayAsOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("every other test does this when it is not run as root")
	}
	const uid, gid = 65534, 65534
	r, repository := newRepository(t)
	tree := sampleTree(rand.New(rand.NewPCG(seed(t), 0)))
	delete(tree, "pgdata/readable")
	m := backUp(t, r, tree)
	room := openRoom(t, uid, gid, repository)
	v := &thawed{t: t, repository: filepath.Join(room, "repository"), dir: filepath.Join(room, "mnt"),
		o: OverlayOptions{Passthrough: true, FillOnRead: true}}
	r, err := repo.Open(t.Context(), v.repository, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := Lay(t.Context(), r.OpenBackup(m), "pgdata", v.dir, LayOptions{Owner: &Owner{uid, gid}}); err != nil {
		t.Fatal(err)
	}
	credential := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	v.edit = func(cmd *exec.Cmd) {
		cmd.Path, cmd.Dir, cmd.SysProcAttr = filepath.Join(room, "test"), room, credential
	}
	v.mount()
	cmd := exec.Command("sh", "-ec", "cd mnt; wc -c <base/5/1010; echo hello >base/5/1010; umask 027; mkdir d; echo x >d/f; stat -c %u:%g:%a d d/f; cat base/5/1010; "+
		"(umask 333; echo read-only >r); (umask 777; echo nothing allowed >n); stat -c %a r n; chmod 600 n; cat r n")
	cmd.Dir, cmd.SysProcAttr = room, credential
	out, err := cmd.CombinedOutput()
	if want := "3145733\n65534:65534:750\n65534:65534:640\nhello\n444\n0\nread-only\nnothing allowed\n"; err != nil || string(out) != want {
		t.Errorf("%v, got %q, want %q", err, out, want)
	}
	if s := v.do("hydrate"); !s.Whole {
		t.Errorf("hydrated %+v", s)
	}
	v.do("unmount")
	checkNoAttribute(t, v.dir)
	expectQuiet(t, v.c)
}

// TestLayMany lays many files, and says how long it takes. Nothing is left of how the directories came to their places.
func TestLayMany(t *testing.T) {
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	tree.dir("pgdata/base", 0o700)
	p := random(rand.New(rand.NewPCG(1, 1)), 600)
	for i := range 10 {
		tree.dir(fmt.Sprintf("pgdata/base/%d", i), 0o700)
		for j := range 100 {
			tree.file(fmt.Sprintf("pgdata/base/%d/%d", i, j), 0o600, p)
		}
	}
	r, _ := newRepository(t)
	m := backUp(t, r, tree)
	dir := t.TempDir()
	flags := flagsOf(t, dir)
	start := time.Now()
	got, err := Lay(t.Context(), r.OpenBackup(m), "pgdata", dir, LayOptions{Owner: &Owner{uint32(os.Geteuid()), uint32(os.Getegid())}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d files laid in %v", got.Files, time.Since(start))
	if want := (LayResult{1000, 600_000}); got != want {
		t.Errorf("laid %+v, want %+v", got, want)
	}
	if now := flagsOf(t, dir); now != flags {
		t.Errorf("the directory's flags are %x, and were %x", now, flags)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "base/?/*"))
	others, _ := filepath.Glob(filepath.Join(dir, "[^b]*"))
	if len(files) != 1000 || len(others) != 0 {
		t.Errorf("%d files are there, and %q", len(files), others)
	}
}

// flagsOf are those of chattr(1); 0 where the file system has none.
func flagsOf(t *testing.T, dir string) (flags uint32) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flags, _ = unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	return flags
}
