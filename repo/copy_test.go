package repo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// copySource is a repository with backups that have most in common, and all WAL.
type copySource struct {
	*Repository
	files   testFiles
	backups []*Manifest
}

// inMemory makes a repository of which nothing has to be synced.
func inMemory(t testing.TB, keys ...Key) *Repository {
	t.Helper()
	r, err := initStore(t.Context(), store.NewMem(), "memory", Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func openStored(t testing.TB, s store.Store, keys ...Key) *Repository {
	t.Helper()
	r, err := openStore(t.Context(), s, "memory", Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// damagedCopy is a clone of a repository that is not encrypted, with one object damaged.
func damagedCopy(t testing.TB, r *Repository, key string) *Repository {
	t.Helper()
	clone := store.NewMem()
	for _, k := range storedKeys(t, r) {
		b, err := r.store.Get(t.Context(), k, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		if k == key {
			b[len(b)/2] ^= 0x55
		}
		if err := clone.Put(t.Context(), k, b); err != nil {
			t.Fatal(err)
		}
	}
	return openStored(t, clone)
}

func newCopySource(t testing.TB, files testFiles, keys ...Key) *copySource {
	t.Helper()
	r := inMemory(t, keys...)
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, testSegmentSize); err != nil {
		t.Fatal(err)
	}
	return &copySource{Repository: r, files: files}
}

// backUp changes files, and adds a backup and its WAL.
func (s *copySource) backUp(t testing.TB, changed testFiles) *Manifest {
	t.Helper()
	for name, content := range changed {
		s.files[name] = content
	}
	var prior *Backup
	if n := len(s.backups); n > 0 {
		prior = s.OpenBackup(s.backups[n-1])
	}
	first := uint64(3*len(s.backups) + 3)
	for no := first; no < first+3; no++ {
		putTestSegment(t, s.Repository, 1, no)
	}
	s.backups = append(s.backups, backupAt(t, s.Repository, s.files, prior, first, first+1))
	return s.backups[len(s.backups)-1]
}

// withPages gives the file with some pages changed.
func (s *copySource) withPages(name string, seed uint64, pages ...int) testFiles {
	b := bytes.Clone(s.files[name])
	for _, p := range pages {
		copy(b[p*PageSize:], pagesOf(seed+uint64(p), 1))
	}
	return testFiles{name: b}
}

func newDestination(t testing.TB, keys ...Key) *Repository {
	t.Helper()
	r := inMemory(t, keys...)
	t.Cleanup(func() { checkClean(t, r) })
	return r
}

// tinyFiles are read hundreds of times.
func tinyFiles() testFiles {
	return testFiles{"pgdata/PG_VERSION": []byte("15\n"), "pgdata/base/5/2": pagesOf(3, 60), "pgdata/global/pg_control": pagesOf(1, 1)}
}

// copyAll copies, and expects that nothing is left out.
func copyAll(t testing.TB, from, to *Repository) Copied {
	t.Helper()
	done, left := copyWith(t, from, to, CopyOptions{})
	for _, l := range left {
		t.Errorf("not copied: %+v", l)
	}
	return done
}

func copyWith(t testing.TB, from, to *Repository, o CopyOptions) (done Copied, left []NotCopied) {
	t.Helper()
	o.NotCopied = func(l NotCopied) { left = append(left, l) }
	done, err := from.Copy(t.Context(), to, o)
	if err != nil {
		t.Fatal(err)
	}
	return done, left
}

// sameBackups compares backups of both repositories: what they say of themselves, all entries and all bytes.
func sameBackups(t testing.TB, from, to *Repository, want ...*Manifest) {
	t.Helper()
	ids, err := to.BackupIDs(t.Context(), "main")
	for i, id := range ids {
		ids[i] = OriginalID(id)
	}
	ids = slices.Compact(ids) // two copies at once may both bring a backup
	var wanted []string
	for _, m := range want {
		wanted = append(wanted, m.ID)
	}
	if err != nil || !slices.Equal(ids, wanted) {
		t.Fatalf("the destination has backups %v, want %v: %v", ids, wanted, err)
	}
	for _, m := range want {
		got, err := to.Manifest(t.Context(), "main", m.ID)
		if err != nil {
			t.Fatal(err)
		}
		if a, b := said(t, m), said(t, got); a != b {
			t.Errorf("the copy says of itself\n%s\nand the original\n%s", b, a)
		}
		if a, b := tree(t, from, m), tree(t, to, got); a != b {
			t.Errorf("backup %s has in the copy\n%s\nand in the original\n%s", m.ID, b, a)
		}
	}
}

// said is what a manifest says that does not depend on the repository.
func said(t testing.TB, m *Manifest) string {
	t.Helper()
	s := *m
	s.ID, s.Root, s.Packs, s.StoredBytes = OriginalID(s.ID), Ref{}, PackListRef{}, 0
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// tree is all that a reader of a backup sees.
func tree(t testing.TB, r *Repository, m *Manifest) string {
	t.Helper()
	var b strings.Builder
	err := r.OpenBackup(m).Walk(t.Context(), ".", func(name string, e Entry) error {
		var content []byte
		if e.Mode.IsRegular() {
			var err error
			if content, err = readFile(t.Context(), r.OpenBackup(m), e); err != nil {
				return err
			}
		}
		id, _ := newDigester([keySize]byte{}).sum(content, nil)
		fmt.Fprintln(&b, name, e.Mode, e.UID, e.GID, e.Size, e.ModTime, e.Link, id)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func storedBytes(t testing.TB, r *Repository) (n int64) {
	t.Helper()
	for o, err := range r.store.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		n += o.Size
	}
	return n
}

// TestCopy: what is copied is the same, a second copy has nothing to do, a third brings what is new; from and to any seal.
func TestCopy(t *testing.T) {
	for _, seals := range []struct {
		name     string
		from, to []Key
	}{
		{"plain to encrypted", nil, []Key{newTestKey(t)}},
		{"encrypted to encrypted", []Key{newTestKey(t)}, []Key{newTestKey(t)}},
		{"encrypted to plain", []Key{newTestKey(t)}, nil},
	} {
		t.Run(seals.name, func(t *testing.T) {
			files := sampleFiles()
			files["pgdata/base/5/2"] = pagesOf(3, 300)
			s := newCopySource(t, files, seals.from...)
			s.backUp(t, nil)
			s.backUp(t, s.withPages("pgdata/base/5/2", 100, 7, 100, 101, 102))
			delete(s.files, "pgdata/odd")
			s.backUp(t, testFiles{
				"pgdata/base/5/3": s.files["pgdata/base/5/3"][:20*PageSize+5], // grown, shrunk, moved, new
				"pgdata/base/5/4": append(bytes.Clone(s.files["pgdata/base/5/4"]), pagesOf(8, 5)...),
				"pgdata/base/6/1": s.files["pgdata/base/5/2"], "pgdata/base/6/2": pagesOf(9, 70)})
			to := newDestination(t, seals.to...)
			done := copyAll(t, s.Repository, to)
			if len(done.Backups) != 3 || done.WALFiles != 9 || done.WALBytes != 9*testSegmentSize {
				t.Errorf("copied %+v", done)
			}
			sameBackups(t, s.Repository, to, s.backups...)

			before := storedKeys(t, to)
			if done := copyAll(t, s.Repository, to); len(done.Backups) != 0 || done.Present != 3 || done.WALFiles != 0 || done.WALThere != 9 {
				t.Errorf("a second time it copied %+v", done)
			}
			if after := storedKeys(t, to); !slices.Equal(before, after) {
				t.Errorf("a second copy left %v where there was %v", after, before)
			}
			s.backUp(t, s.withPages("pgdata/base/5/2", 300, 8))
			if done := copyAll(t, s.Repository, to); len(done.Backups) != 1 || done.WALFiles != 3 {
				t.Errorf("a third time it copied %+v", done)
			}
			sameBackups(t, s.Repository, to, s.backups...)
		})
	}
}

// TestCopyReadsWhatChanged: an incremental copy reads from the source little more than what the backup added there.
func TestCopyReadsWhatChanged(t *testing.T) {
	files := testFiles{"pgdata/base/1/1": pagesOf(1, 200), "pgdata/base/5/2": pagesOf(2, 2000)}
	for i := range 100 {
		files[fmt.Sprintf("pgdata/base/4/%d", i)] = pagesOf(uint64(i), 1)
	}
	s := newCopySource(t, files)
	s.backUp(t, nil)
	to := newDestination(t)
	copyAll(t, s.Repository, to)
	m := s.backUp(t, s.withPages("pgdata/base/5/2", 100, 7, 1000, 1500))

	from := openStored(t, s.store)
	got := copyAll(t, from, to).Backups
	if len(got) != 1 {
		t.Fatalf("copied %d backups", len(got))
	}
	wal := int64(3 * 1024) // segments without a record
	t.Logf("%d bytes read for a backup that added %d of %d; its copy added %d", from.ReadBytes(), m.StoredBytes, m.SizeBytes, got[0].StoredBytes)
	if limit := 3*m.StoredBytes + wal; from.ReadBytes() > limit {
		t.Errorf("%d bytes were read, want at most %d", from.ReadBytes(), limit)
	}
	if got[0].StoredBytes > m.StoredBytes*11/10 {
		t.Errorf("the copy stores %d bytes, the original %d", got[0].StoredBytes, m.StoredBytes)
	}
	sameBackups(t, from, to, s.backups...)
}

// TestCopyTakesNoMoreRoom: backups that share nearly everything share it in the destination, all at once or one by one.
func TestCopyTakesNoMoreRoom(t *testing.T) {
	long(t)
	s := newCopySource(t, testFiles{"pgdata/base/5/2": pagesOf(2, 1000), "pgdata/base/5/3": pagesOf(3, 100)})
	at, gradually := newDestination(t), newDestination(t)
	for i := range 10 {
		var pages []int
		for p := range 50 {
			pages = append(pages, p*20+i*7%20)
		}
		s.backUp(t, s.withPages("pgdata/base/5/2", uint64(1000*i), pages...))
		copyAll(t, s.Repository, gradually)
	}
	copyAll(t, s.Repository, at)
	for _, to := range []*Repository{at, gradually} {
		ratio := float64(storedBytes(t, to)) / float64(storedBytes(t, s.Repository))
		t.Logf("the copy takes %.3f times the room of the source", ratio)
		if ratio > 1.1 {
			t.Errorf("the copy takes %.3f times the room", ratio)
		}
		sameBackups(t, s.Repository, to, s.backups...)
	}
}

// TestCopyOne copies a single backup, and later the others, which are older.
func TestCopyOne(t *testing.T) {
	s := newCopySource(t, smallFiles())
	for i := range 3 {
		s.backUp(t, s.withPages("pgdata/base/5/2", uint64(100*i), 7+i))
	}
	to := newDestination(t)
	if _, err := s.Copy(t.Context(), to, CopyOptions{Backup: "20200101T000000.000Z-0000"}); !errors.Is(err, ErrNoBackup) {
		t.Errorf("a backup that is not there: %v", err)
	}
	if _, err := s.Copy(t.Context(), to, CopyOptions{Clusters: []string{"other"}}); !errors.Is(err, ErrNoCluster) {
		t.Errorf("a cluster that is not there: %v", err)
	}
	if done, _ := copyWith(t, s.Repository, to, CopyOptions{Backup: Latest}); len(done.Backups) != 1 || done.WALFiles != 9 {
		t.Errorf("copied %+v", done)
	}
	sameBackups(t, s.Repository, to, s.backups[2])
	if done, _ := copyWith(t, s.Repository, to, CopyOptions{Backup: s.backups[0].ID}); len(done.Backups) != 1 || done.WALFiles != 0 {
		t.Errorf("copied %+v", done)
	}
	copyAll(t, s.Repository, to)
	sameBackups(t, s.Repository, to, s.backups...)
	if got, want := storedBytes(t, to), storedBytes(t, s.Repository); got > want*11/10 {
		t.Errorf("the copy takes %d bytes, the source %d", got, want)
	}
}

// TestCopyRefuses: a clone of the source, and a name that is another cluster's in the destination.
func TestCopyRefuses(t *testing.T) {
	s := newCopySource(t, smallFiles())
	s.backUp(t, nil)
	if _, err := s.Copy(t.Context(), s.Repository, CopyOptions{}); !errors.Is(err, ErrSameRepository) {
		t.Errorf("copied to itself: %v", err)
	}
	to := newDestination(t)
	if _, err := to.BindCluster(t.Context(), "main", testSystemID+1, testSegmentSize); err != nil {
		t.Fatal(err)
	}
	_, left := copyWith(t, s.Repository, to, CopyOptions{})
	if len(left) != 1 || !errors.Is(left[0].Err, ErrOtherCluster) || left[0].Cluster != "main" {
		t.Errorf("left out %+v", left)
	}
}

// TestCopyDeleted: what was deleted in the source is not copied, what was deleted in the destination does not come back.
func TestCopyDeleted(t *testing.T) {
	s := newCopySource(t, smallFiles())
	for range 3 {
		s.backUp(t, nil)
	}
	to := newDestination(t)
	for i, r := range []*Repository{s.Repository, to} {
		if err := r.markDeleted(t.Context(), BackupName{"main", s.backups[i].ID}, "not kept"); err != nil {
			t.Fatal(err)
		}
	}
	unmade := BackupName{"main", newCopyID(s.backups[2].ID)}
	if err := to.markUnmade(t.Context(), unmade, "its writer died"); err != nil {
		t.Fatal(err)
	}
	if done := copyAll(t, s.Repository, to); done.Deleted != 1 || len(done.Backups) != 1 {
		t.Errorf("copied %+v", done)
	}
	sameBackups(t, s.Repository, to, s.backups[2])
}

// faultyStore fails from the so-manieth change on. What it fails at may have been done all the same.
type faultyStore struct {
	store.Store
	mu   sync.Mutex
	left int
	kept bool // what fails first was done
}

var errPowerCut = errors.New("power cut")

func (s *faultyStore) Put(ctx context.Context, key string, body []byte) error {
	s.mu.Lock()
	s.left--
	left := s.left
	s.mu.Unlock()
	if left > 0 || left == 0 && s.kept {
		if err := s.Store.Put(ctx, key, body); err != nil {
			return err
		}
	}
	if left <= 0 {
		return errPowerCut
	}
	return nil
}

func (s *faultyStore) Delete(ctx context.Context, key string) error { return errPowerCut }

func (s *faultyStore) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	return s.Store.List(ctx, prefix)
}

// TestCopyInterrupted ends the copy at each change of the destination, lost or done all the same: what is there then is
// whole, and the copy goes on where it was.
func TestCopyInterrupted(t *testing.T) {
	s := newCopySource(t, tinyFiles())
	for i := range 2 {
		s.backUp(t, s.withPages("pgdata/base/5/2", uint64(100*i), 7+i))
	}
	step := 1
	if testing.Short() {
		step = 4
	}
	for _, kept := range []bool{false, true} {
		for n := 1; ; n += step {
			to := inMemory(t)
			whole := to.store
			to.store = &faultyStore{Store: whole, left: n, kept: kept}
			_, err := s.Copy(t.Context(), to, CopyOptions{Workers: 1})
			to.store = whole
			if err == nil {
				t.Logf("%d changes", n-1)
				break
			}
			if !errors.Is(err, errPowerCut) {
				t.Fatalf("change %d, kept %v: %v", n, kept, err)
			}
			backups, _ := to.BackupIDs(t.Context(), "main")
			wal, _ := to.WALNames(t.Context(), "main")
			done := copyAll(t, s.Repository, to)
			if len(done.Backups) != 2-len(backups) || done.WALFiles != 6-len(wal) {
				t.Errorf("change %d, kept %v: with %d backups and %d WAL files there it copied %+v", n, kept, len(backups), len(wal), done)
			}
			sameBackups(t, s.Repository, to, s.backups...)
			if t.Failed() {
				return
			}
		}
	}
}

// TestCopyAtOnce: two copies to one destination.
func TestCopyAtOnce(t *testing.T) {
	s := newCopySource(t, smallFiles())
	for i := range 3 {
		s.backUp(t, s.withPages("pgdata/base/5/2", uint64(100*i), 7+i))
	}
	to := newDestination(t)
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			if _, err := s.Copy(t.Context(), to, CopyOptions{NotCopied: func(l NotCopied) { t.Errorf("not copied: %+v", l) }}); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
	sameBackups(t, s.Repository, to, s.backups...)
}

// TestCopyOfDamaged damages each object of the source: what can still be read is copied, and nothing else is.
func TestCopyOfDamaged(t *testing.T) {
	long(t)
	s := newCopySource(t, tinyFiles())
	for i := range 3 {
		s.backUp(t, s.withPages("pgdata/base/5/2", uint64(100*i), 7+i))
	}
	if err := s.PutWAL(t.Context(), "main", pg.WALName{Kind: pg.WALHistory, Timeline: 2}, []byte("1\t0/C00000\tno recovery target specified\n")); err != nil {
		t.Fatal(err)
	}
	lost := map[string]int{}
	for _, key := range storedKeys(t, s.Repository) {
		if key != configKey && !strings.HasPrefix(key, sessionsPrefix) {
			lost[key[:strings.IndexByte(key, '/')]] += s.copyDamaged(t, key)
		}
	}
	t.Logf("%v", lost)
	for _, kind := range []string{"clusters", "backups", "packs", "wal"} {
		if lost[kind] == 0 {
			t.Errorf("no damage of %s costs anything", kind)
		}
	}
}

// copyDamaged copies from a source of which one object is damaged, and tells how much could not be copied.
func (s *copySource) copyDamaged(t *testing.T, key string) int {
	t.Helper()
	from, to := damagedCopy(t, s.Repository, key), inMemory(t)
	done, left := copyWith(t, from, to, CopyOptions{})
	for _, l := range left {
		if !errors.Is(l.Err, ErrCorrupt) || l.Cluster != "main" || l.Backup != "" && readable(t, from, l.Backup) {
			t.Errorf("%s is damaged: not copied: %+v", key, l)
		}
	}
	for _, m := range done.Backups {
		if id := OriginalID(m.ID); !readable(t, from, id) {
			t.Errorf("%s is damaged: copied %s all the same", key, id)
		}
	}
	if n := len(done.Backups); n < 3 && len(left) == 0 {
		t.Errorf("%s is damaged: only %d backups were copied", key, n)
	}
	sameBackups(t, s.Repository, to, slices.DeleteFunc(slices.Clone(s.backups), func(m *Manifest) bool { return !readable(t, from, m.ID) })...)
	_, err := to.Check(t.Context(), CheckOptions{ReadData: true}, func(f Finding) {
		if f.Window == nil { // WAL that is missing, because it was damaged, is found
			t.Errorf("%s is damaged, in the copy: %+v", key, f)
		}
	})
	if err != nil {
		t.Error(err)
	}
	return len(left)
}

// readable tells whether a backup can be read from beginning to end.
func readable(t *testing.T, r *Repository, id string) bool {
	t.Helper()
	m, err := r.Manifest(t.Context(), "main", id)
	if err != nil {
		return false
	}
	b := r.OpenBackup(m)
	return b.Walk(t.Context(), ".", func(_ string, e Entry) error {
		if !e.Mode.IsRegular() {
			return nil
		}
		_, err := readFile(t.Context(), b, e)
		return err
	}) == nil
}

// TestCopyToDamaged: what is damaged of earlier copies costs nothing but comparing with them.
func TestCopyToDamaged(t *testing.T) {
	s := newCopySource(t, smallFiles())
	s.backUp(t, nil)
	to := inMemory(t)
	copyAll(t, s.Repository, to)
	s.backUp(t, s.withPages("pgdata/base/5/2", 100, 7))
	for _, key := range storedKeys(t, to) {
		if !strings.HasPrefix(key, "packs/") && !strings.HasPrefix(key, "backups/") {
			continue
		}
		if done := copyAll(t, s.Repository, damagedCopy(t, to, key)); len(done.Backups) != 1 {
			t.Errorf("%s is damaged: copied %+v", key, done)
		}
	}
}
