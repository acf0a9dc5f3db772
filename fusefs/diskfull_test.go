package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// fullDisks runs a test on a file system of each kind that can be filled, or of one kind in a short run.
func fullDisks(t *testing.T, test func(t *testing.T, d fullDisk)) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a file system of its own")
	}
	for name, mkfs := range map[string][]string{
		"ext4":               {"mkfs.ext4", "-b", "4096"},
		"ext4, 1 kB a block": {"mkfs.ext4", "-b", "1024"},
		"xfs":                {"mkfs.xfs", "-f"},
	} {
		if testing.Short() && name != "ext4" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(mkfs[0]); err != nil && mkfs[0] != "mkfs.ext4" {
				t.Skipf("no %s is installed", mkfs[0])
			}
			d := fullDisk{newDisk(t, mkfs[0])}
			d.off()
			d.run(mkfs[0], append(mkfs[1:], "-q", d.image)...)
			d.on()
			test(t, d)
		})
	}
	if testing.Short() {
		return
	}
	t.Run("tmpfs", func(t *testing.T) {
		d := fullDisk{&disk{t: t, dir: t.TempDir()}}
		if err := unix.Mount("none", d.dir, "tmpfs", 0, "size=32m,mode=755"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.off)
		test(t, d)
	})
}

// fullDisk is a file system that a ballast fills.
type fullDisk struct{ *disk }

func (d fullDisk) ballast() string { return filepath.Join(d.dir, "ballast") }

