package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"
)

// priorBackup is the backup that a new one is compared with.
type priorBackup struct {
	r     *Repository
	b     *Backup
	sizes map[PackID]packSize
	tocs  *cache[PackID, *packTOC]

	unusable *unusablePacks // to which nothing new refers

	dir     string // the directory that was looked into last: files come directory by directory
	listing *Listing
}

// tocCacheBytes is room for the page digests of some 20 GB.
const tocCacheBytes = 32 << 20

// openPrior reads the prior backup's pack list and enters its chunks into the index, but for what is known to be damaged, or
// turns out to be: that the new backup stores anew, and so does not inherit the damage. Not all that its packs hold: what no
// backup refers to any more may go while this one is being made. nil: nothing can be compared.
func openPrior(ctx context.Context, r *Repository, b *Backup, index *chunkIndex) (*priorBackup, error) {
	uses, err := r.packList(ctx, b.Manifest)
	if errors.Is(err, ErrCorrupt) {
		r.log.Warn("the pack list of the prior backup is damaged; all pages are stored again", "error", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p := &priorBackup{r: r, b: b, sizes: make(map[PackID]packSize, len(uses)), tocs: newCache[PackID, *packTOC](tocCacheBytes)}
	if p.unusable, err = r.unusablePacks(ctx); err != nil {
		return nil, err
	}
	for _, u := range uses {
		p.sizes[u.pack] = u.size
	}
	vetted := packVetter{p: p, sound: map[PackID]bool{}}
	walk := newPieceWalk(r, func(kind byte, ref Ref) error {
		if kind != pieceChunk {
			return nil
		}
		sound, err := vetted.vet(ctx, ref.Pack)
		if err != nil || !sound {
			return err
		}
		return errorIf(!index.add(ref), errFull)
	})
	if err := walk.backup(ctx, b); err != nil && err != errFull && !p.isDamaged(err) {
		return nil, fmt.Errorf("compare with backup %s: %w", b.Manifest.ID, err)
	}
	return p, nil
}

// errFull says that no more is wanted.
var errFull = errors.New("full")

// packVetter looks at each pack once. Safe for concurrent use.
type packVetter struct {
	p *priorBackup

	mu    sync.Mutex // a leaf
	sound map[PackID]bool
}

// vet tells whether a pack may be referred to.
func (v *packVetter) vet(ctx context.Context, id PackID) (sound bool, err error) {
	v.mu.Lock()
	sound, known := v.sound[id]
	v.mu.Unlock()
	if known {
		return sound, nil
	}
	toc, err := v.p.usable(ctx, id)
	if err != nil {
		return false, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sound[id] = toc != nil
	return toc != nil, nil
}

// usable returns the table of contents of a pack that may be referred to, nil of another.
func (p *priorBackup) usable(ctx context.Context, id PackID) (*packTOC, error) {
	if p.unusable.has(id) {
		return nil, nil
	}
	toc, err := p.toc(ctx, id)
	if p.isDamaged(err) {
		return nil, nil
	}
	return toc, err
}

// sound tells whether nothing is known to be damaged of what the prior backup needs.
func (p *priorBackup) sound() bool {
	for id := range p.sizes {
		if p.unusable.has(id) {
			return false
		}
	}
	return true
}

// isDamaged tells whether an error is damage, and if so, keeps the new backup from the pack that it names.
func (p *priorBackup) isDamaged(err error) bool {
	var bad *CorruptError
	if !errors.As(err, &bad) {
		return false
	}
	if id, ok := packOfKey(bad.Object); ok && p.unusable.add(id) {
		p.r.log.Warn("a pack of the prior backup is damaged; what lies in it is stored again", "error", err)
	}
	return true
}

func (p *priorBackup) toc(ctx context.Context, id PackID) (*packTOC, error) {
	return p.tocs.get(id, func() (*packTOC, int64, error) {
		toc, err := p.r.readTOC(ctx, id, p.sizes[id])
		if err != nil {
			return nil, 0, err
		}
		return toc, toc.cost(), nil
	})
}

func (p *priorBackup) packSize(id PackID) (packSize, bool) {
	if p == nil {
		return packSize{}, false
	}
	s, ok := p.sizes[id]
	return s, ok
}

// tree returns where the prior listing of a directory lies; the zero Ref if there is none. What cannot be read now is
// as good as none: the new backup then writes its own.
func (p *priorBackup) tree(ctx context.Context, name string) Ref {
	if p == nil {
		return Ref{}
	}
	e, err := p.b.Stat(ctx, name)
	if err != nil || !e.IsDir() || p.unusable.has(e.content.ref.Pack) {
		return Ref{}
	}
	return e.content.ref
}

// priorFile is the prior state of one file.
type priorFile struct {
	p   *priorBackup
	m   *fileMap
	ref Ref // of the map, if it is a piece
}

// file opens the prior state of the file at a path; nil if there is none in chunks.
func (p *priorBackup) file(ctx context.Context, name string) (*priorFile, error) {
	if p == nil {
		return nil, nil
	}
	dir, base := path.Split(name)
	list, err := p.list(ctx, path.Clean(dir))
	if err != nil {
		return nil, fmt.Errorf("compare with backup %s: %w", p.b.Manifest.ID, err)
	}
	e, ok := list.Find(base)
	if !ok || e.content.kind != contentMap && e.content.kind != contentInlineMap {
		return nil, nil
	}
	m, err := p.r.fileMap(ctx, e)
	if p.isDamaged(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("compare with backup %s: %w", p.b.Manifest.ID, err)
	}
	if p.unusable.has(e.content.ref.Pack) {
		e.content.ref = Ref{}
	}
	return &priorFile{p: p, m: m, ref: e.content.ref}, nil
}

// list returns the prior listing of a directory; an empty one if there is none, or it is damaged. Files are made by one goroutine at a time.
func (p *priorBackup) list(ctx context.Context, dir string) (*Listing, error) {
	if p.listing != nil && p.dir == dir {
		return p.listing, nil
	}
	e, err := p.b.Stat(ctx, dir)
	list := &Listing{}
	if err == nil && e.IsDir() {
		list, err = p.r.listing(ctx, e)
	}
	if p.isDamaged(err) {
		list, err = &Listing{}, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	p.dir, p.listing = dir, list
	return list, nil
}

func (f *priorFile) mapRef() Ref {
	if f == nil {
		return Ref{}
	}
	return f.ref
}

// pagePlace is where a page lies: page of the chunk at ref, nil if it has to be stored.
type pagePlace struct {
	ref  *Ref
	page uint32
}

// page returns where the prior backup has page pageNo of the file, if it has it with this digest.
func (f *priorFile) page(ctx context.Context, pageNo uint32, digest [pageDigestSize]byte) (pagePlace, error) {
	if int64(pageNo) >= pages64(f.m.size) {
		return pagePlace{}, nil
	}
	i := f.m.at(pageNo)
	e := f.m.extents[i]
	if e.chunk == zeros {
		return pagePlace{}, nil
	}
	ref := &f.m.chunks[e.chunk]
	toc, err := f.p.usable(ctx, ref.Pack)
	if toc == nil {
		return pagePlace{}, err
	}
	at := e.page + pageNo - f.m.first[i]
	k, ok := toc.find(ref.Offset)
	if !ok || toc.ids[k] != ref.ID || int(at+1)*pageDigestSize > len(toc.digests[k]) {
		return pagePlace{}, nil // map and table contradict each other: neither is to be built on
	}
	if [pageDigestSize]byte(toc.digests[k][at*pageDigestSize:]) != digest {
		return pagePlace{}, nil
	}
	return pagePlace{ref, at}, nil
}

// chunkIndex finds chunks by content: those of the prior backup and those just written. It is bounded, so a very large
// cluster's content is found again only as far as it goes; pages of the same file are found without it.
type chunkIndex struct {
	mu    sync.Mutex
	packs []PackID
	known map[PackID]uint32 // index into packs
	at    map[ID]chunkPlace
}

type chunkPlace struct{ pack, offset, length uint32 }

// maxIndex bounds the index: so many chunks are 100 GiB of content and take 30 MB. A few more, and Go's map takes twice that.
const maxIndex = 800_000

func newChunkIndex() *chunkIndex {
	return &chunkIndex{known: map[PackID]uint32{}, at: map[ID]chunkPlace{}}
}

// add enters a chunk. It returns false when there is no room.
func (x *chunkIndex) add(ref Ref) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.at) >= maxIndex {
		return false
	}
	pack, ok := x.known[ref.Pack]
	if !ok {
		pack = uint32(len(x.packs))
		x.known[ref.Pack] = pack
		x.packs = append(x.packs, ref.Pack)
	}
	x.at[ref.ID] = chunkPlace{pack, ref.Offset, ref.Length}
	return true
}

func (x *chunkIndex) find(id ID) (Ref, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	p, ok := x.at[id]
	if !ok {
		return Ref{}, false
	}
	return Ref{Pack: x.packs[p.pack], Offset: p.offset, Length: p.length, ID: id}, true
}
