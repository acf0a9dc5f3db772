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

// packSets numbers sets of packs. There are few different ones, so that a file map is kept in 12 bytes. A directory's set consists
// of others, which have lower numbers: the packs of a whole cluster are not written down for each backup and directory.
type packSets struct {
	numbers map[string]uint32
	sets    []packSet // the first is the empty one
}

type packSet struct {
	packs []uint32 // their numbers, ascending
	sets  []uint32 // numbers of those that it includes, ascending
}

const noPacks = 0 // the number of the empty set

func newPackSets() packSets {
	return packSets{numbers: map[string]uint32{}, sets: make([]packSet, 1)}
}

// number returns that of the set of these packs and those of other sets, which may come in any order and with repetitions.
func (s *packSets) number(packs, sets []uint32) uint32 {
	packs, sets = sorted(packs), sorted(sets)
	if len(sets) > 0 && sets[0] == noPacks {
		sets = sets[1:]
	}
	switch {
	case len(packs) == 0 && len(sets) == 0:
		return noPacks
	case len(packs) == 0 && len(sets) == 1:
		return sets[0]
	}
	key := binary.LittleEndian.AppendUint32(make([]byte, 0, 4+4*len(packs)+4*len(sets)), uint32(len(packs)))
	for _, no := range packs {
		key = binary.LittleEndian.AppendUint32(key, no)
	}
	for _, no := range sets {
		key = binary.LittleEndian.AppendUint32(key, no)
	}
	n, known := s.numbers[string(key)]
	if !known {
		n = uint32(len(s.sets))
		s.numbers[string(key)] = n
		s.sets = append(s.sets, packSet{slices.Clone(packs), slices.Clone(sets)})
	}
	return n
}

func sorted(numbers []uint32) []uint32 {
	slices.Sort(numbers)
	return slices.Compact(numbers)
}

// all tells of each pack whether a set has it, of so many packs.
func (s *packSets) all(set uint32, packs int) []bool {
	has, todo := make([]bool, packs), make([]bool, set+1)
	todo[set] = true
	for n := set; n > noPacks; n-- {
		if !todo[n] {
			continue
		}
		for _, no := range s.sets[n].packs {
			has[no] = true
		}
		for _, no := range s.sets[n].sets {
			todo[no] = true
		}
	}
	return has
}

// without tells of each set whether it has none of the packs that bad is true for.
func (s *packSets) without(bad func(no uint32) bool) []bool {
	none := make([]bool, len(s.sets))
	for i, set := range s.sets {
		none[i] = !slices.ContainsFunc(set.packs, bad) && !slices.ContainsFunc(set.sets, func(no uint32) bool { return !none[no] })
	}
	return none
}

// checkMaps verifies every directory and file map of every backup, and each place that they refer to.
func (c *checker) checkMaps(ctx context.Context) error {
	c.maps = &mapChecker{c: c, sets: newPackSets(), seen: map[place]uint32{}, loose: map[place]Ref{}}
	for _, cl := range c.clusters {
		for _, m := range cl.withImages() {
			set, err := c.maps.tree(ctx, cl, m, m.Root)
			if err == nil {
				err = c.checkListed(ctx, m, set)
			}
			if err != nil {
				return err
			}
		}
	}
	c.done.Maps = len(c.maps.seen)
	return c.checkTOCs(ctx)
}

