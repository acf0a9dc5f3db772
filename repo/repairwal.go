package repo

import (
	"context"
	"errors"

	"pgthaw/repo/pg"
)

// wal removes a damaged WAL object, so that the file can be pushed again: what is there already is not replaced. First it is
// recorded, for nobody may take the file's absence for the end of WAL.
func (k *repairer) wal(ctx context.Context, m *Remedy) error {
	cluster, name, err := parseWALKey(m.Object)
	if err != nil {
		m.Next = nextOdd
		return nil
	}
	m.Next = nextWAL
	if name.Kind == pg.WALHistory {
		m.Next = nextHistory
	}
	there, err := k.r.exists(ctx, m.Object)
	if err != nil || !there {
		if m.Recorded = err == nil && !there && m.Recorded; m.Recorded {
			m.Outcome = Removed
		}
		return err
	}
	whole := func() error { _, err := k.r.WAL(ctx, cluster, name); return err }
	switch err := whole(); {
	case err == nil:
		m.Next = nextAgain // such as a segment that cannot be, by its number
		return nil
	case !errors.Is(err, ErrCorrupt):
		m.Next = nextMedium
		return unanswered(ctx, err)
	}
	ok, err := k.proven(ctx)
	if !ok || err != nil {
		m.Next = nextForeign
		return err
	}
	if err := k.alone(ctx); err != nil {
		return err
	}
	if err := k.r.recordDamage(ctx, m.Object, m.Err); err != nil {
		return err
	}
	if err := k.remove(ctx, m.Object, whole); err != nil {
		return err
	}
	m.Outcome = Removed
	return nil
}
