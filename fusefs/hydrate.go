package fusefs

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

const (
	partSize  = 64 << 20 // what one worker takes of a file, so that a relation segment of 1 GiB keeps all of them busy
	pieceSize = 4 << 20  // read from the repository and written at once: neighbouring chunks come in one request
	syncAlone = 1 << 24  // a placeholder of so many bytes is synced by itself; smaller ones together
	together  = 1024     // placeholders
)

// hydrators are two more than there are processors, for some wait for the disk.
func hydrators() int { return min(runtime.NumCPU(), 16) + 2 }

// Hydrate fills all holes, at most bytesPerSecond of them a second (0: as fast as it goes). It returns nil when no file
// has a placeholder's attribute any more and all is on disk: the bare directory is then whole. It gives way to readers
// that wait for the repository. What is damaged in the repository is left out, and reported when all else is done.
//
// Where it stopped, another run takes up: the holes themselves say what is left.
func (v *Overlay) Hydrate(ctx context.Context, bytesPerSecond int64) error {
	ctx, done, err := v.useUntilEnd(ctx)
	if err != nil {
		return err
	}
	defer done()
	v.eager.Store(bytesPerSecond <= 0)
	defer v.eager.Store(false)
	h := hydrator{rate: rate{bytesPerSecond: bytesPerSecond}}
	h.turns = newTurns(v, h.rate.most())
	for {
		whole, err := h.round(ctx)
		if err != nil && v.ctx.Err() != nil {
			return ErrUnmounted
		}
		if err != nil {
			return fmt.Errorf("hydrate %s: %w", v.dir, err)
		}
		if whole {
			break
		}
	}
	if err := unix.Syncfs(v.root); err != nil {
		return fmt.Errorf("sync the file system of %s: %w", v.dir, err)
	}
	return nil
}

// hydrator is one run of Hydrate.
type hydrator struct {
	turns
	rate rate

	mu      sync.Mutex
	filled  []*node // placeholders that wait for a common sync
	damaged []error
}

// round makes one branch after the other whole, but for what is damaged. It tells whether all of them were whole when it
// began: then nothing can have come from one into another that it missed.
func (h *hydrator) round(ctx context.Context) (whole bool, err error) {
	whole = true
	err = h.v.eachBranch(func(b *branch) error {
		for damaged := len(h.damaged); !b.isWhole() && len(h.damaged) == damaged; {
			whole = false
			if _, err := b.search(func() (int, error) { return h.pass(ctx, b) }); err != nil {
				return err
			}
		}
		return nil
	})
	return whole, errors.Join(append([]error{err}, h.damaged...)...)
}

// filling is a placeholder in hand. The worker that comes first opens it, the last one ends it.
type filling struct {
	n          *node // with a reference
	opened     sync.Once
	err        error // of open
	fd, direct int   // direct: for direct I/O, -1 where that is of no use
	left       atomic.Int32
	failed     atomic.Bool // some of it could not be filled
}

// part is what a worker does at a time.
type part struct {
	of *filling
	span
}

// pass goes through a branch once.
func (h *hydrator) pass(ctx context.Context, b *branch) (found int, err error) {
	parts := make(chan part)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(parts)
		return h.v.eachPlaceholder(ctx, b, func(n *node, limit int64) error {
			found++
			return h.send(ctx, n, limit, parts)
		})
	})
	for range hydrators() {
		g.Go(func() error { return h.work(ctx, parts) })
	}
	err = g.Wait()
	return found, errors.Join(err, h.settle(h.takeFilled(0)))
}

// send splits a placeholder into parts. Those that nobody takes any more are ended here.
func (h *hydrator) send(ctx context.Context, n *node, limit int64, parts chan<- part) error {
	count := (limit + partSize - 1) / partSize
	f := &filling{n: n, fd: -1, direct: -1}
	f.left.Store(int32(count))
	for i := range count {
		select {
		case parts <- part{f, span{i * partSize, min((i+1)*partSize, limit)}}:
		case <-ctx.Done():
			f.failed.Store(true)
			return errors.Join(ctx.Err(), h.done(f, int32(count-i)))
		}
	}
	return nil
}

