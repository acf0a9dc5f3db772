package repo

import (
	"context"
	"errors"
	"iter"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/store"
)

// pruneStep is a step of a prune, by the operation that begins it.
type pruneStep struct{ name, kind, prefix, suffix string }

const (
	beforeAll     = "begins"
	listsPacks    = "lists the packs"
	plansWAL      = "plans"
	putsFloors    = "puts the floors"
	listsSessions = "lists the sessions"
	listsBackups  = "lists the backups"
	deletesWAL    = "deletes WAL"
)

// Steps of docs/format.md.
var (
	stepsP4 = []pruneStep{{listsPacks, opList, packsRoot, ""}, {listsSessions, opList, sessionsPrefix, ""}, {listsBackups, opList, backupsRoot, ""}}
	stepsP8 = []pruneStep{{plansWAL, opList, walPrefix("main"), ""}, {putsFloors, opPut, sessionsPrefix, begunSuffix}, {listsSessions, opList, sessionsPrefix, ""},
		{deletesWAL, opDelete, walRoot, ""}}
)

// steppedStore is the store as a prune has it, and says before which of its next steps it is. Steps may be left out, and listings frozen.
type steppedStore struct {
	store.Store
	steps  []pruneStep
	at     func(step string)
	omit   string                    // a put that is reported done, and is not
	frozen map[string][]store.Object // listings that show no change any more
}

func (s *steppedStore) reach(kind, key string) (omitted bool) {
	if len(s.steps) == 0 || s.steps[0].kind != kind || !strings.HasPrefix(key, s.steps[0].prefix) || !strings.HasSuffix(key, s.steps[0].suffix) {
		return false
	}
	name := s.steps[0].name
	s.steps = s.steps[1:]
	s.at(name)
	return name == s.omit
}

func (s *steppedStore) Put(ctx context.Context, key string, body []byte) error {
	sign := strings.HasPrefix(key, sessionsPrefix) && !strings.HasSuffix(key, begunSuffix) // which comes from another goroutine
	if !sign && s.reach(opPut, key) {
		return nil
	}
	return s.Store.Put(ctx, key, body)
}

func (s *steppedStore) Delete(ctx context.Context, key string) error {
	s.reach(opDelete, key)
	return s.Store.Delete(ctx, key)
}

func (s *steppedStore) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	s.reach(opList, prefix)
	if page, frozen := s.frozen[prefix]; frozen {
		return pageOf(page)
	}
	return s.Store.List(ctx, prefix)
}

func pageOf(page []store.Object) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		for _, o := range page {
			if !yield(o, nil) {
				return
			}
		}
	}
}

func (s *steppedStore) freeze(t *testing.T, prefix string) {
	s.frozen = map[string][]store.Object{prefix: {}}
	for o, err := range s.Store.List(t.Context(), prefix) {
		if err != nil {
			t.Error(err)
		}
		s.frozen[prefix] = append(s.frozen[prefix], o)
	}
}

// deafStore has no session in its listings.
type deafStore struct{ store.Store }

func (s deafStore) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	if prefix == sessionsPrefix {
		return pageOf(nil)
	}
	return s.Store.List(ctx, prefix)
}

// slowStore waits before a manifest, or another object of that suffix, is put.
type slowStore struct {
	store.Store
	suffix string
	goOn   chan struct{}
}

func (s slowStore) Put(ctx context.Context, key string, body []byte) error {
	if strings.HasSuffix(key, s.suffix) {
		<-s.goOn
	}
	return s.Store.Put(ctx, key, body)
}

// pruneRace is a backup beside a prune, both as docs/format.md says, and with one thing other than that. The backup is a standby's, and all its WAL
// lies in segment 9, which no other backup needs.
type pruneRace struct {
	name      string
	steps     []pruneStep
	begins    string // the prune's step before which the backup is made, but for its manifest
	publishes string // that before which the manifest is put, and where the prune then stands still until the session is gone; "": behind the prune

	early, freezes string // a step before which a listing is taken that belongs behind it
	omit           string // a step
	deaf           bool   // the backup does not look for floors
}

var pruneRaces = []pruneRace{
	{name: "P4, the backups before the sessions", steps: stepsP4, begins: beforeAll, publishes: listsSessions, early: listsSessions, freezes: backupsRoot},
	{name: "P8 without the floors", steps: stepsP8, begins: deletesWAL, publishes: deletesWAL, omit: putsFloors},
	{name: "P8, the sessions before the floors", steps: stepsP8, begins: putsFloors, early: plansWAL, freezes: sessionsPrefix},
	{name: "P8, the backups before the sessions", steps: stepsP8, begins: putsFloors, publishes: listsSessions, early: listsSessions, freezes: backupsPrefix("main")},
	{name: "W4 without the floors", steps: stepsP8, begins: deletesWAL, publishes: deletesWAL, deaf: true},
}

