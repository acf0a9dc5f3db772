package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"path"
	"strings"
)

// Backup is a base backup open for reading: a tree of directories and files as they lay on the server. Paths are
// slash-separated and relative to its root, which holds "pgdata" and "tablespaces/<oid>". Safe for concurrent use.
type Backup struct {
	Manifest *Manifest
	r        *Repository
}

// OpenBackup reads nothing yet: directories are read when someone looks into them.
func (r *Repository) OpenBackup(m *Manifest) *Backup { return &Backup{Manifest: m, r: r} }

// root is the entry of the backup's root directory.
func (b *Backup) root() Entry {
	return Entry{Name: ".", Mode: fs.ModeDir | 0o755, ModTime: b.Manifest.StoppedAt, content: content{kind: contentTree, ref: b.Manifest.Root}}
}

// Stat returns the entry at a path; "." is the root. fs.ErrNotExist: nothing is there.
func (b *Backup) Stat(ctx context.Context, name string) (Entry, error) {
	e := b.root()
	if name == "." {
		return e, nil
	}
	for part := range strings.SplitSeq(name, "/") {
		if !e.IsDir() {
			return Entry{}, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
		}
		list, err := b.list(ctx, e)
		if err != nil {
			return Entry{}, err
		}
		child, ok := list.Find(part)
		if !ok {
			return Entry{}, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
		}
		e = child
	}
	return e, nil
}

// ReadDir returns what a directory holds.
func (b *Backup) ReadDir(ctx context.Context, name string) (*Listing, error) {
	e, err := b.Stat(ctx, name)
	if err != nil {
		return nil, err
	}
	if !e.IsDir() {
		return nil, fmt.Errorf("%s: not a directory", name)
	}
	return b.list(ctx, e)
}

func (b *Backup) list(ctx context.Context, dir Entry) (*Listing, error) {
	return b.r.cachedListing(dir.content.ref, func() ([]byte, error) { return b.r.tree(ctx, dir) })
}

// cachedListing returns the directory whose tree lies at ref, which load reads if it is not in the cache.
func (r *Repository) cachedListing(ref Ref, load func() ([]byte, error)) (*Listing, error) {
	return r.trees.get(ref.ID, func() (*Listing, int64, error) {
		tree, err := load()
		if err != nil {
			return nil, 0, err
		}
		list, err := listingAt(ref, tree)
		if err != nil {
			return nil, 0, err
		}
		return list, list.cost(), nil
	})
}

// listingAt decodes the tree that lies at ref.
func listingAt(ref Ref, tree []byte) (*Listing, error) {
	list, err := newListing(tree)
	if err != nil {
		return nil, ref.corrupt(err.Error())
	}
	return list, nil
}

// tree returns a directory's encoded tree.
func (r *Repository) tree(ctx context.Context, dir Entry) ([]byte, error) {
	b, err := r.piece(ctx, dir.content.ref)
	if err != nil {
		return nil, fmt.Errorf("read directory %s: %w", dir.Name, err)
	}
	return b, nil
}

// listing reads a directory. No cache keeps it.
func (r *Repository) listing(ctx context.Context, dir Entry) (*Listing, error) {
	b, err := r.tree(ctx, dir)
	if err != nil {
		return nil, err
	}
	return listingAt(dir.content.ref, b)
}

// Walk calls fn for the entry at name and everything below, parents first, sorted. It holds the encoded trees of the
// directories above an entry, and decodes one entry at a time: some 75 bytes for each file of a directory.
func (b *Backup) Walk(ctx context.Context, name string, fn func(name string, e Entry) error) error {
	e, err := b.Stat(ctx, name)
	if err != nil {
		return err
	}
	return b.walk(ctx, name, e, fn)
}

func (b *Backup) walk(ctx context.Context, name string, e Entry, fn func(string, Entry) error) error {
	if err := fn(name, e); err != nil || !e.IsDir() {
		return err
	}
	tree, err := b.r.tree(ctx, e)
	if err != nil {
		return err
	}
	t, err := newTreeDecoder(tree)
	for err == nil {
		var child Entry
		if child, err = t.next(); err == nil {
			if err := b.walk(ctx, path.Join(name, child.Name), child, fn); err != nil {
				return err
			}
		}
	}
	if err == io.EOF {
		return nil
	}
	return e.content.ref.corrupt(err.Error())
}

// File is a file of a backup open for reading. It holds nothing that has to be closed. Safe for concurrent use.
type File struct {
	size    int64
	content fileContent
}

