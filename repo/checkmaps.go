package repo

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/pg"
)

// mapChecker goes through the trees of all backups. A tree or file map that several of them share is read once: of each is
// kept which packs it leads to, and that tells both whether a backup's pack list is complete and where to look for the
// files that something damaged is part of.
type mapChecker struct {
	c      *checker
	blamed bool // which files are hit is known

	mu    sync.Mutex // a leaf
	sets  packSets
	seen  map[place]uint32 // set of the packs of what lies there, and of all that it leads to
	loose map[place]Ref    // chunks in packs without a table of contents
}

// packSets numbers sets of packs. There are few different ones, so that a file map is kept in 12 bytes.
type packSets struct {
	numbers map[string]uint32
	sets    [][]uint32 // numbers of packs, ascending
}

// number returns that of a set, which may come in any order and with repetitions.
func (s *packSets) number(packs []uint32) uint32 {
	slices.Sort(packs)
	packs = slices.Compact(packs)
	key := make([]byte, 0, 4*len(packs))
	for _, no := range packs {
		key = binary.LittleEndian.AppendUint32(key, no)
	}
	n, known := s.numbers[string(key)]
	if !known {
		n = uint32(len(s.sets))
		s.numbers[string(key)] = n
		s.sets = append(s.sets, slices.Clone(packs))
	}
	return n
}

// union is the set of all packs of some sets.
func (s *packSets) union(numbers []uint32) uint32 {
	slices.Sort(numbers)
	numbers = slices.Compact(numbers)
	if len(numbers) == 1 {
		return numbers[0]
	}
	var packs []uint32
	for _, n := range numbers {
		packs = append(packs, s.sets[n]...)
	}
	return s.number(packs)
}

// checkMaps verifies every directory and file map of every backup, and each place that they refer to.
func (c *checker) checkMaps(ctx context.Context) error {
	c.maps = &mapChecker{c: c, sets: packSets{numbers: map[string]uint32{}}, seen: map[place]uint32{}, loose: map[place]Ref{}}
	for _, cl := range c.clusters {
		for _, m := range cl.withImages() {
			set, err := c.maps.tree(ctx, cl, m, m.Root)
			if err == nil {
				err = c.checkListed(ctx, m, c.maps.sets.sets[set])
			}
			if err != nil {
				return err
			}
		}
	}
	c.done.Maps = len(c.maps.seen)
	return nil
}

// checkListed compares the packs that a backup's files lie in with its pack list. What is not in it may be deleted.
func (c *checker) checkListed(ctx context.Context, m *Manifest, packs []uint32) error {
	uses, err := c.r.packList(ctx, m)
	if err != nil {
		return unanswered(ctx, err) // reported already
	}
	named := make(map[uint32]bool, len(uses))
	for _, u := range uses {
		named[c.packs[u.pack].no] = true
	}
	for _, p := range c.packsByNo() {
		if _, ok := slices.BinarySearch(packs, p.no); ok && !named[p.no] {
			key := packListKey(m.Cluster, m.ID)
			c.report(Finding{Object: key, Cluster: m.Cluster, Err: corrupt(key, "it does not name pack %s, which the backup needs", p.id),
				Cost: "The pack looks as if nothing needed it.", Backups: []Affected{{Cluster: m.Cluster, Backup: m.ID}}})
		}
	}
	return nil
}

// known returns the set of what was checked already.
func (w *mapChecker) known(at place) (set uint32, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	set, ok = w.seen[at]
	return set, ok
}

// keep remembers what a piece leads to: its own pack, these packs, these sets.
func (w *mapChecker) keep(at place, packs []uint32, sets []uint32) uint32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	set := w.sets.union(append(sets, w.sets.number(append(packs, at.pack))))
	w.seen[at] = set
	return set
}

