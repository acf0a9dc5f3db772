package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// TestCrashSimulation runs writers, readers, prunes, holds, archivers of WAL and checks at once on a store that fails, forgets, repeats and
// delays, with processes that die or stand still at any step and clocks that jump, and after every operation looks at
// what docs/format.md, "Sessions and deletion", promises. A seed that fails fails again: PGTHAW_SIMULATION_SEED is one, or that of a campaign to begin with.
func TestCrashSimulation(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // handing over to another thread is what takes the time
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	first, runs := uint64(1), rounds(200)
	if n, err := strconv.ParseUint(os.Getenv("PGTHAW_SIMULATION_SEED"), 10, 64); err == nil {
		first, runs = n, 1
	}
	if n, err := strconv.Atoi(os.Getenv("PGTHAW_CRASH_ROUNDS")); err == nil {
		runs = 2000 * n
	}
	stats := simStats{}
	for seed := first; seed < first+uint64(runs); seed++ {
		if s := simulate(t, seed, nil, stats); s.violation != nil {
			t.Fatalf("seed %d: %v\n%s", seed, s.violation, s.story())
		}
		if seed%10_000 == 0 {
			t.Logf("%d seeds", seed)
		}
	}
	for _, what := range slices.Sorted(maps.Keys(stats)) {
		t.Logf("%8d %s", stats[what], what)
	}
	for _, what := range []string{"backups made", "manifests put that were marked before", "ErrGivenUp", "prior was deleted", "backups collected", "packs deleted",
		"editions put", "editions deleted", "listings that show what is gone, or not what is there", "sessions given up",
		"WAL deleted", "timelines", "holds in force", "holds that came too late"} {
		if runs >= 1000 && stats[what] == 0 {
			t.Errorf("it never came to this: %s", what)
		}
	}
}

const (
	byPolicy = "not kept by the retention policy"
	byGiveUp = "no sign of life"
)

// simulation is one run.
type simulation struct {
	*simStore
	t        *testing.T
	ctx      context.Context
	template *simTemplate
	fault    *simFault
	server   *simServer    // nil: there is no WAL
	grace    time.Duration // the least that prunes are told

	actors    []*simHandle
	running   int // actors, under simStore.mu
	violation error

	published  map[BackupName]*simBackup
	policy     map[BackupName]bool // some policy wanted it deleted
	relied     map[BackupName]bool // WriteBackup returned nil
	byHand     map[BackupName]bool // somebody wanted it deleted who does not ask for holds
	held       map[BackupName][]*simHeld
	protecting []*simProtection
}

// simBackup is a backup whose manifest was put.
type simBackup struct {
	name   BackupName
	needs  map[string]bool // keys
	pieces simPieces
	files  map[string][]byte

	timeline    pg.Timeline
	first, last uint64 // numbers of its own WAL segments; 0: it has none
	primary     bool
	stop        pg.LSN
}

// simProtection is what a reader may rest on: that as long as its session shows signs of life.
type simProtection struct {
	name  BackupName
	sign  time.Time // when it showed one, by the hosts' clock
	over  bool
	alone bool // it recovers to the backup's own end
}

// simTemplate holds what all repositories of all runs share, and objects of an empty one.
type simTemplate struct {
	*Repository
	wal map[string]simWAL // by name
}

var simTemplateOnce = func() func(t *testing.T) *simTemplate {
	var shared *simTemplate
	return func(t *testing.T) *simTemplate {
		if shared == nil {
			r := newWALRepository(t)
			// The codec makes its channels when it is first used, and those of one run cannot be used in another.
			if _, err := r.codec.decompress(r.codec.compress(nil, []byte("x")), 1); err != nil {
				t.Fatal(err)
			}
			shared = &simTemplate{r, encodeSimWAL(t, r)}
		}
		return shared
	}
}()

// open opens the repository for one process.
func (s *simulation) open(st store.Store) *Repository {
	t := s.template
	r := &Repository{url: "sim:", store: st, config: t.config, log: t.log, digests: t.digests, seals: t.seals, codec: t.codec}
	r.emptyCaches(1 << 20)
	return r
}

