package fusefs

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A volatile disk is a block device that writes down all that is done to it: a file on a FUSE file system of the tests' own,
// which a loop device makes a disk of, with a file system of Linux's on it. From what was written down follows what each power
// cut would have left: what was written before the disk was last told to flush, and of the rest any part.
//
// A file system in between, that forgets files and names instead of blocks, would not do: syncfs(2) does not reach FUSE.

const imageIno = 2

// diskChild serves a volatile disk: arguments are where to mount it, the file that holds it and that in which it writes
// everything down.
func diskChild(ctx context.Context, args []string, ready func()) error {
	image, err := os.OpenFile(args[1], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer image.Close()
	log, err := os.OpenFile(args[2], os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer log.Close()
	d := &diskServer{RawFileSystem: fuse.NewDefaultRawFileSystem(), image: image, log: log}
	s, err := fuse.NewServer(d, args[0], &fuse.MountOptions{DirectMountStrict: true, Name: "pgthaw-disk", MaxWrite: 1 << 20})
	if err != nil {
		return err
	}
	go s.Serve()
	if err := s.WaitMount(); err != nil {
		return err
	}
	ready()
	<-ctx.Done()
	return s.Unmount()
}

type diskServer struct {
	fuse.RawFileSystem
	mu         sync.Mutex
	image, log *os.File
}

// written is the head of what is written down: bytes at an offset follow it, or it was a flush.
type written struct{ Off, Size int64 }

const flushed = -1 // Size

func (d *diskServer) note(w written, data []byte) error {
	b, err := binary.Append(nil, binary.LittleEndian, w)
	if err == nil {
		_, err = d.log.Write(append(b, data...))
	}
	return err
}

func (d *diskServer) attr(ino uint64, out *fuse.Attr) fuse.Status {
	st, err := d.image.Stat()
	if err != nil {
		return fuse.ToStatus(err)
	}
	*out = fuse.Attr{Ino: ino, Mode: unix.S_IFREG | 0o600, Size: uint64(st.Size()), Nlink: 1, Blksize: 4096}
	if ino == fuse.FUSE_ROOT_ID {
		out.Mode = unix.S_IFDIR | 0o755
	}
	return fuse.OK
}

func (d *diskServer) Lookup(_ <-chan struct{}, _ *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if name != "image" {
		return fuse.ENOENT
	}
	out.NodeId = imageIno
	return d.attr(imageIno, &out.Attr)
}

func (d *diskServer) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return d.attr(in.NodeId, &out.Attr)
}

func (d *diskServer) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	return d.attr(in.NodeId, &out.Attr)
}

func (d *diskServer) Open(_ <-chan struct{}, _ *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return fuse.OK
}

func (d *diskServer) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, err := d.image.ReadAt(buf, int64(in.Offset))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fuse.ToStatus(err)
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (d *diskServer) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.image.WriteAt(data, int64(in.Offset))
	if err == nil {
		err = d.note(written{int64(in.Offset), int64(len(data))}, data)
	}
	return uint32(len(data)), fuse.ToStatus(err)
}

func (d *diskServer) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return fuse.ToStatus(d.note(written{Size: flushed}, nil))
}

func (d *diskServer) Fallocate(<-chan struct{}, *fuse.FallocateIn) fuse.Status {
	return fuse.Status(unix.EOPNOTSUPP) // so that nothing is discarded
}

func (d *diskServer) StatFs(<-chan struct{}, *fuse.InHeader, *fuse.StatfsOut) fuse.Status {
	return fuse.OK
}

// volatile is a volatile disk with a file system on it.
type volatile struct {
	t          *testing.T
	dir        string // where the file system is mounted
	first, log string // the disk as it was when begin was called, and what was done since
	image      string
}

