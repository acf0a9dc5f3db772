package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// Memory is what a host remembers of repositories. A store that serves an old state, or another repository in the place of
// the one that was there, can be told only by who has seen better. Its methods do not fail: what is forgotten makes less
// noticeable, and nothing else. Safe for concurrent use.
type Memory interface {
	At(url string) (id string)                     // of the repository that is known at a URL; "": none
	Settle(url, id string)                         // makes it that one
	Seen(url, id string) Seen                      // of a repository, where it lies: a copy elsewhere may be behind
	Update(url, id string, change func(seen Seen)) // changes that in one step
}

// Seen is the newest that was seen of each of a repository's clusters, by name.
type Seen map[string]*SeenCluster

// SeenCluster is the newest that was seen of a cluster.
type SeenCluster struct {
	Backup string                 `json:"backup,omitempty"` // its id
	WAL    map[pg.Timeline]string `json:"wal,omitempty"`    // names of whole or partial segments
}

// RollbackError says what a repository lacks that this host has seen, and has nothing newer instead. Its errors.Is is
// ErrRolledBack.
type RollbackError struct {
	Cluster string // "": all of them
	Object  string // key of what is gone
	Detail  string
}

func (e *RollbackError) Error() string { return e.Detail }

// Is makes every RollbackError an ErrRolledBack.
func (e *RollbackError) Is(target error) bool { return target == ErrRolledBack }

// newer tells whether a WAL file lies behind another of its timeline. A partial segment counts as its segment.
func newer(name, than string) bool {
	return strings.TrimSuffix(name, partialSuffix) > strings.TrimSuffix(than, partialSuffix)
}

const partialSuffix = ".partial"

func (s Seen) cluster(name string) *SeenCluster {
	if s[name] == nil {
		s[name] = &SeenCluster{}
	}
	if s[name].WAL == nil {
		s[name].WAL = map[pg.Timeline]string{}
	}
	return s[name]
}

// note takes in the key of an object that is there, and tells whether it is the newest of its kind.
func (s Seen) note(key string) bool {
	switch {
	case strings.HasPrefix(key, backupsRoot):
		cluster, name, _ := strings.Cut(key[len(backupsRoot):], "/")
		id, ok := strings.CutSuffix(name, manifestSuffix)
		if !ok || !backupID.MatchString(id) || ValidClusterName(cluster) != nil || id <= s.cluster(cluster).Backup {
			return false
		}
		s[cluster].Backup = id
		return true
	case strings.HasPrefix(key, walRoot):
		cluster, name, err := parseWALKey(key)
		if err != nil || name.Kind != pg.WALSegment && name.Kind != pg.WALPartial || ValidClusterName(cluster) != nil {
			return false
		}
		c, base := s.cluster(cluster), name.String()
		if c.WAL[name.Timeline] != "" && !newer(base, c.WAL[name.Timeline]) {
			return false
		}
		c.WAL[name.Timeline] = base
		return true
	}
	return false
}

// Merge takes in what is newer in another, and nothing that cannot have been seen.
func (s Seen) Merge(other Seen) {
	for cluster, o := range other {
		if o == nil {
			continue
		}
		if o.Backup != "" {
			s.note(manifestKey(cluster, o.Backup))
		}
		for tli, name := range o.WAL {
			s.note(walRoot + cluster + "/" + tli.Hex() + "/" + name)
		}
	}
}

// witness notes in a Memory what is put and listed. It is between a Repository and its store, so that nothing has to
// think of it.
type witness struct {
	store.Store
	memory Memory
	r      *Repository // whose URL and, once that is known, ID it is

	mu   sync.Mutex
	seen Seen // by this process
	told bool // memory has all of it
}

func (w *witness) Put(ctx context.Context, key string, body []byte) error {
	err := w.Store.Put(ctx, key, body)
	if err == nil || errors.Is(err, store.ErrExist) {
		w.note(key)
		w.tell()
	}
	return err
}

func (w *witness) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		defer w.tell()
		for o, err := range w.Store.List(ctx, prefix) {
			if err == nil {
				w.note(o.Key)
			}
			if !yield(o, err) {
				return
			}
		}
	}
}

func (w *witness) note(key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seen.note(key) {
		w.told = false
	}
}

// tell hands on what is new. mu is held meanwhile: who comes later has something newer to tell.
func (w *witness) tell() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.told {
		w.memory.Update(w.r.url, w.r.ID(), func(s Seen) { s.Merge(w.seen) })
		w.told = true
	}
}

// recall is all that this host and this process have seen.
func (w *witness) recall() Seen {
	s := Seen{}
	s.Merge(w.memory.Seen(w.r.url, w.r.ID()))
	w.mu.Lock()
	defer w.mu.Unlock()
	s.Merge(w.seen)
	return s
}

