package repo

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgthaw/repo/store"
)

var errFault = errors.New("the medium failed")

// faulty is a store whose operation number at fails, or is done and reported as failed; and all after it, if it dies.
type faulty struct {
	store.Store
	at         int
	kept, dies bool
	gate       func() // waits for its turn; nil: it is always its turn

	n int // operations so far
}

// fault tells for an operation whether it is done, and what is said of it.
func (f *faulty) fault() (do bool, err error) {
	if f.gate != nil {
		f.gate()
	}
	f.n++
	if f.n == f.at {
		return f.kept, errFault
	}
	if f.dies && f.at > 0 && f.n > f.at {
		return false, errFault
	}
	return true, nil
}

func (f *faulty) Put(ctx context.Context, key string, body []byte) error {
	do, fault := f.fault()
	if do {
		if err := f.Store.Put(ctx, key, body); err != nil {
			return err
		}
	}
	return fault
}

func (f *faulty) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	if _, err := f.fault(); err != nil {
		return nil, err
	}
	return f.Store.Get(ctx, key, off, n)
}

func (f *faulty) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	if _, err := f.fault(); err != nil {
		return func(yield func(store.Object, error) bool) { yield(store.Object{}, err) }
	}
	return f.Store.List(ctx, prefix)
}

func (f *faulty) Delete(ctx context.Context, key string) error {
	do, fault := f.fault()
	if do {
		if err := f.Store.Delete(ctx, key); err != nil {
			return err
		}
	}
	return fault
}

func keysIn(t *testing.T, s store.Store) (keys []string) {
	t.Helper()
	for o, err := range s.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, o.Key)
	}
	return keys
}

// checkMade opens what Init made: it has the slots of these keys, and nothing else.
func checkMade(t *testing.T, s store.Store, keys ...Key) {
	t.Helper()
	r, err := openStore(t.Context(), s, "mem", Options{Keys: keys})
	if err != nil {
		t.Fatalf("%v; there is %q", err, keysIn(t, s))
	}
	slots, err := r.KeySlots(t.Context())
	if err != nil || len(slots) != len(keys) {
		t.Fatalf("%d slots for %d keys, %v", len(slots), len(keys), err)
	}
	for _, slot := range slots {
		if slot.Foreign {
			t.Errorf("slot %s is foreign", slot.ID)
		}
	}
}

// TestInitFails has each operation of an Init fail once: then nothing is left, or the repository is there and may be.
func TestInitFails(t *testing.T) {
	keys := []Key{newTestKey(t), newTestKey(t)}
	for _, kept := range []bool{false, true} {
		for at := 1; ; at++ {
			s := store.NewMem()
			f := &faulty{Store: s, at: at, kept: kept}
			_, err := initStore(t.Context(), f, "mem", Options{Keys: keys})
			if f.n < at {
				break
			}
			left := keysIn(t, s)
			switch {
			case err == nil: // what failed was the sweep
				checkMade(t, s, keys...)
			case errors.Is(err, ErrPerhapsMade):
				checkMade(t, s, keys...)
			case len(left) > 0:
				t.Errorf("operation %d fails (kept %v): %v, and leaves %q", at, kept, err, left)
			}
			if !errors.Is(err, errFault) && err != nil {
				t.Errorf("operation %d fails (kept %v): %v", at, kept, err)
			}
		}
	}
}

// TestInitDies has an Init die at each operation: the next one makes its repository, encrypted or not.
func TestInitDies(t *testing.T) {
	first, second := newTestKey(t), newTestKey(t)
	for _, keys := range [][]Key{{second}, nil} {
		for at := 1; ; at++ {
			s := store.NewMem()
			f := &faulty{Store: s, at: at, dies: true}
			_, err := initStore(t.Context(), f, "mem", Options{Keys: []Key{first, first}})
			if f.n < at {
				break
			}
			_, again := initStore(t.Context(), s, "mem", Options{Keys: keys})
			switch {
			case errors.Is(again, ErrRepositoryExists) && (err == nil || errors.Is(err, ErrPerhapsMade)):
				checkMade(t, s, first, first)
			case again != nil:
				t.Errorf("after dying at operation %d: %v", at, again)
			default:
				checkMade(t, s, keys...)
			}
		}
	}
}

