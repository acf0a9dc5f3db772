package repo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// damage is word that an object is damaged, or was and is gone: no new backup refers to such a pack, and such a WAL file is
// not one that was never archived. The key alone says so; what the document adds is for people.
//
// Format: docs/format.md, "Damage".
type damage struct {
	document
	Object     string    `json:"object"` // its key
	Found      string    `json:"found"`  // what is wrong with it, in words
	RecordedAt time.Time `json:"recorded_at"`
}

const (
	damageKind  = "pgthaw damage"
	damagedRoot = "damaged/"
)

func damagedKey(object string) string { return damagedRoot + object }

// recordDamage says that an object is damaged. Said already is as good.
func (r *Repository) recordDamage(ctx context.Context, object string, found error) error {
	d := damage{document: document{damageKind, formatVersion}, Object: object, Found: found.Error(), RecordedAt: time.Now().UTC().Truncate(time.Second)}
	if err := r.putDocument(ctx, damagedKey(object), d); err != nil && !errors.Is(err, store.ErrExist) {
		return fmt.Errorf("record that %s is damaged: %w", object, err)
	}
	return nil
}

// damagedObjects lists the records below a prefix of objects' keys.
func (r *Repository) damagedObjects(ctx context.Context, prefix string) (all []store.Object, err error) {
	for o, err := range r.store.List(ctx, damagedKey(prefix)) {
		if err != nil {
			return nil, fmt.Errorf("list what is known to be damaged: %w", err)
		}
		o.Key = strings.TrimPrefix(o.Key, damagedRoot)
		all = append(all, o)
	}
	return all, nil
}

// unusablePacks are packs that a new backup must not refer to.
type unusablePacks struct {
	mu  sync.Mutex
	ids map[PackID]bool
}

// unusablePacks are those that are known to be damaged. It is one listing.
func (r *Repository) unusablePacks(ctx context.Context) (*unusablePacks, error) {
	u := &unusablePacks{ids: map[PackID]bool{}}
	objects, err := r.damagedObjects(ctx, packsRoot)
	for _, o := range objects {
		if id, ok := packOfKey(o.Key); ok {
			u.ids[id] = true
		}
	}
	return u, err
}

func (u *unusablePacks) has(id PackID) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.ids[id]
}

// add tells whether the pack was not among them.
func (u *unusablePacks) add(id PackID) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	known := u.ids[id]
	u.ids[id] = true
	return !known
}

// walDamage gives the error of a WAL object that is not there: it never was, or it was damaged and is not whole again.
func (r *Repository) walDamage(ctx context.Context, cluster string, name pg.WALName) error {
	key := walKey(cluster, name)
	recorded, err := r.exists(ctx, damagedKey(key))
	switch {
	case err != nil:
		return fmt.Errorf("read WAL file %s: %w", name, err)
	case recorded:
		return corrupt(key, "it was damaged and is gone, and has not been pushed again")
	}
	return fmt.Errorf("%s: %w", name, ErrNoWAL)
}

// RemovedWAL are the WAL files of a cluster that WALNames lists although they are gone: they were damaged, and have not been pushed again.
func (r *Repository) RemovedWAL(ctx context.Context, cluster string) (map[pg.WALName]bool, error) {
	removed := map[pg.WALName]bool{}
	objects, err := r.damagedObjects(ctx, walPrefix(cluster))
	if err != nil {
		return nil, err
	}
	for _, o := range objects {
		there, err := r.exists(ctx, o.Key)
		if err != nil {
			return nil, err
		}
		if _, name, err := parseWALKey(o.Key); err == nil && !there {
			removed[name] = true
		}
	}
	return removed, nil
}

// forgetDamage deletes the records that nobody needs any more: of packs that no backup names, and of WAL files that are there
// again or end before every backup starts.
func (p *pruner) forgetDamage(ctx context.Context, named map[PackID]bool) error {
	objects, err := p.r.damagedObjects(ctx, "")
	if err != nil {
		return err
	}
	for _, o := range objects {
		needed := p.now.Sub(o.Modified) < p.o.Grace // whoever made the record may still be about to act on it
		if id, ok := packOfKey(o.Key); ok && !needed {
			needed = named[id]
		} else if !needed {
			needed, err = p.needsWALRecord(ctx, o.Key)
		}
		if err != nil {
			return err
		}
		if needed || !p.o.Apply {
			continue
		}
		if err := p.r.store.Delete(ctx, damagedKey(o.Key)); err != nil {
			return fmt.Errorf("forget that %s was damaged: %w", o.Key, err)
		}
	}
	return nil
}

// needsWALRecord tells whether somebody may still ask for a WAL file that is recorded as damaged and not there.
func (p *pruner) needsWALRecord(ctx context.Context, key string) (bool, error) {
	cluster, name, err := parseWALKey(key)
	if err != nil {
		return true, nil // nothing of ours
	}
	if found, err := p.r.exists(ctx, key); err != nil || found {
		return false, err
	}
	stored, err := p.r.storedBackups(ctx, backupsPrefix(cluster))
	if err != nil {
		return true, err
	}
	for _, b := range stored {
		if !b.manifest {
			continue
		}
		m, err := p.r.readManifest(ctx, b.Cluster, b.Backup)
		if errors.Is(err, ErrNoBackup) {
			continue // another prune collected it meanwhile
		}
		if err != nil {
			return true, err
		}
		if no, notSegment := name.SegmentNo(m.SegmentSize); notSegment != nil || m.SegmentSize.Start(no+1) > m.StartLSN {
			return true, nil
		}
	}
	return false, nil
}
