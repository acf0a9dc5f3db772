package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// newWALRepository is a repository in memory with a cluster of small WAL segments.
func newWALRepository(t testing.TB, keys ...Key) *Repository {
	t.Helper()
	r, err := initStore(t.Context(), store.NewMem(), "mem:", Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, testSegmentSize); err != nil {
		t.Fatal(err)
	}
	return r
}

// backupNow makes a backup of two segments that ends now, and then a segment more.
func backupNow(t testing.TB, r *Repository, first uint64) *Manifest {
	t.Helper()
	for no := range uint64(3) {
		putTestSegment(t, r, 1, first+no)
	}
	m, err := backupFrom(t.Context(), r, first)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// backupFrom makes a backup of two segments, which are there, that ends now.
func backupFrom(ctx context.Context, r *Repository, first uint64) (*Manifest, error) {
	return r.WriteBackup(ctx, "main", BackupOptions{}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		m := testManifest()
		m.SegmentSize = testSegmentSize
		m.StartLSN, m.StopLSN = pg.LSN(first*testSegmentSize+0x28), pg.LSN((first+1)*testSegmentSize+0x100)
		m.StartedAt, m.StoppedAt = time.Now().UTC(), time.Now().UTC()
		m.WALFirst, m.WALLast = testSegment(1, first).String(), testSegment(1, first+1).String()
		err := writeFiles(w, testFiles{"pgdata/base/1": incompressible(int(first))})
		if err == nil {
			err = w.Mkdir("pgdata/pg_wal", Entry{Mode: 0o700})
		}
		for no := first; err == nil && no < first+2; no++ {
			err = w.AddWAL("pgdata/pg_wal/"+testSegment(1, no).String(), Entry{Mode: 0o600, Size: testSegmentSize}, testSegment(1, no))
		}
		return m, err
	})
}

