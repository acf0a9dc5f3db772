package repo

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/store"
)

// prune runs a prune that changes things, and fails the test if it fails.
func prune(t testing.TB, r *Repository, keep int, grace time.Duration) *PruneReport {
	t.Helper()
	report, err := r.Prune(t.Context(), PruneOptions{Policy: Policy{Last: keep}, Grace: grace, Apply: true})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func listedBackups(t testing.TB, r *Repository) string {
	t.Helper()
	ids, err := r.BackupIDs(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(ids)
}

func TestPrune(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newMemRepository(t)
		first := writeTestBackup(t, r, testFiles{"pgdata/a": incompressible(40), "pgdata/b": incompressible(20)}, nil)
		time.Sleep(time.Second)
		changed := incompressible(20)
		changed[5]++
		second := writeTestBackup(t, r, testFiles{"pgdata/a": incompressible(40), "pgdata/b": changed}, first)
		time.Sleep(2 * sessionLife)

		before := storedKeys(t, r)
		if report, err := r.Prune(t.Context(), PruneOptions{Policy: Policy{Last: 1}, Grace: DefaultGrace}); err != nil || len(report.Waiting) != 1 {
			t.Errorf("preview: %+v, %v", report, err)
		}
		if after := storedKeys(t, r); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("a preview changed %v to %v", before, after)
		}

		prune(t, r, 1, DefaultGrace)
		if got, want := listedBackups(t, r), fmt.Sprint([]string{second.Manifest.ID}); got != want {
			t.Errorf("listed %s, want %s", got, want)
		}
		if _, err := r.Manifest(t.Context(), "main", first.Manifest.ID); !errors.Is(err, ErrNoBackup) {
			t.Errorf("the deleted one: %v", err)
		}
		checkFiles(t, first, testFiles{"pgdata/a": incompressible(40), "pgdata/b": incompressible(20)}) // opened before
		time.Sleep(DefaultGrace)
		if report := prune(t, r, 1, DefaultGrace); len(report.Collected) != 1 {
			t.Errorf("a day later: %+v", report)
		}
		checkClean(t, r)
		checkFiles(t, second, testFiles{"pgdata/a": incompressible(40), "pgdata/b": changed})
	})
}

// A writer that stands still for days while prunes go on either publishes a backup that is whole, or none and says so.
func TestWriterGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newMemRepository(t)
		s, err := r.begin(t.Context(), BackupOptions{}.session("main"))
		if err != nil {
			t.Fatal(err)
		}
		s.Leave() // it shows no sign of life
		time.Sleep(sessionLife)
		if report := prune(t, r, 1, 0); len(report.GivenUp) != 1 {
			t.Errorf("%+v", report)
		}
		if err := s.rely(t.Context()); !errors.Is(err, ErrGivenUp) {
			t.Errorf("the writer learns %v", err)
		}
		name := s.Info.Makes[0]
		if err := r.store.Put(t.Context(), manifestKey(name.Cluster, name.Backup), []byte("late")); err != nil {
			t.Fatal(err)
		}
		if got := listedBackups(t, r); got != "[]" {
			t.Errorf("listed %s", got)
		}
	})
}

// What a reader uses stays as long as it shows signs of life.
func TestPruneSparesWhatIsUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newMemRepository(t)
		files := testFiles{"pgdata/a": incompressible(40)}
		first := writeTestBackup(t, r, files, nil)
		time.Sleep(time.Second)
		writeTestBackup(t, r, testFiles{"pgdata/b": incompressible(3)}, nil)
		s, err := r.Use(t.Context(), "thaw", BackupName{"main", first.Manifest.ID})
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			time.Sleep(DefaultGrace)
			if report := prune(t, r, 1, DefaultGrace); len(report.Collected) > 0 || report.Packs.Packs > 0 {
				t.Fatalf("%+v", report)
			}
		}
		checkFiles(t, first, files)
		if err := s.End(t.Context()); err != nil {
			t.Fatal(err)
		}
		if report := prune(t, r, 1, DefaultGrace); len(report.Collected) != 1 || report.Packs.Packs == 0 {
			t.Errorf("when it has ended: %+v", report)
		}
		if _, err := r.Use(t.Context(), "thaw", BackupName{"main", first.Manifest.ID}); !errors.Is(err, ErrDeleted) {
			t.Errorf("use of what is gone: %v", err)
		}
	})
}

// newMemRepository makes a repository in memory, which keeps next to nothing in its cache.
func newMemRepository(t testing.TB, keys ...Key) *Repository {
	t.Helper()
	r, err := initStore(t.Context(), store.NewMem(), "mem:", Options{Keys: keys, CacheBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, 16<<20); err != nil {
		t.Fatal(err)
	}
	return r
}
