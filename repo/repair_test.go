package repo

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// whole is a repository of two backups, three segments and a history file in memory, from which damaged ones are made.
type wholeRepo struct {
	wrote
	keys    []Key
	objects map[string][]byte
	r       *Repository
}

func newWholeRepo(t *testing.T, keys []Key) *wholeRepo {
	t.Helper()
	if len(keys) > 0 {
		keys = append(keys, newTestKey(t)) // so that one slot may be damaged
	}
	s := store.NewMem()
	k := &wholeRepo{keys: keys, r: newDamagedRepository(t, s, keys, nil)}
	k.wrote = writeDamaged(t, k.r, smallFiles())
	k.objects = objectsOf(t, s)
	return k
}

func objectsOf(t *testing.T, s store.Store) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for o, err := range s.List(t.Context(), "") {
		if err == nil {
			all[o.Key], err = s.Get(t.Context(), o.Key, 0, -1)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// with gives a copy in which objects are others, or missing: nil.
func (k *wholeRepo) with(t *testing.T, damage map[string][]byte) *faultyMem {
	t.Helper()
	objects := maps.Clone(k.objects)
	for key, b := range damage {
		if objects[key] = b; b == nil {
			delete(objects, key)
		}
	}
	m, err := storeOf(objects)
	if err != nil {
		t.Fatal(err)
	}
	return &faultyMem{Mem: m}
}

// pack is one that a piece of the newest backup lies in.
func (k *wholeRepo) pack(t *testing.T, class byte) string {
	t.Helper()
	uses, err := k.r.packList(t.Context(), k.backups[1].m)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range uses {
		if b, ok := k.objects[u.pack.key()]; ok && b[8] == class {
			return u.pack.key()
		}
	}
	t.Fatalf("no pack of class %c", class)
	return ""
}

// kinds are one object of each kind, and what repair does about it where it is damaged, and where it is missing.
func (k *wholeRepo) kinds(t *testing.T) (kinds []repairedKind) {
	newest := k.backups[1].m.ID
	kinds = []repairedKind{
		{"data pack", k.pack(t, classData), Recorded, Recorded},
		{"hot pack", k.pack(t, classHot), Recorded, Recorded},
		{"metadata pack", k.pack(t, classMeta), Recorded, Recorded},
		{"pack list", packListKey("main", newest), Repaired, Repaired},
		{"cluster", clusterKey("main"), Repaired, Repaired},
		{"manifest", manifestKey("main", newest), Left, Left},
		{"segment", walKey("main", damagedSegment(4)), Removed, ""},
		{"history", walKey("main", pg.WALName{Kind: pg.WALHistory, Timeline: 2}), Removed, ""},
	}
	for key := range k.objects {
		if strings.HasPrefix(key, keySlotsPrefix) {
			return append(kinds, repairedKind{"key slot", key, Left, ""})
		}
	}
	return kinds
}

type repairedKind struct {
	name             string
	key              string
	damaged, missing Outcome // "": nothing is found
}

// harms are what is done to an object.
var harms = []struct {
	name string
	do   func([]byte) []byte
}{
	{"missing", func([]byte) []byte { return nil }},
	{"flipped", func(b []byte) []byte { return flipAt(len(b) / 2)(bytes.Clone(b)) }},
	{"truncated", func(b []byte) []byte { return bytes.Clone(b[:len(b)-1]) }},
	{"empty", func([]byte) []byte { return []byte{} }},
}

// TestRepair damages an object of each kind. Repair does about it what docs/format.md says, and touches nothing else; what it has
// mended is found whole, and what it has left is found again. The next backup is whole.
func TestRepair(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		k := newWholeRepo(t, keys)
		for _, kind := range k.kinds(t) {
			for _, harm := range harms {
				t.Run(kind.name+" "+harm.name, func(t *testing.T) {
					want := kind.damaged
					if harm.name == "missing" {
						want = kind.missing
					}
					k.repair(t, kind, harm.do(k.objects[kind.key]), want)
				})
			}
		}
	})
}

