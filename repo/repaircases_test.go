package repo

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// TestDerivedPackLists makes the pack lists of all backups anew, those of copies too: each has the digest that the manifest has.
func TestDerivedPackLists(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		source := newCopySource(t, smallFiles(), keys...)
		source.backUp(t, nil)
		source.backUp(t, source.withPages("pgdata/base/5/2", 70, 3, 50))
		to := newDestination(t)
		copyAll(t, source.Repository, to)
		source.backUp(t, testFiles{"pgdata/base/5/1": {}, "pgdata/base/5/9": source.files["pgdata/base/5/3"]})
		copyAll(t, source.Repository, to)
		for _, r := range []*Repository{source.Repository, to} {
			all, err := r.Backups(t.Context(), "main")
			if err != nil || len(all) != 3 {
				t.Fatalf("%d backups, %v", len(all), err)
			}
			for _, m := range all {
				uses, err := (&repairer{r: r}).derivePackList(t.Context(), m)
				if err != nil {
					t.Fatal(err)
				}
				if _, id := r.encodePackList("", uses); id != m.Packs.ID || len(uses) != m.Packs.Count {
					t.Errorf("%s of %s: %+v", m.ID, r.URL(), uses)
				}
			}
		}
	})
}

// TestRepairAlone has another repair under way: nothing is removed, but what needs no removal is done. One whose process is gone is none.
func TestRepairAlone(t *testing.T) {
	k := newWholeRepo(t, nil)
	list, pack := packListKey("main", k.backups[1].m.ID), k.pack(t, classData)
	s := k.with(t, map[string][]byte{list: {}, clusterKey("main"): nil, pack: harms[1].do(k.objects[pack])})
	other := &Session{Info: SessionInfo{document: document{sessionKind, formatVersion}, ID: SessionID{1}, Operation: repairOperation, Host: "elsewhere"}, r: openStored(t, s)}
	if err := other.put(t.Context(), begunSuffix); err != nil {
		t.Fatal(err)
	}
	got := outcomes(repairAll(t, s, nil))
	if want := map[string]Outcome{list: Left, clusterKey("main"): Repaired, pack: Recorded}; !maps.Equal(got, want) {
		t.Errorf("beside another: %v, want %v", got, want)
	}
	if b, err := s.Mem.Get(t.Context(), list, 0, -1); err != nil || len(b) != 0 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if err := s.Mem.Delete(t.Context(), other.Info.ID.key(begunSuffix)); err != nil {
		t.Fatal(err)
	}
	if got := outcomes(repairAll(t, s, nil)); got[list] != Repaired {
		t.Errorf("alone: %v", got)
	}
	for key := range objectsOf(t, s.Mem) {
		if strings.HasPrefix(key, sessionsPrefix) && k.objects[key] == nil {
			t.Errorf("%s is left", key)
		}
	}
}

// TestRepairCluster makes a cluster's document anew from its WAL, where there is no backup, and not from WAL that contradicts itself.
func TestRepairCluster(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		r := inMemory(t, keys...)
		other := inMemory(t, keys...)
		for i, r := range []*Repository{r, other} {
			if _, err := r.BindCluster(t.Context(), "main", testSystemID+uint64(i), damagedSegmentSize); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.PutWAL(t.Context(), "main", damagedSegment(3), damagedWAL(3)); err != nil {
			t.Fatal(err)
		}
		want, err := r.Cluster(t.Context(), "main")
		if err != nil {
			t.Fatal(err)
		}
		putInstead(t, r.store, clusterKey("main"), []byte("no document"))
		if got := outcomes(repairAll(t, r.store, keys)); got[clusterKey("main")] != Repaired {
			t.Errorf("%v", got)
		}
		got, err := openStored(t, r.store, keys...).Cluster(t.Context(), "main")
		want.CreatedAt = got.CreatedAt
		if err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}

		putInstead(t, r.store, clusterKey("nobody"), []byte{})
		if got := outcomes(repairAll(t, r.store, keys)); got[clusterKey("nobody")] != Repaired {
			t.Errorf("a document of nothing: %v", got)
		}
		if _, err := r.Cluster(t.Context(), "nobody"); !errors.Is(err, ErrNoCluster) {
			t.Error(err)
		}
	})
}

