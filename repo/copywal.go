package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/pg"
)

// walCopier copies the WAL of one cluster.
type walCopier struct {
	*clusterCopier
	names []pg.WALName // still to be copied, in order

	tried map[pg.WALName]error // those that this copy has read; guarded by copier.mu
}

// copiedWALBytes bounds the WAL files copied at once, for the sake of memory: each takes some three times its size.
const copiedWALBytes = 64 << 20

// choose lists the WAL files that the destination does not have.
func (w *walCopier) choose(ctx context.Context) error {
	there := map[pg.WALName]bool{}
	for o, err := range w.to.walObjects(ctx, walPrefix(w.cluster.Name)) {
		if err != nil && !errors.Is(err, ErrCorrupt) { // what has no name of a WAL file is nobody's
			return err
		}
		there[o.name] = o.bytes > 0 // else it was damaged, and can come again
	}
	for o, err := range w.from.walObjects(ctx, walPrefix(w.cluster.Name)) {
		switch {
		case err != nil:
			if err := w.leaveOut(NotCopied{Cluster: w.cluster.Name, Err: inSource(ctx, err)}); err != nil {
				return err
			}
		case there[o.name]:
			w.done.WALThere++
		default:
			w.names = append(w.names, o.name)
			w.total += w.size(o.name)
		}
	}
	slices.SortFunc(w.names, compareWAL)
	return nil
}

// size is that of a WAL file as far as its name tells.
func (w *walCopier) size(name pg.WALName) int64 {
	if name.Kind == pg.WALSegment || name.Kind == pg.WALPartial {
		return int64(w.cluster.SegmentSize)
	}
	return 0
}

// upTo copies the WAL files that are not behind the last one; nil: all. Several are read at once, but one is put after the
// other, so that a copy which ends early leaves no gap.
func (w *walCopier) upTo(ctx context.Context, last *pg.WALName) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(int(max(1, min(4, copiedWALBytes/int64(w.cluster.SegmentSize)))))
	turn := make(chan bool, 1) // brings true when the one before is done, and is closed when that failed
	turn <- true
	for len(w.names) > 0 && gctx.Err() == nil && (last == nil || compareWAL(w.names[0], *last) <= 0) {
		name, mine, next := w.names[0], turn, make(chan bool, 1)
		w.names, turn = w.names[1:], next
		g.Go(func() error {
			defer close(next)
			err := w.copyListed(gctx, name, mine)
			if err == nil {
				next <- true
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// copyListed copies a WAL file that was listed, unless that was deleted since, or reports why not.
func (w *walCopier) copyListed(ctx context.Context, name pg.WALName, turn <-chan bool) error {
	n, err := w.copy(ctx, name, turn)
	w.progress(w.size(name))
	if errors.Is(err, ErrNoWAL) {
		return nil
	}
	if err != nil {
		return w.leaveOut(NotCopied{Cluster: w.cluster.Name, WAL: name, Err: err})
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done.WALFiles++
	w.done.WALBytes += n
	return nil
}

// copy copies one WAL file, of so many bytes, when its turn has come; one that is there already is compared. What happened
// is kept, for backups that need the file.
func (w *walCopier) copy(ctx context.Context, name pg.WALName, turn <-chan bool) (int64, error) {
	content, err := w.from.WAL(ctx, w.cluster.Name, name)
	err = inSource(ctx, err)
	if !<-turn {
		<-ctx.Done() // the one before says why
		return 0, context.Cause(ctx)
	}
	if err == nil {
		err = w.to.PutWAL(ctx, w.cluster.Name, name, content)
		if errors.Is(err, ErrWALConflict) {
			err = leftOut{fmt.Errorf("in the destination: %w", err)}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tried[name] = err
	return int64(len(content)), err
}

// ensure makes sure that the destination has a WAL file that a backup needs, with the bytes that it needs.
func (w *walCopier) ensure(ctx context.Context, name pg.WALName) error {
	w.mu.Lock()
	err, tried := w.tried[name]
	w.mu.Unlock()
	if !tried {
		now := make(chan bool, 1)
		now <- true
		_, err = w.copy(ctx, name, now)
	}
	if errors.Is(err, ErrNoWAL) {
		err = leftOut{corrupt(walKey(w.cluster.Name, name), "it is missing")}
	}
	return err
}
