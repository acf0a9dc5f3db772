package integration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// troubled shows a directory as a file system in which reading has the trouble that the test wishes.
type troubled struct {
	dir      string       // where it is mounted
	requests atomic.Int64 // opens to read

	mu      sync.Mutex
	trouble trouble
	over    chan struct{} // closed when the trouble is
}

type trouble int

const (
	none    trouble = iota
	silent          // nothing is answered
	failing         // all is EIO
	wrong           // one bit of each read is wrong
	slow            // each request takes slowRequest, however much it reads: pgthaw opens a file for each
)

// newTroubled mounts a file system over dir at a directory of its own, until the test ends.
func newTroubled(t *testing.T, dir string) *troubled {
	t.Helper()
	d := &troubled{dir: filepath.Join(tempDir(t), "troubled"), over: make(chan struct{})}
	if err := syscall.Mkdir(d.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root := &fs.LoopbackRoot{Path: dir}
	root.RootNode = &troubledNode{fs.LoopbackNode{RootData: root}, d}
	server, err := fs.Mount(d.dir, root.RootNode, &fs.Options{MountOptions: fuse.MountOptions{AllowOther: true, FsName: dir, Name: "troubled", DirectMount: true}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.set(none)
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount %s: %v", d.dir, err)
		}
	})
	return d
}

// set ends one trouble and begins the next.
func (d *troubled) set(now trouble) {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.over)
	d.trouble, d.over = now, make(chan struct{})
}

// gate is where what reads meets the trouble. Like a network file system, it lets go of who is killed.
func (d *troubled) gate(ctx context.Context) (trouble, syscall.Errno) {
	d.mu.Lock()
	now, over := d.trouble, d.over
	d.mu.Unlock()
	switch now {
	case failing:
		return now, syscall.EIO
	case silent:
		select {
		case <-over:
			return d.gate(ctx)
		case <-ctx.Done():
			return now, syscall.EINTR
		}
	}
	return now, 0
}

type troubledNode struct {
	fs.LoopbackNode
	d *troubled
}

// WrapChild makes the nodes below what the root is.
func (n *troubledNode) WrapChild(_ context.Context, made fs.InodeEmbedder) fs.InodeEmbedder {
	return &troubledNode{fs.LoopbackNode{RootData: made.(*fs.LoopbackNode).RootData}, n.d}
}

func (n *troubledNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if _, errno := n.d.gate(ctx); errno != 0 {
		return nil, errno
	}
	return n.LoopbackNode.Lookup(ctx, name, out)
}

// Open has the kernel ask for each read, without a cache of its own.
func (n *troubledNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	now, errno := n.d.gate(ctx)
	if errno != 0 {
		return nil, 0, errno
	}
	if n.d.requests.Add(1); now == slow {
		time.Sleep(slowRequest)
	}
	h, _, errno := n.LoopbackNode.Open(ctx, flags)
	if errno != 0 || flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return h, 0, errno
	}
	return &troubledFile{h.(*fs.LoopbackFile), n.d}, fuse.FOPEN_DIRECT_IO, 0
}

// troubledFile is open to be read. The kernel must not read it by itself.
type troubledFile struct {
	file *fs.LoopbackFile
	d    *troubled
}

func (f *troubledFile) Read(ctx context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	now, errno := f.d.gate(ctx)
	if errno != 0 {
		return nil, errno
	}
	r, errno := f.file.Read(ctx, p, off)
	if errno != 0 || now != wrong {
		return r, errno
	}
	got, status := r.Bytes(p)
	if len(got) > 0 {
		got[len(got)/2] ^= 1
	}
	return fuse.ReadResultData(got), syscall.Errno(status)
}

func (f *troubledFile) Release(ctx context.Context) syscall.Errno { return f.file.Release(ctx) }