// TestPruneNeedsItsOrder: with one step of P4, P8 or W4 left out, or in another place, a backup is made that is not whole, or whose WAL is
// gone. As they are, none is.
func TestPruneNeedsItsOrder(t *testing.T) {
	for _, race := range pruneRaces {
		for _, wrong := range []bool{true, false} {
			t.Run(race.name+map[bool]string{false: ", not"}[wrong], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					if damage := race.run(t, wrong); (damage != nil) != wrong {
						t.Error(damage)
					}
				})
			})
		}
	}
}

// run returns what is wrong with the backup, if it was made.
func (race pruneRace) run(t *testing.T, wrong bool) (damage error) {
	r := newWALRepository(t)
	defer r.Close()
	daily(t, r)
	o := PruneOptions{Policy: Policy{Last: 2}, Grace: DefaultGrace, Apply: true}
	if _, err := r.Prune(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	b := &raceBackup{t: t, goOn: make(chan struct{}), ended: make(chan struct{})}
	at := func(step string) {
		if step == race.begins {
			b.begin(r.store, wrong && race.deaf)
		}
		if step == race.publishes {
			close(b.goOn)
			time.Sleep(3 * day)
			if _, err := r.Prune(t.Context(), PruneOptions{Grace: DefaultGrace, Apply: true}); err != nil {
				t.Error(err)
			}
		}
	}
	at(beforeAll)
	time.Sleep(DefaultGrace)
	b.prune(r.store, race, wrong, at, o)
	return b.damage(r)
}

// raceBackup is the backup of a pruneRace.
type raceBackup struct {
	t     *testing.T
	goOn  chan struct{} // closed: its manifest can be put
	ended chan struct{}
	made  *Manifest
	err   error
}

// begin makes the backup as far as it goes.
func (b *raceBackup) begin(s store.Store, deaf bool) {
	if deaf {
		s = deafStore{s}
	}
	r := opened(b.t, slowStore{s, manifestSuffix, b.goOn})
	go func() {
		defer close(b.ended)
		b.made, b.err = standbyBackup(b.t.Context(), r, 9)
	}()
	synctest.Wait()
}

// prune prunes as the race wants it.
func (b *raceBackup) prune(s store.Store, race pruneRace, wrong bool, at func(string), o PruneOptions) {
	stepped := &steppedStore{Store: s, steps: race.steps, at: at}
	if wrong {
		stepped.omit = race.omit
		stepped.at = func(step string) {
			if step == race.early {
				stepped.freeze(b.t, race.freezes)
			}
			at(step)
		}
	}
	if _, err := opened(b.t, stepped).Prune(b.t.Context(), o); err != nil {
		b.t.Error(err)
	}
	if race.publishes == "" {
		close(b.goOn)
	}
	<-b.ended
	if b.err != nil && !errors.Is(b.err, ErrWALPruned) {
		b.t.Error(b.err)
	}
}

// damage is what is wrong with it, if it was made.
func (b *raceBackup) damage(r *Repository) error {
	if b.err != nil {
		return nil
	}
	err := readAll(b.t.Context(), coldRepository(r).OpenBackup(b.made), map[string][]byte{"pgdata/base/1": incompressible(1),
		"pgdata/pg_wal/" + testSegment(1, 9).String(): make([]byte, testSegmentSize)})
	_, walErr := r.WALHead(b.t.Context(), "main", testSegment(1, 9))
	return errors.Join(err, walErr)
}

func opened(t *testing.T, s store.Store) *Repository {
	t.Helper()
	r, err := openStore(t.Context(), s, "mem:", Options{})
	if err != nil {
		t.Error(err)
	}
	return r
}

// TestHoldNeedsToWait: a hold that did not wait for the prunes under way would be there, and its backup deleted.
func TestHoldNeedsToWait(t *testing.T) {
	for _, waits := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := newWALRepository(t)
			defer r.Close()
			all := daily(t, r)
			holder := r
			if !waits {
				holder = opened(t, deafStore{r.store})
			}
			var err error
			marks := &steppedStore{Store: r.store, steps: []pruneStep{{"deletes", opPut, backupsRoot, deletedSuffix}}, at: func(string) {
				_, err = holder.AddHold(t.Context(), "main", all[0].ID, "audit", time.Time{})
			}}
			if _, err := opened(t, marks).Prune(t.Context(), PruneOptions{Policy: Policy{Last: 1}, Grace: DefaultGrace, Apply: true}); err != nil {
				t.Error(err)
			}
			if !errors.Is(r.undeleted(t.Context(), all[0].Name()), ErrDeleted) {
				t.Error("it was not deleted")
			}
			if waits && !errors.Is(err, ErrPruning) || !waits && err != nil {
				t.Errorf("waits: %v: %v", waits, err)
			}
		})
	}
}