// TestInitsAtOnce interleaves the operations of Inits at random, of which some die: one makes its repository at most, and
// nobody takes its slots away.
func TestInitsAtOnce(t *testing.T) {
	const inits = 3
	keys := make([]Key, inits)
	for i := range keys {
		keys[i] = newTestKey(t)
	}
	for seed := range uint64(150) {
		random := rand.New(rand.NewPCG(seed, 0))
		s := store.NewMem()
		errs := interleaved(t.Context(), random, s, keys)
		for i, err := range errs {
			if err != nil && !errors.Is(err, ErrRepositoryExists) && !errors.Is(err, errFault) {
				t.Errorf("seed %d: %d: %v", seed, i, err)
			}
		}
		checkOneMade(t, fmt.Sprintf("seed %d", seed), s, keys, errs)
	}
}

// checkOneMade: the repository, if there is one, opens with the key of one whose Init was done, or may have been, and with no
// other. Who died may have left a slot, which is foreign.
func checkOneMade(t *testing.T, what string, s store.Store, keys []Key, errs []error) {
	t.Helper()
	if _, err := s.Get(t.Context(), configKey, 0, -1); err != nil {
		if slices.Contains(errs, nil) {
			t.Fatalf("%s: there is no repository after %v", what, errs)
		}
		if _, err := initStore(t.Context(), s, "mem", Options{Keys: keys}); err != nil {
			t.Errorf("%s: nobody made it, and now: %v", what, err)
		}
		return
	}
	opened := 0
	for i, k := range keys {
		r, err := openStore(t.Context(), s, "mem", Options{Keys: []Key{k}})
		if (err == nil) != (errs[i] == nil) && !errors.Is(errs[i], ErrPerhapsMade) {
			t.Errorf("%s: Init %d: %v, Open: %v; there is %q", what, i, errs[i], err, keysIn(t, s))
		}
		if err != nil {
			continue
		}
		opened++
		slots, err := r.KeySlots(t.Context())
		slots = slices.DeleteFunc(slots, func(s KeySlot) bool { return s.Foreign })
		if err != nil || len(slots) != 1 {
			t.Errorf("%s: %d genuine slots, %v", what, len(slots), err)
		}
	}
	if opened != 1 {
		t.Errorf("%s: %d keys open it", what, opened)
	}
}

// interleaved runs an Init for each key, one operation at a time, in random order; one in three dies somewhere.
func interleaved(ctx context.Context, random *rand.Rand, s store.Store, keys []Key) []error {
	var turn sync.Cond
	turn.L = &sync.Mutex{}
	waiting, granted, ended := map[int]bool{}, -1, map[int]bool{}
	errs := make([]error, len(keys))
	var all sync.WaitGroup
	for i, k := range keys {
		f := &faulty{Store: s, dies: true}
		if random.IntN(3) == 0 {
			f.at = 1 + random.IntN(9)
		}
		f.gate = func() {
			turn.L.Lock()
			defer turn.L.Unlock()
			waiting[i] = true
			turn.Broadcast()
			for granted != i {
				turn.Wait()
			}
			granted = -1
			delete(waiting, i)
		}
		all.Go(func() {
			_, errs[i] = initStore(ctx, f, "mem", Options{Keys: []Key{k}})
			turn.L.Lock()
			defer turn.L.Unlock()
			ended[i] = true
			turn.Broadcast()
		})
	}
	turn.L.Lock()
	for len(ended) < len(keys) {
		if granted >= 0 || len(waiting)+len(ended) < len(keys) {
			turn.Wait()
			continue
		}
		for granted = random.IntN(len(keys)); !waiting[granted]; granted = random.IntN(len(keys)) {
		}
		turn.Broadcast()
	}
	turn.L.Unlock()
	all.Wait()
	return errs
}