// forget changes what is remembered, without taking in what this process has seen before.
func (w *witness) forget(change func(Seen)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.memory.Update(w.r.url, w.r.ID(), change)
	change(w.seen)
	w.told = true
}

func (w *witness) Close() error {
	if c, ok := w.Store.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// remember puts a witness before the store.
func (r *Repository) remember(m Memory) {
	if m == nil {
		return
	}
	r.witness = &witness{Store: r.store, memory: m, r: r, seen: Seen{}, told: true}
	r.store = r.witness
}

// medium is the store itself.
func (r *Repository) medium() store.Store {
	if r.witness != nil {
		return r.witness.Store
	}
	return r.store
}

// recognise compares the repository with the one that is known at its URL. The first there is known from then on.
func (r *Repository) recognise() {
	if r.witness == nil {
		return
	}
	switch known := r.witness.memory.At(r.url); known {
	case r.ID():
	case "":
		r.witness.memory.Settle(r.url, r.ID())
	default:
		r.replaced = &RollbackError{Object: configKey,
			Detail: fmt.Sprintf("another repository is at %s than this host has seen there: %s instead of %s", r.url, r.ID(), known)}
	}
}

// Replaced is the *RollbackError of a repository that lies where this host has seen another one; nil if it does not.
func (r *Repository) Replaced() error {
	if r.replaced == nil {
		return nil
	}
	return r.replaced
}

// Losses compares the repository with what this host has seen of it: all clusters, or those that are named. Where nothing is gone
// that costs a request for each cluster and one for each of its timelines. Nothing is lost where retention may have
// deleted it: that leaves the newest backup of each cluster, and all WAL from its start on.
func (r *Repository) Losses(ctx context.Context, clusters ...string) ([]*RollbackError, error) {
	if r.witness == nil {
		return nil, nil
	}
	var lost []*RollbackError
	if r.replaced != nil {
		lost = append(lost, r.replaced)
	}
	seen := r.witness.recall()
	for _, name := range slices.Sorted(maps.Keys(seen)) {
		if len(clusters) > 0 && !slices.Contains(clusters, name) {
			continue
		}
		ofCluster, err := r.clusterLosses(ctx, name, seen[name])
		if err != nil {
			return nil, fmt.Errorf("compare with what this host has seen: %w", err)
		}
		lost = append(lost, ofCluster...)
	}
	return lost, nil
}

func (r *Repository) clusterLosses(ctx context.Context, cluster string, seen *SeenCluster) (lost []*RollbackError, err error) {
	e, err := r.lostBackup(ctx, cluster, seen.Backup)
	if err != nil {
		return nil, err
	}
	if e != nil {
		lost = append(lost, e)
	}
	for _, tli := range slices.Sorted(maps.Keys(seen.WAL)) {
		e, err := r.lostWAL(ctx, cluster, tli, seen.WAL[tli])
		if err != nil {
			return nil, err
		}
		if e != nil {
			lost = append(lost, e)
		}
	}
	return lost, nil
}

// lostBackup returns nil if the backup, or a newer one, is there. The object itself is asked for: a listing may be behind.
func (r *Repository) lostBackup(ctx context.Context, cluster, id string) (*RollbackError, error) {
	if id == "" {
		return nil, nil
	}
	if there, err := r.exists(ctx, manifestKey(cluster, id)); there || err != nil {
		return nil, err
	}
	ids, err := r.BackupIDs(ctx, cluster)
	if err != nil || len(ids) > 0 && ids[len(ids)-1] > id {
		return nil, err
	}
	if deleted, err := r.wasDeleted(ctx, cluster, id); deleted || err != nil {
		return nil, err
	}
	now := "there is none now"
	if len(ids) > 0 {
		now = "the newest is " + ids[len(ids)-1] + " now"
	}
	return &RollbackError{cluster, manifestKey(cluster, id),
		fmt.Sprintf("%v: it had backup %s of %s, and %s", ErrRolledBack, id, cluster, now)}, nil
}

// wasDeleted tells whether a prune has deleted a backup: the mark that says so stays for good. The backup is forgotten then.
func (r *Repository) wasDeleted(ctx context.Context, cluster, id string) (bool, error) {
	d, err := r.deletion(ctx, BackupName{cluster, id})
	if errors.Is(err, store.ErrNotExist) {
		return false, nil
	}
	if err != nil || d.ID != id || d.Cluster != cluster {
		return false, err
	}
	r.witness.forget(func(s Seen) {
		if c := s.cluster(cluster); c.Backup == id {
			c.Backup = ""
		}
	})
	return true, nil
}

// lostWAL returns nil if a WAL file, or a newer one of its timeline, is there, or retention may have deleted it.
func (r *Repository) lostWAL(ctx context.Context, cluster string, tli pg.Timeline, name string) (*RollbackError, error) {
	dir := walPrefix(cluster) + tli.Hex() + "/"
	for _, key := range []string{dir + name, damagedKey(dir + name)} { // that it was damaged and is gone, is known
		if there, err := r.exists(ctx, key); there || err != nil {
			return nil, err
		}
	}
	newest, err := r.newestWAL(ctx, cluster, tli)
	if err != nil || newest != "" && !newer(name, newest) {
		return nil, err
	}
	if expired, err := r.mayHaveExpired(ctx, cluster, tli, name); expired || err != nil {
		return nil, err
	}
	now := "it has none of that timeline now"
	if newest != "" {
		now = "it ends with " + newest + " now"
	}
	return &RollbackError{cluster, dir + name, fmt.Sprintf("%v: it had WAL of %s up to %s, and %s", ErrRolledBack, cluster, name, now)}, nil
}

// newestWAL is the newest whole or partial segment of a timeline that is listed; "" if there is none.
func (r *Repository) newestWAL(ctx context.Context, cluster string, tli pg.Timeline) (string, error) {
	listed := Seen{}
	for o, err := range r.store.List(ctx, walPrefix(cluster)+tli.Hex()+"/") {
		if err != nil {
			return "", fmt.Errorf("list WAL of %s: %w", cluster, err)
		}
		listed.note(o.Key)
	}
	return listed.cluster(cluster).WAL[tli], nil
}

// mayHaveExpired tells whether no backup needs a WAL file any more: the newest one begins behind it, or on a later
// timeline. The file is forgotten then.
func (r *Repository) mayHaveExpired(ctx context.Context, cluster string, tli pg.Timeline, name string) (bool, error) {
	ids, err := r.BackupIDs(ctx, cluster)
	if err != nil || len(ids) == 0 {
		return false, err
	}
	m, err := r.readManifest(ctx, cluster, ids[len(ids)-1])
	if errors.Is(err, ErrCorrupt) {
		return false, nil // it says nothing
	}
	if err != nil {
		return false, err
	}
	// Behind the eight digits of the timeline, names of segments sort by place.
	if m.Timeline <= tli && (len(m.WALFirst) <= 8 || m.WALFirst[8:] <= name[8:]) {
		return false, nil
	}
	r.witness.forget(func(s Seen) {
		if c := s.cluster(cluster); c.WAL[tli] == name {
			delete(c.WAL, tli)
		}
	})
	return true, nil
}

// UnlistedWAL are the newest WAL files that this host has seen of the cluster's timelines, as far as listed has nothing that
// new: the repository has lost them (ErrRolledBack), or its listing is behind. What retention may have deleted is not among them.
func (r *Repository) UnlistedWAL(ctx context.Context, cluster string, listed []pg.WALName) (map[pg.WALName]error, error) {
	if r.witness == nil {
		return nil, nil
	}
	now := Seen{}
	for _, n := range listed {
		now.note(walKey(cluster, n))
	}
	unlisted := map[pg.WALName]error{}
	for tli, name := range r.witness.recall().cluster(cluster).WAL {
		if newest := now.cluster(cluster).WAL[tli]; newest != "" && !newer(name, newest) {
			continue
		}
		n, err := pg.ParseWALName(name)
		if err != nil {
			return nil, err
		}
		there, err := r.exists(ctx, walKey(cluster, n))
		if err != nil {
			return nil, err
		}
		if there {
			unlisted[n] = fmt.Errorf("%s is in the repository, but is not listed", name)
			continue
		}
		lost, err := r.lostWAL(ctx, cluster, tli, name)
		if err != nil {
			return nil, err
		}
		if lost != nil {
			unlisted[n] = lost
		}
	}
	return unlisted, nil
}

// Accept makes what the repository holds now the newest that this host has seen of it, and it the repository at its URL. It
// returns what is given up with that.
func (r *Repository) Accept(ctx context.Context) ([]*RollbackError, error) {
	lost, err := r.Losses(ctx)
	if err != nil || r.witness == nil {
		return nil, err
	}
	now := Seen{}
	for _, prefix := range []string{backupsRoot, walRoot} {
		for o, err := range r.store.List(ctx, prefix) {
			if err != nil {
				return nil, fmt.Errorf("list %s: %w", prefix, err)
			}
			now.note(o.Key)
		}
	}
	r.witness.forget(func(s Seen) {
		clear(s)
		s.Merge(now)
	})
	r.witness.memory.Settle(r.url, r.ID())
	r.replaced = nil
	return lost, nil
}
