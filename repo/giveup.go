package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Abandoned is what GiveUp gives up: something damaged that nothing in the repository determines, and without which prune
// reclaims nothing, for what it protects is not known.
type Abandoned struct {
	Object string     // key
	Err    error      // what is wrong with it
	Backup BackupName // of which it is the manifest; zero: it is a session's
	Last   time.Time  // the session's last sign of life
}

// ErrNotDamaged: what can be read is not given up. Retention decides about backups, prune about sessions.
var ErrNotDamaged = errors.New("it is not damaged")

const giveUpOperation = "give up"

// GiveUp gives up a backup, by the key of its manifest, or a session, by that of its object, if that was found damaged twice: not if
// it can be read, and not if the store does not answer. A backup is marked as deleted, and a prune collects it after the grace period: that takes
// from no other backup what it needs. A session's object is deleted, if for as long as a prune waits there was no sign of life. Without
// apply nothing is changed.
//
// Why that is safe: docs/format.md, "Giving up".
func (r *Repository) GiveUp(ctx context.Context, key string, apply bool) (Abandoned, error) {
	p := &pruner{r: r, o: PruneOptions{Grace: DefaultGrace, Apply: apply}, now: time.Now()}
	if apply {
		s, err := r.begin(ctx, SessionInfo{Operation: giveUpOperation})
		if err != nil {
			return Abandoned{}, err
		}
		p.own = s.Info.ID
		defer func() { _ = s.End(context.WithoutCancel(ctx)) }() // what is left of it a prune takes away
	}
	if err := p.readClock(ctx); err != nil {
		return Abandoned{}, err
	}
	name, suffix, isBackup := splitBackupKey(key)
	switch session := sessionKey.FindStringSubmatch(key); {
	case isBackup && suffix == manifestSuffix && strings.HasPrefix(key, backupsRoot):
		return p.giveUpBackup(ctx, name)
	case session != nil:
		return p.giveUpDamagedSession(ctx, key, session[1])
	}
	return Abandoned{}, fmt.Errorf("%s: %w: neither a manifest nor a session", key, ErrNotDamaged)
}

// damagedTwice reads twice what is to be given up: the store, or a memory, may have erred. It returns the damage, or why it is none.
func damagedTwice(key string, read func() error) (damage, err error) {
	for range 2 {
		damage = read()
		switch {
		case damage == nil:
			return nil, fmt.Errorf("%s: %w", key, ErrNotDamaged)
		case !errors.Is(damage, ErrCorrupt):
			return nil, damage
		}
	}
	return damage, nil
}

func (p *pruner) giveUpBackup(ctx context.Context, name BackupName) (Abandoned, error) {
	stored, err := p.r.storedBackups(ctx, backupsPrefix(name.Cluster))
	if err != nil {
		return Abandoned{}, err
	}
	i := slices.IndexFunc(stored, func(b *storedBackup) bool { return b.BackupName == name })
	if i < 0 {
		return Abandoned{}, fmt.Errorf("%s: %w", name, ErrNoBackup)
	}
	if err := p.r.undeleted(ctx, name); err != nil {
		return Abandoned{}, err
	}
	key := manifestKey(name.Cluster, name.Backup)
	damage, err := damagedTwice(key, func() error { return p.manifestDamage(ctx, stored[i]) })
	if err != nil {
		return Abandoned{}, err
	}
	if reason, held, err := p.r.held(ctx, stored[i], p.now); err != nil || held {
		return Abandoned{}, errors.Join(err, errorIf(err == nil, fmt.Errorf("backup %s is held (%s): remove the hold first", name, reason)))
	}
	given := Abandoned{Object: key, Err: damage, Backup: name}
	if !p.o.Apply {
		return given, nil
	}
	return given, p.r.markDeleted(ctx, name, "given up: "+damage.Error())
}

// manifestDamage reads a manifest. One that is not there is damage where prune takes it for that.
func (p *pruner) manifestDamage(ctx context.Context, b *storedBackup) error {
	_, err := p.r.readManifest(ctx, b.Cluster, b.Backup)
	if !errors.Is(err, ErrNoBackup) || !b.packs {
		return err
	}
	lost, lostErr := p.lost(ctx, b)
	if lostErr != nil || !lost {
		return errors.Join(lostErr, errorIf(lostErr == nil, err))
	}
	return corrupt(manifestKey(b.Cluster, b.Backup), "it is missing")
}

// giveUpDamagedSession deletes a session's object. Whoever stands still in it learns that it was given up.
func (p *pruner) giveUpDamagedSession(ctx context.Context, key, id string) (Abandoned, error) {
	given, s := Abandoned{Object: key}, &listedSession{}
	for o, err := range p.r.store.List(ctx, sessionsPrefix+id) {
		if err != nil {
			return given, err
		}
		if match := sessionKey.FindStringSubmatch(o.Key); match != nil {
			s.add(match[2], o.Modified)
		}
	}
	given.Last = s.last
	damage, err := damagedTwice(key, func() error { _, err := p.r.sessionInfo(ctx, key); return err })
	if err != nil {
		return given, err
	}
	given.Err = damage
	if end := s.last.Add(p.o.Grace + sessionLife); p.now.Before(end) {
		return given, fmt.Errorf("%s may be at work: its last sign of life came at %s, and it can be given up from %s on", key, s.last.Local().Format(time.DateTime),
			end.Local().Format(time.DateTime))
	}
	if !p.o.Apply {
		return given, nil
	}
	info := &SessionInfo{document: document{sessionKind, formatVersion}, Operation: giveUpOperation}
	if err := info.ID.UnmarshalText([]byte(id)); err != nil {
		return given, err
	}
	if !strings.HasSuffix(key, givenUpSuffix) {
		err = p.r.putGivenUp(ctx, info)
	}
	if err == nil {
		err = p.r.store.Delete(ctx, key)
	}
	return given, err
}
