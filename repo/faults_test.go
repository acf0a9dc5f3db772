package repo

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

var errInjected = errors.New("injected fault")

// fault is how an operation of a store fails.
type fault int

const (
	lost fault = iota + 1 // it is not done
	kept                  // it is done, but reported failed
)

func (f fault) String() string { return [...]string{"", "lost", "kept"}[f] }

// faultyMem lets operations of a store fail, by their number from 1.
type faultyMem struct {
	*store.Mem

	mu     sync.Mutex
	n      int
	faults map[int]fault
	dies   bool // after the last of the faults nothing is done any more
	trace  []string
}

// next counts an operation and says how it fails.
func (s *faultyMem) next(op, key string) fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	s.trace = append(s.trace, op+" "+key)
	f, armed := s.faults[s.n]
	if s.dies && !armed && s.n > slices.Max(slices.Collect(maps.Keys(s.faults))) {
		return lost
	}
	return f
}

// heal ends all faults.
func (s *faultyMem) heal() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults, s.dies = nil, false
}

// do runs an operation, or fails instead or as well.
func (f fault) do(op func() error) error {
	var err error
	if f != lost {
		err = op()
	}
	if f != 0 {
		return errInjected
	}
	return err
}

func (s *faultyMem) Put(ctx context.Context, key string, body []byte) error {
	return s.next("put", key).do(func() error { return s.Mem.Put(ctx, key, body) })
}

func (s *faultyMem) Delete(ctx context.Context, key string) error {
	return s.next("delete", key).do(func() error { return s.Mem.Delete(ctx, key) })
}

func (s *faultyMem) Get(ctx context.Context, key string, off, n int64) (b []byte, err error) {
	err = s.next("get", key).do(func() error { b, err = s.Mem.Get(ctx, key, off, n); return err })
	if err != nil {
		return nil, err
	}
	return b, nil
}

// List fails at its end: what it yielded before is right.
func (s *faultyMem) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		f := s.next("list", prefix)
		for o, err := range s.Mem.List(ctx, prefix) {
			if !yield(o, err) {
				return
			}
		}
		if f != 0 {
			yield(store.Object{}, errInjected)
		}
	}
}

// history is a repository's life on a faulty store, in steps that a person would repeat if they failed.
type history struct {
	ctx     context.Context
	s       *faultyMem
	keys    []Key
	r       *Repository
	wrote   map[string]testFiles // by id: backups that were reported made
	untold  map[string]testFiles // published, but reported failed
	last    *Backup
	next    testFiles // of the backup that is being made
	wal     pg.WALName
	content []byte
}

type step struct {
	name string
	do   func(h *history) error
}

var walStep = step{"wal", func(h *history) error { return h.r.PutWAL(h.ctx, "main", h.wal, h.content) }}

var lifeSteps = []step{
	{"init", (*history).init},
	{"bind", func(h *history) error {
		_, err := h.r.BindCluster(h.ctx, "main", testSystemID, 16<<20)
		return err
	}},
	walStep,
	{"backup", func(h *history) error { return h.backup(smallFiles(), nil) }},
	walStep,
	{"second backup", func(h *history) error { return h.backup(changedFiles(smallFiles()), h.last) }},
	{"key add", (*history).addKey},
	{"check", func(h *history) error { return soundRepository(h.ctx, h.r, h.all()) }},
}

func newHistory(ctx context.Context, faults map[int]fault, dies bool, keys []Key) *history {
	return &history{ctx: ctx, s: &faultyMem{Mem: store.NewMem(), faults: faults, dies: dies}, keys: keys, wrote: map[string]testFiles{}, untold: map[string]testFiles{},
		wal: pg.WALName{Kind: pg.WALHistory, Timeline: 2}, content: []byte("1\t0/3000000\tno reason\n")}
}

func (h *history) init() error {
	r, err := initStore(h.ctx, h.s, "faulty", Options{Keys: h.keys})
	if errors.Is(err, ErrRepositoryExists) { // the first attempt, which was reported failed
		r, err = openStore(h.ctx, h.s, "faulty", Options{Keys: h.keys})
	}
	if err == nil {
		h.r = r
	}
	return err
}

func (h *history) backup(files testFiles, prior *Backup) error {
	h.next = files
	m, err := h.r.WriteBackup(h.ctx, "main", BackupOptions{Prior: prior, Workers: 1}, func(ctx context.Context, w *BackupWriter) (Manifest, error) {
		return testManifest(), writeFiles(w, files)
	})
	if err == nil {
		h.last, h.wrote[m.ID] = h.r.OpenBackup(m), files
	}
	return err
}

func (h *history) addKey() error {
	if len(h.keys) == 0 {
		return nil
	}
	_, err := h.r.AddKey(h.ctx, h.keys[0], "again")
	return err
}

// all are the backups that may be listed. It is asked for after every failure.
func (h *history) all() map[string]testFiles {
	all := maps.Clone(h.wrote)
	for o := range h.s.Mem.List(h.ctx, backupsRoot) {
		name, suffix, _ := splitBackupKey(o.Key)
		if suffix == manifestSuffix && h.wrote[name.Backup] == nil && h.untold[name.Backup] == nil {
			h.untold[name.Backup] = h.next
		}
	}
	maps.Copy(all, h.untold)
	return all
}

