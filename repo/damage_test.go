package repo

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgthaw/repo/store"
)

// smallFiles make a repository with every kind of object and content in it, small enough to be read thousands of times.
func smallFiles() testFiles {
	return testFiles{
		"pgdata/PG_VERSION":        []byte("15\n"),
		"pgdata/global/pg_control": pagesOf(1, 1),
		"pgdata/base/5/1":          pagesOf(2, 3),
		"pgdata/base/5/2":          pagesOf(3, 100),
		"pgdata/base/5/3":          append(pagesOf(4, 4), make([]byte, 40*PageSize)...),
		"tablespaces/16385/t":      pagesOf(6, 17)[:16*PageSize+5],
	}
}

// flipsPerRound makes a million of the 50 rounds of make crash.
const flipsPerRound = 20_000

// TestCrashDamage damages a small repository: flips of one bit, and after every fifth of them something worse. Whoever
// reads then gets the right bytes or an error that names the object: never other bytes, never a panic, never a hang.
//
// What is read after each damage: two of the reads that fetched a byte of it while it was sound; after some, one of all; after fewer,
// everything, from the opening of the repository on; a check, which has to name the object if a read failed; and a new
// backup that compares with what is damaged, and is read back before and after that is undone.
//
// PGTHAW_CRASH_ROUNDS times 20,000 flips, without it 600; PGTHAW_SEED repeats the choices.
func TestCrashDamage(t *testing.T) {
	flips := 600
	if rounds := environmentNumber(t, "PGTHAW_CRASH_ROUNDS", 0); rounds > 0 {
		flips = rounds * flipsPerRound
	}
	bothSeals(t, func(t *testing.T, keys ...Key) {
		if len(keys) > 0 {
			keys = append(keys, newTestKey(t))
		}
		c := newDamageCampaign(t, keys)
		for i := range flips {
			c.do(i, c.flip())
			if i%5 == 0 {
				c.do(i/5, c.worse())
			}
			if (i+1)%50_000 == 0 {
				t.Logf("%d flips", i+1)
			}
		}
		c.report()
	})
}

