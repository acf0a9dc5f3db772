package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

const testSegmentSize = 1 << 20

// checkedRepo is a repository on disk that a test damages.
type checkedRepo struct {
	dir  string
	a, b *Manifest // two backups; the WAL of a is segments 3 and 4, that of b 8 and 9
}

// newCheckedRepo makes one with WAL of segments 2 to 12. In the second backup one page of base/5/2 changed; base/5/1 and
// base/5/3 are the same in both.
func newCheckedRepo(t testing.TB) checkedRepo {
	t.Helper()
	k := checkedRepo{dir: filepath.Join(t.TempDir(), "repo")}
	r, err := Init(t.Context(), k.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, testSegmentSize); err != nil {
		t.Fatal(err)
	}
	for no := range uint64(11) {
		putTestSegment(t, r, 1, no+2)
	}
	files := smallFiles()
	k.a = backupAt(t, r, files, nil, 3, 4)
	changed := bytes.Clone(files["pgdata/base/5/2"])
	copy(changed[7*PageSize:], pagesOf(77, 1))
	files["pgdata/base/5/2"] = changed
	k.b = backupAt(t, r, files, r.OpenBackup(k.a), 8, 9)
	return k
}

// putTestSegment stores a WAL segment without a record in it.
func putTestSegment(t testing.TB, r *Repository, tli pg.Timeline, no uint64) {
	t.Helper()
	if err := r.PutWAL(t.Context(), "main", testSegment(tli, no), testSegmentContent(tli, no)); err != nil {
		t.Fatal(err)
	}
}

// testSegmentContent is a segment without records.
func testSegmentContent(tli pg.Timeline, no uint64) []byte {
	seg := make([]byte, testSegmentSize)
	binary.LittleEndian.PutUint16(seg[0:], 0xD110) // XLOG_PAGE_MAGIC of 15
	binary.LittleEndian.PutUint16(seg[2:], 2)      // XLP_LONG_HEADER
	binary.LittleEndian.PutUint32(seg[4:], uint32(tli))
	binary.LittleEndian.PutUint64(seg[8:], no*testSegmentSize)
	binary.LittleEndian.PutUint64(seg[24:], testSystemID)
	binary.LittleEndian.PutUint32(seg[32:], testSegmentSize)
	binary.LittleEndian.PutUint32(seg[36:], 8192)
	return seg
}

func testSegment(tli pg.Timeline, no uint64) pg.WALName {
	return pg.SegmentName(tli, no, testSegmentSize)
}

