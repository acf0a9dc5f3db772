package repo

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// testMemory is a host's.
type testMemory struct {
	mu   sync.Mutex
	urls map[string]string
	seen map[string]Seen
}

func newTestMemory() *testMemory {
	return &testMemory{urls: map[string]string{}, seen: map[string]Seen{}}
}

func (m *testMemory) At(url string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.urls[url]
}

func (m *testMemory) Settle(url, id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.urls[url] = id
}

func (m *testMemory) Seen(url, id string) Seen {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Seen{}
	s.Merge(m.seen[url+id])
	return s
}

func (m *testMemory) Update(url, id string, change func(Seen)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.seen[url+id] == nil {
		m.seen[url+id] = Seen{}
	}
	change(m.seen[url+id])
}

// remembered is a repository in a directory, and the memory of a host that uses it.
type remembered struct {
	*Repository
	t      *testing.T
	dir    string
	memory *testMemory
}

func newRemembered(t *testing.T) remembered {
	t.Helper()
	dir, m := t.TempDir()+"/repo", newTestMemory()
	r, err := Init(t.Context(), dir, Options{Memory: m})
	if err == nil {
		_, err = r.BindCluster(t.Context(), "main", testSystemID, 16<<20)
	}
	if err != nil {
		t.Fatal(err)
	}
	return remembered{r, t, dir, m}
}

// open is what another process of the host has.
func (r remembered) open() remembered {
	r.t.Helper()
	var err error
	if r.Repository, err = Open(r.t.Context(), r.dir, Options{Memory: r.memory}); err != nil {
		r.t.Fatal(err)
	}
	return r
}