func (k *wholeRepo) repair(t *testing.T, kind repairedKind, harm []byte, want Outcome) {
	s := k.with(t, map[string][]byte{kind.key: harm})
	before := objectsOf(t, s)
	m := repairAll(t, s, k.keys)
	if want == "" && len(m) == 0 {
		return
	}
	if len(m) != 1 || m[0].Object != kind.key || m[0].Outcome != want {
		t.Fatalf("%s: %+v, want %s", kind.key, m, want)
	}
	if (m[0].Next == "") != (want == Repaired) {
		t.Errorf("next: %q", m[0].Next)
	}
	k.untouched(t, s, before, kind.key, want)
	again := repairAll(t, s, k.keys)
	if found := len(again) > 0; found != (want != Repaired) || found && again[0].Outcome != want {
		t.Errorf("repaired again: %+v", again)
	}
	k.backupAfter(t, s, kind)
	if want == Removed {
		k.pushAgain(t, s, kind.key)
	}
}

// repairAll gives what is found, but for notes.
func repairAll(t *testing.T, s store.Store, keys []Key) (all []Remedy) {
	t.Helper()
	r := openStored(t, s, keys...)
	_, err := r.Repair(t.Context(), CheckOptions{ReadData: true}, func(m Remedy) {
		if !m.Note {
			all = append(all, m)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// untouched compares all other objects with what they were.
func (k *wholeRepo) untouched(t *testing.T, s store.Store, before map[string][]byte, key string, did Outcome) {
	t.Helper()
	after := objectsOf(t, s)
	record := damagedKey(key)
	if recorded := after[record] != nil; recorded != (did == Recorded || did == Removed) {
		t.Errorf("recorded: %v", recorded)
	}
	if there := after[key] != nil; did == Removed && there {
		t.Errorf("%s is still there", key)
	}
	if did == Repaired || did == Removed {
		delete(before, key)
		delete(after, key)
	}
	delete(after, record)
	if !maps.EqualFunc(before, after, bytes.Equal) {
		t.Errorf("%q are not as they were", slices.DeleteFunc(slices.Sorted(maps.Keys(after)), func(k string) bool { return bytes.Equal(before[k], after[k]) }))
	}
}

// backupAfter makes a backup that compares with the newest one, if that can be read, and reads it back.
func (k *wholeRepo) backupAfter(t *testing.T, s store.Store, kind repairedKind) {
	t.Helper()
	r := openStored(t, s, k.keys...)
	prior := r.OpenBackup(k.backups[1].m)
	if kind.name == "manifest" {
		prior = nil
	}
	files := k.backups[1].files
	m := damagedBackup(t, r, files, prior, 5)
	uses, err := r.packList(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range uses {
		if u.pack.key() == kind.key {
			t.Errorf("the next backup uses %s", u.pack)
		}
	}
	for name, content := range files {
		if err := (wroteBackup{m, files}).checkRange(t.Context(), openStored(t, s, k.keys...), name, 0, int64(len(content))); err != nil {
			t.Error(err)
		}
	}
	_, err = r.Check(t.Context(), CheckOptions{ReadData: true}, func(f Finding) {
		if !f.Note && f.Object != kind.key || slices.ContainsFunc(f.Backups, func(a Affected) bool { return a.Backup == m.ID && kind.name != "segment" && kind.name != "history" }) {
			t.Errorf("the next backup: %+v", f)
		}
	})
	if err != nil {
		t.Error(err)
	}
	if small := m.StoredBytes < k.backups[0].m.StoredBytes/2; !small && slices.Contains([]string{"pack list", "cluster", "segment", "history"}, kind.name) {
		t.Errorf("the next backup stores %d bytes", m.StoredBytes)
	}
}

// pushAgain brings what was removed.
func (k *wholeRepo) pushAgain(t *testing.T, s store.Store, key string) {
	t.Helper()
	r := openStored(t, s, k.keys...)
	_, name, err := parseWALKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.WAL(t.Context(), "main", name); !errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNoWAL) {
		t.Errorf("reading what was removed: %v", err) // never the end of WAL
	}
	names, err := r.WALNames(t.Context(), "main")
	if err != nil || !slices.Contains(names, name) {
		t.Errorf("listed: %v, %v", names, err)
	}
	if err := r.PutWAL(t.Context(), "main", name, k.wal[name]); err != nil {
		t.Fatal(err)
	}
	if err := r.PutWAL(t.Context(), "main", name, k.wal[name]); err != nil {
		t.Errorf("pushed twice: %v", err)
	}
	if again := repairAll(t, s, k.keys); len(again) != 0 {
		t.Errorf("pushed again: %+v", again)
	}
}

// TestRepairChangesNothingWhole counts what repair does to a repository without damage: what a check does.
func TestRepairChangesNothingWhole(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		k := newWholeRepo(t, keys)
		s := k.with(t, nil)
		if found := repairAll(t, s, k.keys); len(found) > 0 {
			t.Fatalf("%+v", found)
		}
		repaired := len(s.trace)
		for _, op := range s.trace {
			if !strings.HasPrefix(op, "get ") && !strings.HasPrefix(op, "list ") && !strings.Contains(op, " "+sessionsPrefix) {
				t.Error(op)
			}
		}
		if !maps.EqualFunc(k.objects, objectsOf(t, s.Mem), bytes.Equal) {
			t.Error("not all objects are as they were")
		}
		check := k.with(t, nil)
		if _, err := openStored(t, check, k.keys...).Check(t.Context(), CheckOptions{ReadData: true}, func(Finding) {}); err != nil {
			t.Fatal(err)
		}
		if repaired != len(check.trace) {
			t.Errorf("repair takes %d operations, check %d", repaired, len(check.trace))
		}
	})
}

// TestRepairInterrupted damages one object of each kind at once, and lets each operation of the repair fail, lost or kept, with and without
// the death of the process. What is whole stays, and the next repair mends all that the first one would have.
func TestRepairInterrupted(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		k := newWholeRepo(t, keys)
		damage := map[string][]byte{}
		for _, kind := range k.kinds(t) {
			if kind.name != "manifest" && kind.name != "key slot" && kind.name != "metadata pack" { // without these the pack list cannot be had
				damage[kind.key] = harms[1].do(k.objects[kind.key])
			}
		}
		damage[manifestKey("main", k.backups[0].m.ID)] = []byte{}
		s := k.with(t, damage)
		want := outcomes(repairAll(t, s, k.keys))
		total := len(s.trace)
		every := 1
		switch {
		case crashRounds(t) > 0:
		case testing.Short():
			every = 29
		default:
			every = 7
		}
		runs := 0
		for i := 1; i <= total; i++ {
			if op := s.trace[i-1]; i%every != 0 && (testing.Short() || strings.HasPrefix(op, "get ") || strings.HasPrefix(op, "list ")) {
				continue
			}
			for _, f := range []fault{lost, kept} {
				k.interrupt(t, damage, i, f, want)
				runs++
			}
		}
		t.Logf("%d operations, %d runs", total, runs)
	})
}

