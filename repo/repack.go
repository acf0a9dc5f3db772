package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"pgthaw/repo/store"
)

// Repacked tells what repacking did, or would do. Bytes read and written are what RepackLimit bounds; which pieces are live is
// found in file maps and directories, and these are read once besides.
type Repacked struct {
	Packs   int
	Read    int64 // bytes of packs
	Written int64
	Won     int64 // by which the packs became smaller
	Maps    int   // file maps and directories that were read
	Left    int   // packs that were left because of the limit
}

// repack puts in the place of packs that are mostly dead editions which hold only what is live.
//
// What was dead when the inventory was taken stays dead, whatever goes on meanwhile: docs/format.md, "Sessions and deletion".
func (p *pruner) repack(ctx context.Context) error {
	if p.o.RepackLimit <= 0 || p.inventory == nil {
		return nil
	}
	r := &repacker{pruner: p, packs: p.candidates()}
	if len(r.packs) == 0 {
		return nil
	}
	if err := r.mark(ctx); errors.Is(err, ErrDeleted) { // another prune collected it
		return nil
	} else if errors.Is(err, ErrCorrupt) {
		p.report.Unrepacked = err
		return nil
	} else if err != nil {
		return err
	}
	todo := slices.DeleteFunc(r.order(), func(c *candidate) bool { return !c.worth() })
	for n, c := range todo {
		p.o.Progress("repacking packs", int64(n), int64(len(todo)))
		if p.report.Repacked.Read+p.report.Repacked.Written+2*c.bytes > p.o.RepackLimit {
			p.report.Repacked.Left++
			continue
		}
		if err := r.pack(ctx, c); err != nil {
			return fmt.Errorf("repack pack %s: %w", c.id, err)
		}
	}
	return nil
}

// candidate is a pack that is perhaps mostly dead.
type candidate struct {
	*packState
	id    PackID
	live  map[uint32]uint32 // stored lengths of the pieces that backups refer to, by offset; nil: it is not worth it
	bytes int64             // of these
}

// worth tells whether repacking wins half of the pack, or ends what an earlier prune began.
func (c *candidate) worth() bool {
	return len(c.live) > 0 && (2*c.bytes <= c.size || c.older > 0)
}

// candidates are the packs of which no backup by itself needs more than half, the most dead first, as many as the limit lets
// through, and those with several editions. Who writes them is done, and listings show them as they are.
func (p *pruner) candidates() map[PackID]*candidate {
	var all []*candidate
	for id, s := range p.inventory.packs {
		settled := !p.inventory.sessions[id.by()] && p.now.Sub(s.modified) >= p.o.Grace && s.newest() < maxEditions
		if settled && (s.used || s.waits) && (s.older > 0 || 2*int64(s.live) <= s.size) {
			all = append(all, &candidate{packState: s, id: id, live: map[uint32]uint32{}})
		}
	}
	slices.SortFunc(all, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(float64(a.packState.live)/float64(a.size), float64(b.packState.live)/float64(b.size)), a.id.compare(b.id))
	})
	packs := map[PackID]*candidate{}
	var least int64
	for _, c := range all {
		if least += 2 * int64(c.packState.live); least > p.o.RepackLimit {
			p.report.Repacked.Left++
			continue
		}
		packs[c.id] = c
	}
	return packs
}

type repacker struct {
	*pruner
	packs map[PackID]*candidate

	mu sync.Mutex // a leaf: guards the candidates while mark runs
}

// order is the most dead first.
func (r *repacker) order() []*candidate {
	var all []*candidate
	for _, c := range r.packs {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(float64(a.bytes)/float64(a.size), float64(b.bytes)/float64(b.size)), a.id.compare(b.id))
	})
	return all
}

// mark finds out which pieces of the candidates the backups refer to. ErrDeleted: one of them went away meanwhile.
func (r *repacker) mark(ctx context.Context) error {
	walk := newPieceWalk(r.r, r.keep)
	for _, b := range r.inventory.kept {
		err := walk.backup(ctx, r.r.OpenBackup(b.manifest))
		if errors.Is(err, ErrCorrupt) {
			err = cmp.Or(r.r.undeleted(ctx, b.BackupName), err)
		}
		if err != nil {
			return fmt.Errorf("nothing was repacked, for what backup %s needs is not known: %w", b.BackupName, err)
		}
	}
	return nil
}