// segmentsLeft writes the numbers of the segments of timeline 1.
func segmentsLeft(t testing.TB, r *Repository) string {
	t.Helper()
	names, err := r.WALNames(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, n := range names {
		no, _ := n.SegmentNo(testSegmentSize)
		all = append(all, fmt.Sprint(no))
	}
	return strings.Join(all, " ")
}

// daily makes five backups, a day apart, of segments 1 to 15.
func daily(t testing.TB, r *Repository) (all []*Manifest) {
	t.Helper()
	for i := range uint64(5) {
		all = append(all, backupNow(t, r, 1+3*i))
		time.Sleep(day)
	}
	time.Sleep(day) // the sessions of the backups have ended
	return all
}

// TestPruneWAL: WAL goes that nothing needs, in two steps.
func TestPruneWAL(t *testing.T) {
	for _, c := range []struct {
		policy      Policy
		once, twice string // segments left after the first prune, and after one a day later
	}{
		{Policy{}, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"},
		{Policy{Last: 2}, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "10 11 12 13 14 15"},
		{Policy{Last: 4, Window: time.Hour}, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", "4 5 7 8 10 11 13 14 15"},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newWALRepository(t)
			defer r.Close()
			daily(t, r)
			o := PruneOptions{Policy: c.policy, Grace: DefaultGrace, Apply: true}
			for _, want := range []string{c.once, c.twice, c.twice} {
				before := segmentsLeft(t, r)
				preview, err := r.Prune(t.Context(), PruneOptions{Policy: o.Policy, Grace: o.Grace})
				if err != nil || segmentsLeft(t, r) != before {
					t.Errorf("%+v: the preview left %s: %v", c.policy, segmentsLeft(t, r), err)
				}
				report, err := r.Prune(t.Context(), o)
				if got := segmentsLeft(t, r); err != nil || got != want {
					t.Errorf("%+v leaves %s, want %s: %v", c.policy, got, want, err)
				}
				if fmt.Sprint(preview.WAL) != fmt.Sprint(report.WAL) {
					t.Errorf("%+v: the preview says\n%v\nand prune\n%v", c.policy, preview.WAL, report.WAL)
				}
				checkClean(t, r)
				time.Sleep(DefaultGrace)
			}
		})
	}
}

// TestPruneWALYoung: a prune whose listings show no session yet, those of less than the grace period before, deletes no WAL of a
// backup that is being made, even if a newer one is there. It would if they were staler.
func TestPruneWALYoung(t *testing.T) {
	for _, stale := range []time.Duration{DefaultGrace - time.Second, DefaultGrace} {
		synctest.Test(t, func(t *testing.T) {
			r := newWALRepository(t)
			defer r.Close()
			for _, m := range daily(t, r) {
				if err := r.markStandalone(t.Context(), "main", m.ID); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(DefaultGrace)
			for no := uint64(16); no < 20; no++ {
				putTestSegment(t, r, 1, no)
			}
			goOn, made := make(chan struct{}), make(chan error)
			go func() {
				_, err := backupFrom(t.Context(), opened(t, slowStore{r.store, packListSuffix, goOn}), 16)
				made <- err
			}()
			synctest.Wait()
			backupNow(t, r, 20)
			time.Sleep(stale)
			if _, err := opened(t, deafStore{r.store}).Prune(t.Context(), PruneOptions{Grace: DefaultGrace, Apply: true}); err != nil {
				t.Fatal(err)
			}
			close(goOn)
			if err := <-made; err != nil {
				t.Fatal(err)
			}
			want := "16 17 18 19 20 21 22"
			if stale == DefaultGrace {
				want = "20 21 22"
			}
			if left := segmentsLeft(t, r); !strings.HasSuffix(left, " 14 "+want) {
				t.Errorf("left are %s, want %s", left, want)
			}
		})
	}
}

// TestPruneWALInterrupted: wherever prune dies the repository is whole, and the next one goes on.
func TestPruneWALInterrupted(t *testing.T) {
	for deletes := 1; deletes < 40; deletes += 3 {
		synctest.Test(t, func(t *testing.T) {
			r := newWALRepository(t)
			defer r.Close()
			daily(t, r)
			whole := r.store
			for range 2 {
				ctx, die := context.WithCancel(t.Context())
				r.store = &dyingStore{whole, deletes, die}
				if _, err := r.Prune(ctx, PruneOptions{Policy: Policy{Last: 3, Window: time.Hour}, Apply: true}); err == nil && deletes < 10 {
					t.Errorf("it did not die at delete %d", deletes)
				}
				die()
				r.store = whole
				checkClean(t, r)
				time.Sleep(2 * day)
			}
			if _, err := r.Prune(t.Context(), PruneOptions{Policy: Policy{Last: 3, Window: time.Hour}, Apply: true}); err != nil {
				t.Error(err)
			}
			if got := segmentsLeft(t, r); got != "7 8 10 11 13 14 15" {
				t.Errorf("left are %s", got)
			}
			checkClean(t, r)
		})
	}
}

// dyingStore does nothing any more after some deletes.
type dyingStore struct {
	store.Store
	deletes int
	die     func()
}

func (s *dyingStore) Delete(ctx context.Context, key string) error {
	if s.deletes--; s.deletes < 0 {
		s.die()
		return errors.New("the process is dead")
	}
	return s.Store.Delete(ctx, key)
}

func (s *dyingStore) Put(ctx context.Context, key string, body []byte) error {
	if s.deletes < 0 {
		return errors.New("the process is dead")
	}
	return s.Store.Put(ctx, key, body)
}

// TestPruneWALSpares: nothing goes of a cluster while a backup of it is being made, nor behind a backup that somebody uses.
func TestPruneWALSpares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newWALRepository(t)
		defer r.Close()
		all := daily(t, r)
		writer, err := r.begin(t.Context(), BackupOptions{}.session("main"))
		if err != nil {
			t.Fatal(err)
		}
		before := segmentsLeft(t, r)
		o := PruneOptions{Policy: Policy{Last: 2, Window: time.Hour}, Apply: true}
		report, err := r.Prune(t.Context(), o)
		if err != nil || len(report.WALSpared) != 1 || segmentsLeft(t, r) != before {
			t.Errorf("while a backup is made %s are left: %+v, %v", segmentsLeft(t, r), report, err)
		}
		if err := writer.End(t.Context()); err != nil {
			t.Fatal(err)
		}
		reader, err := r.Use(t.Context(), "restore", BackupName{"main", all[3].ID})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Prune(t.Context(), o); err != nil || segmentsLeft(t, r) != "10 11 12 13 14 15" {
			t.Errorf("while a backup is restored %s are left: %v", segmentsLeft(t, r), err)
		}
		if alone, err := r.Standalone(t.Context(), all[3]); err != nil || !alone {
			t.Errorf("it is not marked: %v", err)
		}
		if err := reader.End(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Prune(t.Context(), o); err != nil || segmentsLeft(t, r) != "10 11 13 14 15" {
			t.Errorf("afterwards %s are left: %v", segmentsLeft(t, r), err)
		}
		checkClean(t, r)
		if err := r.store.Delete(t.Context(), walKey("main", testSegment(1, 11))); err != nil {
			t.Fatal(err)
		}
		var found []Finding
		if _, err := r.Check(t.Context(), CheckOptions{}, func(f Finding) { found = append(found, f) }); err != nil || len(found) != 1 ||
			len(found[0].Backups) != 1 || found[0].Backups[0].Backup != all[3].ID {
			t.Errorf("without a segment of its own: %+v, %v", found, err)
		}
	})
}