// checkListed compares the packs that a backup's files lie in with its pack list. What is not in it may be deleted.
func (c *checker) checkListed(ctx context.Context, m *Manifest, set uint32) error {
	uses, err := c.r.packList(ctx, m)
	if err != nil {
		return unanswered(ctx, err) // reported already
	}
	needed := c.maps.sets.all(set, len(c.order))
	for _, u := range uses {
		needed[c.packs[u.pack].no] = false
	}
	for no, needed := range needed {
		if p := c.order[no]; needed {
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

// keep remembers what a piece leads to: its own pack, and these sets.
func (w *mapChecker) keep(at place, sets ...uint32) uint32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	set := w.sets.number([]uint32{at.pack}, sets)
	w.seen[at] = set
	return set
}

// tree checks a directory and all below it, once.
func (w *mapChecker) tree(ctx context.Context, cl *checkedCluster, m *Manifest, ref Ref) (set uint32, err error) {
	at, _, err := (&locator{c: w.c}).locate(ctx, ref, pieceTree)
	if set, ok := w.known(at); ok {
		return set, nil
	}
	var list *Listing
	if err == nil {
		list, err = w.read(ctx, ref)
	}
	if err != nil {
		return w.keep(at), w.bad(ctx, at, err)
	}
	sets, err := w.files(ctx, fileChecker{mapChecker: w, cl: cl, m: m, dir: at}, list)
	if err != nil {
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
	return w.keep(at, sets...), nil
}

// filesTogether is how many files of a directory one goroutine checks: most have small maps in few packs.
const filesTogether = 16

// files checks what a directory's files lead to. It returns the set of each entry, noPacks for directories.
func (w *mapChecker) files(ctx context.Context, f fileChecker, list *Listing) ([]uint32, error) {
	sets := make([]uint32, list.Len())
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for first := 0; first < len(sets); first += filesTogether {
		g.Go(func() (err error) {
			f := f
			f.pieces.c = w.c
			for i := first; i < min(first+filesTogether, len(sets)) && err == nil; i++ {
				if e := list.At(i); !e.IsDir() {
					sets[i], err = f.file(gctx, e)
				}
			}
			return err
		})
	}
	return sets, g.Wait()
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

// fileChecker checks files of one directory, one after the other.
type fileChecker struct {
	*mapChecker
	cl     *checkedCluster
	m      *Manifest
	dir    place // of the directory's tree
	pieces locator
}

// file checks what a file's entry leads to.
func (f *fileChecker) file(ctx context.Context, e Entry) (set uint32, err error) {
	switch e.content.kind {
	case contentWAL:
		f.walFile(f.cl, f.m, e.content.wal)
	case contentInlineMap:
		return f.fileMap(ctx, f.dir, e)
	case contentMap:
		at, _, err := f.pieces.locate(ctx, e.content.ref, pieceMap)
		if set, ok := f.known(at); ok {
			return set, nil
		}
		if err != nil {
			return f.keep(at), f.bad(ctx, at, err)
		}
		set, err := f.fileMap(ctx, at, e)
		if err == nil {
			set = f.keep(at, set)
		}
		return set, err
	}
	return noPacks, nil
}

// fileMap checks a file's map, which lies in the piece at, and returns the set of packs that it refers to.
func (f *fileChecker) fileMap(ctx context.Context, at place, e Entry) (set uint32, err error) {
	m, err := f.c.r.fileMap(ctx, e)
	if err != nil {
		return noPacks, f.bad(ctx, at, err)
	}
	need := m.contentSizes()
	var packs []uint32
	for i, ref := range m.chunks {
		at, size, err := f.pieces.locate(ctx, ref, pieceChunk)
		if err == nil && size < need[i] {
			err = ref.corrupt(fmt.Sprintf("%d bytes where a file needs %d", size, need[i]))
		}
		if err != nil {
			if err := f.bad(ctx, at, err); err != nil {
				return 0, err
			}
		} else if f.c.o.ReadData && f.pieces.toc == nil {
			f.keepLoose(at, ref)
		}
		if n := len(packs); n == 0 || packs[n-1] != at.pack {
			packs = append(packs, at.pack)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sets.number(packs, nil), nil
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
	whole := c.maps.sets.without(func(no uint32) bool { return c.damages[no] != nil })
	for _, cl := range c.clusters {
		for _, m := range cl.withImages() {
			b := blamer{mapChecker: c.maps, m: m, whole: whole}
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
	m     *Manifest
	whole []bool // of each set of packs: nothing is damaged in any
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
func (b *blamer) sound(at place) bool { return b.whole[b.seen[at]] }

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