func (r *repacker) keep(kind byte, ref Ref) error {
	c := r.packs[ref.Pack]
	if c == nil && kind == pieceChunk {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if kind != pieceChunk {
		r.report.Repacked.Maps++
		r.o.Progress("reading file maps", int64(r.report.Repacked.Maps), 0)
	}
	if c == nil {
		return nil
	}
	if _, known := c.live[ref.Offset]; known || c.live == nil {
		return nil
	}
	c.live[ref.Offset] = ref.Length
	c.bytes += int64(ref.Length)
	if !c.worth() {
		c.live = nil
	}
	return nil
}

// pack repacks one. What cannot be read as it should be is left as it is: check is to report it.
func (r *repacker) pack(ctx context.Context, c *candidate) error {
	done := Repacked{Packs: 1, Read: c.bytes, Written: c.bytes, Won: c.size + c.older - c.bytes}
	if r.o.Apply {
		edition, read, err := r.edition(ctx, c)
		if errors.Is(err, ErrCorrupt) {
			r.r.log.Warn("a pack is left as it is", "error", err)
			return nil
		}
		if err == nil {
			err = r.replace(ctx, c, edition)
		}
		if err != nil {
			return err
		}
		done.Read, done.Written, done.Won = read, int64(len(edition)), c.size+c.older-int64(len(edition))
	}
	sum := &r.report.Repacked
	sum.Packs, sum.Read, sum.Written, sum.Won = sum.Packs+done.Packs, sum.Read+done.Read, sum.Written+done.Written, sum.Won+done.Won
	return nil
}

// replace puts the edition, and then deletes what is older. Somebody else may have put one of that number: it holds all
// that is live, too.
func (r *repacker) replace(ctx context.Context, c *candidate, edition []byte) error {
	err := r.r.store.Put(ctx, c.id.editionKey(c.newest()+1), edition)
	if err != nil && !errors.Is(err, store.ErrExist) {
		return err
	}
	return r.deletePack(ctx, c.id, c.keys(c.id))
}

// edition makes the next edition of a pack, from pieces that were verified.
func (r *repacker) edition(ctx context.Context, c *candidate) (edition []byte, read int64, err error) {
	before := r.r.ReadBytes()
	class, err := r.r.packClass(ctx, c.id)
	if err != nil {
		return nil, 0, err
	}
	toc, err := r.r.readTOC(ctx, c.id, c.stated)
	if err != nil {
		return nil, 0, err
	}
	left, err := c.left(toc)
	if err != nil {
		return nil, 0, err
	}
	pieces, err := r.pieces(ctx, c, left)
	if err != nil {
		return nil, 0, err
	}
	return r.r.encodeEdition(c.id, c.newest()+1, class, left, pieces), r.r.ReadBytes() - before, nil
}

// left is what the table says of the live pieces.
func (c *candidate) left(toc *packTOC) (*packTOC, error) {
	left := &packTOC{}
	for i, offset := range toc.offsets {
		if length, ok := c.live[offset]; ok && length == toc.lengths[i] {
			left.addAt(offset, toc.kinds[i], length, toc.sizes[i], toc.ids[i], toc.digests[i])
		}
	}
	if len(left.offsets) != len(c.live) {
		return nil, corrupt(c.id.key(), "its table of contents has %d of %d pieces that backups refer to", len(left.offsets), len(c.live))
	}
	return left, nil
}

// pieces reads and verifies the pieces that a table names, neighbours together.
func (r *repacker) pieces(ctx context.Context, c *candidate, toc *packTOC) ([]byte, error) {
	pieces := make([]byte, 0, c.bytes)
	var refs []Ref
	for i := range toc.offsets {
		refs = append(refs, toc.ref(c.id, i))
	}
	for i := 0; i < len(refs); {
		n := neighbours(slices.Values(refs[i:]))
		first, last := refs[i], refs[i+n-1]
		b, err := r.r.getPack(ctx, c.id, int64(first.Offset), int64(last.end()-first.Offset))
		if err != nil {
			return nil, err
		}
		pieces = append(pieces, b...)
		for ; n > 0; i, n = i+1, n-1 { // verifying is done in place
			if err := r.r.verify(toc.kinds[i], refs[i], b[refs[i].Offset-first.Offset:][:refs[i].Length]); err != nil {
				return nil, err
			}
		}
	}
	return pieces, nil
}

// verify opens a piece in place and compares its content with its ID.
func (r *Repository) verify(kind byte, ref Ref, sealed []byte) error {
	if kind != pieceChunk {
		_, err := r.pieceContent(ref, sealed)
		return err
	}
	room := r.codec.room()
	defer r.codec.giveBack(room)
	_, err := r.decodeChunk(ref, sealed, (*room)[:0])
	return err
}
