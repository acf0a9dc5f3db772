package repo

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/store"
)

// mute does not answer for one object.
type mute struct {
	store.Store
	key string
}

func (s mute) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	if key == s.key {
		return nil, errInjected
	}
	return s.Store.Get(ctx, key, off, n)
}

// refusesToGiveUp makes sure that nothing is given up, and nothing changed but the session.
func refusesToGiveUp(t *testing.T, r *Repository, key string, want error) {
	t.Helper()
	before := objectsOf(t, r.store)
	if given, err := r.GiveUp(t.Context(), key, true); err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("%s is given up: %+v, %v; want %v", key, given, err, want)
	}
	if after := objectsOf(t, r.store); !maps.EqualFunc(before, after, bytes.Equal) {
		t.Errorf("%s: something changed: %v", key, slices.Sorted(maps.Keys(after)))
	}
}

// TestGiveUpBackup gives up a backup whose manifest is damaged, or gone: prune goes on then, and the others are whole.
func TestGiveUpBackup(t *testing.T) {
	harms := map[string]func(r *Repository, key string) error{
		"flipped": func(r *Repository, key string) error {
			b, err := r.store.Get(t.Context(), key, 0, -1)
			if err != nil {
				return err
			}
			return errors.Join(r.store.Delete(t.Context(), key), r.store.Put(t.Context(), key, flipAt(len(b)/2)(b)))
		},
		"gone": func(r *Repository, key string) error { return r.store.Delete(t.Context(), key) },
	}
	for name, harm := range harms {
		t.Run(name, func(t *testing.T) {
			bothSeals(t, func(t *testing.T, keys ...Key) {
				synctest.Test(t, func(t *testing.T) { giveUpBackup(t, newWALRepository(t, keys...), harm) })
			})
		})
	}
}

func giveUpBackup(t *testing.T, r *Repository, harm func(*Repository, string) error) {
	defer r.Close()
	all := daily(t, r)
	lost, held := manifestKey("main", all[1].ID), manifestKey("main", all[3].ID)
	hold, err := r.AddHold(t.Context(), "main", all[3].ID, "audit", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	refusesToGiveUp(t, r, lost, ErrNotDamaged)
	for _, key := range []string{lost, held} {
		if err := harm(r, key); err != nil {
			t.Fatal(err)
		}
	}
	refusesToGiveUp(t, r, manifestKey("main", all[2].ID), ErrNotDamaged)
	refusesToGiveUp(t, r, held, nil)
	muted := coldRepository(r)
	muted.store = mute{r.store, lost}
	if _, err := muted.GiveUp(t.Context(), lost, true); !errors.Is(err, errInjected) {
		t.Errorf("a manifest that the store does not give: %v", err)
	}
	o := PruneOptions{Grace: DefaultGrace, Apply: true}
	blocked := func() bool {
		report, err := r.Prune(t.Context(), o)
		return errors.Is(err, ErrCorrupt) || len(report.Unexplained) > 0
	}
	if !blocked() {
		t.Error("prune goes on")
	}
	if err := r.RemoveHold(t.Context(), hold.ID); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{lost, held} {
		before := objectsOf(t, r.store)
		if given, err := r.GiveUp(t.Context(), key, false); err != nil || given.Object != key || !maps.EqualFunc(before, objectsOf(t, r.store), bytes.Equal) {
			t.Errorf("a preview: %+v, %v", given, err)
		}
		if given, err := r.GiveUp(t.Context(), key, true); err != nil || !errors.Is(given.Err, ErrCorrupt) || manifestKey("main", given.Backup.Backup) != key {
			t.Errorf("%+v, %v", given, err)
		}
		refusesToGiveUp(t, r, key, ErrDeleted)
	}
	time.Sleep(DefaultGrace)
	report, err := r.Prune(t.Context(), o)
	if err != nil || len(report.Collected) != 2 || len(report.Unexplained) > 0 || report.Packs.Packs == 0 {
		t.Errorf("%+v, %v", report, err)
	}
	if ids, err := r.BackupIDs(t.Context(), "main"); err != nil || !slices.Equal(ids, []string{all[0].ID, all[2].ID, all[4].ID}) {
		t.Errorf("left are %v, %v", ids, err)
	}
	checkClean(t, coldRepository(r))
}

// TestGiveUpSession gives up a session whose announcement is damaged, once it shows no sign of life.
func TestGiveUpSession(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		synctest.Test(t, func(t *testing.T) {
			r := newWALRepository(t, keys...)
			defer r.Close()
			all := daily(t, r)
			s, err := r.begin(t.Context(), SessionInfo{Operation: "backup", Uses: []BackupName{all[0].Name()}})
			if err != nil {
				t.Fatal(err)
			}
			key := s.Info.ID.key(begunSuffix)
			refusesToGiveUp(t, r, key, ErrNotDamaged)
			b, err := r.store.Get(t.Context(), key, 0, -1)
			if err != nil {
				t.Fatal(err)
			}
			putInstead(t, r.store, key, flipAt(len(b)/2)(b))
			time.Sleep(3*day + time.Hour)   // between two signs of life
			refusesToGiveUp(t, r, key, nil) // its signs of life go on
			s.Leave()
			o := PruneOptions{Policy: Policy{Last: 2}, Grace: DefaultGrace, Apply: true}
			time.Sleep(DefaultGrace + sessionLife)
			if _, err := r.Prune(t.Context(), o); !errors.Is(err, ErrCorrupt) {
				t.Errorf("prune goes on: %v", err)
			}
			if given, err := r.GiveUp(t.Context(), key, true); err != nil || given.Object != key || !errors.Is(given.Err, ErrCorrupt) || given.Last.IsZero() {
				t.Errorf("%+v, %v", given, err)
			}
			if err := s.rely(t.Context()); !errors.Is(err, ErrGivenUp) {
				t.Errorf("who stands still in it: %v", err)
			}
			for range 2 {
				if report, err := r.Prune(t.Context(), o); err != nil || len(report.GivenUp) > 0 {
					t.Errorf("%+v, %v", report, err)
				}
				time.Sleep(DefaultGrace)
			}
			for o := range objectsOf(t, r.store) {
				if len(o) > len(sessionsPrefix)+16 && o[:len(sessionsPrefix)+16] == sessionsPrefix+s.Info.ID.String() {
					t.Errorf("%s is left", o)
				}
			}
			checkClean(t, coldRepository(r))
		})
	})
}