// fileContent is where a file's bytes come from: the tree itself, chunks, a WAL object.
type fileContent interface {
	readAt(p []byte, off int64) error // p lies within the file
	data(yield func(off, n int64) bool)
	within(ctx context.Context) fileContent // the same, for reads that ctx bounds
}

// Open opens a regular file, reading its map, and only that. The context bounds all later reads.
func (b *Backup) Open(ctx context.Context, e Entry) (*File, error) {
	if !e.Mode.IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", e.Name)
	}
	if inline, ok := e.Inline(); ok {
		return &File{e.Size, inlineFile(inline)}, nil
	}
	if e.content.kind == contentWAL {
		f, err := b.r.openWAL(ctx, b.Manifest.Cluster, e.content.wal)
		if errors.Is(err, ErrNoWAL) {
			err = corrupt(walKey(b.Manifest.Cluster, e.content.wal), "it is missing")
		}
		return f, err
	}
	m, err := b.r.openMap(ctx, e)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", e.Name, err)
	}
	return &File{e.Size, &mappedFile{b.r, ctx, m}}, nil
}

// fileMap returns the map of a file that has one.
func (r *Repository) fileMap(ctx context.Context, e Entry) (*fileMap, error) {
	encoded := e.content.bytes
	if e.content.kind == contentMap {
		var err error
		if encoded, err = r.piece(ctx, e.content.ref); err != nil {
			return nil, err
		}
	}
	m, err := fileMapAt(e.content.ref, encoded)
	if err != nil {
		return nil, err
	}
	return m.of(e)
}

// fileMapAt decodes the map that lies at ref.
func fileMapAt(ref Ref, encoded []byte) (*fileMap, error) {
	m, err := decodeFileMap(encoded)
	if err != nil {
		return nil, ref.corrupt(err.Error())
	}
	return m, nil
}

// of returns the map if it can be that of a file.
func (m *fileMap) of(e Entry) (*fileMap, error) {
	if m.size != e.Size {
		return nil, e.content.ref.corrupt(fmt.Sprintf("a map of %d bytes for a file of %d", m.size, e.Size))
	}
	return m, nil
}

// Size is the file's length in bytes.
func (f *File) Size() int64 { return f.size }