func TestHolds(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		synctest.Test(t, func(t *testing.T) {
			r := newWALRepository(t, keys...)
			defer r.Close()
			all := daily(t, r)
			forever, err := r.AddHold(t.Context(), "main", all[0].ID, "audit", time.Time{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.AddHold(t.Context(), "main", all[1].ID, "migration", time.Now().Add(day)); err != nil {
				t.Fatal(err)
			}
			listed := func() string {
				if _, err := r.Prune(t.Context(), PruneOptions{Policy: Policy{Last: 1}, Apply: true}); err != nil {
					t.Fatal(err)
				}
				ids, err := r.BackupIDs(t.Context(), "main")
				if err != nil {
					t.Fatal(err)
				}
				var got []int
				for i, m := range all {
					if slices.Contains(ids, m.ID) {
						got = append(got, i)
					}
				}
				return fmt.Sprint(got)
			}
			for i, want := range []string{"[0 1 4]", "[0 1 4]", "[0 4]"} { // a day longer than it says
				if got := listed(); got != want {
					t.Errorf("after %d days there are %s, want %s", i, got, want)
				}
				time.Sleep(day)
			}
			holds, err := r.Holds(t.Context(), "")
			if err != nil || len(holds) != 1 || holds[0].String() != "audit" {
				t.Errorf("holds %v, %v", holds, err)
			}
			if err := r.RemoveHold(t.Context(), forever.ID); err != nil {
				t.Fatal(err)
			}
			if err := r.RemoveHold(t.Context(), forever.ID); !errors.Is(err, ErrNoHold) {
				t.Errorf("removed again: %v", err)
			}
			if got := listed(); got != "[4]" {
				t.Errorf("in the end there are %s", got)
			}
			if _, err := r.AddHold(t.Context(), "main", all[0].ID, "late", time.Time{}); !errors.Is(err, ErrDeleted) {
				t.Errorf("hold on a deleted backup: %v", err)
			}
		})
	})
}

// TestHoldMeetsPrune: a hold that comes while a prune is under way does not say that it was in time.
func TestHoldMeetsPrune(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newWALRepository(t)
		defer r.Close()
		all := daily(t, r)
		prune, err := r.begin(t.Context(), SessionInfo{Operation: pruneOperation})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.AddHold(t.Context(), "main", all[0].ID, "audit", time.Time{}); !errors.Is(err, ErrPruning) {
			t.Errorf("beside a prune: %v", err)
		}
		ended := make(chan error)
		go func() {
			time.Sleep(time.Second)
			ended <- errors.Join(r.markDeleted(t.Context(), BackupName{"main", all[1].ID}, "not kept"), prune.End(t.Context()))
		}()
		if _, err := r.AddHold(t.Context(), "main", all[1].ID, "audit", time.Time{}); !errors.Is(err, ErrDeleted) {
			t.Errorf("behind a prune: %v", err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if holds, err := r.Holds(t.Context(), "main"); err != nil || len(holds) != 1 {
			t.Errorf("left are holds %v, %v", holds, err)
		}
	})
}

// TestPruneWithoutGrace deletes and collects at once, on a clock that goes on.
func TestPruneWithoutGrace(t *testing.T) {
	k := newCheckedRepo(t)
	r := k.open(t)
	for o, err := range r.store.List(t.Context(), sessionsPrefix) { // of the backups, which have ended
		if err == nil {
			err = r.store.Delete(t.Context(), o.Key)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	report, err := r.Prune(t.Context(), PruneOptions{Policy: Policy{Last: 1}, Apply: true})
	if err != nil || len(report.Collected) != 1 || report.Collected[0].Backup != k.a.ID || segmentsLeft(t, r) != "8 9 10 11 12" {
		t.Errorf("left are segments %s: %+v, %v", segmentsLeft(t, r), report, err)
	}
	checkClean(t, r)
}