// TestInitLeavesOthersAlone: what only looks like key slots is no repository that died.
func TestInitLeavesOthersAlone(t *testing.T) {
	for _, key := range []string{"keys/id_rsa", "keys/0123456789abcdef", "keys/0123456789abcdef/x", "cat.jpg"} {
		s := store.NewMem()
		if err := s.Put(t.Context(), key, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		if _, err := initStore(t.Context(), s, "mem", Options{}); !errors.Is(err, ErrNotEmpty) {
			t.Errorf("%s: %v", key, err)
		}
		if left := keysIn(t, s); len(left) != 1 {
			t.Errorf("%s: there is %q", key, left)
		}
	}
}

func TestFindKeys(t *testing.T) {
	k, other := newTestKey(t), newTestKey(t)
	var asked []Place
	find := func(keys ...Key) func(Place) ([]Key, error) {
		return func(p Place) ([]Key, error) {
			asked = append(asked, p)
			return keys, nil
		}
	}
	s := store.NewMem()
	if _, err := initStore(t.Context(), s, "mem", Options{FindKeys: find()}); !errors.Is(err, ErrNoKey) || len(keysIn(t, s)) > 0 {
		t.Errorf("no key is found for Init: %v, and there is %q", err, keysIn(t, s))
	}
	made, err := initStore(t.Context(), s, "mem", Options{FindKeys: find(k, passphraseKey(t, "x"))})
	if err != nil {
		t.Fatal(err)
	}
	opened, err := openStore(t.Context(), s, "mem", Options{FindKeys: find(k)})
	if err != nil {
		t.Fatal(err)
	}
	want, _ := made.Place()
	if len(asked) != 3 || asked[1] != want || asked[2].ID != opened.ID() || !asked[2].Passphrase || asked[2].URL != "mem" {
		t.Errorf("keys were looked for at %+v", asked)
	}
	for what, c := range map[string]struct {
		o    Options
		want error
	}{
		"given":       {Options{Keys: []Key{k}, FindKeys: func(Place) ([]Key, error) { return nil, errFault }}, nil},
		"given wrong": {Options{Keys: []Key{other}, FindKeys: find(k)}, ErrWrongKey},
		"found wrong": {Options{FindKeys: find(other)}, ErrWrongKey},
		"not found":   {Options{FindKeys: find()}, ErrNoKey},
		"failed":      {Options{FindKeys: func(Place) ([]Key, error) { return nil, errFault }}, errFault},
	} {
		if _, err := openStore(t.Context(), s, "mem", c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
	}
	plain := store.NewMem()
	if _, err := initStore(t.Context(), plain, "mem", Options{}); err != nil {
		t.Fatal(err)
	}
	n := len(asked)
	if _, err := openStore(t.Context(), plain, "mem", Options{FindKeys: find(k)}); err != nil || len(asked) != n {
		t.Errorf("not encrypted: %v, and a key was looked for %d times", err, len(asked)-n)
	}
}

// TestNoSlotIsDamage: no key is wrong where none could be right.
func TestNoSlotIsDamage(t *testing.T) {
	k, s := newTestKey(t), store.NewMem()
	if _, err := initStore(t.Context(), s, "mem", Options{Keys: []Key{k}}); err != nil {
		t.Fatal(err)
	}
	for _, key := range keysIn(t, s) {
		if key != configKey {
			if err := s.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, o := range []Options{{}, {Keys: []Key{k}}} {
		if _, err := openStore(t.Context(), s, "mem", o); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d keys: %v", len(o.Keys), err)
		}
	}
}

// TestSlotsAreAuthentic changes what a key slot says of itself: it is shown, opens nothing, and does not count as a way in.
func TestSlotsAreAuthentic(t *testing.T) {
	k, other := newTestKey(t), newTestKey(t)
	for what, change := range map[string]func(*KeySlot){
		"label":          func(s *KeySlot) { s.Label = "somebody trusted" },
		"recipient":      func(s *KeySlot) { s.Recipient = other.public },
		"created_at":     func(s *KeySlot) { s.CreatedAt = s.CreatedAt.AddDate(-1, 0, 0) },
		"boundaries":     func(s *KeySlot) { s.Label, s.Recipient = s.Label+s.Recipient[:1], s.Recipient[1:] },
		"authentication": func(s *KeySlot) { s.Authentication = "" },
		"id":             func(s *KeySlot) { s.ID = strings.Repeat("0", 16) },
	} {
		s := store.NewMem()
		r, err := initStore(t.Context(), s, "mem", Options{Keys: []Key{k}})
		if err != nil {
			t.Fatal(err)
		}
		slots, err := r.KeySlots(t.Context())
		if err != nil || len(slots) != 1 || slots[0].Foreign {
			t.Fatalf("%+v, %v", slots, err)
		}
		good, bad := slots[0], slots[0]
		change(&bad)
		if err := errors.Join(s.Delete(t.Context(), good.key()), putKeySlot(t.Context(), s, bad)); err != nil {
			t.Fatal(err)
		}
		if slots, err = r.KeySlots(t.Context()); err != nil || len(slots) != 1 || !slots[0].Foreign {
			t.Errorf("%s: %+v, %v", what, slots, err)
		}
		if _, err := openStore(t.Context(), s, "mem", Options{Keys: []Key{k}}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: it opens: %v", what, err)
		}
		added, err := r.AddKey(t.Context(), other, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := r.RemoveKey(t.Context(), added.ID); !errors.Is(err, ErrLastKey) {
			t.Errorf("%s: the last good slot is removed: %v", what, err)
		}
		if err := r.RemoveKey(t.Context(), bad.ID); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		checkMade(t, s, other)
	}
}