// simulate runs one seed.
func simulate(t *testing.T, seed uint64, fault *simFault, stats simStats) *simulation {
	s := &simulation{template: simTemplateOnce(t), fault: fault, published: map[BackupName]*simBackup{}, policy: map[BackupName]bool{},
		relied: map[BackupName]bool{}, byHand: map[BackupName]bool{}, held: map[BackupName][]*simHeld{}}
	synctest.Test(t, func(t *testing.T) {
		cryptotest.SetGlobalRandom(t, seed)
		s.t, s.ctx = t, t.Context()
		s.setUp(seed, stats)
		s.run()
	})
	return s
}

// setUp draws the circumstances.
func (s *simulation) setUp(seed uint64, stats simStats) {
	rng := rand.New(rand.NewPCG(seed, 3))
	st := &simStore{rng: rng, objects: map[string][]*simObject{}, stats: stats, changed: s.changed}
	s.simStore = st
	st.offset = time.Duration(rng.Int64N(int64(200*24*time.Hour))) - 100*24*time.Hour
	st.faults = []int{0, 5, 20, 60}[rng.IntN(4)]
	st.replaces = rng.IntN(4) == 0
	s.grace = []time.Duration{0, time.Hour, DefaultGrace, DefaultGrace}[rng.IntN(4)]
	if s.grace > 0 && rng.IntN(2) == 0 {
		st.stale = s.grace - time.Second
	}
	for o, err := range s.template.store.List(s.ctx, "") {
		b, _ := s.template.store.Get(s.ctx, o.Key, 0, -1)
		if err := errors.Join(err, st.put(o.Key, b)); err != nil {
			s.t.Fatal(err)
		}
	}
	if rng.IntN(2) == 0 {
		s.server = newSimServer()
	}
	kinds := simKinds
	if s.fault != nil {
		kinds = simFaultKinds
		if s.fault.kinds != nil {
			kinds = s.fault.kinds
		}
		s.grace %= DefaultGrace
		st.stale = min(st.stale, max(0, s.grace-time.Second))
		st.faults = max(st.faults, 20)
	}
	for no := range 3 + rng.IntN(6) {
		k := kinds[rng.IntN(len(kinds))]
		if no < 2 {
			k = kinds[no] // a writer and a prune at least
		}
		s.start(k, no, rng.Uint64())
	}
}

// simKind is a kind of process.
type simKind struct {
	name string // of its processes, before a number
	act  func(*simulation, *simHandle, *rand.Rand)
}

var (
	simWriter  = simKind{"writer", (*simulation).write}
	simPrune   = simKind{"prune", (*simulation).prune}
	simDeleter = simKind{"deleter", (*simulation).deleteByHand}
	simArchive = simKind{"archive", (*simulation).archive}
	simHold    = simKind{"hold", (*simulation).hold}
)

// simKinds are those of which chance takes some, a writer and a prune first. What stands here several times is taken as often.
var simKinds = []simKind{simWriter, simPrune, simWriter, simWriter, simPrune, simPrune, {"reader", (*simulation).read}, simDeleter,
	{"check", (*simulation).check}, simArchive, simArchive, {"fetch", (*simulation).fetch}, simHold}

// start starts a process, which waits for the scheduler at once.
func (s *simulation) start(k simKind, no int, seed uint64) {
	h := &simHandle{s: s.simStore, no: no, name: fmt.Sprint(k.name, no), wrote: map[string]bool{}, calm: k.name == "check"}
	if s.fault != nil {
		h.fault, h.still = s.fault.fault(h), s.fault.still
	}
	s.actors = append(s.actors, h)
	s.running++
	go func() {
		h.think(s.ctx)
		k.act(s, h, rand.New(rand.NewPCG(seed, 4)))
		s.mu.Lock()
		defer s.mu.Unlock()
		s.running--
	}()
}

