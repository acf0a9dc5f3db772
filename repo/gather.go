package repo

import (
	"cmp"
	"context"
	"errors"
	"io"
	"iter"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
)

// Span is a run of bytes of one of a backup's files.
type Span struct {
	Path     string
	Off, Len int64
}

const (
	// gatherReads is how many reads of the store Gather has under way: of maxFetch bytes each.
	gatherReads = 6
	// gatherGap is how many stored bytes that nobody wants are read rather than asked around: a request to an object
	// store takes as long as megabytes do, one to a disk as long as this.
	gatherGap = 128 << 10
)

// Gather reads spans of any number of files in few large reads: what lies near each other in a pack comes at once, and so
// do the directories and file maps on the way. The reads begin in the order of the spans. fn gets the bytes, verified, a chunk or
// less at a time, from several goroutines at once; they are its own until it returns.
//
// What is not a file, or behind a file's end, is left out, and so are zeros that lie nowhere. An error may come after part of the bytes.
func (b *Backup) Gather(ctx context.Context, spans []Span, fn func(Span, []byte) error) error {
	g := gatherer{b: b, fn: fn}
	files, err := g.find(ctx, spans)
	if err != nil {
		return err
	}
	mapped, err := g.fileMaps(ctx, files)
	if err != nil {
		return err
	}
	for _, s := range spans {
		if e := files[s.Path]; e.Mode.IsRegular() && mapped[s.Path] == nil {
			if err := g.unmapped(ctx, s, e); err != nil {
				return err
			}
		}
	}
	return g.chunks(ctx, spans, mapped)
}

// unmapped reads a span of a file that lies in the tree, or is a WAL object.
func (g *gatherer) unmapped(ctx context.Context, s Span, e Entry) error {
	f, err := g.b.Open(ctx, e)
	if err != nil {
		return err
	}
	buf := make([]byte, min(walBlockSize, e.Size))
	for off, end := max(0, s.Off), min(s.Off+s.Len, e.Size); off < end; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), end-off)]
		if _, err := f.ReadAt(p, off); err != nil && err != io.EOF {
			return err
		}
		if err := g.fn(Span{s.Path, off, int64(len(p))}, p); err != nil {
			return err
		}
	}
	return nil
}

type gatherer struct {
	b  *Backup
	fn func(Span, []byte) error
}

// find returns the entries of the spans' files, those that are there. It reads directories a level at a time.
func (g *gatherer) find(ctx context.Context, spans []Span) (map[string]Entry, error) {
	files, level := map[string]Entry{}, map[string]Entry{".": g.b.root()}
	for _, s := range spans {
		files[s.Path] = Entry{}
	}
	for depth := 0; len(level) > 0; depth++ {
		if err := g.readTrees(ctx, level); err != nil {
			return nil, err
		}
		below := map[string]Entry{}
		for name := range files {
			parts := strings.SplitN(name, "/", depth+2)
			if len(parts) <= depth {
				continue
			}
			dir, ok := level[path.Join(".", path.Join(parts[:depth]...))]
			if !ok {
				continue
			}
			list, err := g.b.list(ctx, dir)
			if err != nil {
				return nil, err
			}
			e, ok := list.Find(parts[depth])
			switch {
			case ok && len(parts) == depth+1:
				files[name] = e
			case ok && e.IsDir():
				below[path.Join(parts[:depth+1]...)] = e
			}
		}
		level = below
	}
	return files, nil
}

// preloadBelow is how many entries a directory has at most that Preload looks through for directories: one of more is full of
// relations.
const preloadBelow = 4096

// Preload reads a directory and those below it, a level at a time and few requests each, for whoever is about to look into them all.
func (b *Backup) Preload(ctx context.Context, name string) error {
	g := gatherer{b: b}
	top, err := b.Stat(ctx, name)
	if err != nil {
		return err
	}
	for level := map[string]Entry{name: top}; len(level) > 0; {
		if err := g.readTrees(ctx, level); err != nil {
			return err
		}
		below := map[string]Entry{}
		for name, dir := range level {
			list, err := b.list(ctx, dir)
			if err != nil {
				return err
			}
			if list.Len() > preloadBelow {
				continue
			}
			for i := range list.Len() {
				if e := list.At(i); e.IsDir() {
					below[path.Join(name, e.Name)] = e
				}
			}
		}
		level = below
	}
	return nil
}

// readTrees brings directories into the cache that are not there.
func (g *gatherer) readTrees(ctx context.Context, dirs map[string]Entry) error {
	var refs []Ref
	for _, e := range dirs {
		if !g.b.r.trees.has(e.content.ref.ID) {
			refs = append(refs, e.content.ref)
		}
	}
	return g.scattered(ctx, refs, func(ref Ref, sealed []byte) error {
		_, err := g.b.r.cachedListing(ref, func() ([]byte, error) { return g.b.r.pieceContent(ref, sealed) })
		return err
	})
}

