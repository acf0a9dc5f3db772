package fusefs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// seed returns the seed of a random test and prints it: PGTHAW_SEED repeats one.
func seed(t *testing.T) uint64 {
	t.Helper()
	s := rand.Uint64()
	if text := os.Getenv("PGTHAW_SEED"); text != "" {
		var err error
		if s, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("PGTHAW_SEED=%d", s)
	return s
}

// rounds is how often a random test does what it does n times, or fewer in a short run.
func rounds(n int) int {
	if testing.Short() {
		return n / 4
	}
	return n
}

func random(rng *rand.Rand, n int) []byte {
	p := make([]byte, n+8)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64()|0x0101010101010101) // no byte is zero: a hole taken for data shows
	}
	return p[:n:n]
}

// layFile makes a placeholder in a temporary directory and opens it as a mount would.
func layFile(t *testing.T, lower []byte) (f *file, fd int) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "placeholder")
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(len(lower))); err != nil {
		t.Fatal(err)
	}
	if err := (placeholder{int64(len(lower)), "lower"}).write(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(name) }) // many are made, and the file system of a test may be small
	return reopen(t, name, lower), fd
}

// reopen is what a restarted daemon knows of the file.
func reopen(t *testing.T, name string, lower []byte) *file {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(name, &st); err != nil {
		t.Fatal(err)
	}
	return &file{
		name:      func() string { return name },
		openLower: func(string) (io.ReaderAt, error) { return bytes.NewReader(lower), nil },
		block:     int64(st.Bsize),
		traffic:   new(traffic),
		open:      handles{descriptors: new(atomic.Int64)},
	}
}

func checkContent(t *testing.T, f *file, fd int, want []byte) {
	t.Helper()
	got := make([]byte, len(want)+100)
	n, err := f.readAt(fd, got, 0, false)
	if err != nil {
		t.Fatal(err)
	}
	if n != len(want) {
		t.Fatalf("read %d bytes, want %d", n, len(want))
	}
	if i := firstDifference(got[:n], want); i >= 0 {
		t.Fatalf("byte %d is %d, want %d", i, got[i], want[i])
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// resized is what truncate makes of a content.
func resized(content []byte, size int) []byte {
	if size <= len(content) {
		return content[:size:size]
	}
	return append(content[:len(content):len(content)], make([]byte, size-len(content))...)
}

func TestEdges(t *testing.T) {
	const size = 3*4096 + 1000 // the last block is short
	for _, write := range []span{
		{0, 1}, {1, 2}, {4095, 4097}, {4096, 8192}, {4096, 8191}, {4097, 8192}, {100, 12000},
		{size - 1, size}, {size - 1, size + 1}, {size, size + 1}, {size + 10, size + 20}, {3 * 4096, size}, {3*4096 + 5, size + 5},
		{16384, 16385}, {20000, 30000}, {0, size}, {0, 16384}, {8192, 3*4096 + 1},
	} {
		t.Run("", func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, 2))
			lower := random(rng, size)
			f, fd := layFile(t, lower)
			p := random(rng, int(write.to-write.from))
			if _, err := f.writeAt(fd, p, write.from); err != nil {
				t.Fatal(err)
			}
			want := resized(lower, max(size, int(write.to)))
			want = bytes.Clone(want)
			copy(want[write.from:], p)
			checkContent(t, f, fd, want)
			checkContent(t, reopen(t, f.name(), lower), fd, want)
		})
	}
}

func TestTruncateThenExtend(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), 5*4096+77)
	for _, size := range []int{0, 1, 4095, 4096, 4097, 9000, 5 * 4096, len(lower) - 1, len(lower), len(lower) + 5000} {
		f, fd := layFile(t, lower)
		if err := f.truncate(fd, int64(size)); err != nil {
			t.Fatal(err)
		}
		want := resized(lower, size)
		checkContent(t, f, fd, want)
		if err := f.truncate(fd, 40000); err != nil {
			t.Fatal(err)
		}
		want = resized(want, 40000)
		checkContent(t, f, fd, want)
		want = bytes.Clone(want)
		copy(want[size+10:], "in the straddling block")
		if _, err := f.writeAt(fd, []byte("in the straddling block"), int64(size+10)); err != nil {
			t.Fatal(err)
		}
		checkContent(t, f, fd, want)
		checkContent(t, reopen(t, f.name(), lower), fd, want)
	}
}