func environmentNumber(t *testing.T, name string, usually int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return usually
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// How often more is done than a few reads: after one damage of so many.
const (
	readBackEvery = 200
	checkEvery    = 300
	backupEvery   = 600
)

// damageCampaign is a repository in memory, and what the campaign has seen.
type damageCampaign struct {
	t       *testing.T
	rng     *rand.Rand
	keys    []Key
	store   *damagedStore
	r       *Repository // opened while all was sound
	wrote   wrote
	reads   []repoRead
	objects []string          // keys
	bodies  map[string][]byte // of all objects; a flip changes them, and back
	regions map[string][]region
	kinds   []string            // of regions
	older   map[string][]byte   // the same objects sealed with other salts, of an encrypted repository
	twins   map[string][]byte   // the same sealed for another repository of the same master key
	foreign map[string][][]byte // by kind: objects of another repository, of the same master key if there is one

	doing atomic.Pointer[string]
	watch *time.Timer
	seen  map[string]*damageCount
	more  struct{ readBacks, checks, found, backups, refused int }
}

// damageCount counts damages of one kind.
type damageCount struct{ done, noticed int }

// region is a part of an object, as docs/format.md has it.
type region struct {
	key string
	span
}

// repoDamage is one thing done to the repository.
type repoDamage struct {
	what   string // and where
	kind   string
	bodies map[string][]byte // what the store has instead; nil: the object is gone
	spans  map[string]span   // what of the objects is not as it was
	sure   bool              // no read of it can go well
	fine   bool              // every read goes well
	vague  bool              // other objects may be named
	undo   func()            // after the bodies are gone
}

func newDamageCampaign(t *testing.T, keys []Key) *damageCampaign {
	t.Helper()
	seed := environmentNumber(t, "PGTHAW_SEED", int(rand.Uint32()))
	t.Logf("PGTHAW_SEED=%d", seed)
	c := &damageCampaign{t: t, rng: rand.New(rand.NewPCG(uint64(seed), 0)), keys: keys, store: &damagedStore{Mem: store.NewMem()},
		bodies: map[string][]byte{}, regions: map[string][]region{}, seen: map[string]*damageCount{}}
	c.r = newDamagedRepository(t, c.store, keys, nil)
	c.wrote = writeDamaged(t, c.r, smallFiles())
	checkClean(t, c.r)
	reads, err := c.wrote.allReads(t.Context(), c.store, c.r, keys)
	if err != nil {
		t.Fatal(err)
	}
	c.reads = reads
	c.objects = storedKeys(t, c.r)
	for _, key := range c.objects {
		c.divide(key)
	}
	c.kinds = slices.Sorted(maps.Keys(c.regions))
	c.addOthers()
	c.watch = time.AfterFunc(time.Hour, func() { panic("hangs: " + *c.doing.Load()) })
	t.Cleanup(func() {
		c.watch.Stop()
		checkClean(t, coldRepository(c.r))
	})
	return c
}

// do does one damage, reads, and undoes it.
func (c *damageCampaign) do(i int, d repoDamage) {
	c.doing.Store(&d.what)
	c.watch.Reset(time.Minute)
	count := c.seen[d.kind]
	if count == nil {
		count = &damageCount{}
		c.seen[d.kind] = count
	}
	reads := c.dependents(d)
	if i%checkEvery != 1 && len(reads) > 2 {
		c.rng.Shuffle(len(reads), func(i, j int) { reads[i], reads[j] = reads[j], reads[i] })
		reads = reads[:2]
	}
	c.store.bodies = d.bodies
	r := coldRepository(c.r)
	noticed := c.try(d, r, reads)
	if i%4 == 0 {
		c.judge(d, c.reads[c.rng.IntN(len(c.reads))], r)
	}
	count.done++
	if noticed {
		count.noticed++
	}
	if i%readBackEvery == 0 {
		c.readBack(d)
	}
	if i%checkEvery == 1 && d.kind != "deletion" { // what a check makes of that, TestCheckSaysWhatDamageCosts tells
		c.check(d, noticed)
	}
	var made *wroteBackup
	if i%backupEvery == 2 {
		made = c.backUp(d, r)
	}
	c.store.bodies = nil
	d.undo()
	if i%10 == 0 {
		c.readUndone(d, r, reads)
	}
	if made != nil {
		c.readNew(d, r, *made)
	}
}

// dependents are the reads that fetched something of what is damaged.
func (c *damageCampaign) dependents(d repoDamage) (reads []repoRead) {
	for _, read := range c.reads {
		for key, at := range d.spans {
			if read.depends(key, at) {
				reads = append(reads, read)
				break
			}
		}
	}
	return reads
}

// try tells whether one of the reads noticed.
func (c *damageCampaign) try(d repoDamage, r *Repository, reads []repoRead) (noticed bool) {
	for _, read := range reads {
		if c.judge(d, read, r) {
			noticed = true
		} else if d.sure {
			c.t.Errorf("%s: %s did not notice it", d.what, read.name)
		}
	}
	return noticed
}

// judge reads, and tells whether that gave an error.
func (c *damageCampaign) judge(d repoDamage, read repoRead, r *Repository) (noticed bool) {
	return c.accept(d, read.name, read.do(c.t.Context(), r))
}

// accept says what must not be: wrong bytes, or an error that does not name what is damaged.
func (c *damageCampaign) accept(d repoDamage, reading string, err error) (noticed bool) {
	if err == nil {
		return false
	}
	named := d.vague
	for key := range d.bodies {
		named = named || strings.Contains(err.Error(), nameOf(key))
	}
	if errors.Is(err, errWrongBytes) || !named || d.fine {
		c.t.Errorf("%s: %s: %v", d.what, reading, err)
	}
	return true
}

// readBack opens the repository and reads everything.
func (c *damageCampaign) readBack(d repoDamage) {
	c.more.readBacks++
	r, err := openStore(c.t.Context(), c.store, c.r.url, Options{Keys: c.keys})
	if c.accept(d, "open", err) {
		return
	}
	defer r.codec.dec.Close()
	for _, read := range c.reads {
		c.judge(d, read, r)
	}
}

// check finds what reads have noticed: as soon as it looks at that kind of thing.
func (c *damageCampaign) check(d repoDamage, noticed bool) {
	c.more.checks++
	r, err := openStore(c.t.Context(), c.store, c.r.url, Options{Keys: c.keys})
	if c.accept(d, "open", err) {
		return
	}
	defer r.codec.dec.Close()
	found, any := false, false
	_, err = r.Check(c.t.Context(), d.depth(c.rng), func(f Finding) {
		any = true
		_, ok := d.bodies[f.Object]
		found = found || ok
	})
	if err != nil {
		c.t.Errorf("%s: check: %v", d.what, err)
	}
	if found {
		c.more.found++
	} else if noticed && !(d.vague && any) {
		c.t.Errorf("%s: check does not find it", d.what)
	}
}

// depth is that of a check which has to find the damage: the least, or the greatest.
func (d repoDamage) depth(rng *rand.Rand) CheckOptions {
	switch d.kind {
	case "map", "tree", "pack header", "table of contents", "trailer", "WAL header", "WAL head":
		return CheckOptions{Maps: true, ReadData: rng.IntN(2) == 0}
	case "key slot", "cluster", "manifest", "pack list", "edition header", "edition table":
		return CheckOptions{ReadData: rng.IntN(2) == 0}
	}
	return CheckOptions{ReadData: true}
}

// backUp makes a backup that compares with the last one, which is known from before the damage, and reads it back.
func (c *damageCampaign) backUp(d repoDamage, r *Repository) *wroteBackup {
	prior := c.wrote.backups[1]
	files := maps.Clone(prior.files)
	files["pgdata/base/5/2"] = bytes.Clone(files["pgdata/base/5/2"])
	copy(files["pgdata/base/5/2"][c.rng.IntN(100)*PageSize:], pagesOf(c.rng.Uint64(), 1))
	files["pgdata/base/5/9"] = files["pgdata/base/5/3"] // found by its content
	before := storedKeys(c.t, c.r)
	m, err := r.WriteBackup(c.t.Context(), "main", BackupOptions{Prior: r.OpenBackup(prior.m)}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		return testManifest(), writeFiles(w, files)
	})
	if c.accept(d, "backup", err) {
		c.more.refused++
		if after := storedKeys(c.t, c.r); !slices.Equal(before, after) {
			c.t.Errorf("%s: a backup that failed left something", d.what)
		}
		return nil
	}
	c.more.backups++
	b := &wroteBackup{m, files}
	for name := range files {
		c.accept(d, "new "+name, b.checkRange(c.t.Context(), r, name, 0, int64(len(files[name]))))
	}
	return b
}