// putInstead puts an object in the place of another.
func putInstead(t *testing.T, s store.Store, key string, body []byte) {
	t.Helper()
	if err := errors.Join(s.Delete(t.Context(), key), s.Put(t.Context(), key, body)); err != nil {
		t.Fatal(err)
	}
}

// TestRepairClusterContradicted leaves a cluster's document whose backups do not agree.
func TestRepairClusterContradicted(t *testing.T) {
	r := inMemory(t)
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, damagedSegmentSize); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(2) {
		_, err := r.WriteBackup(t.Context(), "main", BackupOptions{}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
			m := testManifest()
			m.SystemIdentifier += i
			return m, writeFiles(w, tinyFiles())
		})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	putInstead(t, r.store, clusterKey("main"), []byte{})
	if got := outcomes(repairAll(t, r.store, nil)); got[clusterKey("main")] != Left {
		t.Errorf("%v", got)
	}
}

// TestRepairLeaves names what nobody but a person can decide about, and touches nothing of it.
func TestRepairLeaves(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		k := newWholeRepo(t, keys)
		odd, hold := walPrefix("main")+"00000001/nobody's", holdKey("main", k.backups[0].m.ID, "0123abcd")
		session := SessionID{7}.key(begunSuffix)
		s := k.with(t, map[string][]byte{odd: {1}, hold: {2}, session: {3}})
		before := objectsOf(t, s.Mem)
		want := map[string]Outcome{odd: Left, hold: Left, session: Left}
		all := repairAll(t, s, k.keys)
		if got := outcomes(all); !maps.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
		for _, m := range all {
			if m.Next == "" {
				t.Errorf("%s: nothing to do next", m.Object)
			}
		}
		if !maps.EqualFunc(before, objectsOf(t, s.Mem), bytes.Equal) {
			t.Error("something changed")
		}
	})
}

// TestRepairWithForeignConfig has another repository's config in the place of the right one. With its digest key nothing is whole, and yet
// nothing is touched.
func TestRepairWithForeignConfig(t *testing.T) {
	k := newWholeRepo(t, nil)
	other := inMemory(t)
	config, err := other.store.Get(t.Context(), configKey, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	s := k.with(t, map[string][]byte{configKey: config})
	before := objectsOf(t, s.Mem)
	all := repairAll(t, s, nil)
	if len(all) < 5 {
		t.Errorf("%d findings", len(all))
	}
	for _, m := range all {
		if m.Outcome != Left || m.Next == "" {
			t.Errorf("%+v", m)
		}
	}
	if !maps.EqualFunc(before, objectsOf(t, s.Mem), bytes.Equal) {
		t.Error("something changed")
	}
}

// TestPushBesideRepair pushes a WAL file again between its record and its removal: it is not called the same, for it is about to go.
func TestPushBesideRepair(t *testing.T) {
	k := newWholeRepo(t, nil)
	name := damagedSegment(3)
	key := walKey("main", name)
	s := k.with(t, map[string][]byte{key: flipAt(-9)(bytes.Clone(k.objects[key]))})
	r := openStored(t, s)
	if err := r.recordDamage(t.Context(), key, errors.New("a test")); err != nil {
		t.Fatal(err)
	}
	if err := r.PutWAL(t.Context(), "main", name, k.wal[name]); !errors.Is(err, ErrCorrupt) {
		t.Errorf("pushed beside: %v", err)
	}
}

// TestDamageIsForgotten: prune takes away the record of a pack when that goes, and of a WAL file when it is there again.
func TestDamageIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newMemRepository(t)
		files := testFiles{"pgdata/a": incompressible(40), "pgdata/b": incompressible(20)}
		first := writeTestBackup(t, r, files, nil)
		again := pg.WALName{Kind: pg.WALHistory, Timeline: 2}
		if err := r.PutWAL(t.Context(), "main", again, []byte(goldenHistory)); err != nil {
			t.Fatal(err)
		}
		uses, err := r.packList(t.Context(), first.Manifest)
		if err != nil {
			t.Fatal(err)
		}
		pack, wal, gone := uses[0].pack.key(), walKey("main", again), walKey("main", pg.WALName{Kind: pg.WALHistory, Timeline: 3})
		past := walKey("main", pg.WALName{Kind: pg.WALSegment, Timeline: 1}) // it ends before the first backup starts
		for _, key := range []string{pack, wal, gone, past} {
			if err := r.recordDamage(t.Context(), key, errors.New("a test")); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.store.Delete(t.Context(), pack); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		second := writeTestBackup(t, r, files, first)
		checkRecords(t, r, pack, wal, gone, past)
		prune(t, r, 2, DefaultGrace)
		checkRecords(t, r, pack, wal, gone, past) // they are not older than a repair under way may be
		time.Sleep(2*sessionLife + time.Minute)
		prune(t, r, 2, DefaultGrace)
		checkRecords(t, r, pack, gone)
		prune(t, r, 1, DefaultGrace)
		time.Sleep(DefaultGrace + time.Minute)
		prune(t, r, 1, DefaultGrace)
		checkRecords(t, r, gone) // of WAL that a backup may lead to
		checkFiles(t, second, files)
	})
}