// run is the scheduler: first chance reigns, then everything ends well, time passes, and nothing may be left.
func (s *simulation) run() {
	most := 60 + s.rng.IntN(500)
	for step := 0; s.step(step < most); step++ {
		if step > 20*most {
			s.violate("it does not end")
		}
	}
	if s.violation == nil {
		s.settle()
	}
	s.stats["runs"]++
}

// step does one thing. It returns false when nobody runs any more.
func (s *simulation) step(chaos bool) bool {
	synctest.Wait()
	if s.violation != nil {
		for _, h := range s.actors {
			h.until = time.Time{}
			s.crash(h)
		}
		synctest.Wait()
	}
	if s.running == 0 {
		return false
	}
	if !chaos {
		s.faults = 0
	}
	ready := s.ready()
	switch chance := s.rng.IntN(1000); {
	case len(ready) == 0:
		s.pass(time.Minute + time.Duration(s.rng.Int64N(int64(6*time.Hour))))
	case chaos && chance < 40:
		s.passSomeTime()
	case chaos && chance < 40+s.faults/4:
		s.harm(ready[s.rng.IntN(len(ready))].h)
	case chaos && chance < 70+s.faults && len(s.late) > 0:
		s.carryOutLate(s.rng.IntN(len(s.late)))
	default:
		s.take(ready[s.rng.IntN(len(ready))])
	}
	return true
}

func (s *simulation) passSomeTime() {
	switch s.rng.IntN(8) {
	case 0, 1:
		s.pass(time.Duration(s.rng.Int64N(int64(time.Minute))))
	case 2, 3, 4:
		s.pass(time.Duration(s.rng.Int64N(int64(4 * time.Hour))))
	default:
		s.pass(20*time.Hour + time.Duration(s.rng.Int64N(int64(40*time.Hour))))
	}
}

// harm kills a process, lets it stand still, or moves the store's clock.
func (s *simulation) harm(h *simHandle) {
	switch s.rng.IntN(4) {
	case 0:
		if h.calm {
			return
		}
		s.drop(h)
		s.crash(h)
	case 1, 2:
		if h.calm {
			return
		}
		h.until = time.Now().Add(time.Duration(s.rng.Int64N(int64(100 * time.Hour))))
		s.log = append(s.log, simEvent{time.Now(), h.name, "stands still until " + h.until.UTC().Format("02T15:04:05"), nil})
		s.stats["stood still"]++
	default:
		if s.stale > 0 { // a grace period made shorter, and stale listings, are too much at once
			return
		}
		s.offset += time.Duration(s.rng.Int64N(int64(144*time.Hour))) - 72*time.Hour
		s.log = append(s.log, simEvent{time.Now(), "", "the store's clock jumps to " + s.now().UTC().String(), nil})
		s.stats["clock jumped"]++
		for _, p := range s.protecting {
			p.over = true
		}
	}
}

// pass lets time pass. Sessions show signs of life meanwhile.
func (s *simulation) pass(d time.Duration) {
	s.log = append(s.log, simEvent{time.Now(), "", "time passes", nil})
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(min(time.Until(end), signOfLifeEvery))
		for s.signs() {
		}
	}
}

// signs serves the signs of life of those who do not stand still.
func (s *simulation) signs() (any bool) {
	synctest.Wait()
	for _, op := range s.ready() {
		if strings.HasPrefix(op.key, sessionsPrefix) && strings.HasPrefix(op.class(), op.kind+" sessions.<sign>") {
			s.take(op)
			synctest.Wait() // who waited for that goes on
			any = true
		}
	}
	return any
}

// drop ends what a process may rest on.
func (s *simulation) drop(h *simHandle) {
	if h.protect != nil {
		h.protect.over = true
	}
}

func (s *simulation) violate(format string, args ...any) {
	if s.violation == nil {
		s.violation = fmt.Errorf(format, args...)
		s.log = append(s.log, simEvent{time.Now(), "", "violation: " + s.violation.Error(), nil})
	}
}

