package repo

import (
	"context"
	"errors"
	"io"
	"maps"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

var noContext = context.Background()

// diskVariable makes this binary serve a forgetting disk at the path it holds, for the test that started it: a process that
// uses its own mount can deadlock.
const diskVariable = "PGTHAW_TEST_DISK"

func TestMain(m *testing.M) {
	if dir := os.Getenv(diskVariable); dir != "" {
		os.Exit(serveDisk(dir))
	}
	os.Exit(m.Run())
}

// mountedDisk is a forgetting disk in another process, mounted.
type mountedDisk struct {
	t       *testing.T
	dir     string
	control *rpc.Client
}

// mountDisk mounts an empty disk.
func mountDisk(t *testing.T) *mountedDisk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a file system of its own")
	}
	dir := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), diskVariable+"="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := &mountedDisk{t, dir, rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})}
	t.Cleanup(func() {
		d.control.Close()
		timer := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
		defer timer.Stop()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the disk: %v", err)
			syscall.Unmount(dir, syscall.MNT_DETACH)
		}
	})
	d.reset(DiskOptions{})
	return d
}

func (d *mountedDisk) call(method string, args, reply any) {
	d.t.Helper()
	if err := d.control.Call("Disk."+method, args, reply); err != nil {
		d.t.Fatal(err)
	}
}

// reset empties the disk, as it was when it was new.
func (d *mountedDisk) reset(o DiskOptions) { d.t.Helper(); d.call("Reset", o, new(int)) }

// now is how many operations the log has.
func (d *mountedDisk) now() (n int) { d.t.Helper(); d.call("Now", 0, &n); return n }

// log is what was done since the disk was reset.
func (d *mountedDisk) log() (ops []DiskOp) { d.t.Helper(); d.call("Log", 0, &ops); return ops }

// arm lets an operation fail from now on.
func (d *mountedDisk) arm(f DiskFault) { d.t.Helper(); d.call("Arm", f, new(int)) }

// calls counts requests since arm or reset, by what they ask for; "" counts all.
func (d *mountedDisk) calls() (n map[string]int) { d.t.Helper(); d.call("Calls", 0, &n); return n }

// DiskOptions of an empty disk.
type DiskOptions struct{ NoLinks bool }

// DiskFault is something that goes wrong.
type DiskFault struct {
	Class string // of requests; "": all
	Nth   int    // counted from 1; 0: none
	After bool   // all after it, too
	Kept  bool   // it is done, but reported failed
	Errno int
	Gone  string // instead of failing, the directory "repo" is detached, as by umount -l: "absent", or "empty", with another in its place
}

// serveDisk serves the disk until its standard input ends.
func serveDisk(dir string) int {
	fs := &diskServer{RawFileSystem: fuse.NewDefaultRawFileSystem(), next: rootIno, open: map[uint64][]fuse.DirEntry{}}
	s, err := fuse.NewServer(fs, dir, &fuse.MountOptions{DirectMountStrict: true, Name: "pgthaw-disk", DisableReadDirPlus: true, MaxWrite: 1 << 20})
	if err != nil {
		os.Stderr.WriteString("disk: " + err.Error() + "\n")
		return 1
	}
	go s.Serve()
	if err := errors.Join(s.WaitMount(), rpc.RegisterName("Disk", &DiskControl{fs})); err != nil {
		os.Stderr.WriteString("disk: " + err.Error() + "\n")
		return 1
	}
	rpc.ServeConn(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
	if err := s.Unmount(); err != nil {
		os.Stderr.WriteString("disk: " + err.Error() + "\n")
		return 1
	}
	return 0
}

// diskServer serves a forgetting disk and writes down what is done to it. Nothing is cached by the kernel.
type diskServer struct {
	fuse.RawFileSystem

	mu      sync.Mutex
	disk    *forgetting
	times   map[uint64]time.Time // of last change
	next    uint64               // highest inode number so far; none is used again
	log     []DiskOp
	options DiskOptions
	fault   DiskFault
	calls   map[string]int
	handle  uint64
	open    map[uint64][]fuse.DirEntry // directories being read
}

// DiskControl is what the test tells the disk.
type DiskControl struct{ s *diskServer }

func (c *DiskControl) Reset(o DiskOptions, _ *int) error {
	s := c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disk, s.log, s.options = newForgetting(""), nil, o
	s.fault, s.calls, s.times = DiskFault{}, map[string]int{}, map[uint64]time.Time{}
	return nil
}

func (c *DiskControl) Now(_ int, n *int) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	*n = len(c.s.log)
	return nil
}

