package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// crashRounds is how often the campaigns of this package go through, 0 of `make check`: then they take samples.
func crashRounds(t *testing.T) int {
	t.Helper()
	v := os.Getenv("PGTHAW_CRASH_ROUNDS")
	if v == "" {
		return 0
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("PGTHAW_CRASH_ROUNDS: %v", err)
	}
	return n
}

// long skips a test that takes many seconds under the race detector, and finds no races: the rooms' other run has it.
func long(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes long")
	}
}

// cuts goes through the power cuts of a recorded run: after each operation, with nothing of what was not synced left, with
// all of it and with parts. It stops when found says so.
func cuts(log []DiskOp, deaf string, rounds int, rng *rand.Rand, found func(n int, m image) (goOn bool)) {
	d := newForgetting(deaf)
	for n := 0; ; n++ {
		for i := range max(3, rounds) {
			keep := []float64{0, 1, 0.5, 0.1, 0.9}[i%5]
			if !found(n, d.cut(rng, keep)) {
				return
			}
		}
		if n == len(log) {
			return
		}
		d.apply(log[n])
	}
}

// putCall is one Put or Delete of a recorded run.
type putCall struct {
	key         string
	body        []byte // nil: a Delete
	begun, done int    // operations on the disk until then
	err         error
}

// TestCrashFileStore cuts the power at every operation of several writers in two processes: what Put and Delete returned
// nil for is so, what Put returned ErrExist for is there, and an object has all the bytes that somebody put, or is absent.
// The disk is then deaf to one kind of fsync, and the loss has to be seen.
func TestCrashFileStore(t *testing.T) {
	d := mountDisk(t)
	for name, o := range map[string]DiskOptions{"links": {}, "no links": {NoLinks: true}} {
		t.Run(name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, uint64(len(name))))
			puts := recordPuts(t, d, o, rng)
			log := d.log()
			t.Logf("%d operations of %d puts", len(log), len(puts))
			cuts(log, "", crashRounds(t), rng, func(n int, m image) bool {
				problem := lostPut(m.below("above/repo"), puts, n)
				if problem != "" {
					t.Errorf("cut after operation %d: %s", n, problem)
				}
				return problem == ""
			})
			for _, deaf := range []string{"file", "file names", "directory names"} {
				seen := false
				cuts(log, deaf, 0, rng, func(n int, m image) bool {
					seen = lostPut(m.below("above/repo"), puts, n) != ""
					return !seen
				})
				if !seen {
					t.Errorf("a disk that does not sync %ss loses nothing: this test sees nothing", deaf)
				}
			}
		})
	}
}

// recordPuts lets two processes with two writers each put and delete objects, the same ones among them.
func recordPuts(t *testing.T, d *mountedDisk, o DiskOptions, rng *rand.Rand) []*putCall {
	t.Helper()
	d.reset(o)
	var plans [4][]*putCall
	for i, key := range slices.Repeat([]string{"config", "a/1", "a/b/2", "c/d/e/3", "a/4", "f/5", "c/d/6", "g/h/7"}, 4) {
		w, body := rng.IntN(4), bytes.Repeat([]byte{byte(i + 1)}, 1+rng.IntN(20_000))
		plans[w] = append(plans[w], &putCall{key: key, body: body})
	}
	recordPlans(t, d, plans[:])
	all := slices.Concat(plans[:]...)
	for i := range plans {
		plans[i] = nil
	}
	for i, key := range []string{"a/1", "c/d/e/3", "a/1", "f/5"} {
		plans[i] = []*putCall{{key: key}}
	}
	recordPlans(t, d, plans[:])
	all = append(all, slices.Concat(plans[:]...)...)

	// A Delete that got as far as the unlink, and the same again.
	key := "g/h/7"
	d.arm(DiskFault{Class: "fsyncdir", Nth: 1, Errno: int(syscall.EIO)})
	s, err := store.OpenFile(filepath.Join(d.dir, "above", "repo"))
	if err != nil {
		t.Fatal(err)
	}
	first := &putCall{key: key, begun: d.now()}
	if err := s.Delete(noContext, key); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a Delete that cannot be synced: %v", err)
	}
	recordPlans(t, d, [][]*putCall{{{key: key}}})
	return append(all, first, &putCall{key: key, begun: first.begun, done: d.now()})
}

