package repo

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func startReads(n int) (reads []Span) {
	for i := range n {
		reads = append(reads, Span{fmt.Sprintf("pgdata/base/5/%d with a space", i), int64(i) * PageSize, int64(i+1) * PageSize})
	}
	return reads
}

func startKeys(t *testing.T, r *Repository) (keys []string) {
	t.Helper()
	all, err := r.starts(t.Context(), startsRoot)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range all {
		keys = append(keys, o.Key)
	}
	return keys
}

// TestStartRecord: what was put last is what there is.
func TestStartRecord(t *testing.T) { bothSeals(t, testStartRecord) }

func testStartRecord(t *testing.T, keys ...Key) {
	r := newTestRepository(t, keys...)
	if _, err := r.Start(t.Context(), "main"); !errors.Is(err, ErrNoStart) {
		t.Error(err)
	}
	for n := range 3 {
		s := StartRecord{Cluster: "main", Backup: "b", MadeAt: time.Unix(int64(n), 0).UTC(), Reads: startReads(n * MaxStartReads)}
		if err := r.PutStart(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		got, err := r.Start(t.Context(), "main")
		if err != nil {
			t.Fatal(err)
		}
		s.Reads = s.Reads[:min(n, 1)*MaxStartReads]
		if got.MadeAt != s.MadeAt || !slices.Equal(got.Reads, s.Reads) {
			t.Errorf("%d reads of %v", len(got.Reads), got.MadeAt)
		}
	}
	if err := r.PutStart(t.Context(), StartRecord{Cluster: "other"}); err != nil {
		t.Fatal(err)
	}
	if keys := startKeys(t, r); len(keys) != 2 {
		t.Errorf("there are %v", keys)
	}
}

// TestStartRecordPrune: of each cluster that has a backup the newest one stays.
func TestStartRecordPrune(t *testing.T) {
	r := newTestRepository(t)
	writeTestBackup(t, r, smallFiles(), nil)
	for _, cluster := range []string{"main", "main", "gone"} {
		d := startDocument{document: document{startKind, formatVersion}, Cluster: cluster, Reads: []string{"0+1 pgdata/x"}}
		if err := r.putDocument(t.Context(), fmt.Sprintf("%s%016x", startsPrefix(cluster), len(startKeys(t, r))), d); err != nil {
			t.Fatal(err)
		}
	}
	newest := startKeys(t, r)
	newest = slices.DeleteFunc(newest, func(k string) bool { return !strings.HasPrefix(k, startsPrefix("main")) })[1:]
	for _, apply := range []bool{false, true} {
		before := startKeys(t, r)
		if _, err := r.Prune(t.Context(), PruneOptions{Grace: DefaultGrace, Apply: apply}); err != nil {
			t.Fatal(err)
		}
		want := before
		if apply {
			want = newest
		}
		if got := startKeys(t, r); !reflect.DeepEqual(got, want) {
			t.Errorf("apply %v leaves %v, want %v", apply, got, want)
		}
	}
}

// TestStartRecordDamaged: a check finds it, and a repair takes it away.
func TestStartRecordDamaged(t *testing.T) {
	r := newTestRepository(t)
	writeTestBackup(t, r, smallFiles(), nil)
	if err := r.PutStart(t.Context(), StartRecord{Cluster: "main", Reads: startReads(2)}); err != nil {
		t.Fatal(err)
	}
	key := startKeys(t, r)[0]
	b, err := r.store.Get(t.Context(), key, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := errors.Join(r.store.Delete(t.Context(), key), r.store.Put(t.Context(), key, b)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Start(t.Context(), "main"); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
	var found []Remedy
	if _, err := r.Repair(t.Context(), CheckOptions{}, func(m Remedy) { found = append(found, m) }); err != nil {
		t.Fatal(err)
	}
	if len(found) != 1 || found[0].Object != key || found[0].Outcome != Removed {
		t.Errorf("%+v", found)
	}
	if keys := startKeys(t, r); len(keys) != 0 {
		t.Errorf("left: %v", keys)
	}
}

func FuzzStartRead(f *testing.F) {
	for _, s := range []string{"0+1 pgdata/global/1262", "4294967295+4294967295 a b", "0+0 x", "1+1 ../x", "1 x", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseStartRead(text)
		if err != nil {
			return
		}
		again, err := parseStartRead(formatStartRead(s))
		if err != nil || again != s {
			t.Errorf("%+v encodes to %+v, %v", s, again, err)
		}
	})
}
