package repo

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// ledger is a store in memory that keeps the operations which change it, and lets one of them fail.
type ledger struct {
	mu      sync.Mutex
	objects map[string]ledgerObject
	log     []ledgerOp
	fault   map[int]fault // by number, from 0
}

type ledgerObject struct {
	body     []byte
	modified time.Time
}

// ledgerOp is a put, or, without a body, a deletion.
type ledgerOp struct {
	key  string
	body []byte
}

func (op ledgerOp) String() string {
	if op.body == nil {
		return "delete " + op.key
	}
	return "put " + op.key
}

func newLedger(objects map[string]ledgerObject) *ledger { return &ledger{objects: maps.Clone(objects)} }

// change enters an operation, and lets it fail if that is wanted.
func (l *ledger) change(op ledgerOp, do func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.fault[len(l.log)]
	if f == lost {
		l.log = append(l.log, ledgerOp{})
		return errInjected
	}
	l.log = append(l.log, op)
	return f.do(do)
}

func (l *ledger) Put(_ context.Context, key string, body []byte) error {
	op := ledgerOp{key, slices.Concat([]byte{}, body)}
	return l.change(op, func() error {
		if _, ok := l.objects[key]; ok {
			return fmt.Errorf("put %s: %w", key, store.ErrExist)
		}
		l.objects[key] = ledgerObject{op.body, time.Now()}
		return nil
	})
}

func (l *ledger) Delete(_ context.Context, key string) error {
	return l.change(ledgerOp{key: key}, func() error { delete(l.objects, key); return nil })
}

func (l *ledger) Get(_ context.Context, key string, off, n int64) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o, ok := l.objects[key]
	if !ok {
		return nil, fmt.Errorf("get %s: %w", key, store.ErrNotExist)
	}
	if n < 0 {
		n = int64(len(o.body)) - off
	}
	if off < 0 || n < 0 || off+n > int64(len(o.body)) {
		return nil, fmt.Errorf("get %s: range", key)
	}
	return slices.Clone(o.body[off : off+n]), nil
}

func (l *ledger) List(_ context.Context, prefix string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		l.mu.Lock()
		objects := maps.Clone(l.objects)
		l.mu.Unlock()
		for _, key := range slices.Sorted(maps.Keys(objects)) {
			o := objects[key]
			if strings.HasPrefix(key, prefix) && !yield(store.Object{Key: key, Size: int64(len(o.body)), Modified: o.modified}, nil) {
				return
			}
		}
	}
}

// ledgerWriter is a kind of writer. It is run on what lies in a store, once alone, once for each of its operations with that
// lost, and once with it kept but reported failed. Then it goes on, and takes back what it can.
type ledgerWriter struct {
	name    string
	new     bool   // there is no repository yet
	copies  bool   // there is another one
	backups uint64 // so many there are; 0: one
	do      func(ctx context.Context, p *prefixes, r *Repository) error
}

var ledgerWriters = []ledgerWriter{
	{name: "repo init", new: true, do: func(ctx context.Context, p *prefixes, _ *Repository) error {
		r, err := initStore(ctx, p.l, "mem:", Options{Keys: p.keys})
		if err == nil {
			err = r.Close()
		}
		return err
	}},
	{name: "first backup of a cluster", do: func(ctx context.Context, p *prefixes, r *Repository) error {
		_, err := r.BindCluster(ctx, "other", testSystemID+1, testSegmentSize)
		if err == nil {
			_, err = r.WriteBackup(ctx, "other", BackupOptions{Workers: 1}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
				return testManifest(), writeFiles(w, p.next)
			})
		}
		return err
	}},
	{name: "backup", do: func(ctx context.Context, p *prefixes, r *Repository) error { return p.backup(ctx, r, nil) }},
	{name: "incremental backup", do: func(ctx context.Context, p *prefixes, r *Repository) error {
		m, err := r.Manifest(ctx, "main", Latest)
		if err == nil {
			err = p.backup(ctx, r, r.OpenBackup(m))
		}
		return err
	}},
	{name: "wal push", do: func(ctx context.Context, p *prefixes, r *Repository) error {
		partial := testSegment(1, 4)
		partial.Kind = pg.WALPartial
		history := fmt.Appendf(nil, "1\t%s\tno reason\n", pg.LSN(4*testSegmentSize+0x100))
		return errors.Join(p.push(ctx, r, testSegment(1, 3), testSegmentContent(1, 3)), p.push(ctx, r, partial, testSegmentContent(1, 4)),
			p.push(ctx, r, pg.WALName{Kind: pg.WALHistory, Timeline: 2}, history), p.push(ctx, r, testSegment(2, 4), testSegmentContent(2, 4)))
	}},
	{name: "copy", copies: true, do: func(ctx context.Context, p *prefixes, r *Repository) error {
		_, err := p.other.Copy(ctx, r, CopyOptions{Workers: 1})
		return err
	}},
	{name: "prune", backups: 3, do: func(ctx context.Context, p *prefixes, r *Repository) error { return p.prune(ctx, r) }},
	{name: "hold", do: func(ctx context.Context, p *prefixes, r *Repository) error {
		h, err := r.AddHold(ctx, "main", Latest, "audit", time.Time{})
		if err == nil {
			err = r.RemoveHold(ctx, h.ID)
		}
		return err
	}},
	{name: "restore, thaw and check", do: func(ctx context.Context, p *prefixes, r *Repository) error {
		m, err := r.Manifest(ctx, "main", Latest)
		if err != nil {
			return err
		}
		restore, err := r.Use(ctx, "restore", m.Name())
		if err == nil {
			time.Sleep(2*signOfLifeEvery + time.Hour)
			err = restore.End(ctx)
		}
		thaw, useErr := r.UseStill(ctx, "thaw", m.Name())
		thaw.Leave()
		_, checkErr := r.Check(ctx, CheckOptions{}, func(Finding) {})
		return errors.Join(err, useErr, checkErr)
	}},
	{name: "keys", do: func(ctx context.Context, p *prefixes, r *Repository) error {
		if len(p.keys) == 0 {
			return nil
		}
		slot, err := r.AddKey(ctx, p.keys[0], "again")
		if err == nil {
			err = r.RemoveKey(ctx, slot.ID)
		}
		return err
	}},
}