func (c *DiskControl) Log(_ int, ops *[]DiskOp) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	*ops = slices.Clone(c.s.log)
	return nil
}

func (c *DiskControl) Arm(f DiskFault, _ *int) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.fault, c.s.calls = f, map[string]int{}
	return nil
}

func (c *DiskControl) Calls(_ int, n *map[string]int) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	*n = maps.Clone(c.s.calls)
	return nil
}

// do answers one request of a class, with the node that it names.
func (s *diskServer) do(class string, ino uint64, f func(n *forgettingInode) fuse.Status) fuse.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.disk.inodes[ino]
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	s.calls[class]++
	s.calls[""]++
	count := s.calls[s.fault.Class]
	hit := (s.fault.Class == "" || s.fault.Class == class) && s.fault.Nth > 0 &&
		(count == s.fault.Nth || s.fault.After && count > s.fault.Nth)
	switch {
	case hit && s.fault.Gone != "":
		s.detach()
	case hit && s.fault.Kept:
		f(n)
		return fuse.Status(s.fault.Errno)
	case hit:
		return fuse.Status(s.fault.Errno)
	}
	return f(n)
}

// detach takes the directory "repo" out of the root. Who has it open goes on in it.
func (s *diskServer) detach() {
	root := s.disk.inodes[rootIno]
	delete(root.names, "repo")
	if s.fault.Gone == "empty" {
		s.next++
		s.disk.inodes[s.next] = &forgettingInode{dir: true, mode: 0o755, links: 1, names: map[string]uint64{}, past: map[string][]uint64{}}
		root.names["repo"] = s.next
	}
}

// change does and logs an operation.
func (s *diskServer) change(op DiskOp) fuse.Status {
	s.disk.apply(op)
	s.log = append(s.log, op)
	s.times[op.Ino] = time.Now()
	return fuse.OK
}

func (s *diskServer) attr(ino uint64, out *fuse.Attr) {
	n := s.disk.inodes[ino]
	kind := uint32(syscall.S_IFREG)
	if n.dir {
		kind = syscall.S_IFDIR
	}
	out.Ino, out.Size, out.Mode, out.Nlink, out.Blksize = ino, uint64(len(n.data)), kind|n.mode, n.links, 4096
	out.Owner = fuse.Owner{Uid: n.uid, Gid: n.gid}
	t := s.times[ino]
	out.SetTimes(&t, &t, &t)
}

func (s *diskServer) entry(ino uint64, out *fuse.EntryOut) fuse.Status {
	out.NodeId = ino
	s.attr(ino, &out.Attr)
	return fuse.OK
}

func (s *diskServer) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	return s.do("lookup", h.NodeId, func(n *forgettingInode) fuse.Status {
		if n.names[name] == 0 {
			return fuse.ENOENT
		}
		return s.entry(n.names[name], out)
	})
}

func (s *diskServer) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	return s.do("getattr", in.NodeId, func(n *forgettingInode) fuse.Status { s.attr(in.NodeId, &out.Attr); return fuse.OK })
}

func (s *diskServer) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	return s.do("setattr", in.NodeId, func(n *forgettingInode) fuse.Status {
		op := DiskOp{Kind: "setattr", Ino: in.NodeId, Mode: n.mode, UID: n.uid, GID: n.gid}
		if mode, ok := in.GetMode(); ok {
			op.Mode = mode & 0o7777
		}
		if uid, ok := in.GetUID(); ok {
			op.UID = uid
		}
		if gid, ok := in.GetGID(); ok {
			op.GID = gid
		}
		s.change(op)
		s.attr(in.NodeId, &out.Attr)
		return fuse.OK
	})
}

// make makes a file or directory.
func (s *diskServer) make(kind string, h *fuse.InHeader, mode uint32, name string, out *fuse.EntryOut) fuse.Status {
	return s.do(kind, h.NodeId, func(n *forgettingInode) fuse.Status {
		if n.names[name] != 0 {
			return fuse.Status(syscall.EEXIST)
		}
		s.next++
		s.change(DiskOp{Kind: kind, Ino: h.NodeId, Name: name, Other: s.next, Mode: mode & 0o7777, UID: h.Uid, GID: h.Gid})
		s.times[s.next] = time.Now()
		return s.entry(s.next, out)
	})
}

