package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path"
	"sort"
	"testing"
	"time"

	"pgthaw/repo/pg"
)

const testSystemID = 7123456789012345678

func newTestRepository(t testing.TB, keys ...Key) *Repository {
	t.Helper()
	r, err := Init(t.Context(), t.TempDir()+"/repo", Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		checkClean(t, r)
		r.Close()
	})
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, 16<<20); err != nil {
		t.Fatal(err)
	}
	return r
}

// bothSeals runs a test on a repository that is not encrypted and on one that is, given the keys of either.
func bothSeals(t *testing.T, test func(t *testing.T, keys ...Key)) {
	t.Run("plain", func(t *testing.T) { test(t) })
	t.Run("encrypted", func(t *testing.T) { test(t, newTestKey(t)) })
}

func newTestKey(t testing.TB) Key {
	t.Helper()
	k, _, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func passphraseKey(t testing.TB, passphrase string) Key {
	t.Helper()
	k, err := PassphraseKey(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// rounds is how often, or on how much, a long test does what it does n times, or fewer in a short run.
func rounds(n int) int {
	if testing.Short() {
		return n / 5
	}
	return n
}

// testFiles is a cluster's content: paths to bytes.
type testFiles map[string][]byte

func writeTestBackup(t testing.TB, r *Repository, files testFiles, prior *Backup) *Backup {
	t.Helper()
	m, err := r.WriteBackup(t.Context(), "main", BackupOptions{Prior: prior}, func(ctx context.Context, w *BackupWriter) (Manifest, error) {
		return testManifest(), writeFiles(w, files)
	})
	if err != nil {
		t.Fatal(err)
	}
	return r.OpenBackup(m)
}

func testManifest() Manifest {
	return Manifest{SystemIdentifier: testSystemID, PGVersion: "15.18", PGVersionNum: 150018, PageSize: 8192, SegmentSize: 16 << 20,
		Timeline: 1, StartLSN: 0x2000028, StopLSN: 0x2000100, StartedAt: time.Unix(900_000_000, 0).UTC(), StoppedAt: time.Unix(900_000_060, 0).UTC()}
}

func writeFiles(w *BackupWriter, files testFiles) error {
	made := map[string]bool{".": true}
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		if err := makeParents(w, path.Dir(name), made); err != nil {
			return err
		}
		f, err := w.Create(name, testEntry(files[name]), len(files[name]) < 1<<16)
		if err != nil {
			return err
		}
		if _, err := f.ReadFrom(bytes.NewReader(files[name])); err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	return nil
}

func makeParents(w *BackupWriter, dir string, made map[string]bool) error {
	if made[dir] {
		return nil
	}
	if err := makeParents(w, path.Dir(dir), made); err != nil {
		return err
	}
	made[dir] = true
	return w.Mkdir(dir, Entry{Mode: 0o700, ModTime: time.Unix(1_700_000_000, 0)})
}

func testEntry(content []byte) Entry {
	return Entry{Mode: 0o600, UID: 104, GID: 105, Size: int64(len(content)), ModTime: time.Unix(1_700_000_000, 0)}
}

// checkFiles compares a whole backup with what was written.
func checkFiles(t testing.TB, b *Backup, want testFiles) {
	t.Helper()
	seen := 0
	err := b.Walk(t.Context(), ".", func(name string, e Entry) error {
		if !e.Mode.IsRegular() {
			return nil
		}
		seen++
		got, err := readFile(t.Context(), b, e)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, want[name]) {
			return fmt.Errorf("%s: %d bytes read differ from %d written", name, len(got), len(want[name]))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen != len(want) {
		t.Fatalf("%d files read, %d written", seen, len(want))
	}
}

func readFile(ctx context.Context, b *Backup, e Entry) ([]byte, error) {
	f, err := b.Open(ctx, e)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
}

// pagesOf makes n pages of text that compresses somewhat, different for each seed.
func pagesOf(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n*PageSize)
	for i := range b {
		if i%64 < 16 {
			b[i] = byte(rng.Uint32())
		}
	}
	return b
}

func sampleFiles() testFiles {
	return testFiles{
		"pgdata/PG_VERSION":        []byte("15\n"),
		"pgdata/empty":             {},
		"pgdata/global/pg_control": pagesOf(1, 1),
		"pgdata/base/5/1":          pagesOf(2, 3),
		"pgdata/base/5/2":          pagesOf(3, 1000),
		"pgdata/base/5/3":          append(pagesOf(4, 40), make([]byte, 200*PageSize)...),
		"pgdata/base/5/4":          pagesOf(5, 33)[:33*PageSize-777],
		"pgdata/zeros":             make([]byte, 50*PageSize),
		"pgdata/odd":               bytes.Repeat([]byte("x"), maxInline+1),
		"tablespaces/16385/t":      pagesOf(6, 17),
	}
}

func TestRoundTrip(t *testing.T) { bothSeals(t, testRoundTrip) }

func testRoundTrip(t *testing.T, keys ...Key) {
	r := newTestRepository(t, keys...)
	files := sampleFiles()
	b := writeTestBackup(t, r, files, nil)
	checkFiles(t, b, files)

	again, err := Open(t.Context(), r.URL(), Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	m, err := again.Manifest(t.Context(), "main", Latest)
	if err != nil {
		t.Fatal(err)
	}
	checkFiles(t, again.OpenBackup(m), files)
	if m.Files != len(files) {
		t.Errorf("manifest counts %d files, want %d", m.Files, len(files))
	}
}

func TestReadAtEveryEdge(t *testing.T) { bothSeals(t, testReadAtEveryEdge) }

func testReadAtEveryEdge(t *testing.T, keys ...Key) {
	r := newTestRepository(t, keys...)
	files := sampleFiles()
	b := writeTestBackup(t, r, files, nil)
	for name, want := range files {
		e, err := b.Stat(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		f, err := b.Open(t.Context(), e)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(7, 7))
		for range 200 {
			off := rng.Int64N(int64(len(want)) + 2)
			p := make([]byte, rng.IntN(3*ChunkSize))
			n, err := f.ReadAt(p, off)
			if err != nil && err != io.EOF {
				t.Fatalf("%s: read %d+%d: %v", name, off, len(p), err)
			}
			end := min(off+int64(len(p)), int64(len(want)))
			if off < int64(len(want)) && !bytes.Equal(p[:n], want[off:end]) {
				t.Fatalf("%s: read %d+%d gave other bytes", name, off, len(p))
			}
		}
	}
}

// TestChangedPagesOnly writes a file again and again with a few pages changed: every backup reads right, and costs
// about its changed pages.
func TestChangedPagesOnly(t *testing.T) {
	r := newTestRepository(t)
	n := rounds(1000)
	files := testFiles{"pgdata/PG_VERSION": []byte("15\n"), "pgdata/base/5/2": pagesOf(3, n), "pgdata/base/5/9": pagesOf(9, 100)}
	b := writeTestBackup(t, r, files, nil)
	full := b.Manifest.StoredBytes
	rng := rand.New(rand.NewPCG(1, 2))
	kept := map[*Backup][]byte{}
	for round := range 12 {
		content := bytes.Clone(files["pgdata/base/5/2"])
		for range n / 20 {
			page := rng.IntN(n)
			copy(content[page*PageSize:], pagesOf(uint64(1000*round+page), 1))
		}
		files["pgdata/base/5/2"] = content
		b = writeTestBackup(t, r, files, b)
		kept[b] = content
		checkFiles(t, b, files)
		if got := b.Manifest.StoredBytes; round == 0 && got > full/20*13/10 {
			t.Errorf("%d bytes stored for 5 %% of pages, of %d for all", got, full)
		}
	}
	for old, content := range kept {
		checkFiles(t, old, testFiles{"pgdata/PG_VERSION": files["pgdata/PG_VERSION"], "pgdata/base/5/2": content, "pgdata/base/5/9": files["pgdata/base/5/9"]})
	}
}

// TestUnchangedCostsNothing counts what a second backup of the same content adds: no pack at all.
func TestUnchangedCostsNothing(t *testing.T) { bothSeals(t, testUnchangedCostsNothing) }

func testUnchangedCostsNothing(t *testing.T, keys ...Key) {
	r := newTestRepository(t, keys...)
	files := sampleFiles()
	first := writeTestBackup(t, r, files, nil)
	second := writeTestBackup(t, r, files, first)
	if second.Manifest.Root != first.Manifest.Root {
		t.Error("the root tree was written again")
	}
	if second.Manifest.StoredBytes > 1024 {
		t.Errorf("%d bytes stored", second.Manifest.StoredBytes)
	}
}

// TestSameContentElsewhere moves a file: its chunks are found again under another name.
func TestSameContentElsewhere(t *testing.T) {
	r := newTestRepository(t)
	content := pagesOf(3, 1000)
	first := writeTestBackup(t, r, testFiles{"pgdata/base/5/2": content}, nil)
	files := testFiles{"pgdata/base/5/777": content, "pgdata/base/6/2": content}
	second := writeTestBackup(t, r, files, first)
	checkFiles(t, second, files)
	if second.Manifest.StoredBytes > first.Manifest.StoredBytes/20 {
		t.Errorf("%d bytes stored, %d the first time", second.Manifest.StoredBytes, first.Manifest.StoredBytes)
	}
}

func TestFailedBackupLeavesNothing(t *testing.T) {
	r := newTestRepository(t)
	before := storedKeys(t, r)
	boom := errors.New("server went away")
	_, err := r.WriteBackup(t.Context(), "main", BackupOptions{}, func(ctx context.Context, w *BackupWriter) (Manifest, error) {
		if err := writeFiles(w, testFiles{"pgdata/base/5/2": incompressible(6 * dataPackSize / PageSize / 4)}); err != nil {
			return Manifest{}, err
		}
		return Manifest{}, boom
	})
	if !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if after := storedKeys(t, r); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("left behind: %v", after)
	}
}

func TestCancelledBackup(t *testing.T) {
	r := newTestRepository(t)
	before := storedKeys(t, r)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := r.WriteBackup(ctx, "main", BackupOptions{}, func(ctx context.Context, w *BackupWriter) (Manifest, error) {
		err := writeFiles(w, testFiles{"pgdata/base/5/2": incompressible(2 * dataPackSize / PageSize)})
		cancel()
		return testManifest(), err
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if after := storedKeys(t, r); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("left behind: %v", after)
	}
}

func incompressible(n int) []byte {
	b := make([]byte, n*PageSize)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(b)
	return b
}

func storedKeys(t testing.TB, r *Repository) []string {
	t.Helper()
	var keys []string
	for o, err := range r.store.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, o.Key)
	}
	return keys
}

func TestInitAndOpen(t *testing.T) {
	dir := t.TempDir() + "/repo"
	if _, err := Open(t.Context(), dir, Options{}); !errors.Is(err, ErrNoRepository) {
		t.Errorf("open of nothing: %v", err)
	}
	if _, err := Init(t.Context(), dir, Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), dir, Options{}); !errors.Is(err, ErrRepositoryExists) {
		t.Errorf("init again: %v", err)
	}
}

func TestClusterBelongsToOneSystem(t *testing.T) {
	r := newTestRepository(t)
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, 16<<20); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if _, err := r.BindCluster(t.Context(), "main", testSystemID+1, 16<<20); !errors.Is(err, ErrOtherCluster) {
		t.Errorf("another system: %v", err)
	}
	if _, err := r.Cluster(t.Context(), "other"); !errors.Is(err, ErrNoCluster) {
		t.Errorf("unknown name: %v", err)
	}
}

func TestWALHistoryFile(t *testing.T) { bothSeals(t, testWALHistoryFile) }

func testWALHistoryFile(t *testing.T, keys ...Key) {
	r := newTestRepository(t, keys...)
	name := pg.WALName{Kind: pg.WALHistory, Timeline: 2}
	content := []byte("1\t0/3000000\tno recovery target specified\n")
	for range 2 {
		if err := r.PutWAL(t.Context(), "main", name, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.PutWAL(t.Context(), "main", name, []byte("other")); !errors.Is(err, ErrWALConflict) {
		t.Errorf("other bytes: %v", err)
	}
	got, err := r.WAL(t.Context(), "main", name)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := r.WAL(t.Context(), "main", pg.WALName{Kind: pg.WALHistory, Timeline: 3}); !errors.Is(err, ErrNoWAL) {
		t.Errorf("absent: %v", err)
	}
}

func TestNotFound(t *testing.T) {
	r := newTestRepository(t)
	b := writeTestBackup(t, r, sampleFiles(), nil)
	for _, name := range []string{"nowhere", "pgdata/nowhere", "pgdata/PG_VERSION/below"} {
		if _, err := b.Stat(t.Context(), name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// checkClean fails the test if a full check of the repository finds anything.
func checkClean(t testing.TB, r *Repository) {
	t.Helper()
	_, err := r.Check(context.WithoutCancel(t.Context()), CheckOptions{ReadData: true}, func(f Finding) {
		t.Errorf("check: %s: %v: %v", f.Object, f.Err, f.Backups)
	})
	if err != nil {
		t.Errorf("check: %v", err)
	}
}