// tree checks a directory and all below it, once.
func (w *mapChecker) tree(ctx context.Context, cl *checkedCluster, m *Manifest, ref Ref) (set uint32, err error) {
	at, _, err := w.c.locate(ctx, ref, pieceTree)
	if set, ok := w.known(at); ok {
		return set, nil
	}
	var list *Listing
	if err == nil {
		list, err = w.read(ctx, ref)
	}
	if err != nil {
		return w.keep(at, nil, nil), w.bad(ctx, at, err)
	}
	sets := make([]uint32, list.Len())
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for i := range sets {
		sets[i] = w.keepNone()
		if e := list.At(i); !e.IsDir() {
			g.Go(func() (err error) { sets[i], err = w.file(gctx, cl, m, at, e); return err })
		}
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	for i := range sets {
		if e := list.At(i); e.IsDir() {
			if sets[i], err = w.tree(ctx, cl, m, e.content.ref); err != nil {
				return 0, err
			}
		}
	}
	w.c.progress("check maps", w.c.r.ReadBytes(), 0)
	return w.keep(at, nil, sets), nil
}

// keepNone is the empty set.
func (w *mapChecker) keepNone() uint32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sets.number(nil)
}

// read reads a directory past all caches: the same content may lie in two places.
func (w *mapChecker) read(ctx context.Context, ref Ref) (*Listing, error) {
	content, err := w.c.r.piece(ctx, ref)
	if err != nil {
		return nil, err
	}
	list, err := newListing(content)
	if err != nil {
		return nil, ref.corrupt(err.Error())
	}
	return list, nil
}

// bad keeps a damaged piece. It returns an error if the check cannot go on.
func (w *mapChecker) bad(ctx context.Context, at place, err error) error {
	if errors.Is(err, errKnown) {
		return nil
	}
	if err := unanswered(ctx, err); err != nil {
		return err
	}
	w.c.pieceDamaged(at, err)
	return nil
}

// file checks what a file's entry in the tree at dir leads to.
func (w *mapChecker) file(ctx context.Context, cl *checkedCluster, m *Manifest, dir place, e Entry) (set uint32, err error) {
	switch e.content.kind {
	case contentWAL:
		w.walFile(cl, m, e.content.wal)
	case contentInlineMap:
		return w.fileMap(ctx, dir, e)
	case contentMap:
		at, _, err := w.c.locate(ctx, e.content.ref, pieceMap)
		if set, ok := w.known(at); ok {
			return set, nil
		}
		if err != nil {
			return w.keep(at, nil, nil), w.bad(ctx, at, err)
		}
		set, err := w.fileMap(ctx, at, e)
		if err == nil {
			set = w.keep(at, nil, []uint32{set})
		}
		return set, err
	}
	return w.keepNone(), nil
}

// fileMap checks a file's map, which lies in the piece at, and returns the set of packs that it refers to.
func (w *mapChecker) fileMap(ctx context.Context, at place, e Entry) (set uint32, err error) {
	m, err := w.c.r.fileMap(ctx, e)
	if err != nil {
		return w.keepNone(), w.bad(ctx, at, err)
	}
	need := m.contentSizes()
	var packs []uint32
	for i, ref := range m.chunks {
		at, size, err := w.c.locate(ctx, ref, pieceChunk)
		if err == nil && size < need[i] {
			err = ref.corrupt(fmt.Sprintf("%d bytes where a file needs %d", size, need[i]))
		}
		if err != nil {
			if err := w.bad(ctx, at, err); err != nil {
				return 0, err
			}
		} else if w.c.o.ReadData && w.c.knownPack(ref.Pack).broken {
			w.keepLoose(at, ref)
		}
		packs = append(packs, at.pack)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sets.number(packs), nil
}

func (w *mapChecker) keepLoose(at place, ref Ref) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.loose[at] = ref
}

// contentSizes is how many bytes the file needs of the content of each of its chunks.
func (m *fileMap) contentSizes() []uint32 {
	need := make([]uint32, len(m.chunks))
	for i, e := range m.extents {
		if e.chunk == zeros {
			continue
		}
		end := int64(e.page+e.n) * PageSize
		if behind := int64(m.first[i]+e.n)*PageSize - m.size; behind > 0 { // the file's last page is short
			end -= behind
		}
		need[e.chunk] = max(need[e.chunk], uint32(end))
	}
	return need
}