// fill leaves some blocks free. statfs(2) would not do: root may use what it calls reserved.
func (d fullDisk) fill(blocks int) {
	d.t.Helper()
	f, err := os.OpenFile(d.ballast(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil { // what was given up is free, what was written has its blocks
		d.t.Fatal(err)
	}
	size, block := int64(0), int64(d.block())
	for n := int64(1 << 16); n > 0; {
		switch err := unix.Fallocate(int(f.Fd()), 0, size, n*block); {
		case err == nil:
			size += n * block
		case errors.Is(err, unix.ENOSPC):
			n /= 2
		default:
			d.t.Fatal(err)
		}
	}
	if err := f.Truncate(max(0, size-int64(blocks)*block)); err != nil {
		d.t.Fatal(err)
	}
}

func (d fullDisk) empty() {
	d.t.Helper()
	if err := os.Remove(d.ballast()); err != nil {
		d.t.Fatal(err)
	}
}

// TestFileDiskFull compares a file with a model through writes, reads that fill, and hydration, on a disk that is full but
// for some blocks. What fails must fail with ENOSPC, and whatever it did not write must be as it was.
func TestFileDiskFull(t *testing.T) {
	fullDisks(t, func(t *testing.T, d fullDisk) {
		t.Setenv("TMPDIR", d.dir)
		rng := rand.New(rand.NewPCG(seed(t), 0))
		failed := 0
		for range rounds(15) {
			t.Run("", func(t *testing.T) { failed += d.checkTight(t, rng) }) // its temporary directory is on the disk
		}
		if failed < rounds(40) {
			t.Errorf("only %d operations met a full disk", failed)
		}
	})
}

func (d fullDisk) checkTight(t *testing.T, rng *rand.Rand) (failed int) {
	lower := random(rng, 1+rng.IntN(1<<20))
	c := &checkedFile{t: t, rng: rng, lower: lower, want: lower}
	c.f, c.fd = layFile(t, lower)
	d.fill(rng.IntN(40))
	defer d.empty()
	for range 20 {
		failed += c.tightStep()
		checkContent(t, c.f, c.fd, c.want)
	}
	checkContent(t, reopen(t, c.f.name(), lower), c.fd, c.want)
	d.fill(1 << 14)
	if _, err := c.f.fill(c.fd, span{0, 4 << 20}, make([]byte, 4<<20)); err != nil {
		t.Fatal(err)
	}
	if filled, err := c.f.checkFilled(c.fd); !filled || err != nil {
		t.Fatalf("filled is %v, %v", filled, err)
	}
	checkContent(t, c.f, c.fd, c.want)
	if got := readAll(t, c.f.name()); !bytes.Equal(got, c.want) {
		t.Fatalf("the backing file differs at %d", firstDifference(got, c.want))
	}
	return failed
}

// TestFileDiskFullAtOnce begins a write while there seems to be room for it. Linux then leaves zeros behind what was
// written, which must not be taken for data.
func TestFileDiskFullAtOnce(t *testing.T) {
	if testing.Short() {
		t.Skip("fills a large disk")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a file system of its own")
	}
	d := fullDisk{newDisk(t, "mkfs.ext4")}
	t.Setenv("TMPDIR", d.dir)
	rng := rand.New(rand.NewPCG(seed(t), 0))
	t.Run("", func(t *testing.T) {
		lower := bytes.Repeat(random(rng, 1<<20), 2*spareSpace>>20)
		c := &checkedFile{t: t, rng: rng, lower: lower, want: lower}
		c.f, c.fd = layFile(t, lower)
		d.fill(spareSpace * 3 / 2 / d.block())
		defer d.empty()
		if c.f.shortOfSpace(c.fd) {
			t.Fatal("space is short before anything was written")
		}
		p := bytes.Repeat(random(rng, 1<<20), 2*spareSpace>>20)
		n, err := c.f.writeAt(c.fd, p, 0)
		if !errors.Is(err, unix.ENOSPC) || n == len(p) || !c.f.careful.Load() {
			t.Fatalf("wrote %d bytes of %d: %v", n, len(p), err)
		}
		c.want = bytes.Clone(lower)
		copy(c.want, p[:n])
		checkContent(t, c.f, c.fd, c.want)
		checkContent(t, reopen(t, c.f.name(), lower), c.fd, c.want)
	})
}

// tightStep does one thing, and returns 1 if the disk was too full for it.
func (c *checkedFile) tightStep() int {
	c.t.Helper()
	off, size := c.rng.IntN(len(c.want)), 1+c.rng.IntN(300_000)
	if c.rng.IntN(2) == 0 {
		off, size = off-off%8192, 8192
	}
	var err error
	switch c.rng.IntN(4) {
	case 0, 1:
		err = c.tightWrite(off, size)
	case 2:
		err = c.tightRead(off, size)
	default:
		at := int64(off - off%(1<<17))
		_, err = c.f.fill(c.fd, span{at, at + 1<<17}, make([]byte, 1<<17))
	}
	if err == nil {
		return 0
	}
	if !errors.Is(err, unix.ENOSPC) {
		c.t.Fatalf("got %v, want ENOSPC", err)
	}
	return 1
}

func (c *checkedFile) tightWrite(off, size int) error {
	p := random(c.rng, size)
	n, err := c.f.writeAt(c.fd, p, int64(off))
	if n > 0 {
		c.want = bytes.Clone(resized(c.want, max(len(c.want), off+n)))
		copy(c.want[off:], p[:n])
	}
	return err
}

// tightRead must give all bytes, though it cannot keep them.
func (c *checkedFile) tightRead(off, size int) error {
	p := make([]byte, size)
	n, err := c.f.readAt(c.fd, p, int64(off), true)
	if want := c.want[off:min(off+size, len(c.want))]; err != nil || !bytes.Equal(p[:n], want) {
		c.t.Fatalf("read %d+%d: %d bytes that differ from the %d wanted, %v", off, size, n, len(want), err)
	}
	return nil
}

// TestOverlayDiskFull fills the disk under a mount: reads go on, writes and hydration fail with ENOSPC and nothing else, and
// once there is room again everything works.
func TestOverlayDiskFull(t *testing.T) {
	fullDisks(t, func(t *testing.T, d fullDisk) {
		modes(t, func(t *testing.T, o OverlayOptions) {
			rng := rand.New(rand.NewPCG(seed(t), 0))
			tree := lowerTree{}
			tree.dir("pgdata", 0o700)
			content := map[string][]byte{}
			for i := range 12 {
				name := fmt.Sprintf("f%d", i)
				content[name] = random(rng, 1000+rng.IntN(3<<19))
				tree.file("pgdata/"+name, 0o600, content[name])
			}
			dir, err := os.MkdirTemp(d.dir, "")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			v := thawIn(t, dir, tree, o)
			d.fill(20)
			defer d.empty()
			refused := 0
			for range rounds(80) {
				name := fmt.Sprintf("f%d", rng.IntN(12))
				content[name], err = writeSome(rng, filepath.Join(v.dir, name), content[name])
				if errors.Is(err, unix.ENOSPC) {
					refused++
				} else if err != nil {
					t.Fatalf("got %v, want ENOSPC", err)
				}
				checkFile(t, v.dir, name, content[name])
			}
			if refused < rounds(20) {
				t.Errorf("only %d writes met a full disk", refused)
			}
			if r, err := v.ask("hydrate"); err != nil || !strings.Contains(r.Err, syscall.ENOSPC.Error()) || r.Status.Whole {
				t.Errorf("hydration on a full disk: %+v, %v", r, err)
			}
			if err := os.WriteFile(filepath.Join(v.dir, "new"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("a new file: %v, want ENOSPC", err)
			}
			for name, want := range content {
				checkFile(t, v.dir, name, want)
			}
			d.fill(1 << 15)
			for name := range content {
				if content[name], err = writeSome(rng, filepath.Join(v.dir, name), content[name]); err != nil {
					t.Errorf("with room again: %v", err)
				}
			}
			if s := v.do("hydrate"); !s.Whole {
				t.Errorf("hydrated %+v", s)
			}
			v.do("unmount")
			for name, want := range content {
				checkFile(t, v.dir, name, want)
			}
			checkNoAttribute(t, v.dir)
			expectQuiet(t, v.c)
		})
	})
}

func checkFile(t *testing.T, dir, name string, want []byte) {
	t.Helper()
	if got := readAll(t, filepath.Join(dir, name)); !bytes.Equal(got, want) {
		t.Fatalf("%s has %d bytes, want %d; they differ at %d", name, len(got), len(want), firstDifference(got[:min(len(got), len(want))], want))
	}
}

// writeSome writes to a place in a file, and returns what the file then is.
func writeSome(rng *rand.Rand, path string, content []byte) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return content, err
	}
	defer f.Close()
	off, p := rng.IntN(len(content)), random(rng, 8192)
	off -= off % (1 + 8191*rng.IntN(2))
	if rng.IntN(4) == 0 {
		p = random(rng, 1+rng.IntN(200_000))
	}
	n, err := pwriteFull(int(f.Fd()), p, int64(off)) // os.File.WriteAt does not tell how much it wrote before an error
	if n > 0 {
		content = bytes.Clone(resized(content, max(len(content), off+n)))
		copy(content[off:], p[:n])
	}
	return content, err
}

// TestOverlayPostgresDiskFull fills the disk under a server whose pages are not all local: it must say so, lose nothing that
// it acknowledged, and go on when there is room again.
func TestOverlayPostgresDiskFull(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a server through much")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to run PostgreSQL as user postgres on a mount of root's")
	}
	p := newServer(t)
	tree := p.source()
	for name, o := range map[string]OverlayOptions{
		"passthrough": {Passthrough: true, AllowOther: true, SyncBefore: []string{"postmaster.pid"}},
		"fill":        {FillOnRead: true, AllowOther: true},
	} {
		t.Run(name, func(t *testing.T) {
			d := fullDisk{newDisk(t, "mkfs.ext4")}
			p.t = t
			v := thawAt(t, d.dir, tree, o, &Owner{p.as.Uid, p.as.Gid})
			p.data = v.dir
			p.admit(v.dir)
			rewriteWAL(t, v.dir)
			p.start()
			p.run("pgbench", "-n", "-c", "4", "-t", "50")
			d.fill(200)
			p.checkLedger(200)
			p.lacksSpace("create unlogged table big as select * from generate_series(1, 1000000)")
			p.run("psql", "-Xq", "-c", "begin", "-c", "delete from pgbench_accounts where aid % 2000 = 0", "-c", "rollback")
			p.lacksSpace("checkpoint") // for pages that have no blocks yet; if small files of its own have none, it is a PANIC
			if r, err := v.ask("hydrate"); err != nil || !strings.Contains(r.Err, syscall.ENOSPC.Error()) || r.Status.Whole {
				t.Errorf("hydration on a full disk: %+v, %v", r, err)
			}
			d.empty()
			p.signal(syscall.SIGQUIT)
			p.start()
			p.checkLedger(200)
			p.run("pgbench", "-n", "-c", "4", "-t", "100")
			p.checkLedger(600)
			v.do("hydrate")
			p.stop()
			v.do("unmount")
			checkNoAttribute(t, v.dir)
			p.run("pg_checksums", "--check", "-D", v.dir)
			p.start()
			p.checkLedger(600)
			p.stop()
			expectQuiet(t, v.c)
		})
	}
}

// rewriteWAL gives WAL that will be recycled its blocks, as it has them on a server: else the first record would be a PANIC.
func rewriteWAL(t *testing.T, dir string) {
	t.Helper()
	segments, err := filepath.Glob(filepath.Join(dir, "pg_wal", "0*"))
	if err != nil || len(segments) == 0 {
		t.Fatalf("WAL: %q, %v", segments, err)
	}
	for _, name := range segments {
		content := readAll(t, name)
		f, err := os.OpenFile(name, os.O_WRONLY, 0)
		if err == nil {
			_, err = f.Write(content)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// lacksSpace wants a statement to fail for want of space.
func (p *server) lacksSpace(statement string) {
	p.t.Helper()
	before := len(readAll(p.t, p.room+"/log"))
	out, err := p.command("psql", "-Xq", "-c", statement).CombinedOutput()
	log := readAll(p.t, p.room+"/log")[before:]
	if err == nil || !bytes.Contains(log, []byte("No space left on device")) {
		p.t.Fatalf("%s on a full disk: %v\n%s\n%s", statement, err, out, log)
	}
}