func (s *diskServer) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return s.make("mkdir", &in.InHeader, in.Mode, name, out)
}

func (s *diskServer) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return s.make("create", &in.InHeader, in.Mode, name, &out.EntryOut)
}

func (s *diskServer) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	return s.do("link", in.NodeId, func(n *forgettingInode) fuse.Status {
		switch {
		case s.options.NoLinks:
			return fuse.EPERM
		case n.names[name] != 0:
			return fuse.Status(syscall.EEXIST)
		}
		s.change(DiskOp{Kind: "link", Ino: in.NodeId, Name: name, Other: in.Oldnodeid})
		return s.entry(in.Oldnodeid, out)
	})
}

func (s *diskServer) Unlink(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
	return s.do("unlink", h.NodeId, func(n *forgettingInode) fuse.Status {
		if n.names[name] == 0 {
			return fuse.ENOENT
		}
		return s.change(DiskOp{Kind: "unlink", Ino: h.NodeId, Name: name})
	})
}

func (s *diskServer) Rename(_ <-chan struct{}, in *fuse.RenameIn, name, newName string) fuse.Status {
	return s.do("rename", in.NodeId, func(n *forgettingInode) fuse.Status {
		const noReplace = 1
		switch to := s.disk.inodes[in.Newdir]; {
		case in.Flags != noReplace:
			return fuse.EINVAL
		case to.names[newName] != 0:
			return fuse.Status(syscall.EEXIST)
		case n.names[name] == 0:
			return fuse.ENOENT
		}
		return s.change(DiskOp{Kind: "rename", Ino: in.NodeId, Name: name, Other: in.Newdir, NewName: newName})
	})
}

func (s *diskServer) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return s.do("open", in.NodeId, func(*forgettingInode) fuse.Status { return fuse.OK })
}

func (s *diskServer) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	var got []byte
	status := s.do("read", in.NodeId, func(n *forgettingInode) fuse.Status {
		if off := int(in.Offset); off < len(n.data) {
			got = buf[:copy(buf, n.data[off:])]
		}
		return fuse.OK
	})
	return fuse.ReadResultData(got), status
}

func (s *diskServer) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	return uint32(len(data)), s.do("write", in.NodeId, func(n *forgettingInode) fuse.Status {
		return s.change(DiskOp{Kind: "write", Ino: in.NodeId, Off: int64(in.Offset), Data: slices.Clone(data)})
	})
}

func (s *diskServer) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

func (s *diskServer) Fsync(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return s.do("fsync", in.NodeId, func(*forgettingInode) fuse.Status { return s.change(DiskOp{Kind: "fsync", Ino: in.NodeId}) })
}

func (s *diskServer) FsyncDir(_ <-chan struct{}, in *fuse.FsyncIn) fuse.Status {
	return s.do("fsyncdir", in.NodeId, func(*forgettingInode) fuse.Status { return s.change(DiskOp{Kind: "fsyncdir", Ino: in.NodeId}) })
}

func (s *diskServer) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	return s.do("opendir", in.NodeId, func(n *forgettingInode) fuse.Status {
		s.handle++
		out.Fh = s.handle
		var all []fuse.DirEntry
		for name, ino := range n.names {
			mode := uint32(syscall.S_IFREG)
			if s.disk.inodes[ino].dir {
				mode = syscall.S_IFDIR
			}
			all = append(all, fuse.DirEntry{Name: name, Ino: ino, Mode: mode})
		}
		s.open[s.handle] = all
		return fuse.OK
	})
}

func (s *diskServer) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return s.do("readdir", in.NodeId, func(*forgettingInode) fuse.Status {
		for _, e := range s.open[in.Fh][min(int(in.Offset), len(s.open[in.Fh])):] {
			if !out.AddDirEntry(e) {
				break
			}
		}
		return fuse.OK
	})
}

func (s *diskServer) ReleaseDir(in *fuse.ReleaseIn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, in.Fh)
}

func (s *diskServer) StatFs(<-chan struct{}, *fuse.InHeader, *fuse.StatfsOut) fuse.Status {
	return fuse.OK
}
