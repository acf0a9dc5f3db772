package fusefs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOverlayPowerCut shuts the backing file system down as a power cut would, in the middle of writes, truncations and
// hydration: what was synced must be there, nothing else may be there than what was once written, and a file that nobody
// wrote to must have the backup's bytes.
func TestOverlayPowerCut(t *testing.T) {
	onDisks(t, func(t *testing.T, _, mkfs string) {
		d := newDisk(t, mkfs)
		rng := rand.New(rand.NewPCG(seed(t), 0))
		tree := lowerTree{}
		tree.dir("pgdata", 0o700)
		p := &powerCut{t: t, rng: rng, disk: d}
		for i := range 60 {
			size := rng.IntN(60_000)
			if i%4 == 0 {
				size = 1<<20 + rng.IntN(1<<20)
			}
			name := fmt.Sprintf("f%d", i)
			tree.file("pgdata/"+name, 0o600, random(rng, 600+size))
			p.files = append(p.files, &writtenFile{name: name, versions: [][]byte{tree["pgdata/"+name].content}})
		}
		p.v = thawIn(t, d.dir, tree, OverlayOptions{Passthrough: true})
		for range rounds(5) {
			p.round()
		}
		expectQuiet(t, p.v.c)
	})
}

// onDisks runs a test for each kind of file system that can be made here; mkfs makes one.
func onDisks(t *testing.T, test func(t *testing.T, kind, mkfs string)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a file system of its own")
	}
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			mkfs, err := exec.LookPath("mkfs." + kind)
			if err != nil && kind != "ext4" {
				t.Skipf("no mkfs.%s is installed", kind)
			}
			test(t, kind, mkfs)
		})
	}
}

// disk is a file system in a file, which can lose its power.
type disk struct {
	t          *testing.T
	image, dir string
}

func newDisk(t *testing.T, mkfs string) *disk {
	t.Helper()
	dir := t.TempDir()
	d := &disk{t: t, image: filepath.Join(dir, "image"), dir: filepath.Join(dir, "disk")}
	if err := os.Mkdir(d.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.image, 400<<20); err != nil {
		t.Fatal(err)
	}
	d.run(mkfs, "-q", d.image)
	d.on()
	t.Cleanup(d.off)
	return d
}

func (d *disk) run(name string, args ...string) {
	d.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		d.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

func (d *disk) on()  { d.t.Helper(); d.run("mount", "-o", "loop", d.image, d.dir) }
func (d *disk) off() { d.t.Helper(); d.run("umount", d.dir) }

// block is the least that a power cut leaves as it was before or after a write, in bytes.
func (d *disk) block() int {
	d.t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		d.t.Fatal(err)
	}
	return int(st.Bsize)
}

// cut stops all writing of the file system, its journal's among it.
func (d *disk) cut() {
	d.t.Helper()
	const shutdown, noLogFlush = 0x8004587d, 2 // FS_IOC_SHUTDOWN, FS_SHUTDOWN_FLAGS_NOLOGFLUSH
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), shutdown, noLogFlush); err != nil {
		d.t.Fatal(err)
	}
}

type powerCut struct {
	t     *testing.T
	rng   *rand.Rand
	disk  *disk
	v     *thawed
	files []*writtenFile
}

// writtenFile knows what a file was since it was last synced, the newest last.
type writtenFile struct {
	name     string
	versions [][]byte
}

func (f *writtenFile) content() []byte { return f.versions[len(f.versions)-1] }

func (p *powerCut) round() {
	p.t.Helper()
	hydrated, v, command := make(chan struct{}), p.v, []string{"crawl", "hydrate"}[p.rng.IntN(2)]
	go func() { defer close(hydrated); v.ask(command) }()
	for range 40 + p.rng.IntN(100) {
		p.change(p.files[p.rng.IntN(len(p.files)/2)]) // the other half is written by the hydrator alone
	}
	p.disk.cut()
	p.v.c.kill()
	<-hydrated
	if err := ForceUnmount(p.v.dir); err != nil {
		p.t.Fatal(err)
	}
	p.disk.off()
	p.disk.on()
	p.v.mount()
	for _, f := range p.files {
		p.check(f)
	}
}

func (p *powerCut) change(f *writtenFile) {
	p.t.Helper()
	h, err := os.OpenFile(filepath.Join(p.v.dir, f.name), os.O_RDWR, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	defer h.Close()
	content := bytes.Clone(f.content())
	off := p.rng.IntN(len(content) + 1)
	switch p.rng.IntN(6) {
	case 0:
		err = h.Truncate(int64(off))
		content = content[:off]
	case 1:
		err = h.Truncate(int64(off + 20_000))
		content = resized(content, off+20_000)
	case 2, 3:
		off -= off % 8192
		fallthrough
	default:
		b := random(p.rng, 1+p.rng.IntN(16_384))
		_, err = h.WriteAt(b, int64(off))
		content = bytes.Clone(resized(content, max(len(content), off+len(b))))
		copy(content[off:], b)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	f.versions = append(f.versions, content)
	if p.rng.IntN(3) > 0 {
		return
	}
	if p.rng.IntN(2) == 0 {
		err = h.Sync()
	} else {
		err = unix.Fdatasync(int(h.Fd()))
	}
	if err != nil {
		p.t.Fatal(err)
	}
	f.versions = [][]byte{content}
}

// was tells whether a block at an offset was ever so: as a version had it, cut off where a later one ended, for the size
// may be on disk before the bytes are, and followed by zeros.
func (f *writtenFile) was(got []byte, at int) bool {
	for i, v := range f.versions {
		size := len(v)
		for _, later := range f.versions[i:] {
			size = min(size, len(later))
			if bytes.Equal(got, resized(v[:size], max(size, at+len(got)))[at:at+len(got)]) {
				return true
			}
		}
	}
	return false
}

// check compares a file block by block with what it was since it was synced, and takes what it finds for the truth from
// then on.
func (p *powerCut) check(f *writtenFile) {
	p.t.Helper()
	block := p.disk.block()
	got := readAll(p.t, filepath.Join(p.v.dir, f.name))
	longest := 0
	for _, v := range f.versions {
		longest = max(longest, len(v))
	}
	if len(f.versions) == 1 && len(got) != longest || len(got) > longest {
		p.t.Errorf("%s has %d bytes, want %d", f.name, len(got), longest)
	}
	for at := 0; at < len(got); at += block {
		end := min(at+block, len(got))
		if !f.was(got[at:end], at) {
			p.t.Fatalf("%s: block at %d of %d was never so; %d versions", f.name, at, len(got), len(f.versions))
		}
	}
	f.versions = [][]byte{got}
}