// story is the log of a run.
func (s *simulation) story() string {
	var b strings.Builder
	fmt.Fprintf(&b, "grace %s, stale %s, faults %d, replaces %v\n", s.grace, s.stale, s.faults, s.replaces)
	for _, e := range s.log {
		if fmt.Fprintln(&b, e); strings.HasPrefix(e.what, "violation") {
			break
		}
	}
	return b.String()
}

// changed looks at what the store promises, after a put and before a deletion.
func (s *simulation) changed(op *simOp) {
	name, suffix, isBackup := splitBackupKey(op.key)
	switch {
	case op.kind == opDelete:
		s.deleting(op.key)
	case isBackup && suffix == manifestSuffix:
		s.publishes(op, name)
	case isBackup && suffix == deletedSuffix && bytes.Contains(op.body, []byte(byGiveUp)):
		s.stats["sessions given up"]++
		if s.relied[name] && !s.policy[name] {
			s.violate("%s is marked as given up, but its writer relies on it", name)
		}
	case isBackup && suffix == deletedSuffix:
		s.policy[name] = true
		s.byHand[name] = s.byHand[name] || strings.HasPrefix(op.h.name, simDeleter.name)
		s.checkHeld(name, op.no)
	case strings.HasPrefix(op.key, packsRoot):
		if _, no, _ := editionOfKey(op.key); no > 0 {
			s.stats["editions put"]++
		} else {
			op.h.wrote[op.key] = true
		}
	case strings.HasPrefix(op.key, sessionsPrefix) && op.h.protect != nil:
		op.h.protect.sign = time.Now()
	}
}

func (s *simulation) listed(name BackupName) bool {
	return s.object(manifestKey(name.Cluster, name.Backup)) != nil && !s.marked(name)
}

func (s *simulation) marked(name BackupName) bool {
	return s.object(deletedKey(name.Cluster, name.Backup)) != nil
}

// deleting is called before an object is deleted.
func (s *simulation) deleting(key string) {
	for name, b := range s.published {
		if s.listed(name) && s.needed(b, key) {
			s.violate("%s is deleted, which %s needs", key, name)
		}
	}
	for _, p := range s.protecting {
		if time.Since(p.sign) >= sessionLife {
			p.over = true // it has stood still for too long
		}
		if b := s.published[p.name]; b != nil && !p.over && s.needed(b, key) {
			s.violate("%s is deleted, which %s needs, which is being read", key, p.name)
		}
	}
	switch {
	case strings.HasPrefix(key, walRoot):
		s.deletingWAL(key)
	case strings.HasPrefix(key, packsRoot):
		s.stats["packs deleted"]++
		if _, no, _ := editionOfKey(key); no > 0 {
			s.stats["editions deleted"]++
		}
	case strings.HasSuffix(key, manifestSuffix):
		s.stats["backups collected"]++
	case strings.HasSuffix(key, deletedSuffix):
		s.violate("%s is deleted", key)
	}
}

// publishes looks at a backup whose manifest was just put.
func (s *simulation) publishes(op *simOp, name BackupName) {
	s.stats["manifests put"]++
	if s.marked(name) {
		s.stats["manifests put that were marked before"]++
		return
	}
	r := s.open(observer{s.simStore})
	m, err := r.readManifest(s.ctx, name.Cluster, name.Backup)
	if err != nil {
		s.violate("publish %s: %w", name, err)
		return
	}
	uses, err := r.packList(s.ctx, m)
	if err != nil {
		s.violate("publish %s: %w", name, err)
		return
	}
	b := &simBackup{name: name, files: op.want, timeline: m.Timeline, stop: m.StopLSN, first: op.wal.first, last: op.wal.last, primary: op.wal.primary, needs: map[string]bool{op.key: true, packListKey(name.Cluster, name.Backup): true}}
	for _, u := range uses {
		b.needs[u.pack.key()] = true
	}
	s.published[name] = b
	s.checkRecovery(b)
	if b.pieces, err = piecesOf(s.ctx, r.OpenBackup(m)); err != nil {
		s.violate("publish %s: %w", name, err)
	}
	if err := readAll(s.ctx, r.OpenBackup(m), b.files); err != nil {
		s.violate("publish %s: %w", name, err)
	}
}

