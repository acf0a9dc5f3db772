package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgthaw/repo/store"
)

// tinyChurn is a repository whose packs are mostly dead, a kilobyte each, and its one listed backup.
func tinyChurn(t testing.TB, r *Repository) (*Backup, testFiles) {
	t.Helper()
	files := testFiles{}
	for i := range 8 {
		files[fmt.Sprintf("pgdata/%d", i)] = incompressible(1)[i*100:][:700+i]
	}
	b := writeTestBackup(t, r, files, nil)
	for round := range 3 {
		last := b.Manifest.Name()
		files = maps.Clone(files)
		for i := range 5 {
			name := fmt.Sprintf("pgdata/%d", (2*round+i)%8)
			files[name] = bytes.Clone(files[name])
			files[name][0]++
		}
		b = writeTestBackup(t, r, files, b)
		if err := r.markDeleted(t.Context(), last, "only a test"); err != nil {
			t.Fatal(err)
		}
	}
	for o, err := range r.store.List(t.Context(), sessionsPrefix) {
		if err = errors.Join(err, r.store.Delete(t.Context(), o.Key)); err != nil {
			t.Fatal(err)
		}
	}
	return b, files
}

// cloned is another store with the same objects.
func cloned(t testing.TB, s store.Store) *store.Mem {
	t.Helper()
	c := store.NewMem()
	for o, err := range s.List(t.Context(), "") {
		b, getErr := s.Get(t.Context(), o.Key, 0, -1)
		if err = errors.Join(err, getErr, c.Put(t.Context(), o.Key, b)); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// TestCrashRepack lets each operation of a prune that repacks fail, lost or kept but reported failed, and lets it die there. What is
// left is whole, and the next prune makes one object of each pack.
func TestCrashRepack(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		r := newMemRepository(t, keys...)
		b, files := tinyChurn(t, r)
		k := &repackCampaign{t: t, keys: keys, start: r.store, files: map[string]testFiles{b.Manifest.ID: files}}
		k.total = k.try(nil, false)
		var all []map[int]fault
		for i := 1; i <= k.total; i++ {
			all = append(all, map[int]fault{i: lost}, map[int]fault{i: kept})
		}
		if crashRounds(t) == 0 {
			rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
			all = all[:min(len(all), 20)]
		}
		for _, f := range all {
			k.try(f, false)
			k.try(f, true)
		}
		t.Logf("%d operations, %d runs, %d with several objects of one pack", k.total, 2*len(all), k.halves)
	})
}

type repackCampaign struct {
	t      *testing.T
	keys   []Key
	start  store.Store
	files  map[string]testFiles
	total  int
	halves int // runs that left several objects of one pack
}

// try prunes with faults, and then without, and returns how many operations the first prune took.
func (k *repackCampaign) try(faults map[int]fault, dies bool) int {
	s := &faultyMem{Mem: cloned(k.t, k.start)}
	r, err := openStore(k.t.Context(), s, "mem:", Options{Keys: k.keys})
	if err != nil {
		k.t.Fatal(err)
	}
	defer r.Close()
	o := PruneOptions{Apply: true, RepackLimit: 1 << 30}
	s.n, s.trace, s.faults, s.dies = 0, nil, faults, dies
	report, err := r.Prune(k.t.Context(), o)
	n := s.n
	if faults == nil && (err != nil || report.Repacked.Packs < 2) || err != nil && !errors.Is(err, errInjected) {
		k.t.Errorf("%s: %+v, %v", describe(faults, s.trace), report, err)
	}
	s.heal()
	k.sound(faults, s)
	if severalObjects(packKeys(k.t, s.Mem)) {
		k.halves++
	}
	for range 2 { // the first may give way to what the one that failed has left
		if _, err := r.Prune(k.t.Context(), o); err != nil {
			k.t.Errorf("%s: the next prune: %v", describe(faults, s.trace), err)
		}
	}
	if severalObjects(packKeys(k.t, s.Mem)) {
		k.t.Errorf("%s: left are %v", describe(faults, s.trace), packKeys(k.t, s.Mem))
	}
	k.sound(faults, s)
	return n
}

func (k *repackCampaign) sound(faults map[int]fault, s *faultyMem) {
	k.t.Helper()
	r, err := openStore(k.t.Context(), s.Mem, "mem:", Options{Keys: k.keys})
	if err != nil {
		k.t.Fatal(err)
	}
	defer r.Close()
	if err := soundRepository(k.t.Context(), r, k.files); err != nil {
		k.t.Errorf("%s: %v", describe(faults, s.trace), err)
	}
}

// severalObjects tells whether there are several of one pack.
func severalObjects(keys map[string]int64) bool {
	seen := map[string]bool{}
	for key := range keys {
		pack, _, _ := strings.Cut(key, ".")
		if seen[pack] {
			return true
		}
		seen[pack] = true
	}
	return false
}

