package repo

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
)

// checkedPack is a pack that some pack list, or some map, names.
type checkedPack struct {
	id     PackID
	no     uint32   // in the order in which packs were met
	size   packSize // that it is to have
	stored int64    // bytes that it has; -1: it is not there
	broken bool     // it is not there, has another size, or its header or table of contents cannot be believed
}

// place is a piece: its pack's number and its offset. Offset 0, where no piece can be, is the pack itself.
type place struct{ pack, offset uint32 }

// packDamage is what is wrong with a pack, and who is hit by it.
type packDamage struct {
	err    error // what was found first
	pieces int   // of it that are damaged
	cost   string
	hits   []Affected
}

const (
	costFiles   = "These files cannot be read."
	costPack    = "Files of these backups cannot be read; repo check --maps names them."
	costSize    = "Files of these backups cannot be read; repo check --read-data names them."
	costIndex   = "Files can be read without it, and repo check --read-data tells whether they are whole; but no backup can be made that compares with these: use backup --full."
	costIntact  = "Every file was read without it; but no backup can be made that compares with these: use backup --full."
	costNothing = "No backup needs it."
)

// packDamaged keeps what is wrong with a pack as a whole.
func (c *checker) packDamaged(p *checkedPack, err error, cost string) {
	p.broken = true
	c.mu.Lock()
	defer c.mu.Unlock()
	d := &packDamage{err: err, cost: cost}
	if before := c.damages[p.no]; before != nil {
		d.pieces = before.pieces
	}
	c.damages[p.no] = d
	c.r.log.Info("damage found", "error", err)
}

// pieceDamaged keeps what is wrong with a piece, once.
func (c *checker) pieceDamaged(at place, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bad[at] {
		return
	}
	c.bad[at] = true
	d := c.damages[at.pack]
	if d == nil {
		d = &packDamage{err: err, cost: costNothing}
		c.damages[at.pack] = d
	}
	d.pieces++
	c.r.log.Info("damage found", "error", err)
}

