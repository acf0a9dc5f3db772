package fusefs

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

// Prefetch fills the holes of placeholders that spans of the backup's files name, in few large reads and about in the
// spans' order. root is the directory of the backup that Lay laid here. What is not there any more, was renamed, or has no holes
// is left out. With yield it gives way to those who use the mount, as hydration does.
//
// It is of no consequence to anybody but for speed: what an error keeps it from, a reader gets for itself.
func (v *Overlay) Prefetch(ctx context.Context, b *repo.Backup, root string, spans []repo.Span, yield bool) error {
	ctx, done, err := v.useUntilEnd(ctx)
	if err != nil {
		return err
	}
	defer done()
	gather := func(spans []repo.Span) error {
		missing, err := v.missing(root, spans, yield && v.eager.Load())
		if err == nil && len(missing) > 0 {
			err = b.Gather(ctx, missing, func(s repo.Span, content []byte) error { return v.put(root, s, content) })
		}
		return err
	}
	if yield {
		err = v.inTurns(ctx, spans, gather)
	} else {
		err = gather(spans)
	}
	if err != nil {
		return fmt.Errorf("prefetch %s: %w", v.dir, err)
	}
	return nil
}

// aheadAtOnce is what is read beforehand at once when nobody is there who uses the mount, in bytes of chunks.
const aheadAtOnce = 64 << 20

// inTurns calls gather with some of the spans at a time.
func (v *Overlay) inTurns(ctx context.Context, spans []repo.Span, gather func([]repo.Span) error) error {
	q := newTurns(v, aheadAtOnce)
	for spans := slices.Clone(spans); len(spans) > 0; {
		t, err := q.turn(ctx)
		if err != nil {
			return err
		}
		if t.narrow {
			t.size = pieceSize // which may be many requests to the store
		}
		var first []repo.Span
		first, spans = firstOf(spans, t.size)
		t.begin(v)
		if err := errors.Join(gather(first), q.end(ctx, t)); err != nil {
			return err
		}
	}
	return nil
}

// firstOf takes some bytes off the beginning of spans, which it changes. A span counts as a chunk at least, for it costs as much.
func firstOf(spans []repo.Span, size int64) (first, rest []repo.Span) {
	for len(spans) > 0 && size > 0 {
		s := &spans[0]
		n := min(s.Len, max(size, repo.ChunkSize))
		first = append(first, repo.Span{Path: s.Path, Off: s.Off, Len: n})
		size -= max(n, repo.ChunkSize)
		if s.Off, s.Len = s.Off+n, s.Len-n; s.Len <= 0 {
			spans = spans[1:]
		}
	}
	return first, spans
}

// missing are the holes in spans; or in the chunks that they come from, if these are to be kept. A file is looked for once.
func (v *Overlay) missing(root string, spans []repo.Span, chunks bool) (missing []repo.Span, err error) {
	of := map[string][]int{}
	var names []string
	for i, s := range spans {
		if of[s.Path] == nil {
			names = append(names, s.Path)
		}
		of[s.Path] = append(of[s.Path], i)
	}
	holes := make([][]span, len(spans))
	for _, name := range names {
		err := v.withPlaceholder(root, name, func(f *file, fd int) (err error) {
			for _, i := range of[name] {
				s := spans[i]
				if holes[i], err = f.missing(fd, span{max(0, s.Off), s.Off + s.Len}, chunks); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	named := map[repo.Span]bool{} // a chunk may be wanted more than once
	for i, s := range spans {
		for _, h := range holes[i] {
			if m := (repo.Span{Path: s.Path, Off: h.from, Len: h.to - h.from}); !named[m] {
				named[m] = true
				missing = append(missing, m)
			}
		}
	}
	return missing, nil
}

// missing are the holes in s, or in the chunk that they come from.
func (f *file) missing(fd int, s span, chunk bool) ([]span, error) {
	holes, err := f.holes(fd, s)
	if err != nil || !chunk || len(holes) == 0 {
		return holes, err
	}
	if around, err := f.around(holes); err == nil && around.from < around.to {
		return f.holes(fd, around)
	}
	return holes, nil
}

// put writes bytes of the lower into what is still a hole of them.
func (v *Overlay) put(root string, s repo.Span, content []byte) error {
	return v.withPlaceholder(root, s.Path, func(f *file, fd int) error {
		holes, err := f.holes(fd, span{s.Off, s.Off + s.Len})
		if err != nil || len(holes) == 0 {
			return err
		}
		return f.fillFrom(fd, holes, content, s.Off)
	})
}

// withPlaceholder calls fn with the file that lies where the backup has a path, if it is still that one's placeholder.
func (v *Overlay) withPlaceholder(root, name string, fn func(f *file, fd int) error) error {
	rel, ok := strings.CutPrefix(name, root+"/")
	if !ok {
		return nil
	}
	dir, base := path.Split(rel)
	dirfd, err := unix.Openat2(v.root, path.Join(".", dir), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if isGone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(dirfd)
	p, err := readPlaceholder(procPath(dirfd) + "/" + base)
	if isGone(err) || err == nil && p.path != name {
		return nil
	}
	if err != nil {
		return err
	}
	b := v.top
	if first, _, below := strings.Cut(rel, "/"); below {
		b = v.branchAt(first)
	}
	n, _, err := v.look(b, dirfd, base)
	if isGone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer v.nodes.drop(n, 1)
	return n.withLower(name, fn)
}

func isGone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// withLower calls fn if the node is a placeholder of the lower file at a path.
func (n *node) withLower(name string, fn func(f *file, fd int) error) error {
	if n.file == nil {
		return nil
	}
	fd, err := n.file.open.acquire(n.path())
	if err != nil {
		return err
	}
	defer n.file.open.release()
	if p, err := n.file.placeholder(); err != nil || p.limit == 0 || p.path != name {
		return err
	}
	return fn(n.file, fd)
}

// opened tells Options.Touched that a file with a lower was opened.
func (v *Overlay) opened(f *file) {
	if f.touched == nil {
		return
	}
	if p, err := f.placeholder(); err == nil && p.path != "" {
		f.touched(p.path, 0, 0)
	}
}

// tell tells Options.Touched what somebody waits for.
func (f *file) tell(holes []span) {
	if f.touched == nil {
		return
	}
	for _, h := range holes {
		f.touched(f.path, h.from, h.to-h.from)
	}
}