func checkRecords(t *testing.T, r *Repository, want ...string) {
	t.Helper()
	objects, err := r.damagedObjects(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, o := range objects {
		got[o.Key] = true
	}
	for _, key := range want {
		if !got[key] {
			t.Errorf("%s is not recorded any more", key)
		}
		delete(got, key)
	}
	for key := range got {
		t.Errorf("%s is still recorded", key)
	}
}

// TestCopyOntoDamage copies to a destination a pack of which is recorded as damaged: the new copy does not use it, and is whole.
func TestCopyOntoDamage(t *testing.T) {
	for _, class := range []byte{classData, classHot, classMeta} {
		source := newCopySource(t, smallFiles())
		source.backUp(t, nil)
		to := inMemory(t)
		copyAll(t, source.Repository, to)
		old := onlyBackup(t, to)
		uses, err := to.packList(t.Context(), old)
		if err != nil {
			t.Fatal(err)
		}
		var bad PackID
		for _, u := range uses {
			header, err := to.store.Get(t.Context(), u.pack.key(), 0, packHeaderSize)
			if err != nil {
				t.Fatal(err)
			}
			if header[8] == class {
				bad = u.pack
			}
		}
		b, err := to.store.Get(t.Context(), bad.key(), 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		putInstead(t, to.store, bad.key(), flipAt(packHeaderSize+3)(b))
		if got := outcomes(repairAll(t, to.store, nil)); got[bad.key()] != Recorded {
			t.Fatalf("class %c: %v", class, got)
		}
		source.backUp(t, source.withPages("pgdata/base/5/2", 70, 3))
		to = openStored(t, to.store)
		copyAll(t, source.Repository, to)
		all, err := to.Backups(t.Context(), "main")
		if err != nil || len(all) != 2 {
			t.Fatalf("%d backups, %v", len(all), err)
		}
		if uses, err = to.packList(t.Context(), all[1]); err != nil {
			t.Fatal(err)
		}
		for _, u := range uses {
			if u.pack == bad {
				t.Errorf("class %c: the new copy uses the damaged pack", class)
			}
		}
		for name, content := range source.files {
			if err := (wroteBackup{all[1], source.files}).checkRange(t.Context(), openStored(t, to.store), name, 0, int64(len(content))); err != nil {
				t.Errorf("class %c: %v", class, err)
			}
		}
	}
}

func onlyBackup(t *testing.T, r *Repository) *Manifest {
	t.Helper()
	all, err := r.Backups(t.Context(), "main")
	if err != nil || len(all) != 1 {
		t.Fatalf("%d backups, %v", len(all), err)
	}
	return all[0]
}

// TestRemovedWALIsNotLost: a host that has seen a WAL file which a repair then removed does not take the repository for an older one.
func TestRemovedWALIsNotLost(t *testing.T) {
	k := newWholeRepo(t, nil)
	name := pg.WALName{Kind: pg.WALSegment, Timeline: 1, Seg: damagedSegment(5).Seg, Log: damagedSegment(5).Log}
	s := k.with(t, map[string][]byte{walKey("main", name): {}})
	if got := outcomes(repairAll(t, s, nil)); got[walKey("main", name)] != Removed {
		t.Fatalf("%v", got)
	}
	r := openStored(t, s)
	lost, err := r.lostWAL(t.Context(), "main", 1, name.String())
	if lost != nil || err != nil {
		t.Errorf("%v, %v", lost, err)
	}
	if err := s.Mem.Delete(t.Context(), damagedKey(walKey("main", name))); err != nil {
		t.Fatal(err)
	}
	if lost, err := r.lostWAL(t.Context(), "main", 1, name.String()); lost == nil || err != nil {
		t.Errorf("without its record: %v, %v", lost, err)
	}
}

// TestCrashRepair damages a repository at random, repairs it, and makes a backup that compares with the newest one. Whatever was not damaged is
// as it was, a second repair finds no more than the first has left, and the new backup is whole.
//
// PGTHAW_CRASH_ROUNDS times 100 damages, without it 8; PGTHAW_SEED repeats the choices.
func TestCrashRepair(t *testing.T) {
	damages := max(8, 100*crashRounds(t))
	bothSeals(t, func(t *testing.T, keys ...Key) {
		if len(keys) > 0 {
			keys = append(keys, newTestKey(t))
		}
		c := newDamageCampaign(t, keys)
		k := &wholeRepo{wrote: c.wrote, keys: keys, objects: c.bodies, r: c.r}
		made := 0
		for i := range damages {
			d := c.flip()
			if i%2 == 0 {
				d.undo()
				d = c.worse()
			}
			bodies := maps.Clone(d.bodies)
			for key, b := range bodies {
				bodies[key] = bytes.Clone(b) // a flip is undone in place
			}
			d.undo()
			if k.repairCrashed(t, d.what, bodies) {
				made++
			}
		}
		t.Logf("%d damages, %d backups after them", damages, made)
		if made < damages/4 {
			t.Error("hardly any backup could be made")
		}
	})
}

// repairCrashed tells whether the next backup could be made.
func (k *wholeRepo) repairCrashed(t *testing.T, what string, damage map[string][]byte) bool {
	t.Helper()
	s := k.with(t, damage)
	r, err := openStore(t.Context(), s, "memory", Options{Keys: k.keys})
	if err != nil {
		return false // config, or the keys
	}
	defer r.Close()
	first := map[string]Outcome{}
	if _, err := r.Repair(t.Context(), CheckOptions{ReadData: true}, func(m Remedy) { first[m.Object] = m.Outcome }); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	after := objectsOf(t, s.Mem)
	for key, b := range k.objects {
		if _, damaged := damage[key]; !damaged && !bytes.Equal(after[key], b) {
			t.Errorf("%s: %s is not as it was", what, key)
		}
	}
	for _, m := range repairAll(t, s, k.keys) {
		if did := first[m.Object]; did != m.Outcome {
			t.Errorf("%s: %s: %q, and then %q: %v", what, m.Object, did, m.Outcome, m.Err)
		}
	}
	return k.backupCrashed(t, what, s)
}

func (k *wholeRepo) backupCrashed(t *testing.T, what string, s store.Store) bool {
	t.Helper()
	r := openStored(t, s, k.keys...)
	prior := k.backups[1]
	m, err := r.WriteBackup(t.Context(), "main", BackupOptions{Prior: r.OpenBackup(prior.m)}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		return testManifest(), writeFiles(w, prior.files)
	})
	if err != nil {
		return false
	}
	for name, content := range prior.files {
		if err := (wroteBackup{m, prior.files}).checkRange(t.Context(), openStored(t, s, k.keys...), name, 0, int64(len(content))); err != nil {
			t.Errorf("%s: the next backup: %v", what, err)
		}
	}
	return true
}