func (h *history) stored() []string {
	var keys []string
	for o := range h.s.Mem.List(h.ctx, "") {
		keys = append(keys, o.Key)
	}
	return keys
}

// live goes through the steps. One that fails is repeated without faults, in a new process if the old one died.
func (h *history) live(steps []step) error {
	for _, st := range steps {
		before := h.stored()
		err := st.do(h)
		if err == nil {
			continue
		}
		if !errors.Is(err, errInjected) {
			return fmt.Errorf("%s: %w", st.name, err)
		}
		claimed := strings.Contains(err.Error(), "nothing of it is left")
		if after := h.stored(); claimed && !slices.Equal(before, after) {
			return fmt.Errorf("%s says %q, but there is %q", st.name, err, slices.DeleteFunc(after, func(k string) bool { return slices.Contains(before, k) }))
		}
		died := h.s.dies
		h.s.heal()
		if err := h.sound(); err != nil {
			return fmt.Errorf("after %s failed: %w", st.name, err)
		}
		if died && h.r != nil {
			if h.r, err = openStore(h.ctx, h.s, "faulty", Options{Keys: h.keys}); err != nil {
				return fmt.Errorf("after %s died: %w", st.name, err)
			}
		}
		if err := st.do(h); err != nil {
			return fmt.Errorf("%s, repeated: %w", st.name, err)
		}
	}
	h.s.heal()
	return h.sound()
}

// sound looks at what there is with fresh eyes.
func (h *history) sound() error {
	r, err := openStore(h.ctx, h.s.Mem, "mem", Options{Keys: h.keys})
	if errors.Is(err, ErrNoRepository) {
		return nil
	}
	if err != nil {
		return err
	}
	defer r.Close()
	if err := soundRepository(h.ctx, r, h.all()); err != nil {
		return err
	}
	for id := range h.wrote {
		if _, err := r.Manifest(h.ctx, "main", id); err != nil {
			return fmt.Errorf("backup %s, which was reported made: %w", id, err)
		}
	}
	return nil
}

// smallLife is short enough for every pair of faults.
var smallLife = []step{lifeSteps[0], lifeSteps[1], walStep, {"backup", func(h *history) error {
	return h.backup(testFiles{"pgdata/PG_VERSION": []byte("15\n")}, h.last)
}}}

// TestCrashFaults lets each operation of a repository's life fail, lost or kept but reported failed, and two of them; and lets
// the writer die at each. Nothing is damaged, what is said of what was left is true, and whoever tries again succeeds.
func TestCrashFaults(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		rng := rand.New(rand.NewPCG(4, 0))
		k := &faultCampaign{t: t, keys: keys, steps: lifeSteps}
		k.total = k.try(nil, false)
		singles := k.faults(func(i int) []map[int]fault { return []map[int]fault{{i: lost}, {i: kept}} })
		k.tryAll(rng, singles, 3)
		// After one fault the second one is mostly in what cleans up, or in the attempt after.
		k.tryAll(rng, k.faults(func(i int) []map[int]fault { return pairs(i, i+1+rng.IntN(20)) }), 2)

		small := &faultCampaign{t: t, keys: keys, steps: smallLife}
		small.total = small.try(nil, false)
		small.tryAll(rng, small.faults(func(i int) (all []map[int]fault) {
			for j := i + 1; j <= small.total; j++ {
				all = append(all, pairs(i, j)...)
			}
			return all
		}), 8)
		t.Logf("%d operations, %d runs; %d operations, %d runs", k.total, k.tried, small.total, small.tried)
	})
}

func pairs(i, j int) []map[int]fault {
	return []map[int]fault{{i: lost, j: lost}, {i: lost, j: kept}, {i: kept, j: lost}, {i: kept, j: kept}}
}

type faultCampaign struct {
	t            *testing.T
	keys         []Key
	steps        []step
	total, tried int
}

// faults gathers what can go wrong from each operation on.
func (k *faultCampaign) faults(from func(i int) []map[int]fault) (all []map[int]fault) {
	for i := 1; i <= k.total; i++ {
		all = append(all, from(i)...)
	}
	return all
}

// tryAll tries all faults; make check tries a few.
func (k *faultCampaign) tryAll(rng *rand.Rand, all []map[int]fault, few int) {
	if crashRounds(k.t) == 0 {
		rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		all = all[:few]
	}
	for _, faults := range all {
		k.try(faults, false)
		k.try(faults, true)
	}
}

// try lives a life and returns how many operations it took.
func (k *faultCampaign) try(faults map[int]fault, dies bool) int {
	h := newHistory(k.t.Context(), faults, dies, k.keys)
	if err := h.live(k.steps); err != nil {
		k.t.Errorf("%s of %d, dies: %v: %v", describe(faults, h.s.trace), k.total, dies, err)
	}
	k.tried++
	return h.s.n
}

// describe names the operations that failed.
func describe(faults map[int]fault, trace []string) string {
	var all []string
	for _, i := range slices.Sorted(maps.Keys(faults)) {
		if i <= len(trace) {
			all = append(all, fmt.Sprintf("%d (%s) %s", i, trace[i-1], faults[i]))
		}
	}
	return strings.Join(all, ", ")
}