// prefixes checks a repository after each operation of a writer.
type prefixes struct {
	ctx      context.Context
	keys     []Key
	start    map[string]ledgerObject // what the writer finds
	other    *Repository             // another repository, of the same cluster, with a backup
	copied   bool                    // that is what the writer makes
	made     map[string]testFiles    // backups that there were
	next     testFiles               // of any that the writer makes
	l        *ledger
	checked  int
	problems []error
}

// backup makes one, with its WAL.
func (p *prefixes) backup(ctx context.Context, r *Repository, prior *Backup) error {
	if err := r.PutWAL(ctx, "main", testSegment(1, 3), testSegmentContent(1, 3)); err != nil {
		return err
	}
	_, err := r.WriteBackup(ctx, "main", BackupOptions{Prior: prior, Workers: 1}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		return p.describe(w, p.next, 3)
	})
	return err
}

// push tries again, as an archiver does: what comes next waits.
func (p *prefixes) push(ctx context.Context, r *Repository, name pg.WALName, content []byte) error {
	err := r.PutWAL(ctx, "main", name, content)
	if errors.Is(err, errInjected) {
		err = r.PutWAL(ctx, "main", name, content)
	}
	return err
}

// prune does so twice, a day apart: backups go, some stand alone, WAL goes.
func (p *prefixes) prune(ctx context.Context, r *Repository) error {
	o := PruneOptions{Policy: Policy{Last: 2, Window: time.Hour}, Grace: DefaultGrace, Apply: true}
	_, err := r.Prune(ctx, o)
	time.Sleep(2 * DefaultGrace)
	_, again := r.Prune(ctx, o)
	return errors.Join(err, again)
}

// run runs the writer, and checks what there is after each of its operations from one on. It returns how many there were.
func (p *prefixes) run(w ledgerWriter, faults map[int]fault, from int) int {
	p.l = newLedger(p.start)
	p.l.fault = faults
	var r *Repository
	if !w.new {
		var err error
		if r, err = openStore(p.ctx, p.l, "mem:", Options{Keys: p.keys}); err != nil {
			p.problems = append(p.problems, err)
			return 0
		}
		defer r.Close()
	}
	err := w.do(p.ctx, p, r)
	if err != nil && len(faults) == 0 {
		p.problems = append(p.problems, err)
	}
	p.replay(from, fmt.Sprintf("%s, %v", w.name, faults))
	return len(p.l.log)
}

// mostBehind is behind how many operations after one that failed it is looked at the repository, besides the end.
const mostBehind = 6

// replay checks what the operations lead to: from those before number from on, one more each time.
func (p *prefixes) replay(from int, what string) {
	state := newLedger(p.start)
	for i := range len(p.l.log) + 1 {
		if i >= from && (from == 0 || i < from+mostBehind || i == len(p.l.log)) {
			p.checked++
			if err := p.sound(state); err != nil {
				p.problems = append(p.problems, fmt.Errorf("%s: %d of %d operations done, the last %v: %w", what, i, len(p.l.log), p.l.log[max(0, i-1)], err))
			}
		}
		if i < len(p.l.log) && p.l.log[i].key != "" {
			state.apply(p.l.log[i])
		}
	}
}