func outcomes(all []Remedy) map[string]Outcome {
	did := map[string]Outcome{}
	for _, m := range all {
		did[m.Object] = m.Outcome
	}
	return did
}

func (k *wholeRepo) interrupt(t *testing.T, damage map[string][]byte, at int, f fault, want map[string]Outcome) {
	t.Helper()
	s := k.with(t, damage)
	s.faults, s.dies = map[int]fault{at: f}, at%3 > 0
	if r, err := openStore(t.Context(), s, "memory", Options{Keys: k.keys}); err == nil {
		_, _ = r.Repair(t.Context(), CheckOptions{ReadData: true}, func(Remedy) {}) // it has to have done no harm, whatever it says
	}
	what := fmt.Sprintf("%d, %s, %s", at, s.trace[min(at, len(s.trace))-1], f)
	s.heal()
	for key, b := range objectsOf(t, s.Mem) {
		if was, known := k.objects[key]; known && damage[key] == nil && !bytes.Equal(b, was) {
			t.Errorf("%s: %s is not as it was", what, key)
		}
	}
	for key := range k.objects {
		if _, err := s.Get(t.Context(), key, 0, 0); err != nil && damage[key] == nil {
			t.Errorf("%s: %s: %v", what, key, err)
		}
	}
	got := outcomes(repairAll(t, s, k.keys))
	for key, did := range want {
		if now := got[key]; now != did && !(did == Repaired && now == "") {
			t.Errorf("%s: %s is then %q, without interruption %q", what, key, now, did)
		}
	}
	for _, m := range repairAll(t, s, k.keys) {
		if want[m.Object] == Repaired || want[m.Object] == "" {
			t.Errorf("%s: in the end %s is %v", what, m.Object, m.Err)
		}
	}
}