// fileMaps returns the maps of the files that have one.
func (g *gatherer) fileMaps(ctx context.Context, files map[string]Entry) (map[string]*fileMap, error) {
	var refs []Ref
	for _, e := range files {
		if e.content.kind == contentMap && !g.b.r.maps.has(e.content.ref.ID) {
			refs = append(refs, e.content.ref)
		}
	}
	err := g.scattered(ctx, refs, func(ref Ref, sealed []byte) error {
		_, err := g.b.r.cachedMap(ref, func() ([]byte, error) { return g.b.r.pieceContent(ref, sealed) })
		return err
	})
	if err != nil {
		return nil, err
	}
	found := map[string]*fileMap{}
	for name, e := range files {
		if e.content.kind != contentMap && e.content.kind != contentInlineMap {
			continue
		}
		if found[name], err = g.b.r.openMap(ctx, e); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// openMap is fileMap through the cache.
func (r *Repository) openMap(ctx context.Context, e Entry) (*fileMap, error) {
	if e.content.kind != contentMap {
		return r.fileMap(ctx, e)
	}
	m, err := r.cachedMap(e.content.ref, func() ([]byte, error) { return r.piece(ctx, e.content.ref) })
	if err != nil {
		return nil, err
	}
	return m.of(e)
}

// cachedMap returns the map that lies at ref, which load reads if it is not in the cache.
func (r *Repository) cachedMap(ref Ref, load func() ([]byte, error)) (*fileMap, error) {
	return r.maps.get(ref.ID, func() (*fileMap, int64, error) {
		encoded, err := load()
		if err != nil {
			return nil, 0, err
		}
		m, err := fileMapAt(ref, encoded)
		if err != nil {
			return nil, 0, err
		}
		return m, m.cost(), nil
	})
}

// cost is about what the map takes in memory, in bytes.
func (m *fileMap) cost() int64 { return 128 + 40*int64(len(m.chunks)) + 16*int64(len(m.extents)) }

// share is what a span wants of a chunk: n bytes from byte from, which are those of the span's file at off.
type share struct {
	path    string
	from, n int
	off     int64
}

// chunks reads what the spans want.
func (g *gatherer) chunks(ctx context.Context, spans []Span, mapped map[string]*fileMap) error {
	var refs []Ref
	wanted := map[Ref][]share{}
	for _, s := range spans {
		m := mapped[s.Path]
		if m == nil {
			continue
		}
		for ref, w := range m.shares(s) {
			if wanted[ref] == nil {
				refs = append(refs, ref)
			}
			wanted[ref] = append(wanted[ref], w)
		}
	}
	return g.scattered(ctx, refs, func(ref Ref, sealed []byte) error {
		content, err := g.b.r.decodeChunk(ref, sealed, nil)
		if err != nil {
			return err
		}
		for _, w := range wanted[ref] {
			if w.from+w.n > len(content) {
				return ref.corrupt("it has fewer bytes than a file needs")
			}
			if err := g.fn(Span{w.path, w.off, int64(w.n)}, content[w.from:][:w.n]); err != nil {
				return err
			}
		}
		return nil
	})
}

// shares gives the chunks of a span; what is zeros lies in none.
func (m *fileMap) shares(s Span) iter.Seq2[Ref, share] {
	return func(yield func(Ref, share) bool) {
		off, end := max(0, s.Off), min(s.Off+s.Len, m.size)
		if off >= end {
			return
		}
		for i := m.at(uint32(off / PageSize)); off < end; i++ {
			e := m.extents[i]
			skip := off - int64(m.first[i])*PageSize
			n := min(end-off, int64(e.n)*PageSize-skip)
			if e.chunk != zeros && !yield(m.chunks[e.chunk], share{s.Path, int(e.page)*PageSize + int(skip), int(n), off}) {
				return
			}
			off += n
		}
	}
}

// scattered reads pieces, each once, and calls fn with each as it is stored.
func (g *gatherer) scattered(ctx context.Context, refs []Ref, fn func(Ref, []byte) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(gatherReads)
	for _, run := range nearby(refs) {
		if err := ctx.Err(); err != nil {
			group.Go(func() error { return err })
			break
		}
		group.Go(func() error { return g.b.r.readRun(ctx, run, fn) })
	}
	return group.Wait()
}

// nearby splits pieces into runs that are worth one read each, in the order of each one's first piece in refs.
func nearby(refs []Ref) (runs [][]Ref) {
	order := make(map[Ref]int, len(refs))
	for i, ref := range slices.Backward(refs) {
		order[ref] = i
	}
	sorted := slices.SortedFunc(maps.Keys(order), func(a, b Ref) int {
		return cmp.Or(a.Pack.compare(b.Pack), cmp.Compare(a.Offset, b.Offset))
	})
	firsts := map[Ref]int{} // by the piece with which a run begins
	for _, ref := range sorted {
		last := len(runs) - 1
		if last < 0 || !near(runs[last], ref) {
			runs = append(runs, []Ref{ref})
			firsts[ref] = order[ref]
			continue
		}
		runs[last] = append(runs[last], ref)
		firsts[runs[last][0]] = min(firsts[runs[last][0]], order[ref])
	}
	slices.SortFunc(runs, func(a, b []Ref) int { return cmp.Compare(firsts[a[0]], firsts[b[0]]) })
	return runs
}

// near tells whether a piece behind a run comes with it.
func near(run []Ref, ref Ref) bool {
	first, last := run[0], run[len(run)-1]
	return ref.Pack == first.Pack && ref.Offset >= last.end() && ref.Offset-last.end() <= gatherGap && ref.end()-first.Offset <= maxFetch
}

// readRun reads pieces of one pack, and what lies between them.
func (r *Repository) readRun(ctx context.Context, run []Ref, fn func(Ref, []byte) error) error {
	first, last := run[0], run[len(run)-1]
	stored, err := r.getPack(ctx, first.Pack, int64(first.Offset), int64(last.end()-first.Offset))
	if n := neighbours(slices.Values(run)); errors.Is(err, errNotHeld) && n < len(run) { // what lay between is not there any more
		if err := r.readRun(ctx, run[:n], fn); err != nil {
			return err
		}
		return r.readRun(ctx, run[n:], fn)
	}
	if err != nil {
		return err
	}
	for _, ref := range run {
		if err := fn(ref, stored[ref.Offset-first.Offset:][:ref.Length:ref.Length]); err != nil {
			return err
		}
	}
	return nil
}