// readAll compares a backup with what was written.
func readAll(ctx context.Context, b *Backup, want map[string][]byte) error {
	seen := 0
	err := b.Walk(ctx, ".", func(name string, e Entry) error {
		if !e.Mode.IsRegular() {
			return nil
		}
		if e.content.kind == contentWAL { // to read it whole takes too long
			_, err := b.Open(ctx, e)
			return err
		}
		seen++
		got, err := readFile(ctx, b, e)
		if err == nil && !bytes.Equal(got, want[name]) {
			err = fmt.Errorf("%s: other bytes", name)
		}
		return err
	})
	if err == nil && seen != len(want) {
		err = fmt.Errorf("%d files instead of %d", seen, len(want))
	}
	return err
}

// simContents are contents that files may have: a chunk each.
var simContents = func() (all [6][]byte) {
	for i := range all {
		all[i] = incompressible(1)[i*16:][:600+i]
	}
	return all
}()

// write is a process that makes backups.
func (s *simulation) write(h *simHandle, rng *rand.Rand) {
	for range 1 + rng.IntN(3) {
		r := s.open(h)
		var prior *Backup
		if rng.IntN(4) > 0 {
			if m := s.choose(r, rng); m != nil {
				prior = r.OpenBackup(m)
			}
		}
		files := map[string][]byte{}
		for _, name := range []string{"pgdata/a", "pgdata/b", "pgdata/c"} {
			files[name] = simContents[rng.IntN(len(simContents))]
		}
		fails := rng.IntN(12) == 0
		h.setWrites(files, simRange{})
		m, err := r.WriteBackup(s.ctx, "main", BackupOptions{Prior: prior, Workers: 1}, func(ctx context.Context, w *BackupWriter) (Manifest, error) {
			for _, p := range []*packer{&w.packs.data, &w.packs.hot, &w.packs.meta} {
				p.size = 1000 + 1000*rng.IntN(4)
			}
			if s.server == nil {
				h.think(ctx)
				return testManifest(), errors.Join(errorIf(fails, errSim), writeFiles(w, files))
			}
			wal := s.server.beginBackup(rng)
			if name, ok := wal.partialSegment(); ok {
				files[name] = simContents[0]
			}
			h.setWrites(files, wal)
			h.think(ctx)
			m, err := wal.manifest(), errorIf(fails, errSim)
			if err == nil {
				err = writeFiles(w, files)
			}
			if err == nil {
				err = s.writeWAL(r, w, wal)
			}
			return m, err
		})
		if h.isDead() || s.violation != nil {
			return
		}
		if err == nil {
			s.rely(m.Name())
		} else if errors.Is(err, ErrGivenUp) {
			s.stats["ErrGivenUp"]++
		} else if errors.Is(err, ErrDeleted) {
			s.stats["prior was deleted"]++
		} else {
			s.stats["backups failed"]++
		}
	}
}

// rely looks at a backup of which WriteBackup said that it was made.
func (s *simulation) rely(name BackupName) {
	s.stats["backups made"]++
	s.relied[name] = true
	if !s.listed(name) && !s.policy[name] {
		s.violate("%s was made, but is not listed", name)
	}
	if s.object(manifestKey(name.Cluster, name.Backup)) == nil {
		s.stats["backups made, and collected before the writer knew"]++
	}
}

// choose takes the latest backup, or any.
func (s *simulation) choose(r *Repository, rng *rand.Rand) *Manifest {
	id := Latest
	if rng.IntN(2) == 0 {
		if ids, err := r.BackupIDs(s.ctx, "main"); err == nil && len(ids) > 0 {
			id = ids[rng.IntN(len(ids))]
		}
	}
	m, err := r.Manifest(s.ctx, "main", id)
	if err != nil {
		return nil
	}
	return m
}

// read is a process that reads backups.
func (s *simulation) read(h *simHandle, rng *rand.Rand) {
	for range 2 {
		r := s.open(h)
		if m := s.choose(r, rng); m != nil {
			s.readBackup(h, r, m, rng)
		}
		h.think(s.ctx)
	}
}

