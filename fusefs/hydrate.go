package fusefs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

const (
	hydrators = 2       // files in hand at once
	pieceSize = 1 << 20 // read from the repository at once, bytes
	syncAlone = 1 << 24 // a placeholder of so many bytes is synced by itself; smaller ones together
	together  = 1024    // placeholders
)

// Hydrate fills all holes, at most bytesPerSecond of them a second (0: as fast as it goes). It returns nil when no file
// has a placeholder's attribute any more and all is on disk: the bare directory is then whole. It gives way to readers
// that wait for the repository. What is damaged in the repository is left out, and reported when all else is done.
//
// Where it stopped, another run takes up: the holes themselves say what is left.
func (v *Overlay) Hydrate(ctx context.Context, bytesPerSecond int64) error {
	done, err := v.use()
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(v.ctx, cancel)()
	h := hydrator{v: v, rate: rate{bytesPerSecond: bytesPerSecond}}
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
	v    *Overlay
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

// pass goes through a branch once.
func (h *hydrator) pass(ctx context.Context, b *branch) (found int, err error) {
	files := make(chan *node)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(files)
		return h.v.eachPlaceholder(ctx, b, func(n *node) error {
			select {
			case files <- n:
				found++
				return nil
			case <-ctx.Done():
				h.v.nodes.drop(n, 1)
				return ctx.Err()
			}
		})
	})
	for range hydrators {
		g.Go(func() error { return h.work(ctx, files) })
	}
	err = g.Wait()
	return found, errors.Join(err, h.settle(h.takeFilled(0)))
}

func (h *hydrator) work(ctx context.Context, files <-chan *node) error {
	buf := make([]byte, pieceSize)
	for n := range files {
		err := h.file(ctx, n, buf)
		if errors.Is(err, repo.ErrCorrupt) {
			h.mu.Lock()
			h.damaged = append(h.damaged, err)
			h.mu.Unlock()
			err = nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// file fills one file and sees to it that its attribute is taken away. It takes the reference to n.
func (h *hydrator) file(ctx context.Context, n *node, buf []byte) error {
	drop := true
	defer func() {
		if drop {
			h.v.nodes.drop(n, 1)
		}
	}()
	fd, err := n.file.open.acquire(n.path())
	if err != nil {
		return err
	}
	defer n.file.open.release()
	if err := h.fill(ctx, n.file, fd, buf); err != nil {
		return err
	}
	p, err := n.file.placeholder()
	if err != nil {
		return err
	}
	if p.limit >= syncAlone {
		if err := unix.Fdatasync(fd); err != nil {
			return fmt.Errorf("fdatasync: %w", err)
		}
		return n.file.detach(fd)
	}
	drop = false
	h.mu.Lock()
	h.filled = append(h.filled, n)
	h.mu.Unlock()
	return h.settle(h.takeFilled(together))
}

func (h *hydrator) fill(ctx context.Context, f *file, fd int, buf []byte) error {
	for at := int64(0); ; at += pieceSize {
		p, err := f.placeholder()
		if err != nil || at >= p.limit {
			return err
		}
		if err := h.v.traffic.giveWay(ctx); err != nil {
			return err
		}
		n, err := f.fill(fd, span{at, at + pieceSize}, buf)
		if err != nil {
			return err
		}
		if err := h.rate.wait(ctx, n); err != nil {
			return err
		}
	}
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
			err = h.detach(n)
		}
		h.v.nodes.drop(n, 1)
	}
	return err
}

func (h *hydrator) detach(n *node) error {
	fd, err := n.file.open.acquire(n.path())
	if err != nil {
		return err
	}
	defer n.file.open.release()
	return n.file.detach(fd)
}

// eachPlaceholder calls fn for the node of each file of a branch that has the attribute, with a reference that fn takes.
func (v *Overlay) eachPlaceholder(ctx context.Context, b *branch, fn func(*node) error) error {
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
		return fn(n)
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

// rate bounds the bytes a second. The zero value has no bound.
type rate struct {
	bytesPerSecond int64

	mu   sync.Mutex
	next time.Time // when the bytes handed out so far have had their time
}

// wait accounts for n bytes and returns when they have had their time.
func (r *rate) wait(ctx context.Context, n int64) error {
	if r.bytesPerSecond <= 0 || n == 0 {
		return ctx.Err()
	}
	r.mu.Lock()
	if now := time.Now(); r.next.Before(now) {
		r.next = now
	}
	r.next = r.next.Add(time.Duration(float64(n) / float64(r.bytesPerSecond) * float64(time.Second)))
	pause := time.NewTimer(time.Until(r.next))
	r.mu.Unlock()
	defer pause.Stop()
	select {
	case <-pause.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// traffic counts the requests that wait for the repository, so that the hydrator can stand back.
type traffic struct {
	mu   sync.Mutex
	busy int
	idle chan struct{} // closed when busy falls to 0
}

// enter counts a request until the returned function is called.
func (t *traffic) enter() (leave func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.busy++; t.busy == 1 {
		t.idle = make(chan struct{})
	}
	return t.leave
}

func (t *traffic) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.busy--; t.busy == 0 {
		close(t.idle)
	}
}

// patience is how long the hydrator stands back for readers before it takes its turn all the same.
const patience = 100 * time.Millisecond

// giveWay waits until no request waits for the repository, or patience has run out.
func (t *traffic) giveWay(ctx context.Context) error {
	t.mu.Lock()
	idle, busy := t.idle, t.busy > 0
	t.mu.Unlock()
	if !busy {
		return ctx.Err()
	}
	limit := time.NewTimer(patience)
	defer limit.Stop()
	select {
	case <-idle:
	case <-limit.C:
	case <-ctx.Done():
	}
	return ctx.Err()
}