// newVolatile makes a disk of size MB.
func newVolatile(t *testing.T, mkfs string, megabytes int64) *volatile {
	t.Helper()
	room := t.TempDir()
	v := &volatile{t: t, dir: filepath.Join(room, "fs"), first: filepath.Join(room, "first"), log: filepath.Join(room, "log"), image: filepath.Join(room, "held")}
	disk := filepath.Join(room, "disk")
	for _, dir := range []string{v.dir, disk} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{v.log, v.image} {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(v.image, megabytes<<20); err != nil {
		t.Fatal(err)
	}
	v.run(mkfs, "-q", v.image)
	startChild(t, "disk", nil, disk, v.image, v.log)
	v.run("mount", "-o", "loop", filepath.Join(disk, "image"), v.dir)
	t.Cleanup(func() { v.run("umount", v.dir) })
	return v
}

func (v *volatile) run(name string, args ...string) {
	v.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		v.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// begin forgets what was written down so far: no power cut comes before this.
func (v *volatile) begin() {
	v.t.Helper()
	v.run("sync", "-f", v.dir)
	v.run("cp", "--sparse=always", v.image, v.first)
	if err := os.Truncate(v.log, 0); err != nil {
		v.t.Fatal(err)
	}
}

// now is a place in what is written down.
func (v *volatile) now() int64 {
	v.t.Helper()
	st, err := os.Stat(v.log)
	if err != nil {
		v.t.Fatal(err)
	}
	return st.Size()
}

// cut is a power cut just after a flush, or before it: then of what was written since the flush before, any part is lost.
type cut struct {
	at, since int64 // places in what is written down: of the flush, and of the one before
	torn      bool
}

// synced is the last place up to which the disk keeps its promises.
func (c cut) synced() int64 {
	if c.torn {
		return c.since
	}
	return c.at
}

func (c cut) String() string { return fmt.Sprintf("at %d (torn: %v)", c.at, c.torn) }

// cuts lists two for each flush.
func (v *volatile) cuts() []cut {
	v.t.Helper()
	all, err := cutsIn(v.log)
	if err != nil {
		v.t.Fatal(err)
	}
	return all
}

func cutsIn(log string) (all []cut, err error) {
	since := int64(0)
	err = eachWritten(log, func(at int64, w written, _ []byte) error {
		if w.Size == flushed {
			all = append(all, cut{at, since, true}, cut{at, since, false})
			since = at
		}
		return nil
	})
	return all, err
}

// cutsChild prints them, for tests that have only this binary: the argument is what was written down.
func cutsChild(_ context.Context, args []string, _ func()) error {
	all, err := cutsIn(args[0])
	for _, c := range all {
		fmt.Println(c.at, c.since, c.torn)
	}
	return err
}

var errBehind = errors.New("enough")

// eachWritten calls fn for what was written down, with where it ends, until fn fails.
func eachWritten(path string, fn func(end int64, w written, data []byte) error) error {
	log, err := os.Open(path)
	if err != nil {
		return err
	}
	defer log.Close()
	r := bufio.NewReaderSize(log, 1<<20)
	for at := int64(0); ; {
		var w written
		if err := binary.Read(r, binary.LittleEndian, &w); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		data := make([]byte, max(0, w.Size))
		if _, err := io.ReadFull(r, data); err != nil {
			return err
		}
		at += int64(binary.Size(w)) + int64(len(data))
		if err := fn(at, w, data); err != nil {
			return err
		}
	}
}

// after makes what a power cut leaves, at a path.
func (v *volatile) after(c cut, rng *rand.Rand, path string) {
	v.t.Helper()
	v.run("cp", "--sparse=always", v.first, path)
	if err := c.replay(v.log, path, rng); err != nil {
		v.t.Fatal(err)
	}
}

// replay writes to an image what was written up to the flush before, and all, or a part, of what was written then.
func (c cut) replay(log, path string, rng *rand.Rand) error {
	const sector = 4096
	image, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer image.Close()
	err = eachWritten(log, func(end int64, w written, data []byte) error {
		if end > c.at {
			return errBehind
		}
		for i := 0; i < len(data); i += sector {
			if c.torn && end > c.since && rng.IntN(2) == 0 {
				continue
			}
			if _, err := image.WriteAt(data[i:min(i+sector, len(data))], w.Off+int64(i)); err != nil {
				return err
			}
		}
		return nil
	})
	if errors.Is(err, errBehind) {
		return nil
	}
	return err
}

// replayChild is replay: arguments are what was written down, the image, the cut and a seed.
func replayChild(_ context.Context, args []string, _ func()) error {
	var c cut
	var seed uint64
	if _, err := fmt.Sscan(strings.Join(args[2:], " "), &c.at, &c.since, &c.torn, &seed); err != nil {
		return err
	}
	return c.replay(args[0], args[1], rand.New(rand.NewPCG(seed, 0)))
}

// block is the least that a power cut leaves as it was before or after a write, in bytes.
func (v *volatile) block() int { return (&disk{t: v.t, dir: v.dir}).block() }