// An aligned write must not read the repository: redo of a full-page image never looks at the old page.
func TestAlignedWriteReadsNothing(t *testing.T) {
	f, fd := layFile(t, make([]byte, 1<<20))
	f.openLower = func(string) (io.ReaderAt, error) { return nil, errors.New("the repository was asked") }
	if _, err := f.writeAt(fd, make([]byte, 8192), 16384); err != nil {
		t.Error(err)
	}
	if err := f.truncate(fd, 500_001); err != nil {
		t.Error(err)
	}
	if err := f.sync(fd, true); err != nil {
		t.Error(err)
	}
	var lower *lowerError
	if _, err := f.writeAt(fd, make([]byte, 100), 50000); !errors.As(err, &lower) || errno(err) != unix.EIO {
		t.Errorf("an unaligned write without the repository gave %v, want an error of the lower", err)
	}
	if _, err := f.readAt(fd, make([]byte, 100), 50000, false); !errors.As(err, &lower) {
		t.Errorf("a read without the repository gave %v, want an error of the lower", err)
	}
}

func TestFillKeepsTime(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), 100_001)
	f, fd := layFile(t, lower)
	before := []unix.Timespec{{Sec: 1000}, {Sec: 2000, Nsec: 5}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, f.name(), before, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := f.fill(fd, span{0, 1 << 20}, make([]byte, 1<<20)); err != nil || n != int64(len(lower)) {
		t.Fatalf("filled %d bytes, %v", n, err)
	}
	if _, err := f.checkFilled(fd); err != nil {
		t.Fatal(err)
	}
	if err := f.detach(); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mtim != before[1] {
		t.Errorf("modified at %v, %v; want %v", st.Mtim, err, before[1])
	}
	got, err := os.ReadFile(f.name())
	if err != nil || !bytes.Equal(got, lower) {
		t.Errorf("the backing file has other bytes than the lower, %v", err)
	}
}

// TestRandomFile compares a file with a model through random operations, restarts and hydration among them.
func TestRandomFile(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 1))
	for range rounds(150) {
		lower := random(rng, 1+rng.IntN(80_000)+rng.IntN(4)/3*600_000)
		c := &checkedFile{t: t, rng: rng, lower: lower, want: lower}
		c.f, c.fd = layFile(t, lower)
		for range 60 {
			c.step()
		}
		checkContent(t, c.f, c.fd, c.want)
	}
}

type checkedFile struct {
	t     *testing.T
	rng   *rand.Rand
	f     *file
	fd    int
	lower []byte
	want  []byte
}

func (c *checkedFile) offset() int {
	off := c.rng.IntN(len(c.want) + 9000)
	if c.rng.IntN(2) == 0 {
		off -= off % 4096
	}
	return off
}