func (l *ledger) apply(op ledgerOp) {
	if _, there := l.objects[op.key]; op.body == nil {
		delete(l.objects, op.key)
	} else if !there {
		l.objects[op.key] = ledgerObject{op.body, time.Now()}
	}
}

// sound checks a repository as a process that has never seen it finds it. It writes only into a clone.
func (p *prefixes) sound(state *ledger) error {
	r, err := openStore(p.ctx, newLedger(state.objects), "mem:", Options{Keys: p.keys})
	if errors.Is(err, ErrNoRepository) && p.start[configKey].body == nil {
		return nil
	}
	if err != nil {
		return err
	}
	defer r.Close()
	want := maps.Clone(p.made)
	for key := range state.objects {
		if name, suffix, ok := splitBackupKey(key); ok && suffix == manifestSuffix && p.start[key].body == nil {
			want[name.Backup] = p.making(name)
		}
	}
	return soundRepository(p.ctx, r, want)
}

// making is what the writer's backup is to hold.
func (p *prefixes) making(name BackupName) testFiles {
	switch {
	case name.Cluster == "other":
		return p.next
	case p.copied:
		files := maps.Clone(p.next)
		files["pgdata/a"] = incompressible(3)
		return withSegment(files, 3)
	}
	return withSegment(p.next, 3)
}

// TestEveryPrefix: wherever a writer of any kind dies, between two operations on the store or with one done of which it never
// knew, and whatever it does after one that failed, the repository is whole: checked in full, and read.
func TestEveryPrefix(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		for _, w := range ledgerWriters {
			if testing.Short() && len(keys) > 0 && w.name != "keys" && !w.new {
				continue
			}
			t.Run(w.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					p := newPrefixes(t, w, keys)
					n := p.run(w, nil, 0)
					for i := range n {
						if testing.Short() && i%8 != 3 {
							continue
						}
						p.run(w, map[int]fault{i: kept}, i+1)
						p.run(w, map[int]fault{i: lost}, i+1)
					}
					for _, err := range p.problems {
						t.Error(err)
					}
					t.Logf("%d operations, %d states", n, p.checked)
				})
			})
		}
	})
}

// newPrefixes makes what a writer finds: backups, a day apart, with a segment of WAL each and one behind it.
func newPrefixes(t *testing.T, w ledgerWriter, keys []Key) *prefixes {
	p := &prefixes{ctx: t.Context(), keys: keys, start: map[string]ledgerObject{}, made: map[string]testFiles{}, next: testFiles{"pgdata/a": incompressible(9), "pgdata/b": []byte("b")}}
	if w.new {
		return p
	}
	l := newLedger(map[string]ledgerObject{})
	r, err := initStore(t.Context(), l, "mem:", Options{Keys: keys})
	if err == nil {
		_, err = r.BindCluster(t.Context(), "main", testSystemID, testSegmentSize)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for no := range max(1, w.backups) {
		p.backUp(t, r, p.made, 1+2*no)
	}
	p.start = l.objects
	if p.copied = w.copies; p.copied {
		p.other = newWALRepository(t)
		t.Cleanup(func() { p.other.Close() })
		p.backUp(t, p.other, map[string]testFiles{}, 3)
	}
	return p
}

// backUp makes a backup that begins and ends in a segment.
func (p *prefixes) backUp(t *testing.T, r *Repository, made map[string]testFiles, no uint64) {
	putTestSegment(t, r, 1, no)
	putTestSegment(t, r, 1, no+1)
	files := maps.Clone(p.next)
	files["pgdata/a"] = incompressible(int(no))
	m, err := r.WriteBackup(t.Context(), "main", BackupOptions{Workers: 1}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		return p.describe(w, files, no)
	})
	if err != nil {
		t.Fatal(err)
	}
	made[m.ID] = withSegment(files, no)
	time.Sleep(day)
}

// describe writes a backup's files, and refers to its segment.
func (p *prefixes) describe(w *BackupWriter, files testFiles, no uint64) (Manifest, error) {
	m := simRange{timeline: 1, first: no, last: no}.manifest()
	err := writeFiles(w, files)
	if err == nil {
		err = w.Mkdir("pgdata/pg_wal", Entry{Mode: 0o700})
	}
	if err == nil {
		err = w.AddWAL("pgdata/pg_wal/"+m.WALFirst, Entry{Mode: 0o600, Size: testSegmentSize}, testSegment(1, no))
	}
	return m, err
}

func withSegment(files testFiles, no uint64) testFiles {
	files = maps.Clone(files)
	files["pgdata/pg_wal/"+testSegment(1, no).String()] = testSegmentContent(1, no)
	return files
}