func (s *simulation) readBackup(h *simHandle, r *Repository, m *Manifest, rng *rand.Rand) {
	session, err := r.Use(s.ctx, "restore", m.Name())
	if err != nil || h.isDead() {
		return
	}
	want := s.published[m.Name()]
	if session != nil && want != nil {
		alone, err := r.Standalone(s.ctx, m)
		h.protect = &simProtection{name: m.Name(), sign: time.Now(), alone: alone || err != nil}
		s.protecting = append(s.protecting, h.protect)
	}
	for range 1 + rng.IntN(5) {
		err := readAll(s.ctx, r.OpenBackup(m), want.files)
		switch {
		case err == nil:
			s.stats["reads"]++
		case errors.Is(err, errSim) || h.isDead() || h.protect == nil || h.protect.over || time.Since(h.protect.sign) >= sessionLife:
		default:
			s.violate("%s cannot be read by who uses it: %w", m.Name(), err)
		}
		h.think(s.ctx)
	}
	s.drop(h)
	h.protect = nil
	if rng.IntN(3) == 0 {
		session.Leave()
	} else if err := session.End(s.ctx); err != nil {
		s.stats["sessions not ended"]++
	}
}

// prune is a process that prunes, with some policy.
func (s *simulation) prune(h *simHandle, rng *rand.Rand) {
	for range 1 + rng.IntN(3) {
		o := PruneOptions{Policy: Policy{Last: rng.IntN(4)}, Grace: s.grace, Apply: rng.IntN(10) > 0, RepackLimit: int64(rng.IntN(3)) * 3000}
		if s.server != nil {
			o.Policy.Window = []time.Duration{0, time.Minute, 30 * time.Hour}[rng.IntN(3)]
		}
		report, err := s.open(h).Prune(s.ctx, o)
		if h.isDead() {
			return
		}
		s.stats["prunes"]++
		if err != nil {
			s.stats["prunes that failed"]++
		}
		if err != nil && !errors.Is(err, errSim) && !errors.Is(err, context.DeadlineExceeded) {
			s.stats["prunes that failed: "+strings.Join(strings.Fields(err.Error())[:3], " ")]++
		}
		if len(report.unexplained()) > 0 && o.Apply { // a preview has no clock but the host's
			s.violate("prune finds %v damaged", report.Unexplained)
		}
		if report != nil {
			err = errors.Join(err, report.Unrepacked)
		}
		if errors.Is(err, ErrCorrupt) {
			s.violate("prune finds damage: %w", err)
		}
		h.think(s.ctx)
	}
}

func (r *PruneReport) unexplained() []BackupName {
	if r == nil {
		return nil
	}
	return r.Unexplained
}

// deleteByHand is a process whose policy is any.
func (s *simulation) deleteByHand(h *simHandle, rng *rand.Rand) {
	for range 2 {
		r := s.open(h)
		if m := s.choose(r, rng); m != nil {
			_ = r.markDeleted(s.ctx, m.Name(), byPolicy)
		}
		h.think(s.ctx)
	}
}

// check is a process that checks. What it lists has to be up to date, and it has to be able to announce itself.
func (s *simulation) check(h *simHandle, rng *rand.Rand) {
	if s.stale > 0 {
		return
	}
	for range 2 {
		jumps := s.stats["clock jumped"]
		_, err := s.open(h).Check(s.ctx, CheckOptions{ReadData: rng.IntN(2) == 0 && (s.server == nil || rng.IntN(8) == 0)}, func(f Finding) {
			if jumps == s.stats["clock jumped"] && !f.Note && !s.notArchivedYet(f, h.listedWAL) {
				s.violate("check finds %s: %w", f.Object, f.Err)
			}
		})
		if err != nil && s.violation == nil && jumps == s.stats["clock jumped"] {
			s.violate("check: %w", err)
		}
		s.stats["checks"]++
		h.think(s.ctx)
	}
}

