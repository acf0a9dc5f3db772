package repo

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/store"
)

// checkedPack is a pack that some pack list, or some map, names.
type checkedPack struct {
	id      PackID
	no      uint32      // in the order in which packs were met
	size    packSize    // that it is to have
	stored  int64       // bytes that it, or its edition, has; -1: it is not there
	edition string      // key of the edition that stood for it when it was listed; "": none
	broken  atomic.Bool // it is not there, has another size, or its header or table of contents cannot be believed
	looked  atomic.Bool // header and table of contents were verified
}

// object is the key under which its pieces lie.
func (p *checkedPack) object() string { return cmp.Or(p.edition, p.id.key()) }

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
	costIndex   = "Files can be read without it, and repo check --read-data tells whether they are whole; the next backup stores anew what lies in the pack."
	costIntact  = "Every file was read without it; the next backup stores anew what lies in the pack."
	costNothing = "No backup needs it."
)

// packDamaged keeps what is wrong with a pack as a whole, once.
func (c *checker) packDamaged(p *checkedPack, err error, cost string) {
	if p.broken.Swap(true) {
		return
	}
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

// checkPacks compares the pack lists with one listing of the packs. Of those that were compacted it reads the tables.
func (c *checker) checkPacks(ctx context.Context) error {
	if err := c.listPacks(ctx); err != nil {
		return err
	}
	c.done.Packs = len(c.order)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for _, p := range c.order {
		g.Go(func() error { return c.checkPack(gctx, p) })
	}
	return g.Wait()
}

// checkTOCs verifies the header and table of contents of each pack to which no tree and no map led.
func (c *checker) checkTOCs(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for _, p := range c.order {
		if p.looked.Load() || p.broken.Load() {
			continue
		}
		c.progress("check packs", c.r.ReadBytes(), 0)
		g.Go(func() error { _, err := c.index(gctx, p); return err })
	}
	return g.Wait()
}

// listPacks finds out which packs are there, and how large.
func (c *checker) listPacks(ctx context.Context) error {
	c.unlisted, c.editions = map[PackID]int64{}, map[string]int64{}
	for o, err := range c.r.store.List(ctx, packsRoot) {
		if err != nil {
			return fmt.Errorf("list %s: %w", packsRoot, err)
		}
		id, no, ok := editionOfKey(o.Key)
		switch p := c.packs[id]; {
		case !ok: // nobody reads it
		case no > 0:
			c.editions[o.Key] = o.Size
		case p != nil:
			p.stored = o.Size
		default:
			c.unlisted[id] = o.Size
		}
	}
	return nil
}

// packsRoot begins the keys of all packs.
const packsRoot = "packs/"

// checkPack compares a pack that is there with what the pack lists say, or looks at the edition that stands for it.
func (c *checker) checkPack(ctx context.Context, p *checkedPack) error {
	if p.stored < 0 {
		return c.checkEdition(ctx, p)
	}
	if p.stored != int64(p.size.size) {
		c.packDamaged(p, corrupt(p.id.key(), "it has %d bytes instead of %d", p.stored, p.size.size), costSize)
	}
	return nil
}

// checkEdition looks at what stands for a pack that is not there. Without its table nothing of it can be read.
func (c *checker) checkEdition(ctx context.Context, p *checkedPack) error {
	e, err := c.r.newest(ctx, p.id)
	if err != nil {
		if err := unanswered(ctx, err); err != nil {
			return err
		}
		c.packDamaged(p, err, costPack)
		if object := objectOf(err); object != p.id.key() {
			p.edition = object
		}
		return nil
	}
	p.edition, p.stored = e.key, e.size()
	if size, ok := c.editions[e.key]; ok && size != e.size() {
		c.packDamaged(p, corrupt(e.key, "it has %d bytes instead of %d", size, e.size()), costSize)
	}
	return nil
}

// index returns a pack's table of contents, without page digests. nil: the pack, its header or the table cannot be believed,
// which is kept.
func (c *checker) index(ctx context.Context, p *checkedPack) (*packTOC, error) {
	if p.broken.Load() {
		return nil, nil
	}
	t, err := c.toc(ctx, p)
	if err == nil {
		return t, nil
	}
	if err := unanswered(ctx, err); err != nil {
		return nil, err
	}
	cost := costIndex
	if there, goneErr := c.r.exists(ctx, p.id.key()); goneErr == nil && !there {
		cost = costPack // only the edition tells what lies where
	}
	c.packDamaged(p, err, cost)
	return nil, nil
}

func (c *checker) toc(ctx context.Context, p *checkedPack) (*packTOC, error) {
	return c.tocs.get(p.id, func() (*packTOC, int64, error) {
		if !p.looked.Load() && p.edition == "" {
			b, err := c.r.get(ctx, p.id.key(), 0, packHeaderSize)
			if err == nil {
				err = c.r.checkPackHeader(p.id, b)
			}
			if err != nil && !errors.Is(err, store.ErrNotExist) { // else it was compacted since it was listed
				return nil, 0, err
			}
		}
		t, err := c.readTOC(ctx, p)
		if err != nil {
			return nil, 0, err
		}
		p.looked.Store(true)
		t.digests = nil
		return t, 256 + 25*int64(len(t.kinds)), nil
	})
}

// readTOC reads a pack's table of contents and compares it with the pack's size, or what an edition holds.
func (c *checker) readTOC(ctx context.Context, p *checkedPack) (*packTOC, error) {
	t, err := c.r.readTOC(ctx, p.id, p.size)
	if err != nil || t.edition {
		return t, err
	}
	if end, at := t.end(), p.size.size-p.size.toc-packTrailerSize; end != at {
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
	p := &checkedPack{id: id, no: uint32(len(c.order)), stored: -1}
	err := c.measure(ctx, p)
	if err == nil {
		err = c.checkPack(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(p)
	return p, nil
}

// add enters a pack. Caller holds mu, where others are at work.
func (c *checker) add(p *checkedPack) {
	c.packs[p.id] = p
	c.order = append(c.order, p)
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
	b, err := c.r.get(ctx, p.id.key(), max(0, size-packTrailerSize), min(size, packTrailerSize))
	if errors.Is(err, store.ErrNotExist) { // compacted since it was listed
		p.stored = -1
		return nil
	}
	if err == nil && len(b) == packTrailerSize {
		p.size.toc = binary.LittleEndian.Uint32(b[4:])
	}
	return unanswered(ctx, err)
}

// locator finds pieces. References that follow each other mostly lead to one pack, which it remembers.
type locator struct {
	c   *checker
	p   *checkedPack
	toc *packTOC // of p; nil: it cannot be believed
}

// locate compares a reference with its pack: a piece of that kind, length and ID lies there. size is that of its content,
// the most there can be where the pack's table of contents cannot be believed. errKnown: the pack itself is not there.
func (l *locator) locate(ctx context.Context, ref Ref, kind byte) (at place, size uint32, err error) {
	if l.p == nil || l.p.id != ref.Pack {
		if err := l.turnTo(ctx, ref.Pack); err != nil {
			return at, 0, err
		}
	}
	at = place{l.p.no, ref.Offset}
	switch {
	case l.p.stored < 0:
		return at, 0, errKnown
	case l.p.edition == "" && int64(ref.Offset)+int64(ref.Length) > l.p.stored:
		return at, 0, ref.corrupt("the pack ends before")
	case l.toc == nil:
		return at, ChunkSize, nil
	}
	i, ok := l.toc.find(ref.Offset)
	if !ok || l.toc.kinds[i] != kind || l.toc.lengths[i] != ref.Length || l.toc.ids[i] != ref.ID {
		return at, 0, ref.corrupt("the pack's table of contents does not have the piece that is referred to")
	}
	return at, l.toc.sizes[i], nil
}

func (l *locator) turnTo(ctx context.Context, id PackID) (err error) {
	if l.p, err = l.c.pack(ctx, id); err == nil {
		l.toc, err = l.c.index(ctx, l.p)
	}
	if err != nil {
		l.p = nil
	}
	return err
}

// errKnown says that what is wrong is reported for the pack as a whole.
var errKnown = errors.New("its pack is missing")

// reportPacks reports what is wrong with packs, now that it is known who is hit.
func (c *checker) reportPacks(ctx context.Context) error {
	users, err := c.packUsers(ctx)
	for _, p := range c.order {
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
		c.report(Finding{Object: p.object(), Err: d.summary(), Cost: d.cost, Backups: d.hits})
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
	for _, p := range c.order {
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