// readUndone reads again with the repository that met the damage, which is undone.
func (c *damageCampaign) readUndone(d repoDamage, r *Repository, reads []repoRead) {
	for _, read := range reads {
		if err := read.do(c.t.Context(), r); err != nil {
			c.t.Errorf("%s, undone: %s: %v", d.what, read.name, err)
		}
	}
}

// readNew reads a backup that was made while there was damage, which is undone, after the one that it was compared with,
// and deletes it. What it took for true while objects that are not sealed were exchanged need not be readable any more.
func (c *damageCampaign) readNew(d repoDamage, r *Repository, b wroteBackup) {
	for _, r := range []*Repository{r, coldRepository(c.r)} {
		for _, b := range append(c.wrote.backups[1:2:2], b) {
			for name, content := range b.files {
				err := b.checkRange(c.t.Context(), r, name, 0, int64(len(content)))
				err = errors.Join(err, b.checkRange(c.t.Context(), r, name, int64(len(content)/3), int64(len(content)/3)))
				if errors.Is(err, errWrongBytes) || err != nil && !(d.kind == "exchange" && c.r.seals.master == nil) {
					c.t.Errorf("%s, undone: %s of %s: %v", d.what, name, b.m.ID, err)
				}
			}
		}
	}
	for _, key := range storedKeys(c.t, c.r) {
		if c.bodies[key] == nil {
			if err := c.store.Delete(c.t.Context(), key); err != nil {
				c.t.Fatal(err)
			}
		}
	}
}

// report prints what was done. A kind of damage to what readers fetch that nobody noticed means that they do not reach it.
func (c *damageCampaign) report() {
	total := 0
	for _, kind := range slices.Sorted(maps.Keys(c.seen)) {
		n := c.seen[kind]
		total += n.done
		c.t.Logf("%-18s %8d, noticed %8d", kind, n.done, n.noticed)
		if n.noticed == 0 && n.done > 20 && kind != "pack header" && kind != "older" {
			c.t.Errorf("%s: nobody noticed", kind)
		}
	}
	c.t.Logf("%d damages; %d whole read-backs; %d checks, of which %d found it; %d backups made and %d refused", total, c.more.readBacks, c.more.checks, c.more.found, c.more.backups, c.more.refused)
	if m := c.more; total > 10_000 && (m.readBacks == 0 || m.found == 0 || m.backups == 0 || m.refused == 0) {
		c.t.Errorf("something was never done: %+v", m)
	}
}

// nameOf is what an error about an object has to contain: the name by which its user knows it.
func nameOf(key string) string {
	switch base := path.Base(key); {
	case key == configKey:
		return ""
	case strings.HasPrefix(key, keySlotsPrefix):
		return "key" // one that is gone has no name any more
	case strings.HasSuffix(base, manifestSuffix):
		return strings.TrimSuffix(base, manifestSuffix)
	case strings.HasSuffix(base, packListSuffix):
		return strings.TrimSuffix(base, packListSuffix)
	case strings.HasPrefix(key, packsRoot): // of editions, that are gone too, as of the pack
		return base[:2*len(PackID{})]
	default:
		return base
	}
}