// ReadAt fills p with the file's bytes from offset off, as they were when the backup ended. A chunk, or a WAL file's
// block, is verified before any byte of it is used; neighbouring chunks are fetched together.
//
// At the end of the file it returns io.EOF. What does not match its digest gives a *CorruptError; anything else is the
// store's error. Safe for concurrent use.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read before the beginning of a file")
	}
	n := int(max(0, min(int64(len(p)), f.size-off)))
	if n > 0 {
		if err := f.content.readAt(p[:n], off); err != nil {
			return 0, err
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// within returns the file with another context for its reads.
func (f *File) within(ctx context.Context) *File { return &File{f.size, f.content.within(ctx)} }

// Data gives the runs (offset, length) of bytes that are not known to be zeros, ascending.
func (f *File) Data() iter.Seq2[int64, int64] { return f.content.data }

// Extent tells which bytes [from, to) around an offset in the file come from the same chunk: who reads one of them has paid for
// all. from == to: it is not known, or nothing has to be paid for.
func (f *File) Extent(off int64) (from, to int64) {
	m, ok := f.content.(*mappedFile)
	if !ok || off < 0 || off >= f.size {
		return 0, 0
	}
	i := m.m.at(uint32(off / PageSize))
	if m.m.extents[i].chunk == zeros {
		return 0, 0
	}
	from = int64(m.m.first[i]) * PageSize
	return from, min(from+int64(m.m.extents[i].n)*PageSize, f.size)
}

type inlineFile []byte

func (f inlineFile) readAt(p []byte, off int64) error {
	copy(p, f[off:])
	return nil
}

func (f inlineFile) data(yield func(off, n int64) bool) {
	if len(f) > 0 {
		yield(0, int64(len(f)))
	}
}

func (f inlineFile) within(context.Context) fileContent { return f }

// mappedFile is a file whose bytes lie in chunks.
type mappedFile struct {
	r   *Repository
	ctx context.Context
	m   *fileMap
}

func (f *mappedFile) data(yield func(off, n int64) bool) { f.m.data()(yield) }

func (f *mappedFile) within(ctx context.Context) fileContent { return &mappedFile{f.r, ctx, f.m} }

// maxFetch is how many stored bytes of neighbouring chunks one read of the store brings at most.
const maxFetch = 4 << 20

// part is what one extent contributes to a read: dst comes from the chunk's content, beginning at byte from.
type part struct {
	ref  Ref
	from int
	dst  []byte
}

// whole tells whether the part wants a full chunk, so that it can be decompressed in place.
func (p part) whole() bool { return len(p.dst) == ChunkSize }

func (f *mappedFile) readAt(p []byte, off int64) error {
	parts := f.parts(p, off)
	for len(parts) > 0 {
		n := neighbours(wholeParts(parts))
		var err error
		if n > 0 {
			err = f.fetch(parts[:n])
		} else {
			n = 1
			err = f.copyPart(parts[0])
		}
		if err != nil {
			return err
		}
		parts = parts[n:]
	}
	return nil
}

// parts splits a read by extents; zeros are filled in at once.
func (f *mappedFile) parts(p []byte, off int64) []part {
	var parts []part
	for i := f.m.at(uint32(off / PageSize)); len(p) > 0; i++ {
		e := f.m.extents[i]
		skip := off - int64(f.m.first[i])*PageSize
		n := min(int64(len(p)), int64(e.n)*PageSize-skip)
		if e.chunk == zeros {
			clear(p[:n])
		} else {
			parts = append(parts, part{f.m.chunks[e.chunk], int(e.page)*PageSize + int(skip), p[:n]})
		}
		p, off = p[n:], off+n
	}
	return parts
}

// wholeParts gives the chunks of the whole parts at the beginning of parts.
func wholeParts(parts []part) iter.Seq[Ref] {
	return func(yield func(Ref) bool) {
		for _, p := range parts {
			if !p.whole() || !yield(p.ref) {
				return
			}
		}
	}
}

// neighbours counts the chunks at the beginning of refs that lie one after the other in one pack, up to maxFetch bytes.
func neighbours(refs iter.Seq[Ref]) (n int) {
	var first, last Ref
	for ref := range refs {
		if n == 0 {
			first = ref
		} else if ref.Pack != first.Pack || ref.Offset != last.end() || ref.end()-first.Offset > maxFetch {
			break
		}
		last = ref
		n++
	}
	return n
}

// fetch reads neighbouring whole chunks at once and decompresses each where it is wanted.
func (f *mappedFile) fetch(parts []part) error {
	first, last := parts[0].ref, parts[len(parts)-1].ref
	frames, err := f.r.getPack(f.ctx, first.Pack, int64(first.Offset), int64(last.end()-first.Offset))
	if err != nil {
		return err
	}
	for i, p := range parts {
		frame := frames[p.ref.Offset-first.Offset:][:p.ref.Length]
		content, err := f.r.decodeChunk(p.ref, frame, roomOf(parts[i:]))
		if err != nil {
			return err
		}
		if len(content) != len(p.dst) {
			return p.ref.corrupt(fmt.Sprintf("%d bytes instead of %d", len(content), len(p.dst)))
		}
	}
	return nil
}

// roomOf is the first part's place. If the next part's is right behind, which gets its bytes later, it has some slack.
func roomOf(parts []part) []byte {
	dst := parts[0].dst
	if len(parts) > 1 && cap(parts[1].dst) == cap(dst)-len(dst) {
		return dst[: 0 : len(dst)+slack]
	}
	return dst[:0:len(dst)]
}

// decodeChunk opens a chunk in place, decompresses it, as chunkContent does, and verifies it.
func (r *Repository) decodeChunk(ref Ref, sealed, dst []byte) ([]byte, error) {
	stored, err := r.openPiece(ref, sealed)
	if err != nil {
		return nil, err
	}
	content, err := r.codec.chunkContent(dst, stored)
	if err != nil {
		return nil, ref.corrupt(err.Error())
	}
	if !r.digests.verify(content, ref.ID) {
		return nil, ref.corrupt("its content does not match its digest")
	}
	return content, nil
}

// copyPart takes part of a chunk through the cache.
func (f *mappedFile) copyPart(p part) error {
	content, err := f.r.chunk(f.ctx, p.ref)
	if err != nil {
		return err
	}
	if p.from+len(p.dst) > len(content) {
		return p.ref.corrupt(fmt.Sprintf("%d bytes where a file needs %d", len(content), p.from+len(p.dst)))
	}
	copy(p.dst, content[p.from:])
	return nil
}

// chunk returns a chunk's content, verified. It is shared: do not change it.
func (r *Repository) chunk(ctx context.Context, ref Ref) ([]byte, error) {
	return r.chunks.get(ref.ID, func() ([]byte, int64, error) {
		frame, err := r.getPack(ctx, ref.Pack, int64(ref.Offset), int64(ref.Length))
		if err != nil {
			return nil, 0, err
		}
		content, err := r.decodeChunk(ref, frame, nil)
		return content, int64(len(content)), err
	})
}