// walFile reports a file of a backup whose WAL object is not there, unless that is known from the cluster's WAL.
func (w *mapChecker) walFile(cl *checkedCluster, m *Manifest, name pg.WALName) {
	if cl.wal.names[name] || cl.wal.knownMissing(name) {
		return
	}
	key := walKey(m.Cluster, name)
	w.c.report(Finding{Object: key, Cluster: m.Cluster, Err: corrupt(key, "it is missing"), Cost: costFiles,
		Backups: []Affected{{m.Cluster, m.ID, []string{walFileOf(name)}, 1}}})
}

// walFileOf is where a WAL file lies in a backup.
func walFileOf(name pg.WALName) string { return "pgdata/pg_wal/" + name.String() }

// blame finds the files that something damaged is part of. It looks only where a damaged pack is referred to.
func (c *checker) blame(ctx context.Context) error {
	for _, cl := range c.clusters {
		for _, m := range cl.withImages() {
			b := blamer{mapChecker: c.maps, m: m}
			if err := b.directory(ctx, "", m.Root); err != nil {
				return err
			}
		}
	}
	c.maps.blamed = true
	return nil
}

// blamer goes through one backup.
type blamer struct {
	*mapChecker
	m *Manifest
}

// hit enters a file that cannot be read.
func (b *blamer) hit(pack uint32, path string) {
	d := b.c.damages[pack]
	last := len(d.hits) - 1
	if last < 0 || d.hits[last].Backup != b.m.ID || d.hits[last].Cluster != b.m.Cluster {
		d.hits = append(d.hits, Affected{Cluster: b.m.Cluster, Backup: b.m.ID})
		last++
	}
	if h := &d.hits[last]; len(h.Files) < maxNamed {
		h.Files = append(h.Files, path)
	}
	d.hits[last].Total++
}

// lost tells whether a piece cannot be read.
func (b *blamer) lost(ref Ref) (at place, lost bool) {
	p := b.c.packs[ref.Pack]
	at = place{p.no, ref.Offset}
	return at, p.stored < 0 || b.c.bad[at]
}

// sound tells whether nothing is damaged in the packs that a piece leads to.
func (b *blamer) sound(at place) bool {
	for _, no := range b.sets.sets[b.seen[at]] {
		if b.c.damages[no] != nil {
			return false
		}
	}
	return true
}

// directory looks into a directory, whose path is "" or ends in "/".
func (b *blamer) directory(ctx context.Context, path string, ref Ref) error {
	at, lost := b.lost(ref)
	if lost {
		b.hit(at.pack, cmp.Or(path, "/"))
		return nil
	}
	if b.sound(at) {
		return nil
	}
	list, err := b.read(ctx, ref)
	if err != nil {
		return unanswered(ctx, err)
	}
	for i := range list.Len() {
		e := list.At(i)
		if e.IsDir() {
			err = b.directory(ctx, path+e.Name+"/", e.content.ref)
		} else {
			err = b.file(ctx, path+e.Name, e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *blamer) file(ctx context.Context, path string, e Entry) error {
	if e.content.kind == contentMap {
		at, lost := b.lost(e.content.ref)
		if lost {
			b.hit(at.pack, path)
		}
		if lost || b.sound(at) {
			return nil
		}
	} else if e.content.kind != contentInlineMap {
		return nil
	}
	m, err := b.c.r.fileMap(ctx, e)
	if err != nil {
		return unanswered(ctx, err)
	}
	hit := map[uint32]bool{}
	for _, ref := range m.chunks {
		if at, lost := b.lost(ref); lost && !hit[at.pack] {
			hit[at.pack] = true
			b.hit(at.pack, path)
		}
	}
	return nil
}
