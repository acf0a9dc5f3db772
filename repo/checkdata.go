package repo

import (
	"cmp"
	"context"
	"errors"
	"hash/fnv"
	"maps"
	"math"
	"math/big"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/pg"
)

// Sample is one of so many parts of a repository's packs and WAL objects. The zero value is all of them.
type Sample struct {
	Part, Parts int // Part is from 0 to Parts-1
}

// SampleOf is about that share of a repository, another part every day. The number of parts is the prime nearest to
// 100/percent, and not 7: so runs at any regular interval, but for one of so many days, come by every part.
func SampleOf(percent float64, now time.Time) Sample {
	wanted := int64(math.Round(100 / percent))
	if wanted <= 1 {
		return Sample{}
	}
	for d := int64(0); ; d++ {
		for _, n := range []int64{wanted + d, wanted - d} {
			if n != 7 && big.NewInt(n).ProbablyPrime(0) {
				return Sample{Part: int(now.Unix() / (24 * 60 * 60) % n), Parts: int(n)}
			}
		}
	}
}

// has tells whether an object belongs to the part.
func (s Sample) has(key string) bool {
	if s.Parts <= 1 {
		return true
	}
	h := fnv.New64a()
	h.Write([]byte(key))
	return h.Sum64()%uint64(s.Parts) == uint64(s.Part)
}

// checkWALObjects verifies the heads of all WAL objects. With ReadData, those of the sample are left to readData.
func (c *checker) checkWALObjects(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for cl, name := range c.walObjects {
		if !c.readsWAL(cl, name) {
			g.Go(func() error { return c.checkHead(gctx, cl, name) })
		}
	}
	return g.Wait()
}

// walObjects gives the WAL objects of all clusters in the order of their names, but for those that are known to be damaged.
func (c *checker) walObjects(yield func(*checkedCluster, pg.WALName) bool) {
	for _, cl := range c.clusters {
		for _, name := range slices.SortedFunc(maps.Keys(cl.wal.names), compareWAL) {
			if name.Kind == pg.WALHistory && cl.wal.unread[name.Timeline] || slices.Contains(cl.wal.gone, name) {
				continue
			}
			if !yield(cl, name) {
				return
			}
		}
	}
}

func compareWAL(a, b pg.WALName) int {
	return cmp.Or(cmp.Compare(a.Timeline, b.Timeline), cmp.Compare(a.Log, b.Log), cmp.Compare(a.Seg, b.Seg), cmp.Compare(a.Kind, b.Kind))
}

// readsWAL tells whether all bytes of a WAL object are to be read.
func (c *checker) readsWAL(cl *checkedCluster, name pg.WALName) bool {
	return c.o.ReadData && c.o.Sample.has(walKey(cl.name, name))
}

// checkHead compares a WAL object's head with the size that was listed.
func (c *checker) checkHead(ctx context.Context, cl *checkedCluster, name pg.WALName) error {
	head, err := c.r.WALHead(ctx, cl.name, name)
	if size := cl.wal.sizes[name]; err == nil && head.StoredBytes != size {
		err = corrupt(walKey(cl.name, name), "%d bytes instead of %d", size, head.StoredBytes)
	}
	return c.walResult(ctx, cl, name, err)
}

// walResult reports what is wrong with a WAL object, if anything is.
func (c *checker) walResult(ctx context.Context, cl *checkedCluster, name pg.WALName, err error) error {
	if err == nil || errors.Is(err, ErrNoWAL) { // deleted since it was listed
		return nil
	}
	if err := unanswered(ctx, err); err != nil {
		return err
	}
	return cl.wal.damaged(ctx, name, err)
}

// readData verifies every byte of the packs and WAL objects of the sample, each once and from its beginning to its end.
func (c *checker) readData(ctx context.Context) error {
	packs, total := c.sample()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, p := range packs {
		c.progress("read data", c.bytes.Load(), total)
		g.Go(func() error { return c.readPack(gctx, p) })
	}
	for cl, name := range c.walObjects {
		if c.readsWAL(cl, name) {
			c.progress("read data", c.bytes.Load(), total)
			c.done.WALRead++
			g.Go(func() error { return c.readWAL(gctx, cl, name) })
		}
	}
	err := g.Wait()
	c.done.PacksRead, c.done.Bytes = len(packs), c.bytes.Load()
	c.allRead = err == nil && c.o.Sample.Parts <= 1
	return err
}

