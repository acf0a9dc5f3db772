package repo

import (
	"context"
	"sync"

	"golang.org/x/sync/errgroup"
)

// pieceWalk goes through backups from their roots down and gives the place of every piece that they consist of. A tree or
// file map that several of them share is read once; it keeps about 20 bytes for each.
type pieceWalk struct {
	r    *Repository
	give func(kind byte, ref Ref) error // called by several goroutines at once; an error ends the walk

	mu    sync.Mutex // a leaf
	packs map[PackID]uint32
	seen  map[place]bool
}

func newPieceWalk(r *Repository, give func(kind byte, ref Ref) error) *pieceWalk {
	return &pieceWalk{r: r, give: give, packs: map[PackID]uint32{}, seen: map[place]bool{}}
}

// backup goes through a backup.
func (w *pieceWalk) backup(ctx context.Context, b *Backup) error { return w.tree(ctx, b.root()) }

// first tells whether nobody came by a tree or file map before.
func (w *pieceWalk) first(ref Ref) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	no, ok := w.packs[ref.Pack]
	if !ok {
		no = uint32(len(w.packs))
		w.packs[ref.Pack] = no
	}
	at := place{no, ref.Offset}
	seen := w.seen[at]
	w.seen[at] = true
	return !seen
}

func (w *pieceWalk) tree(ctx context.Context, dir Entry) error {
	if !w.first(dir.content.ref) {
		return nil
	}
	if err := w.give(pieceTree, dir.content.ref); err != nil {
		return err
	}
	list, err := w.r.listing(ctx, dir)
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for i := range list.Len() {
		if e := list.At(i); e.content.mapped() && gctx.Err() == nil {
			g.Go(func() error { return w.file(gctx, e) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i := range list.Len() {
		if e := list.At(i); e.IsDir() {
			if err := w.tree(ctx, e); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *pieceWalk) file(ctx context.Context, e Entry) error {
	if e.content.kind == contentMap {
		if !w.first(e.content.ref) {
			return nil
		}
		if err := w.give(pieceMap, e.content.ref); err != nil {
			return err
		}
	}
	m, err := w.r.fileMap(ctx, e)
	if err != nil {
		return err
	}
	for _, ref := range m.chunks {
		if err := w.give(pieceChunk, ref); err != nil {
			return err
		}
	}
	return nil
}