// settle is the end: what is late comes, time passes, and prunes leave nothing that no backup needs.
func (s *simulation) settle() {
	for len(s.late) > 0 {
		s.carryOutLate(0)
	}
	wasStale := s.stale > 0
	s.stale = 0
	if s.rng.IntN(4) == 0 && !wasStale {
		s.inspect(CheckOptions{})
	}
	last := s.open(direct{s.simStore})
	s.letGo(last)
	for range 3 {
		time.Sleep(10 * 24 * time.Hour)
		if _, err := last.Prune(s.ctx, PruneOptions{Grace: s.grace, Apply: true, RepackLimit: 1 << 20}); err != nil {
			s.violate("the last prune: %w", err)
			return
		}
	}
	if wasStale && s.server != nil {
		return
	}
	s.inspect(CheckOptions{ReadData: s.server == nil || s.rng.IntN(8) == 0})
	s.leftovers()
}

// letGo removes all holds.
func (s *simulation) letGo(r *Repository) {
	holds, err := r.Holds(s.ctx, "")
	for _, h := range holds {
		delete(s.held, BackupName{h.Cluster, h.Backup})
		err = errors.Join(err, r.RemoveHold(s.ctx, h.ID))
	}
	if err != nil {
		s.violate("holds: %w", err)
	}
}

// direct is the store without chance.
type direct struct{ s *simStore }

func (d direct) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	return d.s.get(key, off, n)
}
func (d direct) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	return observer(d).List(ctx, prefix)
}
func (d direct) Put(_ context.Context, key string, body []byte) error {
	return d.s.carryOut(d.op(opPut, key, body)).err
}
func (d direct) Delete(_ context.Context, key string) error {
	return d.s.carryOut(d.op(opDelete, key, nil)).err
}

func (d direct) op(kind, key string, body []byte) *simOp {
	op := &simOp{h: &simHandle{s: d.s, name: "last"}, kind: kind, key: key, body: body}
	d.s.note(op, "")
	return op
}

// inspect checks the repository as it is now, and reads every listed backup.
func (s *simulation) inspect(o CheckOptions) {
	r := s.open(observer{s.simStore})
	_, err := r.Check(s.ctx, o, func(f Finding) {
		if !f.Note && !s.notArchivedYet(f, s.seq) {
			s.violate("check finds %s: %w", f.Object, f.Err)
		}
	})
	if err != nil {
		s.violate("check: %w", err)
	}
	for name, b := range s.published {
		if !s.listed(name) {
			continue
		}
		m, err := r.readManifest(s.ctx, name.Cluster, name.Backup)
		if err == nil {
			err = readAll(s.ctx, r.OpenBackup(m), b.files)
		}
		if err != nil {
			s.violate("%s at the end: %w", name, err)
		}
	}
}

// leftovers looks for what no backup needs.
func (s *simulation) leftovers() {
	needed := map[string]bool{}
	for name, b := range s.published {
		if s.listed(name) {
			maps.Copy(needed, b.needs)
		}
	}
	if err := s.superfluous(); err != nil {
		s.violate("%w", err)
	}
	for _, key := range s.keys {
		if id, _, ok := editionOfKey(key); ok && s.object(key) != nil && needed[id.key()] {
			continue
		}
		stays := key == configKey || strings.HasPrefix(key, clustersPrefix) || strings.HasSuffix(key, deletedSuffix) || s.staysBeside(key)
		if s.object(key) != nil && !stays && !needed[key] {
			s.violate("%s is left over", key)
		}
	}
}

// staysBeside tells of WAL, and of words beside a listed backup, whether they are right to be there.
func (s *simulation) staysBeside(key string) bool {
	if strings.HasPrefix(key, walRoot) {
		return !s.leftoverWAL(key)
	}
	if session := strings.TrimSuffix(key, begunSuffix); session != key {
		return s.isFloor(key)
	}
	name, suffix, isBackup := splitBackupKey(key)
	return isBackup && suffix == standaloneSuffix && s.listed(name)
}