// sample gives the packs that are to be read, and how many bytes these and the WAL objects to be read have.
func (c *checker) sample() (packs []*checkedPack, total int64) {
	for _, p := range c.order {
		if p.stored >= 0 && c.o.Sample.has(p.id.key()) {
			packs = append(packs, p)
			total += p.stored
		}
	}
	for cl, name := range c.walObjects {
		if c.readsWAL(cl, name) {
			total += cl.wal.sizes[name]
		}
	}
	return packs, total
}

func (c *checker) readWAL(ctx context.Context, cl *checkedCluster, name pg.WALName) error {
	_, err := c.r.WAL(ctx, cl.name, name)
	if err == nil {
		c.bytes.Add(cl.wal.sizes[name])
	}
	return c.walResult(ctx, cl, name, err)
}

// readPack verifies the pieces of a pack. Without a table of contents it verifies the chunks that file maps refer to.
func (c *checker) readPack(ctx context.Context, p *checkedPack) error {
	toc, err := c.index(ctx, p)
	if err != nil {
		return err
	}
	var refs []Ref
	if toc == nil {
		refs = c.maps.looseOf(p)
	} else {
		for i, kind := range toc.kinds {
			ref := toc.ref(p.id, i)
			if kind == pieceChunk {
				refs = append(refs, ref)
			} else if err := c.readMetadata(ctx, p, ref); err != nil {
				return err
			}
		}
	}
	for len(refs) > 0 {
		n := neighbours(slices.Values(refs))
		if err := c.readChunks(ctx, p, refs[:n]); err != nil {
			return err
		}
		refs = refs[n:]
	}
	return nil
}

// looseOf gives the chunks of a pack without a table of contents, in order.
func (w *mapChecker) looseOf(p *checkedPack) []Ref {
	var refs []Ref
	for at, ref := range w.loose {
		if at.pack == p.no {
			refs = append(refs, ref)
		}
	}
	slices.SortFunc(refs, func(a, b Ref) int { return cmp.Compare(a.Offset, b.Offset) })
	return refs
}

// readMetadata verifies a tree or file map, unless that was done because a backup refers to it.
func (c *checker) readMetadata(ctx context.Context, p *checkedPack, ref Ref) error {
	at := place{p.no, ref.Offset}
	if _, done := c.maps.known(at); !done {
		if _, err := c.r.piece(ctx, ref); errors.Is(err, errNotHeld) {
			return nil // nothing refers to it, and prune has dropped it
		} else if err != nil {
			return c.maps.bad(ctx, at, err)
		}
	}
	c.bytes.Add(int64(ref.Length))
	return nil
}

// readChunks reads neighbouring chunks at once and verifies each. If they cannot be read together, each is tried alone.
func (c *checker) readChunks(ctx context.Context, p *checkedPack, refs []Ref) error {
	first := refs[0].Offset
	b, err := c.r.getPack(ctx, p.id, int64(first), int64(refs[len(refs)-1].end()-first))
	if err := unanswered(ctx, err); err != nil {
		return err
	}
	if err != nil && len(refs) > 1 {
		for i := range refs {
			if err := c.readChunks(ctx, p, refs[i:i+1]); err != nil {
				return err
			}
		}
		return nil
	}
	room := c.r.codec.room()
	defer c.r.codec.giveBack(room)
	for _, ref := range refs {
		if err == nil {
			_, err = c.r.decodeChunk(ref, b[ref.Offset-first:][:ref.Length], (*room)[:0])
		}
		if err != nil && (p.broken.Load() || !errors.Is(err, errNotHeld)) { // else nothing refers to it, and prune has dropped it
			c.pieceDamaged(place{p.no, ref.Offset}, err)
		}
		err = nil
	}
	c.bytes.Add(int64(len(b)))
	return nil
}