func (c *checkedFile) step() {
	var err error
	switch op := c.rng.IntN(20); {
	case op < 8:
		c.write()
	case op < 11:
		err = c.truncate(c.offset())
	case op < 14:
		c.read()
	case op < 16:
		at := int64(c.rng.IntN(8)) * 8192
		_, err = c.f.fill(c.fd, span{at, at + 8192}, make([]byte, 8192))
	case op < 17:
		c.f = reopen(c.t, c.f.name(), c.lower)
	case op < 18:
		err = c.allocate()
	case op < 19:
		_, err = c.f.checkFilled(c.fd)
	default:
		err = c.hydrate()
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *checkedFile) write() {
	off, n := c.offset(), 1+c.rng.IntN(10_000)
	if c.rng.IntN(2) == 0 {
		n = 8192
	}
	p := random(c.rng, n)
	if _, err := c.f.writeAt(c.fd, p, int64(off)); err != nil {
		c.t.Fatal(err)
	}
	c.want = bytes.Clone(resized(c.want, max(len(c.want), off+n)))
	copy(c.want[off:], p)
}

func (c *checkedFile) truncate(size int) error {
	c.want = resized(c.want, size)
	return c.f.truncate(c.fd, int64(size))
}

func (c *checkedFile) allocate() error {
	off, n := c.offset(), 1+c.rng.IntN(20_000)
	err := c.f.allocate(c.fd, 0, int64(off), int64(n))
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	c.want = resized(c.want, max(len(c.want), off+n))
	return err
}

func (c *checkedFile) read() {
	off, p := c.offset(), make([]byte, 1+c.rng.IntN(20_000))
	n, err := c.f.readAt(c.fd, p, int64(off), c.rng.IntN(2) == 0)
	if err != nil {
		c.t.Fatal(err)
	}
	if want := c.want[min(off, len(c.want)):min(off+len(p), len(c.want))]; !bytes.Equal(p[:n], want) {
		c.t.Fatalf("read %d+%d: %d bytes that differ from the %d wanted", off, len(p), n, len(want))
	}
}

func (c *checkedFile) hydrate() error {
	if c.rng.IntN(4) > 0 {
		return nil
	}
	if err := fillAll(c.f, c.fd, openDirect(c.t, c.f), 1<<20, 512<<10); err != nil {
		return err
	}
	if _, err := c.f.checkFilled(c.fd); err != nil {
		return err
	}
	return c.f.detach()
}

// A kernel that refuses passthrough after it allowed it must not believe its page cache of what was written meanwhile.
func TestModes(t *testing.T) {
	var h handles
	var b branch
	allow := func(int) (int32, bool) { return 7, true }
	refuse := func(int) (int32, bool) { return 0, false }
	type opened struct {
		mode  uint64
		flags uint32
		id    int32
	}
	open := func(register func(int) (int32, bool), want opened) {
		t.Helper()
		out := h.add(register, &b)
		if got := (opened{out.Fh, out.OpenFlags, out.BackingID}); got != want {
			t.Errorf("opened %+v, want %+v", got, want)
		}
	}
	open(allow, opened{through, fuse.FOPEN_PASSTHROUGH, 7})
	open(refuse, opened{through, fuse.FOPEN_PASSTHROUGH, 7}) // it is known already
	unregistered := 0
	h.remove(through, func(int32) { unregistered++ }, &b)
	h.remove(through, func(int32) { unregistered++ }, &b)
	if unregistered != 1 {
		t.Errorf("unregistered %d times", unregistered)
	}
	open(refuse, opened{cached, 0, 0})
	open(allow, opened{direct, fuse.FOPEN_DIRECT_IO, 0}) // no passthrough while a cached handle is open
	open(nil, opened{cached, 0, 0})                      // which what came between may have outdated
	h.remove(direct, nil, &b)
	h.remove(cached, nil, &b)
	h.remove(cached, nil, &b)
	open(nil, opened{cached, fuse.FOPEN_KEEP_CACHE, 0})
	open(allow, opened{direct + 1, fuse.FOPEN_DIRECT_IO, 0})
	h.remove(cached, nil, &b)
	open(allow, opened{direct + 2, fuse.FOPEN_DIRECT_IO, 0}) // the kernel may not have come to know the other's mode
	h.use(direct + 1)
	open(allow, opened{direct + 3, fuse.FOPEN_DIRECT_IO, 0})
	h.use(direct + 2)
	h.remove(direct+3, nil, &b)
	open(allow, opened{through, fuse.FOPEN_PASSTHROUGH, 7})
	open(nil, opened{through, fuse.FOPEN_PASSTHROUGH, 7}) // another mode beside it would be EIO
}

// What leaves the mount is not cached, and what is cached does not leave.
func TestModesOfBranch(t *testing.T) {
	var h handles
	b := branch{whole: true}
	h.add(nil, &b)
	if b.close() || !b.held() {
		t.Error("a branch was closed over a cached handle")
	}
	h.remove(cached, nil, &b)
	if !b.close() || b.held() || b.validity() != 0 {
		t.Error("a branch that nobody uses was not closed")
	}
	out := h.add(nil, &b)
	if out.Fh != direct || out.OpenFlags != fuse.FOPEN_DIRECT_IO {
		t.Errorf("opened %+v in a closed branch", out)
	}
	h.remove(direct, nil, &b)
	b.reopen()
	if out := h.add(nil, &b); out.Fh != cached {
		t.Errorf("opened %+v in a branch that was opened again", out)
	}
}

// A walk that a rename may have led past a placeholder proves nothing.
func TestBranchSearch(t *testing.T) {
	var b, other branch
	none := func() (int, error) { return 0, nil }
	moved := b.moving(&b)
	b.search(none)
	if b.isWhole() {
		t.Error("whole in the middle of a rename")
	}
	moved()
	b.search(func() (int, error) { b.moving(&b)(); return 0, nil })
	if b.isWhole() {
		t.Error("whole though a rename came between")
	}
	if b.search(none); !b.isWhole() {
		t.Error("not whole though nothing was found")
	}
	b.moving(&other)()
	if b.isWhole() {
		t.Error("whole though a file came from elsewhere")
	}
}

// TestRacingFile lets writers of their own pages, a truncation, readers and the hydrator meet in one file.
func TestRacingFile(t *testing.T) {
	const page, pages, writers = 8192, 192, 4
	base := seed(t)
	for round := range uint64(rounds(20)) {
		rng := rand.New(rand.NewPCG(base, round))
		lower := random(rng, pages*page)
		f, fd := layFile(t, lower)
		want := bytes.Clone(lower)
		cut := (pages/2+rng.IntN(pages/2))*page + rng.IntN(page)
		var wg sync.WaitGroup
		for w := range writers {
			rng := rand.New(rand.NewPCG(base, round<<8+uint64(w)))
			wg.Go(func() { raceWrites(t, rng, f, fd, want[:pages/2*page], w, writers) })
		}
		wg.Go(func() {
			if err := f.truncate(fd, int64(cut)); err != nil {
				t.Error(err)
			}
			if err := f.truncate(fd, pages*page); err != nil {
				t.Error(err)
			}
		})
		direct := openDirect(t, f)
		wg.Go(func() {
			if err := fillAll(f, fd, direct, pages*page, 512<<10); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			for at := int64(0); at < pages*page; at += 65536 {
				if _, err := f.fill(fd, span{at, at + 65536}, make([]byte, 65536)); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Wait()
		clear(want[cut:])
		checkContent(t, f, fd, want)
		checkContent(t, reopen(t, f.name(), lower), fd, want)
	}
}

// raceWrites writes pieces of 1 KiB, of which neighbours belong to other writers, and reads them back.
func raceWrites(t *testing.T, rng *rand.Rand, f *file, fd int, want []byte, writer, writers int) {
	const piece = 1024
	for range 200 {
		i := rng.IntN(len(want)/piece/writers)*writers + writer
		p := random(rng, piece)
		if _, err := f.writeAt(fd, p, int64(i*piece)); err != nil {
			t.Error(err)
		}
		copy(want[i*piece:], p)
		got := make([]byte, piece)
		if n, err := f.readAt(fd, got, int64(i*piece), true); err != nil || n != piece || !bytes.Equal(got, p) {
			t.Errorf("read back %d bytes, %v, equal %v", n, err, bytes.Equal(got, p))
		}
	}
}

// A power cut leaves blocks that were given to a file and not written. Once read-ahead has brought them into the page
// cache, lseek(2) takes them for data.
func TestUnwrittenExtents(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), 300_001)
	f, fd := layFile(t, lower)
	if err := unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 8192, 200_000); err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(lower)
	copy(want[98304:], make([]byte, 8192))
	if _, err := pwriteFull(fd, want[98304:106496], 98304); err != nil {
		t.Fatal(err)
	}
	if _, err := preadFull(fd, make([]byte, len(lower)), 0); err != nil {
		t.Fatal(err)
	}
	if hole, _, err := runAt(fd, 16384, 300_000); hole || err != nil {
		t.Logf("this file system still calls it a hole: %v", err)
	}
	checkContent(t, f, fd, want)
	checkContent(t, reopen(t, f.name(), lower), fd, want)
}

func TestPlaceholderText(t *testing.T) {
	want := placeholder{1073741824, "pgdata/base/5/16385.1 with blanks"}
	got, err := parsePlaceholder(want.String())
	if err != nil || got != want {
		t.Errorf("got %v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{"", "5", "5 ", "x path", "-1 path", "0 path", "99999999999999999999 path"} {
		if p, err := parsePlaceholder(bad); err == nil {
			t.Errorf("%q is taken for %v", bad, p)
		}
	}
}

func TestHolesProbe(t *testing.T) {
	fd, err := unix.Open(t.TempDir(), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := checkHoles(fd); err != nil {
		t.Error(err)
	}
}