// backupAt writes a backup that needs WAL segments first to last of timeline 1, with the last of them in its pg_wal.
func backupAt(t testing.TB, r *Repository, files testFiles, prior *Backup, first, last uint64) *Manifest {
	t.Helper()
	m, err := r.WriteBackup(t.Context(), "main", BackupOptions{Prior: prior}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		m := testManifest()
		m.SegmentSize = testSegmentSize
		m.StartLSN, m.StopLSN = pg.LSN(first*testSegmentSize+0x28), pg.LSN(last*testSegmentSize+0x100)
		m.StoppedAt = time.Unix(1_700_000_000+int64(last)*60, 0).UTC()
		m.WALFirst, m.WALLast = testSegment(1, first).String(), testSegment(1, last).String()
		err := writeFiles(w, files)
		if err == nil {
			err = w.Mkdir("pgdata/pg_wal", Entry{Mode: 0o700, ModTime: m.StoppedAt})
		}
		for no := first; err == nil && no <= last; no++ {
			err = w.AddWAL("pgdata/pg_wal/"+testSegment(1, no).String(), Entry{Mode: 0o600, Size: testSegmentSize, ModTime: m.StoppedAt}, testSegment(1, no))
		}
		return m, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// copied gives a copy to damage.
func (k checkedRepo) copied(t testing.TB) checkedRepo {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "copy")
	if err := os.CopyFS(dir, os.DirFS(k.dir)); err != nil {
		t.Fatal(err)
	}
	k.dir = dir
	return k
}

func (k checkedRepo) open(t testing.TB) *Repository {
	t.Helper()
	r, err := Open(t.Context(), k.dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func (k checkedRepo) remove(t testing.TB, key string) {
	t.Helper()
	if err := os.Remove(filepath.Join(k.dir, key)); err != nil {
		t.Fatal(err)
	}
}

// edit changes an object's bytes.
func (k checkedRepo) edit(t testing.TB, key string, change func([]byte) []byte) {
	t.Helper()
	path := filepath.Join(k.dir, key)
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(was), 0o600); err != nil {
		t.Fatal(err)
	}
}

func flipAt(at int) func([]byte) []byte {
	return func(b []byte) []byte {
		if at < 0 {
			at += len(b)
		}
		b[at] ^= 0x40
		return b
	}
}

// check runs one on the repository as it is now.
func (k checkedRepo) check(t testing.TB, o CheckOptions) ([]Finding, Checked) {
	t.Helper()
	var all []Finding
	done, err := k.open(t).Check(t.Context(), o, func(f Finding) { all = append(all, f) })
	if err != nil {
		t.Fatal(err)
	}
	return all, done
}

// place of a file's first chunk in a backup.
func (k checkedRepo) chunk(t testing.TB, m *Manifest, name string, i int) Ref {
	t.Helper()
	b := k.open(t).OpenBackup(m)
	e, err := b.Stat(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	fm, err := b.r.fileMap(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	return fm.chunks[i]
}

var depths = []struct {
	name string
	o    CheckOptions
}{{"structure", CheckOptions{}}, {"maps", CheckOptions{Maps: true}}, {"read-data", CheckOptions{ReadData: true}}}

// summary is what a finding says but for the words: "<object> hits A:1,B:2 window <from>-<to> of A".
func (k checkedRepo) summary(f Finding) string {
	name := map[string]string{k.a.ID: "A", k.b.ID: "B"}
	s := strings.NewReplacer(k.a.ID, "A", k.b.ID, "B").Replace(f.Object)
	if f.Note {
		s = "note " + s
	}
	for _, h := range f.Backups {
		s += fmt.Sprintf(" %s:%d", name[h.Backup], h.Total)
	}
	if w := f.Window; w != nil {
		s += fmt.Sprintf(" %s to %s of", w.From.LSN, w.To.LSN)
		for _, id := range w.Backups {
			s += " " + name[id]
		}
	}
	return s
}

// TestCheckSaysWhatDamageCosts does one damage at a time, and compares what each depth finds.
func TestCheckSaysWhatDamageCosts(t *testing.T) {
	sound := newCheckedRepo(t)
	shared := sound.chunk(t, sound.a, "pgdata/base/5/1", 0)  // in a pack of hot chunks
	large := sound.chunk(t, sound.a, "pgdata/base/5/2", 1)   // in both backups
	changed := sound.chunk(t, sound.b, "pgdata/base/5/2", 0) // page 7 in A only, or the changed page
	if changed.Pack == large.Pack {
		changed = sound.chunk(t, sound.b, "pgdata/base/5/2", 1)
	}
	seg := func(no uint64) string { return walKey("main", testSegment(1, no)) }
	rootA, rootB := sound.a.Root, sound.b.Root
	pack := func(r Ref) string { return r.Pack.key() }
	gone := func(key string) func(*testing.T, checkedRepo) {
		return func(t *testing.T, k checkedRepo) { k.remove(t, key) }
	}
	flipped := func(key string, at int) func(*testing.T, checkedRepo) {
		return func(t *testing.T, k checkedRepo) { k.edit(t, key, flipAt(at)) }
	}
	cut := func(key string, by int) func(*testing.T, checkedRepo) {
		return func(t *testing.T, k checkedRepo) { k.edit(t, key, func(b []byte) []byte { return b[:len(b)-by] }) }
	}
	cutTo := func(key string, n uint32) func(*testing.T, checkedRepo) {
		return func(t *testing.T, k checkedRepo) { k.edit(t, key, func(b []byte) []byte { return b[:n] }) }
	}
	all := func(s string) [3]string { return [3]string{s, s, s} }
	for _, c := range []struct {
		name string
		do   func(*testing.T, checkedRepo)
		want [3]string // at each depth; "": nothing
	}{
		{"nothing", func(*testing.T, checkedRepo) {}, all("")},
		{"hot pack missing", gone(pack(shared)), [3]string{pack(shared) + " A:0 B:0", pack(shared) + " A:2 B:2", pack(shared) + " A:2 B:2"}},
		{"pack of both missing", gone(pack(large)), [3]string{pack(large) + " A:0 B:0", pack(large) + " A:3 B:3", pack(large) + " A:3 B:3"}},
		{"pack of B missing", gone(pack(changed)), [3]string{pack(changed) + " B:0", pack(changed) + " B:1", pack(changed) + " B:1"}},
		{"pack cut", cut(pack(large), 10), [3]string{pack(large) + " A:0 B:0", pack(large) + " A:0 B:0", pack(large) + " A:0 B:0"}},
		{"pack cut in the last chunk", cutTo(pack(changed), changed.end()-1), [3]string{pack(changed) + " B:0", pack(changed) + " B:1", pack(changed) + " B:1"}},
		{"byte of a chunk of both", flipped(pack(large), int(large.Offset)+50), [3]string{"", "", pack(large) + " A:1 B:1"}},
		{"byte of a chunk of B", flipped(pack(changed), int(changed.Offset)+50), [3]string{"", "", pack(changed) + " B:1"}},
		{"byte of a header", flipped(pack(large), 20), [3]string{"", pack(large) + " A:0 B:0", pack(large) + " A:0 B:0"}},
		{"byte of a table of contents", flipped(pack(large), -60), [3]string{"", pack(large) + " A:0 B:0", pack(large) + " A:0 B:0"}},
		{"tree of A", flipped(pack(rootA), int(rootA.Offset)+12), [3]string{"", pack(rootA) + " A:1", pack(rootA) + " A:1"}},
		{"tree of B", flipped(pack(rootB), int(rootB.Offset)+12), [3]string{"", pack(rootB) + " B:1", pack(rootB) + " B:1"}},
		{"manifest missing", gone(manifestKey("main", sound.a.ID)), all("backups/main/A.json A:0")},
		{"manifest damaged", flipped(manifestKey("main", sound.a.ID), 100), all("backups/main/A.json A:0")},
		{"pack list missing", gone(packListKey("main", sound.b.ID)), all("backups/main/B.packs B:0")},
		{"pack list damaged", flipped(packListKey("main", sound.b.ID), objectHeaderSize+5), all("backups/main/B.packs B:0")},
		{"cluster document missing", gone(clusterKey("main")), all("clusters/main A:0 B:0")},
		{"cluster document damaged", flipped(clusterKey("main"), 40), all("clusters/main A:0 B:0")},
		{"segment between", gone(seg(6)), all(seg(6) + " 0/600000 to 0/900100 of A")},
		{"segment behind", gone(seg(11)), all(seg(11) + " 0/B00000 to 0/0 of A B")},
		{"segment before all", gone(seg(2)), all("")},
		{"newest segment", gone(seg(12)), all("")},
		{"segment of A", gone(seg(4)), all(seg(4) + " A:1")},
		{"segment of B", gone(seg(9)), all(seg(9) + " B:1 0/900000 to 0/0 of A")},
		{"head of a segment", flipped(seg(6), 60), [3]string{"", seg(6) + " 0/600000 to 0/900100 of A", seg(6) + " 0/600000 to 0/900100 of A"}},
		{"body of a segment", flipped(seg(9), -5), [3]string{"", "", seg(9) + " B:1 0/900000 to 0/0 of A"}},
		{"segment cut", cut(seg(6), 1), [3]string{"", seg(6) + " 0/600000 to 0/900100 of A", seg(6) + " 0/600000 to 0/900100 of A"}},
		{"segment that none needs", flipped(seg(2), -5), [3]string{"", "", seg(2)}},
		{"other file among the WAL", func(t *testing.T, k checkedRepo) {
			if err := os.WriteFile(filepath.Join(k.dir, "wal/main/00000001/notes.txt"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, all("wal/main/00000001/notes.txt A:0 B:0")},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			k := sound.copied(t)
			c.do(t, k)
			for i, depth := range depths {
				found, _ := k.check(t, depth.o)
				var got []string
				for _, f := range found {
					got = append(got, k.summary(f))
					if !errors.Is(f.Err, ErrCorrupt) || f.Cost == "" && f.Window == nil || strings.Contains(f.Cost, "--"+depth.name) {
						t.Errorf("%s: %v; cost %q", depth.name, f.Err, f.Cost)
					}
				}
				if strings.Join(got, "\n") != c.want[i] {
					t.Errorf("%s finds\n%s\nwant\n%s", depth.name, strings.Join(got, "\n"), c.want[i])
					for _, f := range found {
						t.Logf("%v\n%s %+v", f.Err, f.Cost, f.Backups)
					}
				}
			}
		})
	}
}

// TestCheckNamesFiles compares the files that a damaged chunk is said to hit with those that cannot be read.
func TestCheckNamesFiles(t *testing.T) {
	k := newCheckedRepo(t)
	ref := k.chunk(t, k.a, "pgdata/base/5/3", 0)
	k.edit(t, ref.Pack.key(), flipAt(int(ref.Offset)+30))
	found, _ := k.check(t, CheckOptions{ReadData: true})
	if len(found) != 1 || len(found[0].Backups) != 2 {
		t.Fatalf("found %+v", found)
	}
	r := k.open(t)
	for i, m := range []*Manifest{k.a, k.b} {
		b := r.OpenBackup(m)
		var unreadable []string
		err := b.Walk(t.Context(), ".", func(name string, e Entry) error {
			if e.Mode.IsRegular() {
				if _, err := readFile(t.Context(), b, e); err != nil {
					unreadable = append(unreadable, name)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := found[0].Backups[i]; got.Backup != m.ID || !slices.Equal(got.Files, unreadable) || got.Total != len(unreadable) {
			t.Errorf("found %+v, cannot be read: %v", got, unreadable)
		}
	}
}

// TestCheckReadsSharedOnce counts what checks read: ten backups of one content cost hardly more than one.
func TestCheckReadsSharedOnce(t *testing.T) {
	r := newTestRepository(t)
	files := sampleFiles()
	b := writeTestBackup(t, r, files, nil)
	read := func(o CheckOptions) int64 {
		t.Helper()
		fresh, err := Open(t.Context(), r.URL(), Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer fresh.Close()
		before := fresh.ReadBytes()
		if _, err := fresh.Check(t.Context(), o, func(f Finding) { t.Error(f.Err) }); err != nil {
			t.Fatal(err)
		}
		return fresh.ReadBytes() - before
	}
	var once [3]int64
	for i, d := range depths {
		once[i] = read(d.o)
	}
	stored := int64(0)
	for o, err := range r.store.List(t.Context(), packsRoot) {
		if err != nil {
			t.Fatal(err)
		}
		stored += o.Size
	}
	if once[2] > stored*13/10 {
		t.Errorf("%d bytes read of packs of %d", once[2], stored)
	}
	for range 9 {
		b = writeTestBackup(t, r, files, b)
	}
	for i, d := range depths {
		if ten := read(d.o); ten > once[i]+9*8192 {
			t.Errorf("%s: %d bytes read for ten backups, %d for one", d.name, ten, once[i])
		}
	}
}

// TestCheckSample damages one object at a time: of the parts, just one comes upon it.
func TestCheckSample(t *testing.T) {
	sound := newCheckedRepo(t)
	s := SampleOf(20, time.Unix(1_800_000_000, 0))
	if s.Parts != 5 {
		t.Fatalf("20 %% is one of %d parts", s.Parts)
	}
	ref := sound.chunk(t, sound.a, "pgdata/base/5/2", 1)
	for key, at := range map[string]int{ref.Pack.key(): int(ref.Offset) + 50, walKey("main", testSegment(1, 9)): -5} {
		k := sound.copied(t)
		k.edit(t, key, flipAt(at))
		seen, packs, wal, verified := 0, 0, 0, int64(0)
		for part := range s.Parts {
			found, done := k.check(t, CheckOptions{ReadData: true, Sample: Sample{part, s.Parts}})
			seen += len(found)
			packs, wal, verified = packs+done.PacksRead, wal+done.WALRead, verified+done.Bytes
		}
		_, whole := k.check(t, CheckOptions{ReadData: true})
		if seen != 1 || packs != whole.Packs || wal != whole.WALFiles || verified != whole.Bytes {
			t.Errorf("%s: all parts find %d, and read %d packs, %d WAL objects, %d bytes of %+v", key, seen, packs, wal, verified, whole)
		}
	}
}

// TestSampleCoversAll runs at regular intervals: so many runs as there are parts come by every part.
func TestSampleCoversAll(t *testing.T) {
	for percent, parts := range map[float64]int{1: 101, 5: 19, 10: 11, 15: 5, 20: 5, 50: 2, 100: 0} {
		for _, days := range []int{1, 7, 30} {
			if parts > 0 && days%parts == 0 {
				continue
			}
			met := map[int]bool{}
			for i := range max(1, parts) {
				s := SampleOf(percent, time.Unix(1_800_000_000, 0).AddDate(0, 0, i*days))
				if s.Parts != parts {
					t.Fatalf("%v %%: %d parts, want %d", percent, s.Parts, parts)
				}
				met[s.Part] = true
			}
			if len(met) != max(1, parts) {
				t.Errorf("%v %% every %d days: %d of %d parts", percent, days, len(met), parts)
			}
		}
	}
}

// putSecondTimeline puts segments 10 to 13 of timeline 2, which leaves timeline 1 within segment 10, and its history file.
func putSecondTimeline(t *testing.T, r *Repository) (history pg.WALName) {
	t.Helper()
	history = pg.WALName{Kind: pg.WALHistory, Timeline: 2}
	if err := r.PutWAL(t.Context(), "main", history, []byte("1\t0/A00800\tno recovery target specified\n")); err != nil {
		t.Fatal(err)
	}
	for no := range uint64(4) {
		putTestSegment(t, r, 2, no+10)
	}
	return history
}

// TestCheckTimelines follows a history file from one timeline to the next.
func TestCheckTimelines(t *testing.T) {
	sound := newCheckedRepo(t)
	r := sound.open(t)
	history := putSecondTimeline(t, r)
	if found, _ := sound.check(t, CheckOptions{ReadData: true}); len(found) != 0 {
		t.Fatalf("found %+v", found)
	}
	for _, c := range []struct{ remove, want string }{
		{walKey("main", testSegment(2, 12)), " 0/C00000 to 0/0 of A B"},
		{walKey("main", testSegment(1, 11)), " 0/B00000 to 0/0 of A B"}, // of timeline 1, after the switch
		{walKey("main", testSegment(1, 6)), " 0/600000 to 0/900100 of A"},
		{walKey("main", history), " A:0 B:0"},
	} {
		k := sound.copied(t)
		k.remove(t, c.remove)
		found, _ := k.check(t, CheckOptions{})
		if len(found) != 1 || k.summary(found[0]) != c.want && k.summary(found[0]) != c.remove+c.want {
			t.Errorf("without %s it finds %+v, want %s", c.remove, found, c.want)
		}
	}
	// Either timeline's segment 10 will do for timeline 1's or 2's line up to the switch.
	k := sound.copied(t)
	k.remove(t, walKey("main", testSegment(2, 10)))
	if found, _ := k.check(t, CheckOptions{}); len(found) != 0 {
		t.Errorf("found %+v", found)
	}
}

// TestCheckWithoutArchiving: where the repository has the WAL of backups alone, what lies between them is no damage.
func TestCheckWithoutArchiving(t *testing.T) {
	k := newCheckedRepo(t)
	for _, no := range []uint64{2, 5, 6, 7, 10, 11, 12} {
		k.remove(t, walKey("main", testSegment(1, no)))
	}
	found, _ := k.check(t, CheckOptions{Maps: true})
	if len(found) != 1 || k.summary(found[0]) != "note wal/main/" {
		t.Errorf("found %+v", found)
	}
	k.remove(t, walKey("main", testSegment(1, 4)))
	if found, _ = k.check(t, CheckOptions{}); len(found) != 1 || found[0].Note {
		t.Errorf("found %+v", found)
	}
}

// TestCheckWALAlone damages the WAL of a cluster of which there is nothing else, not even how large its segments are.
func TestCheckWALAlone(t *testing.T) {
	k := newCheckedRepo(t)
	for _, m := range []*Manifest{k.a, k.b} {
		k.remove(t, manifestKey("main", m.ID))
		k.remove(t, packListKey("main", m.ID))
	}
	k.remove(t, clusterKey("main"))
	k.edit(t, walKey("main", testSegment(1, 9)), flipAt(-5))
	found, _ := k.check(t, CheckOptions{ReadData: true})
	if len(found) != 2 || k.summary(found[0]) != "clusters/main" || k.summary(found[1]) != walKey("main", testSegment(1, 9)) {
		t.Errorf("found %+v", found)
	}
}

// TestCheckPackListIncomplete forges a pack list that lacks a pack: what is deleted by it would be missed.
func TestCheckPackListIncomplete(t *testing.T) {
	k := newCheckedRepo(t)
	r := k.open(t)
	uses, err := r.packList(t.Context(), k.b)
	if err != nil {
		t.Fatal(err)
	}
	ref := k.chunk(t, k.b, "pgdata/base/5/2", 1)
	object, id := r.encodePackList(packListKey("main", k.b.ID), slices.DeleteFunc(uses, func(u packUse) bool { return u.pack == ref.Pack }))
	k.b.Packs = PackListRef{Count: len(uses) - 1, ID: id}
	body, err := marshalDocument(k.b)
	if err != nil {
		t.Fatal(err)
	}
	replace := func(b []byte) func([]byte) []byte { return func([]byte) []byte { return b } }
	k.edit(t, packListKey("main", k.b.ID), replace(object))
	k.edit(t, manifestKey("main", k.b.ID), replace(body))
	found, _ := k.check(t, CheckOptions{Maps: true})
	if len(found) != 1 || k.summary(found[0]) != "backups/main/B.packs B:0" || !strings.Contains(found[0].Err.Error(), ref.Pack.String()) {
		t.Errorf("found %+v", found)
	}
}

// TestCheckEnds: a check whose context ends says so, and what it had found.
func TestCheckEnds(t *testing.T) {
	k := newCheckedRepo(t)
	ref := k.chunk(t, k.a, "pgdata/base/5/2", 1)
	k.remove(t, ref.Pack.key())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	found := 0
	phases := map[string]bool{}
	_, err := k.open(t).Check(ctx, CheckOptions{ReadData: true, Progress: func(phase string, done, total int64) {
		phases[phase] = true
		if phase == "read data" {
			cancel()
		}
	}}, func(f Finding) { found++ })
	if !errors.Is(err, context.Canceled) || found != 1 || len(phases) != 2 {
		t.Errorf("%v, %d found, phases %v", err, found, phases)
	}
}

// blinking lacks keys in its first listing of WAL, as one may that goes on while they are put.
type blinking struct {
	store.Store
	keys []string
}

func (s *blinking) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	keys := s.keys
	if strings.HasPrefix(prefix, walRoot) {
		s.keys = nil
	}
	return func(yield func(store.Object, error) bool) {
		for o, err := range s.Store.List(ctx, prefix) {
			if !slices.Contains(keys, o.Key) && !yield(o, err) {
				return
			}
		}
	}
}

// TestCheckBesideArchiving: WAL that the listing lacks, for it came while that went on, is not missing; what is not there is.
func TestCheckBesideArchiving(t *testing.T) {
	sound := newCheckedRepo(t)
	r := sound.open(t)
	history := putSecondTimeline(t, r)
	for _, keys := range [][]string{{walKey("main", testSegment(1, 6))}, {walKey("main", history)}, {walKey("main", history), walKey("main", testSegment(2, 11))}} {
		for _, there := range []bool{true, false} {
			k := sound.copied(t)
			if !there {
				for _, key := range keys {
					k.remove(t, key)
				}
			}
			r := k.open(t)
			r.store = &blinking{r.store, keys}
			found := 0
			checked, err := r.Check(t.Context(), CheckOptions{ReadData: true}, func(f Finding) { found++ })
			if err != nil || (found == 0) != there || there && checked.WALRead != checked.WALFiles {
				t.Errorf("%v, there: %v: %d findings, %+v, %v", keys, there, found, checked, err)
			}
		}
	}
}

// checkNames checks the repository with some objects damaged: these are found, and no others.
func checkNames(t *testing.T, r *Repository, damaged map[string][]byte) {
	t.Helper()
	cold := coldRepository(r)
	cold.store = &damagedStore{Mem: r.store.(*store.Mem), bodies: damaged}
	var found []string
	if _, err := cold.Check(t.Context(), CheckOptions{}, func(f Finding) { found = append(found, f.Object) }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(found)
	if want := slices.Sorted(maps.Keys(damaged)); !slices.Equal(found, want) {
		t.Errorf("found %v, want %v", found, want)
	}
}

// TestCheckAwaitsArchiver: what lies before a backup that ended just now the archiver may still be about to push. That is waited for, and
// nothing else.
func TestCheckAwaitsArchiver(t *testing.T) {
	for _, c := range []struct {
		name                string
		since, comes, takes time.Duration // the backup's end before the check; when WAL comes, 0: never; how long the check takes
		found               int
	}{
		{"in time", 0, 4500 * time.Millisecond, 5 * time.Second, 0},
		{"never", 0, 0, archiverTime, 1},
		{"a backup of before", time.Minute, time.Second, 0, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newWALRepository(t)
				defer r.Close()
				backupNow(t, r, 1) // with segment 3 behind it
				for _, no := range []uint64{7, 8} {
					putTestSegment(t, r, 1, no)
				}
				if _, err := backupFrom(t.Context(), r, 7); err != nil {
					t.Fatal(err)
				}
				time.Sleep(c.since)
				if c.comes > 0 {
					time.AfterFunc(c.comes, func() {
						for no := uint64(4); no < 7; no++ {
							putTestSegment(t, r, 1, no)
						}
					})
				}
				began, found := time.Now(), 0
				if _, err := r.Check(t.Context(), CheckOptions{}, func(f Finding) { found++ }); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); found != c.found || took.Round(time.Second) != c.takes {
					t.Errorf("%d findings after %v, want %d after %v", found, took, c.found, c.takes)
				}
			})
		})
	}
}

// TestCheckNamesSessions: an object of a session that seems to be a newer pgthaw's is named, as one that is damaged is, and of several
// every one.
func TestCheckNamesSessions(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		r := newMemRepository(t, keys...)
		for range 2 {
			writeTestBackup(t, r, testFiles{"pgdata/PG_VERSION": []byte("15\n")}, nil)
		}
		all := map[string][]byte{}
		for key, b := range objectsOf(t, r.store) {
			if !strings.HasPrefix(key, sessionsPrefix) {
				continue
			}
			newer := flipAt(5)(bytes.Clone(b)) // a sealed document's version; what is plain does not match its checksum then
			checkNames(t, r, map[string][]byte{key: newer})
			if strings.HasSuffix(key, begunSuffix) {
				all[key] = newer
			}
		}
		checkNames(t, r, all)
	})
}