// Whoever keeps an edition's table goes on when another edition comes, and when another object comes under the same key.
func TestReadWhileEditionsChange(t *testing.T) {
	r := newMemRepository(t)
	b, files := tinyChurn(t, r)
	repack(t, r, PruneOptions{})
	open := coldRepository(r)
	read := func() {
		t.Helper()
		if err := sameFiles(t.Context(), open.OpenBackup(b.Manifest), files); err != nil {
			t.Error(err)
		}
		kept := open.editions
		open.emptyCaches(1)
		open.editions = kept
	}
	read()
	for key, size := range packKeys(t, r.store) {
		id, no, _ := editionOfKey(key)
		if no == 0 {
			continue
		}
		// another edition of the same number, which has more in it, as of a prune that stood still
		e, err := r.newest(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		pieces, err := r.store.Get(t.Context(), key, e.at[0], size-e.at[0])
		if err != nil {
			t.Fatal(err)
		}
		more := newTOC(0)
		more.addAt(packHeaderSize, pieceTree, 0, 1, ID{}, nil)
		for i := range e.toc.kinds {
			more.addAt(e.toc.offsets[i], e.toc.kinds[i], e.toc.lengths[i], e.toc.sizes[i], e.toc.ids[i], e.toc.digests[i])
		}
		k := r.encodeEdition(id, no, e.class, more, pieces)
		next := r.encodeEdition(id, no+1, e.class, e.toc, pieces)
		for _, err := range []error{r.store.Delete(t.Context(), key), r.store.Put(t.Context(), key, k)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		read()
		for _, err := range []error{r.store.Put(t.Context(), id.editionKey(no+1), next), r.store.Delete(t.Context(), key)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		read()
	}
}

// Whatever is wrong with an edition's header, it is the edition that a check names: a flip may make it one of a newer format.
func TestCheckNamesTheEdition(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		r := newMemRepository(t, keys...)
		tinyChurn(t, r)
		repack(t, r, PruneOptions{})
		key := editionsAmong(packKeys(t, r.store))[0]
		whole, err := r.store.Get(t.Context(), key, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		for at := range editionHeaderSize {
			if keys == nil && at >= 16 && at < objectHeaderSize {
				continue // the salt says nothing where nothing is sealed
			}
			damaged := bytes.Clone(whole)
			damaged[at] ^= 0x80
			cold := coldRepository(r)
			cold.store = &damagedStore{Mem: r.store.(*store.Mem), bodies: map[string][]byte{key: damaged}}
			var found []string
			if _, err := cold.Check(t.Context(), CheckOptions{}, func(f Finding) { found = append(found, f.Object) }); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(found, []string{key}) {
				t.Errorf("byte %d of %s: found %v", at, key, found)
			}
		}
	})
}

// A reference to what an edition does not hold is damage, and costs the right files.
func TestCheckFindsWhatAnEditionLacks(t *testing.T) {
	r := newMemRepository(t)
	b, files := tinyChurn(t, r)
	repack(t, r, PruneOptions{})
	e, err := b.Stat(t.Context(), "pgdata/2")
	if err != nil {
		t.Fatal(err)
	}
	m, err := r.fileMap(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	lost := m.chunks[0]
	was, err := r.newest(t.Context(), lost.Pack)
	if err != nil {
		t.Fatal(err)
	}
	object, err := r.store.Get(t.Context(), was.key, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	less, pieces := newTOC(0), []byte{}
	for i := range was.toc.kinds {
		if was.toc.offsets[i] != lost.Offset {
			less.addAt(was.toc.offsets[i], was.toc.kinds[i], was.toc.lengths[i], was.toc.sizes[i], was.toc.ids[i], was.toc.digests[i])
			pieces = append(pieces, object[was.at[i]:was.at[i+1]]...)
		}
	}
	if err := errors.Join(r.store.Delete(t.Context(), was.key), r.store.Put(t.Context(), was.key, r.encodeEdition(lost.Pack, 1, was.class, less, pieces))); err != nil {
		t.Fatal(err)
	}
	r = coldRepository(r)
	var found []Finding
	if _, err := r.Check(t.Context(), CheckOptions{ReadData: true}, func(f Finding) { found = append(found, f) }); err != nil {
		t.Fatal(err)
	}
	if len(found) != 1 || found[0].Object != was.key || fmt.Sprint(found[0].Backups) != fmt.Sprint([]Affected{{"main", b.Manifest.ID, []string{"pgdata/2"}, 1}}) {
		t.Errorf("found %+v", found)
	}
	for name := range files {
		e, err := b.Stat(t.Context(), name)
		if err == nil {
			_, err = readFile(t.Context(), r.OpenBackup(b.Manifest), e)
		}
		if is := errors.Is(err, ErrCorrupt); is != (name == "pgdata/2") || err != nil && !is {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A prune goes on beside a check: what it drops and deletes is no damage.
func TestCheckBesideRepacking(t *testing.T) {
	r := newMemRepository(t)
	b, files := tinyChurn(t, r)
	done := 0
	for after := 1; after <= 30; after++ {
		clone := coldRepository(r)
		clone.store = cloned(t, r.store)
		other := coldRepository(r)
		other.store = &interrupted{Store: clone.store, after: after, do: func() { done += repack(t, clone, PruneOptions{}).Repacked.Packs }}
		checkClean(t, other)
		if err := sameFiles(t.Context(), other.OpenBackup(b.Manifest), files); err != nil {
			t.Error(err)
		}
	}
	if done < 40 {
		t.Errorf("%d packs were repacked meanwhile", done)
	}
}

// interrupted does something before one of its reads.
type interrupted struct {
	store.Store

	mu    sync.Mutex // held while it is done: the check waits
	after int
	do    func()
}

func (s *interrupted) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.after--; s.after == 0 {
		s.do()
	}
	return s.Store.Get(ctx, key, off, n)
}