// TestStoreTrouble: PostgreSQL on a lazy copy outlasts a repository that is silent or fails for a while, gets errors from one
// that is so for longer or gives wrong bytes, and never wrong rows; and the copy can be looked after meanwhile.
func TestStoreTrouble(t *testing.T) {
	t.Parallel()
	const readTimeout = 15 * time.Second
	p := postgresql(t, 15)
	a := newArchived(t, p, clusterOptions{conf: []string{"fsync = off"}})
	names := []string{"silent_briefly", "failing_briefly", "silent_long", "failing_long", "wrong", "spare"}
	for _, name := range names {
		a.SQL("CREATE TABLE " + name + " AS SELECT i, md5(i::text) AS x FROM generate_series(1, 20000) i")
	}
	const query = "SELECT md5(string_agg(x, '' ORDER BY i)) FROM "
	want := a.SQL(query + "spare")
	a.backup(t)
	a.Stop()
	d := newTroubled(t, a.repo)
	troubledMount(t, archived{a.cluster, d.dir}, d)
	data := newTarget(t)
	var r copied
	archived{a.cluster, d.dir}.copyTo(t, invocation{}, "thaw", "latest", data, "--start", "--to-immediate", "--hydrate", "off",
		"--read-timeout", readTimeout.String()).ok(t).into(t, &r)
	c := r.server(t, p, data)
	s := &troubledCopy{t: t, d: d, data: data, c: c, query: query, want: want}

	s.briefly("silent_briefly", silent)
	s.briefly("failing_briefly", failing)
	s.tooLong("silent_long", silent, readTimeout)
	s.tooLong("failing_long", failing, readTimeout)
	s.wrongBytes("wrong")

	d.set(silent)
	c.StopImmediate()
	pgthaw(t, "overlay", "discard", data).ok(t)
	absent(t, data)
}

// troubledMount: to who browses, too, silence is an error after a while, and no reason to keep the mount.
func troubledMount(t *testing.T, a archived, d *troubled) {
	t.Helper()
	const limit = time.Second
	dir := a.mount(t, invocation{}, "--read-timeout", limit.String())
	file := filepath.Join(dir, "main", "latest", "pgdata", "global", "1260")
	d.set(silent)
	began := time.Now()
	if _, err := os.ReadFile(file); !errors.Is(err, syscall.EIO) || time.Since(began) < limit {
		t.Errorf("after %v: %v, want EIO after %v", time.Since(began), err, limit)
	}
	d.set(none)
	if _, err := os.ReadFile(file); err != nil {
		t.Error(err)
	}
	d.set(silent)
	checkUmount(t, dir)
	d.set(none)
}

type troubledCopy struct {
	t           *testing.T
	d           *troubled
	data        string
	c           *cluster
	query, want string
}

type answer struct {
	text string
	err  error
	took time.Duration
}

// ask begins a query of a table that was not read yet.
func (s *troubledCopy) ask(table string) <-chan answer {
	asked, began := make(chan answer, 1), time.Now()
	go func() {
		text, err := s.c.query("postgres", s.query+table)
		asked <- answer{text, err, time.Since(began)}
	}()
	return asked
}

func (s *troubledCopy) right(table string, a answer) {
	s.t.Helper()
	if a.err != nil || a.text != s.want {
		s.t.Errorf("%s: %q, %v; want %q", table, a.text, a.err, s.want)
	}
}

// awaitWaiting waits until the daemon says what it waits for.
func (s *troubledCopy) awaitWaiting() {
	s.t.Helper()
	waitFor(s.t, stopLimit, "the daemon to say what it waits for", func() bool {
		w := overlayStatus(s.t, invocation{}, s.data).Waiting
		return w != nil && strings.HasPrefix(w.For, "packs/")
	})
}

func (s *troubledCopy) briefly(table string, now trouble) {
	s.t.Helper()
	s.d.set(now)
	asked := s.ask(table)
	s.awaitWaiting()
	s.d.set(none)
	s.right(table, <-asked)
	if w := overlayStatus(s.t, invocation{}, s.data).Waiting; w != nil {
		s.t.Errorf("%s: the daemon still waits for %v", table, w)
	}
}

func (s *troubledCopy) tooLong(table string, now trouble, limit time.Duration) {
	s.t.Helper()
	s.d.set(now)
	asked := s.ask(table)
	s.awaitWaiting()
	if out := pgthaw(s.t, "overlay", "status", s.data).ok(s.t).stdout; !strings.Contains(out, "Waiting") {
		s.t.Errorf("%s: overlay status does not say that it waits:\n%s", table, out)
	}
	if a := <-asked; !isIOError(a.err) || a.took < limit {
		s.t.Errorf("%s: after %v %q, %v; want an I/O error after %v", table, a.took, a.text, a.err, limit)
	}
	s.d.set(none)
	s.right(table, <-s.ask(table))
}

func (s *troubledCopy) wrongBytes(table string) {
	s.t.Helper()
	s.d.set(wrong)
	if a := <-s.ask(table); !isIOError(a.err) {
		s.t.Errorf("%s: %q, %v from wrong bytes; want an I/O error", table, a.text, a.err)
	}
	s.d.set(none)
	s.right(table, <-s.ask(table))
}

func isIOError(err error) bool {
	return err != nil && strings.Contains(err.Error(), "Input/output error")
}