func recordPlans(t *testing.T, d *mountedDisk, plans [][]*putCall) {
	t.Helper()
	var stores [2]*store.File
	for i := range stores {
		var err error
		if stores[i], err = store.OpenFile(filepath.Join(d.dir, "above", "repo")); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for i, plan := range plans {
		wg.Go(func() {
			for _, p := range plan {
				p.begun = d.now()
				if p.body == nil {
					p.err = stores[i%2].Delete(noContext, p.key)
				} else {
					p.err = stores[i%2].Put(noContext, p.key, p.body)
				}
				p.done = d.now()
				if p.err != nil && !errors.Is(p.err, store.ErrExist) {
					t.Error(p.err)
				}
			}
		})
	}
	wg.Wait()
}

// lostPut says which promise the store broke if these are the objects after a cut after n operations.
func lostPut(objects map[string][]byte, puts []*putCall, n int) string {
	for key, body := range objects {
		if !slices.ContainsFunc(puts, func(p *putCall) bool {
			return p.key == key && p.begun <= n && p.body != nil && bytes.Equal(p.body, body)
		}) {
			return fmt.Sprintf("%s holds %d bytes that nobody put", key, len(body))
		}
	}
	deleted := func(p *putCall) bool { return p.body == nil }
	for _, p := range puts {
		body, there := objects[p.key]
		gone := slices.ContainsFunc(puts, func(q *putCall) bool { return q.key == p.key && deleted(q) && q.begun <= n })
		switch {
		case p.done > n || p.done == 0:
		case deleted(p) && there:
			return fmt.Sprintf("%s was deleted, and is there again", p.key)
		case !deleted(p) && !there && !gone:
			return fmt.Sprintf("%s was put (%v), and is gone", p.key, p.err)
		case !deleted(p) && there && p.err == nil && !bytes.Equal(body, p.body):
			return fmt.Sprintf("%s holds another's bytes", p.key)
		}
	}
	return ""
}

// milestone is what a run on the disk had brought about after so many operations.
type milestone struct {
	done  int
	holds func(r *Repository) error
}

// TestCrashRepository cuts the power at every operation of what makes a repository and fills it. What is left then checks
// clean, every listed backup has every byte, and what was reported done is done.
func TestCrashRepository(t *testing.T) {
	d := mountDisk(t)
	bothSeals(t, func(t *testing.T, keys ...Key) {
		d.reset(DiskOptions{NoLinks: len(keys) == 0})
		k := &recordedRun{t: t, d: d, keys: keys, backups: map[string]testFiles{}}
		k.run()
		log := d.log()
		rng := rand.New(rand.NewPCG(2, 0))
		rounds, tried := crashRounds(t), 0
		cuts(log, "", rounds, rng, func(n int, m image) bool {
			if rounds > 0 || rng.IntN(len(log)) < 5 || slices.ContainsFunc(k.milestones, func(m milestone) bool { return m.done == n }) {
				tried++
				k.check(n, m)
			}
			return !t.Failed()
		})
		t.Logf("%d operations, %d cuts looked at", len(log), tried)
	})
}

type recordedRun struct {
	t          *testing.T
	d          *mountedDisk
	keys       []Key
	backups    map[string]testFiles // by id
	milestones []milestone
}

func (k *recordedRun) run() {
	k.t.Helper()
	ctx := k.t.Context()
	r, err := Init(ctx, filepath.Join(k.d.dir, "repo"), Options{Keys: k.keys})
	if err != nil {
		k.t.Fatal(err)
	}
	k.reached(func(r *Repository) error { return errorIf(r.url != recovered, errors.New("there is no repository")) })
	k.again(2, func() error { _, err := r.BindCluster(ctx, "main", testSystemID, 16<<20); return err })
	files := smallFiles()
	b := k.backup(r, files, nil)
	name, content := pg.WALName{Kind: pg.WALHistory, Timeline: 2}, []byte("1\t0/3000000\tno reason\n")
	k.again(4, func() error { return r.PutWAL(ctx, "main", name, content) })
	k.reached(func(r *Repository) error {
		got, err := r.WAL(ctx, "main", name)
		return errors.Join(err, errorIf(!bytes.Equal(got, content), errWrongBytes))
	})
	k.backup(r, changedFiles(files), b)
	if err := r.Close(); err != nil {
		k.t.Fatal(err)
	}
}

// again does something once with the last fsync of its directory failing, the nth, so that it can be read but is not durable,
// and then once more.
func (k *recordedRun) again(nth int, do func() error) {
	k.t.Helper()
	k.d.arm(DiskFault{Class: "fsyncdir", Nth: nth, Errno: int(syscall.EIO)})
	err := do()
	if calls := k.d.calls()["fsyncdir"]; !errors.Is(err, syscall.EIO) || calls != nth {
		k.t.Fatalf("fsync %d of %d directories fails: %v", nth, calls, err)
	}
	k.d.arm(DiskFault{})
	if err := do(); err != nil {
		k.t.Fatal(err)
	}
}

// reached notes that something was reported done.
func (k *recordedRun) reached(holds func(*Repository) error) {
	k.milestones = append(k.milestones, milestone{k.d.now(), holds})
}

func (k *recordedRun) backup(r *Repository, files testFiles, prior *Backup) *Backup {
	k.t.Helper()
	b := writeTestBackup(k.t, r, files, prior)
	id := b.Manifest.ID
	k.backups[id] = files
	k.reached(func(r *Repository) error { _, err := r.Manifest(k.t.Context(), "main", id); return err }) // which asks for the cluster
	return b
}

// changedFiles are the files some time later.
func changedFiles(files testFiles) testFiles {
	changed := testFiles{"pgdata/new": pagesOf(99, 2)}
	for name, b := range files {
		changed[name] = b
	}
	b := bytes.Clone(files["pgdata/base/5/2"])
	copy(b[7*PageSize:], pagesOf(77, 1))
	changed["pgdata/base/5/2"] = b
	return changed
}

func (k *recordedRun) check(n int, m image) {
	k.t.Helper()
	s, err := storeOf(m.below("repo"))
	if err != nil {
		k.t.Fatal(err)
	}
	r, err := openOrInit(k.t.Context(), s, k.keys)
	if err != nil {
		k.t.Errorf("cut after operation %d: %v", n, err)
		return
	}
	defer r.Close()
	if err := soundRepository(k.t.Context(), r, k.backups); err != nil {
		k.t.Errorf("cut after operation %d: %v", n, err)
	}
	for i, reached := range k.milestones {
		if reached.done <= n {
			if err := reached.holds(r); err != nil {
				k.t.Errorf("cut after operation %d: step %d was reported done: %v", n, i, err)
			}
		}
	}
}

// recovered is the URL of a repository that was there after a power cut.
const recovered = "recovered"

// openOrInit opens the repository in a store, or makes one if none had come about.
func openOrInit(ctx context.Context, s store.Store, keys []Key) (*Repository, error) {
	r, err := openStore(ctx, s, recovered, Options{Keys: keys})
	if errors.Is(err, ErrNoRepository) {
		r, err = initStore(ctx, s, "new", Options{Keys: keys})
	}
	return r, err
}

// soundRepository says what is wrong with a repository: what a full check finds, and listed backups that do not have
// these files. Any other backup is wrong, too.
func soundRepository(ctx context.Context, r *Repository, backups map[string]testFiles) error {
	var wrong []error
	_, err := r.Check(ctx, CheckOptions{ReadData: true}, func(f Finding) {
		if !f.Note {
			wrong = append(wrong, fmt.Errorf("check: %s: %w", f.Object, f.Err))
		}
	})
	wrong = append(wrong, err)
	clusters, err := r.Clusters(ctx)
	wrong = append(wrong, err)
	for _, c := range clusters {
		listed, err := r.Backups(ctx, c.Name)
		wrong = append(wrong, err)
		for _, m := range listed {
			if files, ok := backups[m.ID]; !ok {
				wrong = append(wrong, fmt.Errorf("backup %s: nobody made it", m.ID))
			} else if err := sameFiles(ctx, r.OpenBackup(m), files); err != nil {
				wrong = append(wrong, fmt.Errorf("backup %s: %w", m.ID, err))
			}
		}
	}
	return errors.Join(wrong...)
}

// sameFiles compares a whole backup with what was written.
func sameFiles(ctx context.Context, b *Backup, want testFiles) error {
	seen := 0
	err := b.Walk(ctx, ".", func(name string, e Entry) error {
		if !e.Mode.IsRegular() {
			return nil
		}
		seen++
		got, err := readFile(ctx, b, e)
		return errors.Join(err, errorIf(!bytes.Equal(got, want[name]), fmt.Errorf("%s: %w", name, errWrongBytes)))
	})
	return errors.Join(err, errorIf(seen != len(want), fmt.Errorf("%d files, want %d", seen, len(want))))
}

// outOfReach is what a store that went away has to look like: never empty.
func outOfReach(err error) error {
	if errors.Is(err, ErrOutOfReach) {
		return nil
	}
	return fmt.Errorf("it says %v", err)
}

// TestCrashRepositoryVanishes takes the repository's directory away at any request of a backup under way, as umount -l does. The
// backup fails, and nothing is made where the directory was.
func TestCrashRepositoryVanishes(t *testing.T) {
	d := mountDisk(t)
	repo := filepath.Join(d.dir, "repo")
	open := func() *Repository {
		d.reset(DiskOptions{})
		r, err := Init(t.Context(), repo, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.BindCluster(t.Context(), "main", testSystemID, 16<<20); err != nil {
			t.Fatal(err)
		}
		return r
	}
	backup := func(r *Repository) error {
		_, err := r.WriteBackup(t.Context(), "main", BackupOptions{}, func(ctx context.Context, w *BackupWriter) (Manifest, error) {
			return testManifest(), writeFiles(w, smallFiles())
		})
		return err
	}
	r := open()
	d.arm(DiskFault{})
	if err := backup(r); err != nil {
		t.Fatal(err)
	}
	total := d.calls()[""]
	rng, step := rand.New(rand.NewPCG(3, 0)), max(1, total/10)
	if crashRounds(t) > 0 {
		step = 1
	}
	failed := 0
	for n := 1; n <= total; n += 1 + rng.IntN(2*step-1) {
		gone := []string{"absent", "empty"}[n%2]
		r := open()
		d.arm(DiskFault{Nth: n, Gone: gone})
		if err := backup(r); err != nil {
			failed++
			if err := outOfReach(err); err != nil {
				t.Errorf("%s at request %d of %d: %v", gone, n, total, err)
			}
			if strings.Contains(err.Error(), "nothing of it is left") {
				t.Errorf("%s at request %d of %d: it claims to have cleaned up: %v", gone, n, total, err)
			}
		} else if n < total*3/4 {
			t.Errorf("%s at request %d of %d: the backup succeeds", gone, n, total)
		}
		if d.calls()[""] < n {
			continue // this one took fewer requests
		}
		left, err := os.ReadDir(repo)
		if len(left) > 0 || (err == nil) != (gone == "empty") {
			t.Errorf("%s at request %d of %d: in its place there is now %v, %v", gone, n, total, left, err)
		}
		checkGone(t, r)
		r.Close()
	}
	if failed == 0 {
		t.Error("no backup failed")
	}
}

// checkGone asks a repository whose directory has vanished for what is not in it.
func checkGone(t *testing.T, r *Repository) {
	t.Helper()
	_, err := r.WAL(t.Context(), "main", pg.WALName{Kind: pg.WALHistory, Timeline: 9})
	_, backupsErr := r.Backups(t.Context(), "main")
	_, clustersErr := r.Clusters(t.Context())
	for what, err := range map[string]error{"WAL": err, "Backups": backupsErr, "Clusters": clustersErr,
		"Put": r.store.Put(t.Context(), "x/y", nil), "Delete": r.store.Delete(t.Context(), "x/y")} {
		if err := outOfReach(err); err != nil {
			t.Errorf("%s of what has vanished: %v", what, err)
		}
	}
}
