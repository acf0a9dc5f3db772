package repo

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/store"
)

// repack prunes with no limit that counts.
func repack(t testing.TB, r *Repository, o PruneOptions) *PruneReport {
	t.Helper()
	o.Apply, o.RepackLimit = true, cmpLimit(o.RepackLimit)
	report, err := r.Prune(t.Context(), o)
	if err = errors.Join(err, report.Unrepacked); err != nil {
		t.Fatal(err)
	}
	return report
}

func cmpLimit(limit int64) int64 {
	if limit == 0 {
		return 1 << 40
	}
	return limit
}

// repackWithout deletes a backup, and all that tells of it, and has what it leaves repacked at once.
func repackWithout(t testing.TB, r *Repository, m *Manifest) {
	t.Helper()
	for o, err := range r.store.List(t.Context(), sessionsPrefix) {
		if err = errors.Join(err, r.store.Delete(t.Context(), o.Key)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.markDeleted(t.Context(), m.Name(), "only a test"); err != nil {
		t.Fatal(err)
	}
	if report := repack(t, r, PruneOptions{}); report.Repacked.Packs == 0 || len(editionsAmong(packKeys(t, r.store))) != report.Repacked.Packs {
		t.Fatalf("%+v", report.Repacked)
	}
	if err := r.store.Delete(t.Context(), deletedKey(m.Cluster, m.ID)); err != nil {
		t.Fatal(err)
	}
}

// packKeys are the keys of packs and editions, with their sizes.
func packKeys(t testing.TB, s store.Store) map[string]int64 {
	t.Helper()
	all := map[string]int64{}
	for o, err := range s.List(t.Context(), packsRoot) {
		if err != nil {
			t.Fatal(err)
		}
		all[o.Key] = o.Size
	}
	return all
}

func sum(sizes map[string]int64) (n int64) {
	for _, size := range sizes {
		n += size
	}
	return n
}

// editionsAmong are the keys of editions.
func editionsAmong(keys map[string]int64) (all []string) {
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if _, no, ok := editionOfKey(key); ok && no > 0 {
			all = append(all, key)
		}
	}
	return all
}

// churned is a repository of several backups, each of which changed some of many files. Only the last is listed, and what is
// deleted waits for a prune.
func churned(t testing.TB, r *Repository) (*Backup, testFiles) {
	t.Helper()
	files := testFiles{}
	for i := range 24 {
		files[fmt.Sprintf("pgdata/base/5/%d", i)] = pagesOf(uint64(i), 30+i)
	}
	var b *Backup
	for round := range 6 {
		files = maps.Clone(files)
		for i := range 8 {
			name := fmt.Sprintf("pgdata/base/5/%d", (round*3+i)%24)
			files[name] = pagesOf(uint64(100*round+i), 35+i)
		}
		b = writeTestBackup(t, r, files, b)
		time.Sleep(time.Minute)
	}
	return b, files
}

func TestRepack(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		synctest.Test(t, func(t *testing.T) { testRepack(t, newMemRepository(t, keys...)) })
	})
}

func testRepack(t *testing.T, r *Repository) {
	b, files := churned(t, r)
	time.Sleep(3 * DefaultGrace)
	prune(t, r, 1, DefaultGrace)
	time.Sleep(2 * DefaultGrace)
	open := r.OpenBackup(b.Manifest) // and has found nothing out of place yet
	checkFiles(t, open, files)

	before := packKeys(t, r.store)
	preview, err := r.Prune(t.Context(), PruneOptions{Grace: DefaultGrace, RepackLimit: 1 << 30})
	if err != nil || preview.Repacked.Packs == 0 || preview.Repacked.Won == 0 {
		t.Fatalf("preview: %+v, %v", preview.Repacked, err)
	}
	if after := packKeys(t, r.store); !maps.Equal(before, after) {
		t.Errorf("a preview changed %v to %v", before, after)
	}
	report := repack(t, r, PruneOptions{Grace: DefaultGrace})
	after := packKeys(t, r.store)
	got := report.Repacked
	if got.Packs != preview.Repacked.Packs || got.Packs != len(editionsAmong(after)) || sum(before)-sum(after)-report.Packs.Bytes != got.Won || got.Won < sum(before)/3 {
		t.Errorf("%d bytes became %d with %d editions: %+v; the preview was %+v", sum(before), sum(after), len(editionsAmong(after)), got, preview.Repacked)
	}
	t.Logf("%d packs with %d bytes became %d: %+v", len(before), sum(before), sum(after), got)
	checkFiles(t, open, files)
	checkFiles(t, coldRepository(r).OpenBackup(b.Manifest), files)
	checkClean(t, r)
	if again := repack(t, r, PruneOptions{Grace: 0}); again.Repacked.Packs > 0 {
		t.Errorf("repacked again: %+v", again.Repacked)
	}

	// A backup compares with what was repacked, and is copied.
	files = maps.Clone(files)
	files["pgdata/base/5/3"] = bytes.Clone(files["pgdata/base/5/3"])
	files["pgdata/base/5/3"][5*PageSize]++
	next := writeTestBackup(t, r, files, open)
	if next.Manifest.StoredBytes > 10*PageSize {
		t.Errorf("a changed page cost %d bytes", next.Manifest.StoredBytes)
	}
	checkFiles(t, coldRepository(r).OpenBackup(next.Manifest), files)
	checkClean(t, r)
	to := newMemRepository(t)
	copyAll(t, r, to)
	checkClean(t, to)
}

// Pieces are dropped again and again: of an edition the next one is made.
func TestRepackAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newMemRepository(t)
		files := testFiles{}
		for i := range 32 {
			files[fmt.Sprintf("pgdata/%d", i)] = pagesOf(uint64(i), 40)
		}
		b := writeTestBackup(t, r, files, nil)
		for n := 16; n > 0; n /= 2 {
			time.Sleep(3 * DefaultGrace)
			files = maps.Clone(files)
			for i := n; i < 2*n; i++ {
				delete(files, fmt.Sprintf("pgdata/%d", i))
			}
			b = writeTestBackup(t, r, files, b)
			time.Sleep(3 * DefaultGrace)
			prune(t, r, 1, DefaultGrace)
			time.Sleep(DefaultGrace)
			before := sum(packKeys(t, r.store))
			report := repack(t, r, PruneOptions{Grace: DefaultGrace})
			if after := sum(packKeys(t, r.store)); report.Repacked.Packs == 0 || after > before*2/3 {
				t.Errorf("with %d files left: %d bytes instead of %d, %+v", n, after, before, report.Repacked)
			}
			checkFiles(t, b, files)
			checkClean(t, r)
		}
		if newest := slices.Max(slices.Collect(maps.Keys(packKeys(t, r.store)))); !strings.HasSuffix(newest, ".5") && len(editionsAmong(packKeys(t, r.store))) == 0 {
			t.Errorf("the last is %s", newest)
		}
	})
}

// The limit is not exceeded, and what was left comes next time.
func TestRepackLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newMemRepository(t)
		b, files := churned(t, r)
		time.Sleep(3 * DefaultGrace)
		prune(t, r, 1, 0)
		const limit = 1 << 20
		rounds := 0
		for ; rounds < 50; rounds++ {
			got := repack(t, r, PruneOptions{RepackLimit: limit}).Repacked
			if got.Read+got.Written > limit+limit/8 { // tables of contents come on top
				t.Errorf("%+v with a limit of %d", got, limit)
			}
			if got.Packs == 0 {
				break
			}
		}
		if rounds < 2 {
			t.Errorf("%d prunes did it all", rounds)
		}
		checkFiles(t, b, files)
		checkClean(t, r)
	})
}