// checkPacks compares the pack lists with one listing of the packs, and verifies each pack's header and table of contents.
func (c *checker) checkPacks(ctx context.Context) error {
	if err := c.listPacks(ctx); err != nil {
		return err
	}
	c.done.Packs = len(c.packs)
	var done, total int64
	packs := c.packsByNo()
	for _, p := range packs {
		total += int64(p.size.toc)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for _, p := range packs {
		c.progress("check packs", done, total)
		done += int64(p.size.toc)
		g.Go(func() error { return c.checkPack(gctx, p) })
	}
	return g.Wait()
}

// listPacks finds out which packs are there, and how large.
func (c *checker) listPacks(ctx context.Context) error {
	c.unlisted = map[PackID]int64{}
	for o, err := range c.r.store.List(ctx, packsRoot) {
		if err != nil {
			return fmt.Errorf("list %s: %w", packsRoot, err)
		}
		id, ok := packOfKey(o.Key)
		if !ok {
			continue // nobody reads it
		}
		if p := c.packs[id]; p != nil {
			p.stored = o.Size
		} else {
			c.unlisted[id] = o.Size
		}
	}
	return nil
}

// packsRoot begins the keys of all packs.
const packsRoot = "packs/"

func packOfKey(key string) (id PackID, ok bool) {
	err := id.UnmarshalText([]byte(key[strings.LastIndexByte(key, '/')+1:]))
	return id, err == nil && id.key() == key
}

func (c *checker) packsByNo() []*checkedPack {
	return slices.SortedFunc(maps.Values(c.packs), func(a, b *checkedPack) int { return cmp.Compare(a.no, b.no) })
}

// checkPack looks at what tells of a pack without its pieces.
func (c *checker) checkPack(ctx context.Context, p *checkedPack) error {
	if p.stored < 0 {
		c.packDamaged(p, corrupt(p.id.key(), "it is missing"), costPack)
		return nil
	}
	if p.stored != int64(p.size.size) {
		c.packDamaged(p, corrupt(p.id.key(), "it has %d bytes instead of %d", p.stored, p.size.size), costSize)
		return nil
	}
	err := c.checkPackHeader(ctx, p)
	if err == nil && c.o.Maps {
		_, err = c.toc(ctx, p)
	} else if err == nil { // nobody asks for it again
		_, err = c.readTOC(ctx, p)
	}
	if err != nil {
		c.packDamaged(p, err, costIndex)
	}
	return unanswered(ctx, err)
}

func (c *checker) checkPackHeader(ctx context.Context, p *checkedPack) error {
	b, err := c.r.getPack(ctx, p.id, 0, packHeaderSize)
	if err != nil {
		return err
	}
	salt, err := c.r.seals.checkHeader(p.id.key(), b, kindPack)
	if err != nil {
		return err
	}
	if !slices.Contains([]byte{classData, classHot, classMeta}, b[8]) || [7]byte(b[9:16]) != [7]byte{} || PackID(salt) != p.id {
		return corrupt(p.id.key(), "its header is another pack's, or none")
	}
	return nil
}

// toc returns a pack's table of contents, without page digests.
func (c *checker) toc(ctx context.Context, p *checkedPack) (*packTOC, error) {
	return c.tocs.get(p.id, func() (*packTOC, int64, error) {
		t, err := c.readTOC(ctx, p)
		if err != nil {
			return nil, 0, err
		}
		t.digests = nil
		return t, 256 + 25*int64(len(t.kinds)), nil
	})
}

// readTOC reads a pack's table of contents and compares it with the pack's size.
func (c *checker) readTOC(ctx context.Context, p *checkedPack) (*packTOC, error) {
	t, err := c.r.readTOC(ctx, p.id, p.size)
	if err != nil {
		return nil, err
	}
	end, at := uint32(packHeaderSize), p.size.size-p.size.toc-packTrailerSize
	if len(t.kinds) > 0 {
		end = t.offsets[len(t.kinds)]
	}
	if end != at {
		return nil, corrupt(p.id.key(), "its pieces end at %d, its table of contents begins at %d", end, at)
	}
	return t, nil
}

// pack returns a pack that a tree or map refers to. One that no pack list names is looked at now.
func (c *checker) pack(ctx context.Context, id PackID) (*checkedPack, error) {
	if p := c.knownPack(id); p != nil {
		return p, nil
	}
	c.meeting.Lock()
	defer c.meeting.Unlock()
	if p := c.knownPack(id); p != nil {
		return p, nil
	}
	p := &checkedPack{id: id, no: uint32(len(c.packs)), stored: -1}
	err := c.measure(ctx, p)
	if err == nil {
		err = c.checkPack(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packs[id] = p
	return p, nil
}

func (c *checker) knownPack(id PackID) *checkedPack {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.packs[id]
}

// measure takes the sizes of a pack from the listing and from its trailer.
func (c *checker) measure(ctx context.Context, p *checkedPack) error {
	size, ok := c.unlisted[p.id]
	if !ok || size > maxPackSize {
		return nil
	}
	p.stored, p.size.size = size, uint32(size)
	b, err := c.r.getPack(ctx, p.id, max(0, size-packTrailerSize), min(size, packTrailerSize))
	if err == nil && len(b) == packTrailerSize {
		p.size.toc = binary.LittleEndian.Uint32(b[4:])
	}
	return unanswered(ctx, err)
}

// locate compares a reference with its pack: a piece of that kind, length and ID lies there. size is that of its content,
// the most there can be where the pack's table of contents cannot be believed. errKnown: the pack itself is not there.
func (c *checker) locate(ctx context.Context, ref Ref, kind byte) (at place, size uint32, err error) {
	p, err := c.pack(ctx, ref.Pack)
	if err != nil {
		return at, 0, err
	}
	at = place{p.no, ref.Offset}
	switch {
	case p.stored < 0:
		return at, 0, errKnown
	case int64(ref.Offset)+int64(ref.Length) > p.stored:
		return at, 0, ref.corrupt("the pack ends before")
	case p.broken:
		return at, ChunkSize, nil
	}
	toc, err := c.toc(ctx, p)
	if err != nil {
		return at, 0, err
	}
	i, ok := toc.find(ref.Offset)
	if !ok || toc.kinds[i] != kind || toc.offsets[i+1] != ref.end() || toc.ids[i] != ref.ID {
		return at, 0, ref.corrupt("the pack's table of contents does not have the piece that is referred to")
	}
	return at, toc.sizes[i], nil
}

// errKnown says that what is wrong is reported for the pack as a whole.
var errKnown = errors.New("its pack is missing")

// reportPacks reports what is wrong with packs, now that it is known who is hit.
func (c *checker) reportPacks(ctx context.Context) error {
	users, err := c.packUsers(ctx)
	for _, p := range c.packsByNo() {
		d := c.damages[p.no]
		if d == nil {
			continue
		}
		switch {
		case len(d.hits) > 0:
			d.cost = costFiles
		case d.cost != costNothing || c.maps == nil || !c.maps.blamed:
			d.hits = users[p.id]
		}
		if d.cost == costNothing && len(d.hits) > 0 {
			d.cost = costSize // the check broke off before it was known which
		}
		if d.pieces == 0 && p.stored >= 0 && c.allRead {
			d.cost = costIntact
		}
		c.report(Finding{Object: p.id.key(), Err: d.summary(), Cost: d.cost, Backups: d.hits})
	}
	return err
}

// summary is what was found first, and how much more there is.
func (d *packDamage) summary() error {
	if d.pieces > 1 {
		return fmt.Errorf("%w; %d of its pieces are damaged", d.err, d.pieces)
	}
	return d.err
}

// packUsers finds the backups whose pack lists name the packs that are damaged. It reads the lists again, so that who uses
// which pack need not be kept for all.
func (c *checker) packUsers(ctx context.Context) (map[PackID][]Affected, error) {
	users := map[PackID][]Affected{}
	for _, p := range c.packs {
		if c.damages[p.no] != nil {
			users[p.id] = nil
		}
	}
	if len(users) == 0 {
		return users, nil
	}
	for _, cl := range c.clusters {
		for _, m := range cl.withImages() {
			uses, err := c.r.packList(ctx, m)
			if unanswered(ctx, err) != nil {
				return users, err
			}
			for _, u := range uses {
				if _, ok := users[u.pack]; ok {
					users[u.pack] = append(users[u.pack], Affected{Cluster: m.Cluster, Backup: m.ID})
				}
			}
		}
	}
	return users, nil
}