func (h *hydrator) work(ctx context.Context, parts <-chan part) error {
	// Whole memory pages, as direct I/O wants them.
	buf, err := unix.Mmap(-1, 0, pieceSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("get %d bytes of memory: %w", pieceSize, err)
	}
	defer unix.Munmap(buf)
	for p := range parts {
		if err := h.part(ctx, p, buf); err != nil {
			return err
		}
	}
	return nil
}

func (h *hydrator) part(ctx context.Context, p part, buf []byte) error {
	p.of.opened.Do(func() { p.of.err = p.of.open(p.to > directLeast) })
	err := p.of.err
	if err == nil {
		err = h.fill(ctx, p, buf)
	}
	if err != nil {
		p.of.failed.Store(true)
	}
	if errors.Is(err, repo.ErrCorrupt) {
		h.mu.Lock()
		h.damaged = append(h.damaged, err)
		h.mu.Unlock()
		err = nil
	}
	return errors.Join(err, h.done(p.of, 1))
}

// open opens the backing file, also for direct I/O if its file system has that.
func (f *filling) open(large bool) (err error) {
	if f.fd, err = f.n.file.open.acquire(f.n.path()); err != nil {
		f.fd = -1
		return err
	}
	if large {
		f.direct, err = unix.Open(f.n.path(), unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		if err != nil {
			f.direct = -1
		}
	}
	return nil
}

func (f *filling) close() {
	if f.direct >= 0 {
		unix.Close(f.direct)
	}
	if f.fd >= 0 {
		f.n.file.open.release()
	}
}

// write writes lower bytes, p from base on, into what is a hole still; directly if it is no less than least.
func (f *filling) write(holes []span, p []byte, base, least int64) error {
	if f.direct < 0 {
		return f.n.file.fillFrom(f.fd, holes, p, base)
	}
	return f.n.file.fillDirect(f.fd, f.direct, holes, p, base, least)
}

// done counts parts that are through with. When all are, it sees to it that the placeholder's attribute is taken away.
func (h *hydrator) done(f *filling, parts int32) (err error) {
	if f.left.Add(-parts) > 0 {
		return nil
	}
	later := false
	if !f.failed.Load() {
		later, err = h.whole(f)
	}
	f.close()
	if !later {
		h.v.nodes.drop(f.n, 1)
		return err
	}
	return h.settle(h.takeFilled(together))
}

// whole brings a file to disk that is filled, or leaves that for later.
func (h *hydrator) whole(f *filling) (later bool, err error) {
	f.n.file.beside.wait()
	filled, err := f.n.file.checkFilled(f.fd)
	if err == nil && !filled {
		err = errors.New("a hole is left in a hydrated file")
	}
	if err != nil {
		return false, err
	}
	p, err := f.n.file.placeholder()
	if err != nil {
		return false, err
	}
	if p.limit >= syncAlone {
		if err := unix.Fdatasync(f.fd); err != nil {
			return false, fmt.Errorf("fdatasync: %w", err)
		}
		return false, f.n.file.detach()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.filled = append(h.filled, f.n)
	return true, nil
}

// fill fills a part.
func (h *hydrator) fill(ctx context.Context, p part, buf []byte) error {
	for at := p.from; at < p.to; {
		turn, err := h.turn(ctx)
		if err != nil {
			return err
		}
		s := span{at, min(at+turn.size, p.to)}
		if err := errors.Join(h.piece(ctx, &turn, p.of, s, buf), h.end(ctx, turn)); err != nil {
			return err
		}
		at = s.to
	}
	return nil
}

// piece fills the holes of s.
func (h *hydrator) piece(ctx context.Context, t *turn, f *filling, s span, buf []byte) error {
	holes, err := f.n.file.holes(f.fd, s)
	if err != nil || len(holes) == 0 {
		return err
	}
	if err := h.rate.wait(ctx, total(holes)); err != nil {
		return err
	}
	t.begin(h.v)
	if err := f.n.file.readHoles(holes, buf, s.from); err != nil {
		return err
	}
	h.v.hydrated.Add(total(holes))
	return f.write(holes, buf, s.from, directLeast)
}

// takeFilled takes the placeholders that wait for a sync, if there are so many.
func (h *hydrator) takeFilled(least int) []*node {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.filled) < least {
		return nil
	}
	filled := h.filled
	h.filled = nil
	return filled
}

// settle syncs the file system once for many small files, and then takes their attributes away. Before the sync an
// attribute must not go: after a power cut there would be holes with no lower.
func (h *hydrator) settle(filled []*node) error {
	if len(filled) == 0 {
		return nil
	}
	err := unix.Syncfs(h.v.root)
	if err != nil {
		err = fmt.Errorf("sync the file system: %w", err)
	}
	for _, n := range filled {
		if err == nil {
			err = n.file.detach()
		}
		h.v.nodes.drop(n, 1)
	}
	return err
}

// eachPlaceholder calls fn for the node of each file of a branch that has the attribute, with a reference that fn takes, and
// with its limit.
func (v *Overlay) eachPlaceholder(ctx context.Context, b *branch, fn func(n *node, limit int64) error) error {
	return v.eachFileOf(ctx, b, func(dirfd int, name string, _ *unix.Stat_t) error {
		p, err := readPlaceholder(procPath(dirfd) + "/" + name)
		if errors.Is(err, unix.ENOENT) || err == nil && p.limit == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		n, _, err := v.look(b, dirfd, name)
		switch {
		case errors.Is(err, unix.ENOENT):
			return nil
		case err != nil:
			return err
		case n.file == nil: // another file has taken the name
			v.nodes.drop(n, 1)
			return nil
		}
		return fn(n, p.limit)
	})
}

// eachFile calls fn for each regular file below a directory. What is made or removed meanwhile may be missed.
func eachFile(ctx context.Context, dir string, fn func(dirfd int, name string, st *unix.Stat_t) error) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a directory: %w", err)
	}
	defer unix.Close(fd)
	names, err := namesIn(procPath(fd))
	for i := 0; i < len(names) && err == nil; i++ {
		err = eachFileAt(ctx, fd, names[i], fn)
	}
	return err
}