// backup makes one that begins in a segment.
func (r remembered) backup(first string) string {
	r.t.Helper()
	n, err := pg.ParseWALName(first)
	if err != nil {
		r.t.Fatal(err)
	}
	m, err := r.WriteBackup(r.t.Context(), "main", BackupOptions{}, func(context.Context, *BackupWriter) (Manifest, error) {
		m := testManifest()
		m.Timeline, m.WALFirst, m.WALLast = n.Timeline, first, first
		return m, nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return m.ID
}

// wal puts what looks like WAL in a listing.
func (r remembered) wal(names ...string) {
	r.t.Helper()
	for _, name := range names {
		if err := r.store.Put(r.t.Context(), r.walKey(name), []byte("x")); err != nil {
			r.t.Fatal(err)
		}
	}
}

func (r remembered) walKey(name string) string { return walRoot + "main/" + name[:8] + "/" + name }

// remove takes objects away behind everybody's back.
func (r remembered) remove(keys ...string) {
	r.t.Helper()
	for _, key := range keys {
		if err := os.RemoveAll(r.dir + "/" + key); err != nil {
			r.t.Fatal(err)
		}
	}
}

// loses fails the test unless another process misses exactly these objects.
func (r remembered) loses(want ...string) {
	r.t.Helper()
	lost, err := r.open().Losses(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	var got []string
	for _, l := range lost {
		got = append(got, l.Object)
		if !errors.Is(l, ErrRolledBack) || !strings.Contains(l.Error(), "than this host has seen") {
			r.t.Errorf("%s: %v", l.Object, l)
		}
	}
	if !slices.Equal(got, want) {
		r.t.Errorf("lost are %q, want %q", got, want)
	}
}

const (
	seg1 = "000000010000000000000001"
	seg2 = "000000010000000000000002"
	seg3 = "000000010000000000000003"
	seg9 = "000000020000000000000009"
)

func TestLostBackup(t *testing.T) {
	r := newRemembered(t)
	first := r.backup(seg1)
	r.loses()
	second := r.backup(seg1)
	r.loses()
	r.remove(manifestKey("main", first))
	r.loses() // retention may have done that
	r.remove(manifestKey("main", second))
	r.loses(manifestKey("main", second))
	r.backup(seg1) // is newer
	r.loses()
}

// A mark stays of what a prune has deleted, and is no other backup's.
func TestDeletedBackupIsNotLost(t *testing.T) {
	r := newRemembered(t)
	first, second := r.backup(seg1), r.backup(seg1)
	if err := r.markDeleted(t.Context(), BackupName{"main", first}, "test"); err != nil {
		t.Fatal(err)
	}
	r.remove(manifestKey("main", second))
	mark, err := os.ReadFile(r.dir + "/" + deletedKey("main", first))
	if err == nil {
		err = os.WriteFile(r.dir+"/"+deletedKey("main", second), mark, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.loses(manifestKey("main", second))
	r.remove(deletedKey("main", second))
	if err := r.markDeleted(t.Context(), BackupName{"main", second}, "test"); err != nil {
		t.Fatal(err)
	}
	r.loses()
	if got := r.memory.Seen(r.URL(), r.ID()).cluster("main").Backup; got == second {
		t.Error("it is still remembered")
	}
}

func TestLostCluster(t *testing.T) {
	r := newRemembered(t)
	id := r.backup(seg1)
	r.wal(seg1)
	if _, err := r.BindCluster(t.Context(), "other", testSystemID, 16<<20); err != nil {
		t.Fatal(err)
	}
	r.remove("backups/main", "wal/main", "clusters/main")
	r.loses(manifestKey("main", id), r.walKey(seg1))
	lost, err := r.open().Losses(t.Context(), "other")
	if err != nil || len(lost) > 0 {
		t.Errorf("of another cluster is lost %v, %v", lost, err)
	}
}

func TestLostWAL(t *testing.T) {
	r := newRemembered(t)
	r.backup(seg1)
	r.wal(seg1, seg2, seg3, seg9)
	r.loses()
	r.remove(r.walKey(seg2)) // a gap is no rollback
	r.loses()
	r.remove(r.walKey(seg3), r.walKey(seg9))
	r.loses(r.walKey(seg3), r.walKey(seg9))
	r.wal(seg3 + ".partial") // is that segment
	r.loses(r.walKey(seg9))
}

// Retention leaves the newest backup of a cluster and the WAL from its start on, and nothing else for sure.
func TestExpiredWALIsNotLost(t *testing.T) {
	for _, test := range []struct{ newest, lost string }{
		{seg1, seg3}, {seg2, seg3}, {seg3, seg3}, {"000000010000000000000004", ""}, {seg9, ""},
	} {
		t.Run(test.newest, func(t *testing.T) {
			r := newRemembered(t)
			r.wal(seg1, seg2, seg3)
			r.backup(test.newest)
			r.remove(r.walKey(seg1), r.walKey(seg2), r.walKey(seg3))
			if test.lost != "" {
				r.loses(r.walKey(test.lost))
				return
			}
			r.loses()
			if left := r.memory.Seen(r.URL(), r.ID())["main"].WAL; len(left) > 0 {
				t.Errorf("%v is still remembered", left)
			}
		})
	}
}

// behind is a store whose listings lack some objects.
type behind struct {
	store.Store
	unlisted map[string]bool
	asked    *[]string
}

func (b behind) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	*b.asked = append(*b.asked, "get "+key)
	return b.Store.Get(ctx, key, off, n)
}

func (b behind) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	*b.asked = append(*b.asked, "list "+prefix)
	return func(yield func(store.Object, error) bool) {
		for o, err := range b.Store.List(ctx, prefix) {
			if !b.unlisted[o.Key] && !yield(o, err) {
				return
			}
		}
	}
}

func TestStaleListingLosesNothing(t *testing.T) {
	r := newRemembered(t)
	id := r.backup(seg1)
	r.wal(seg1, seg2)
	r = r.open()
	var asked []string
	r.witness.Store = behind{r.witness.Store, map[string]bool{manifestKey("main", id): true, r.walKey(seg2): true}, &asked}
	lost, err := r.Losses(t.Context())
	if err != nil || len(lost) > 0 {
		t.Errorf("lost are %v, %v", lost, err)
	}
	want := []string{"get " + manifestKey("main", id), "get " + r.walKey(seg2)}
	if !slices.Equal(asked, want) {
		t.Errorf("it asked for %q, want %q", asked, want)
	}
	names, err := r.WALNames(t.Context(), "main")
	if err != nil || len(names) != 1 {
		t.Fatalf("listed are %v, %v", names, err)
	}
	unlisted, err := r.UnlistedWAL(t.Context(), "main", names)
	if err != nil || len(unlisted) != 1 {
		t.Fatalf("not listed are %v, %v", unlisted, err)
	}
	for n, why := range unlisted {
		if n.String() != seg2 || errors.Is(why, ErrRolledBack) {
			t.Errorf("%s: %v", n, why)
		}
	}
}

func TestUnlistedWAL(t *testing.T) {
	r := newRemembered(t)
	r.backup(seg1)
	r.wal(seg1, seg2, seg9)
	r.remove(r.walKey(seg2), r.walKey(seg9))
	r = r.open()
	names, err := r.WALNames(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	unlisted, err := r.UnlistedWAL(t.Context(), "main", names)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{seg2, seg9} {
		n, _ := pg.ParseWALName(name)
		if !errors.Is(unlisted[n], ErrRolledBack) {
			t.Errorf("%s: %v", name, unlisted[n])
		}
	}
	if len(unlisted) != 2 {
		t.Errorf("not listed are %v", unlisted)
	}
}

// A process that has seen more itself notices without a memory that keeps anything.
func TestLossWithinOneProcess(t *testing.T) {
	r := newRemembered(t)
	id := r.backup(seg1)
	r.memory.seen = map[string]Seen{}
	r.remove(manifestKey("main", id))
	lost, err := r.Losses(t.Context())
	if err != nil || len(lost) != 1 {
		t.Errorf("lost are %v, %v", lost, err)
	}
}

func TestReplacedRepositoryAndAccept(t *testing.T) {
	r := newRemembered(t)
	r.backup(seg1)
	if err := os.Rename(r.dir, r.dir+".old"); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), r.dir, Options{}); err != nil { // by somebody else
		t.Fatal(err)
	}
	other := r.open()
	if !errors.Is(other.Replaced(), ErrRolledBack) {
		t.Errorf("another repository is %v", other.Replaced())
	}
	r.loses(configKey)
	given, err := other.Accept(t.Context())
	if err != nil || len(given) != 1 || other.Replaced() != nil || other.open().Replaced() != nil {
		t.Errorf("given up is %v, %v; then %v", given, err, other.open().Replaced())
	}
	r.loses()
}

func TestAccept(t *testing.T) {
	r := newRemembered(t)
	first, second := r.backup(seg1), r.backup(seg1)
	r.wal(seg1, seg2, seg9)
	r.remove(manifestKey("main", second), r.walKey(seg2), r.walKey(seg9))
	r = r.open()
	given, err := r.Accept(t.Context())
	if err != nil || len(given) != 3 {
		t.Errorf("given up is %v, %v", given, err)
	}
	r.loses()
	if got := r.memory.Seen(r.URL(), r.ID())["main"]; got.Backup != first || !maps.Equal(got.WAL, map[pg.Timeline]string{1: seg1}) {
		t.Errorf("remembered is %+v", got)
	}
	if lost, err := r.Losses(t.Context()); err != nil || len(lost) > 0 { // the process that accepted
		t.Errorf("lost are %v, %v", lost, err)
	}
	r.remove(manifestKey("main", first))
	r.loses(manifestKey("main", first))
}

// Whatever lies in a state file: only what can be the key of an object is taken over.
func TestSeenTakesNoNonsense(t *testing.T) {
	s := Seen{}
	s.Merge(Seen{"nobody": nil, "a/b": {Backup: "20260101T000000.000Z-0000"}, "": {WAL: map[pg.Timeline]string{1: seg1}},
		"main": {Backup: "../x", WAL: map[pg.Timeline]string{1: "", 2: seg1, 3: "00000003.history", 4: "00000004/../x"}}})
	for name, c := range s {
		if c.Backup != "" || len(c.WAL) > 0 {
			t.Errorf("%q has %+v", name, c)
		}
	}
}

// What is put is remembered at once, in a memory that others change, too.
func TestWitnessesSideBySide(t *testing.T) {
	r := newRemembered(t)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			r := r.open()
			for j := range 20 {
				r.wal(fmt.Sprintf("%08X%08X%08X", i%2+1, 0, i*20+j))
			}
		})
	}
	all.Wait()
	want := map[pg.Timeline]string{1: fmt.Sprintf("%08X%08X%08X", 1, 0, 6*20+19), 2: fmt.Sprintf("%08X%08X%08X", 2, 0, 7*20+19)}
	if got := r.memory.Seen(r.URL(), r.ID())["main"].WAL; !maps.Equal(got, want) {
		t.Errorf("remembered is %v, want %v", got, want)
	}
}
