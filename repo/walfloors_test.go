package repo

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/store"
)

// hookedStore does something before the first operation that it is meant for. Until that is done no session shows a sign of life.
type hookedStore struct {
	store.Store
	still  atomic.Bool
	done   atomic.Bool
	before func(kind, key string) bool
	do     func()
}

func (s *hookedStore) hook(kind, key string) {
	if s.before(kind, key) && !s.done.Swap(true) {
		s.still.Store(true)
		s.do()
		s.still.Store(false)
	}
}

func (s *hookedStore) Put(ctx context.Context, key string, body []byte) error {
	s.hook(opPut, key)
	if s.still.Load() {
		return errInjected
	}
	return s.Store.Put(ctx, key, body)
}

func (s *hookedStore) Delete(ctx context.Context, key string) error {
	s.hook(opDelete, key)
	return s.Store.Delete(ctx, key)
}

func (s *hookedStore) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	s.hook(opGet, key)
	return s.Store.Get(ctx, key, off, n)
}

// standbyBackup makes a backup from a standby whose WAL all lies in segment no, which is not full: it refers to no WAL object.
func standbyBackup(ctx context.Context, r *Repository, no uint64) (*Manifest, error) {
	wal := simRange{timeline: 1, first: no, last: no, partial: true}
	name, _ := wal.partialSegment()
	return r.WriteBackup(ctx, "main", BackupOptions{}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		return wal.manifest(), writeFiles(w, testFiles{"pgdata/base/1": incompressible(1), name: make([]byte, testSegmentSize)})
	})
}

// stillPrune prunes and stands still for three days before an operation, and meanwhile another prune gives it up.
func stillPrune(t *testing.T, r *Repository, o PruneOptions, before func(kind, key string) bool, meanwhile func(*Repository)) error {
	still, err := openStore(t.Context(), &hookedStore{Store: r.store, before: before, do: func() {
		meanwhile(r)
		time.Sleep(3 * day)
		if _, err := r.Prune(t.Context(), PruneOptions{Grace: DefaultGrace, Apply: true}); err != nil {
			t.Error(err)
		}
	}}, "mem:", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer still.Close()
	_, err = still.Prune(t.Context(), o)
	return err
}

// TestPruneWALStandsStill: a prune that has made its plan and goes on after days deletes nothing that a backup made meanwhile
// needs, of a standby that lies behind; or the backup was refused.
func TestPruneWALStandsStill(t *testing.T) {
	for name, before := range map[string]func(kind, key string) bool{
		"before it says so": func(kind, key string) bool { return kind == opPut && strings.HasSuffix(key, standaloneSuffix) },
		"before it deletes": func(kind, key string) bool { return kind == opDelete && strings.HasPrefix(key, walRoot) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newWALRepository(t)
				defer r.Close()
				daily(t, r)
				o := PruneOptions{Policy: Policy{Last: 5, Window: time.Hour}, Apply: true}
				var made *Manifest
				err := stillPrune(t, r, o, before, func(r *Repository) {
					m, err := standbyBackup(t.Context(), r, 9)
					if err != nil && !errors.Is(err, ErrWALPruned) {
						t.Error(err)
					}
					made = m
				})
				if err != nil {
					t.Error(err)
				}
				if left := segmentsLeft(t, r); made != nil && !strings.HasSuffix(left, "9 10 11 12 13 14 15") {
					t.Errorf("left are %s", left)
				}
				if made == nil && name == "before it says so" {
					t.Error("nothing was deleted, and the backup was refused")
				}
				checkClean(t, r)
			})
		})
	}
}

// TestFloorsSuperseded: of the words that WAL was pruned the highest stay, whatever many prunes there are.
func TestFloorsSuperseded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newWALRepository(t)
		defer r.Close()
		for i := range uint64(8) {
			backupNow(t, r, 1+3*i)
			time.Sleep(2 * day)
			if _, err := r.Prune(t.Context(), PruneOptions{Policy: Policy{Last: 1}, Apply: true}); err != nil {
				t.Fatal(err)
			}
		}
		sessions, err := r.sessions(t.Context())
		highest, floors := walFloors{}, 0
		for _, s := range sessions {
			if len(s.info.floors()) > 0 {
				floors++
				highest.raise(s.info.Floors...)
			}
		}
		if err != nil || floors == 0 || floors > 3 || highest[walFloorOf{"main", 1}] != testSegmentSize*22 {
			t.Errorf("%d words, the highest %v: %v", floors, highest, err)
		}
		if _, err := standbyBackup(t.Context(), r, 20); !errors.Is(err, ErrWALPruned) {
			t.Errorf("a backup whose WAL was pruned: %v", err)
		}
		if _, err := standbyBackup(t.Context(), r, 23); err != nil {
			t.Error(err)
		}
	})
}

// TestPruneStandsStillMeetsHold: a prune that goes on after days deletes no backup that is held by now.
func TestPruneStandsStillMeetsHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newWALRepository(t)
		defer r.Close()
		all := daily(t, r)
		var marks atomic.Int32
		o := PruneOptions{Policy: Policy{Last: 1}, Grace: DefaultGrace, Apply: true}
		err := stillPrune(t, r, o, func(kind, key string) bool {
			if kind == opPut && strings.HasSuffix(key, deletedSuffix) {
				marks.Add(1)
			}
			return marks.Load() == 1
		}, func(*Repository) {})
		if !errors.Is(err, ErrGivenUp) {
			t.Errorf("it went on: %v", err)
		}
		if _, err := r.AddHold(t.Context(), "main", all[2].ID, "audit", time.Time{}); err != nil {
			t.Error(err)
		}
	})
}

// TestPruneStandsStillMeetsPrune: what was deleted and collected since a prune listed it is no damage.
func TestPruneStandsStillMeetsPrune(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newWALRepository(t)
		defer r.Close()
		all := daily(t, r)
		err := stillPrune(t, r, PruneOptions{Grace: DefaultGrace, Apply: true}, func(kind, key string) bool {
			return kind == opGet && key == packListKey("main", all[1].ID)
		}, func(r *Repository) {
			if report, err := r.Prune(t.Context(), PruneOptions{Policy: Policy{Last: 1}, Apply: true}); err != nil || len(report.Collected) != 4 {
				t.Errorf("meanwhile: %+v, %v", report, err)
			}
		})
		if err != nil {
			t.Error(err)
		}
		checkClean(t, r)
	})
}

// TestPruneWindowWithoutBackups: WAL that came before the first backup.
func TestPruneWindowWithoutBackups(t *testing.T) {
	r := newWALRepository(t)
	defer r.Close()
	putTestSegment(t, r, 1, 1)
	if _, err := r.Prune(t.Context(), PruneOptions{Policy: Policy{Window: time.Hour}, Apply: true}); err != nil || segmentsLeft(t, r) != "1" {
		t.Errorf("left are %s: %v", segmentsLeft(t, r), err)
	}
}
