package repo

import (
	"context"
	"errors"
)

// proven tells whether the configuration is this repository's. In a repository that is not encrypted nothing vouches for it, and with another
// one's digest key everything looks damaged, to be removed. So before that, one object at least has to have its digest.
func (k *repairer) proven(ctx context.Context) (bool, error) {
	if k.r.seals.master != nil || k.isProven { // who has the master key has authenticated it
		return true, nil
	}
	for _, some := range []func(context.Context) (bool, error){k.somePackList, k.someWAL, k.somePack} {
		if ok, err := some(ctx); ok || err != nil {
			k.isProven = ok
			return ok, err
		}
	}
	return false, nil
}

// proofs bounds how many objects of a kind are asked.
const proofs = 1000

// holds tells whether an object was verified; its error, if that says nothing about it.
func (k *repairer) holds(ctx context.Context, err error) (bool, error) {
	if errors.Is(err, ErrNoBackup) || errors.Is(err, ErrNoWAL) {
		return false, nil
	}
	return err == nil, unanswered(ctx, err)
}

func (k *repairer) somePackList(ctx context.Context) (bool, error) {
	stored, err := k.r.storedBackups(ctx, backupsRoot)
	if err != nil {
		return false, err
	}
	for _, b := range stored[:min(len(stored), proofs)] {
		m, err := k.r.readManifest(ctx, b.Cluster, b.Backup)
		if err == nil {
			_, err = k.r.packList(ctx, m)
		}
		if ok, err := k.holds(ctx, err); ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}

func (k *repairer) someWAL(ctx context.Context) (bool, error) {
	return k.someOf(ctx, walRoot, func(key string) error {
		cluster, name, err := parseWALKey(key)
		if err == nil {
			_, err = k.r.readWALHead(ctx, cluster, name)
		}
		return err
	})
}

func (k *repairer) somePack(ctx context.Context) (bool, error) {
	return k.someOf(ctx, packsRoot, func(key string) error {
		id, ok := packOfKey(key)
		if !ok {
			return corrupt(key, "no pack has this name")
		}
		size, err := k.measure(ctx, id)
		if err == nil {
			_, err = k.r.readTOC(ctx, id, size)
		}
		return err
	})
}

func (k *repairer) someOf(ctx context.Context, prefix string, verify func(key string) error) (bool, error) {
	asked := 0
	for o, err := range k.r.store.List(ctx, prefix) {
		if err != nil {
			return false, err
		}
		if ok, err := k.holds(ctx, verify(o.Key)); ok || err != nil {
			return ok, err
		}
		if asked++; asked == proofs {
			break
		}
	}
	return false, nil
}