// namesIn lists a directory without "." and "..".
func namesIn(dir string) (names []string, err error) {
	err = readDir(dir, func(e fuse.DirEntry) {
		if e.Name != "." && e.Name != ".." {
			names = append(names, e.Name)
		}
	})
	return names, err
}

func eachFileAt(ctx context.Context, dirfd int, name string, fn func(int, string, *unix.Stat_t) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	var st unix.Stat_t
	err := unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		err = eachFile(ctx, procPath(dirfd)+"/"+name, fn)
	case st.Mode&unix.S_IFMT == unix.S_IFREG:
		return fn(dirfd, name, &st)
	}
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// Hydrated is how many bytes Hydrate has brought since the mount was made.
func (v *Overlay) Hydrated() int64 { return v.hydrated.Load() }

// Status is how far the bare directory is from being whole.
type Status struct {
	BytesTotal    int64 // of all regular files
	BytesHydrated int64 // of them, on this disk; a fallocated range counts
	FilesTotal    int
	FilesWhole    int  // without a placeholder's attribute
	Whole         bool // all of them
	OpenHandles   int  // of regular files, through the mount
}

// Status goes through the bare directory: the disk is the only record, so it is right after a restart as well. It takes
// some microseconds a file. Where it cannot look, it says so in the log and that not all is whole.
func (v *Overlay) Status() Status {
	s := Status{OpenHandles: int(v.openFiles.Load())}
	err := v.count(&s)
	if err != nil {
		v.faults.eio("status", fuse.FUSE_ROOT_ID, err)
	}
	s.Whole = err == nil && s.FilesWhole == s.FilesTotal
	return s
}

func (v *Overlay) count(s *Status) error {
	done, err := v.use()
	if err != nil {
		return err
	}
	defer done()
	return eachFile(v.ctx, procPath(v.root), func(dirfd int, name string, st *unix.Stat_t) error {
		p, err := readPlaceholder(procPath(dirfd) + "/" + name)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		s.add(st, p)
		return err
	})
}

func (s *Status) add(st *unix.Stat_t, p placeholder) {
	const blockUnit = 512 // stat(2): st_blocks
	s.FilesTotal++
	s.BytesTotal += st.Size
	s.BytesHydrated += st.Size
	if p.limit > 0 {
		s.BytesHydrated -= max(0, p.limit-st.Blocks*blockUnit)
	} else {
		s.FilesWhole++
	}
}
