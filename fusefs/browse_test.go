package fusefs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// browseChild mounts: arguments are the repository, the directory, "" or "uid:gid" for AsUser, and how many files to
// remember.
func browseChild(ctx context.Context, args []string, ready func()) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	before := runtime.NumGoroutine()
	r, err := repo.Open(ctx, args[0], repo.Options{Log: log})
	if err != nil {
		return err
	}
	defer r.Close()
	o := BrowseOptions{Log: log}
	if args[2] != "" {
		o.AsUser = &Owner{}
		if _, err := fmt.Sscanf(args[2], "%d:%d", &o.AsUser.UID, &o.AsUser.GID); err != nil {
			return err
		}
	}
	limit, err := strconv.ParseInt(args[3], 10, 64)
	if err != nil {
		return err
	}
	m, err := browse(ctx, args[1], r, o, limit)
	if err != nil {
		return err
	}
	ready()
	if err := m.Wait(); err != nil {
		return err
	}
	return endedAll(m, before)
}

// endedAll waits until a mount that was taken away has left no goroutines behind, for at most half a minute.
func endedAll(m *Mount, before int) error {
	select {
	case <-m.served:
	default:
		return nil // somebody still uses it, and is served until this process ends
	}
	for deadline := time.Now().Add(30 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			all := make([]byte, 1<<16)
			return fmt.Errorf("goroutines left behind:\n%s", all[:runtime.Stack(all, true)])
		}
	}
	return nil
}

const (
	browseSystemID = 7123456789012345678
	browseSegment  = 1 << 20 // size of a WAL segment
)

// lowerFile is an entry that a test writes into a backup.
type lowerFile struct {
	e       repo.Entry
	content []byte
}

// lowerTree is a whole backup by path.
type lowerTree map[string]lowerFile

func (tree lowerTree) dir(name string, perm iofs.FileMode) {
	tree[name] = lowerFile{e: repo.Entry{Mode: iofs.ModeDir | perm, UID: 104, GID: 105, ModTime: time.Unix(1_700_000_000, 0)}}
}

func (tree lowerTree) file(name string, perm iofs.FileMode, content []byte) {
	e := repo.Entry{Mode: perm, UID: 104, GID: 105, Size: int64(len(content)), ModTime: time.Unix(1_600_000_000+int64(len(content)), 0)}
	tree[name] = lowerFile{e, content}
}

func (tree lowerTree) link(name, target string) {
	tree[name] = lowerFile{e: repo.Entry{Mode: iofs.ModeSymlink | 0o777, UID: 104, GID: 105, Link: target, ModTime: time.Unix(1_700_000_001, 0)}}
}

func (tree lowerTree) write(w *repo.BackupWriter) error {
	for _, name := range slices.Sorted(maps.Keys(tree)) {
		f := tree[name]
		if err := f.write(w, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (f lowerFile) write(w *repo.BackupWriter, name string) error {
	switch {
	case f.e.IsDir():
		return w.Mkdir(name, f.e)
	case f.e.Link != "":
		return w.Symlink(name, f.e)
	}
	out, err := w.Create(name, f.e, len(f.content) < 1<<16)
	if err != nil {
		return err
	}
	_, err = out.ReadFrom(bytes.NewReader(f.content))
	return errors.Join(err, out.Close())
}

// sampleTree has every kind of entry and file sizes at every edge.
func sampleTree(rng *rand.Rand) lowerTree {
	tree := lowerTree{}
	for _, dir := range []string{"pgdata", "pgdata/base", "pgdata/base/5", "pgdata/global", "pgdata/pg_tblspc", "pgdata/pg_wal"} {
		tree.dir(dir, 0o700)
	}
	tree.dir("pgdata/pg_replslot", 0o750) // stays empty
	tree.dir("tablespaces", 0o700)
	tree.dir("tablespaces/16385", 0o700)
	tree.file("tablespaces/16385/t", 0o600, random(rng, 20_000))
	tree.link("pgdata/pg_tblspc/16385", "/srv/ts1")
	tree.link("pgdata/relative", "base/5")
	tree.file("pgdata/PG_VERSION", 0o600, []byte("15\n"))
	tree.file("pgdata/readable", 0o644, []byte("for all\n"))
	tree.file("pgdata/odd \"name\"\nü", 0o640, random(rng, 600))
	for i, size := range []int{0, 1, 511, 513, 8191, 8192, 8193, 131071, 131072, 131073, 3<<20 + 5} {
		tree.file(fmt.Sprintf("pgdata/base/5/%d", 1000+i), 0o600, random(rng, size))
	}
	holes := make([]byte, 5<<20)
	copy(holes[2<<20:], random(rng, 200_000))
	copy(holes[len(holes)-100:], random(rng, 100))
	tree.file("pgdata/base/5/holes", 0o600, holes)
	tree.file("pgdata/base/5/zeros", 0o600, make([]byte, 1<<20))
	for i := range 300 { // more than the kernel asks for at a time

		tree.file(fmt.Sprintf("pgdata/global/%d", i), 0o600, random(rng, rng.IntN(2000)))
	}
	return tree
}

func newRepository(t testing.TB) (*repo.Repository, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repository")
	r, err := repo.Init(t.Context(), dir, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	bindCluster(t, r, "main")
	return r, dir
}

func bindCluster(t testing.TB, r *repo.Repository, name string) {
	t.Helper()
	if _, err := r.BindCluster(t.Context(), name, browseSystemID, browseSegment); err != nil {
		t.Fatal(err)
	}
}

func backUp(t testing.TB, r *repo.Repository, tree lowerTree) *repo.Manifest {
	t.Helper()
	m, err := r.WriteBackup(t.Context(), "main", repo.BackupOptions{}, func(_ context.Context, w *repo.BackupWriter) (repo.Manifest, error) {
		return repo.Manifest{SystemIdentifier: browseSystemID, PGVersion: "15.18", PGVersionNum: 150018, PageSize: 8192, SegmentSize: browseSegment,
			Timeline: 1, StartLSN: 0x200028, StopLSN: 0x200100, StoppedAt: time.Unix(1_700_000_060, 0).UTC()}, tree.write(w)
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// putSegment stores a WAL segment without a record in it and returns its bytes.
func putSegment(t *testing.T, r *repo.Repository, name string) []byte {
	t.Helper()
	n, err := pg.ParseWALName(name)
	if err != nil {
		t.Fatal(err)
	}
	seg := make([]byte, browseSegment)
	binary.LittleEndian.PutUint16(seg[0:], 0xD110) // XLOG_PAGE_MAGIC of 15
	binary.LittleEndian.PutUint16(seg[2:], 2)      // XLP_LONG_HEADER
	binary.LittleEndian.PutUint32(seg[4:], uint32(n.Timeline))
	binary.LittleEndian.PutUint64(seg[8:], uint64(n.Log)<<32+uint64(n.Seg)*browseSegment)
	binary.LittleEndian.PutUint64(seg[24:], browseSystemID)
	binary.LittleEndian.PutUint32(seg[32:], browseSegment)
	binary.LittleEndian.PutUint32(seg[36:], 8192)
	copy(seg[500_000:], name)
	if err := r.PutWAL(t.Context(), "main", n, seg); err != nil {
		t.Fatal(err)
	}
	return seg
}

// browseIn mounts the repository in a child and returns where.
func browseIn(t testing.TB, repository string) (dir string, c *child) {
	t.Helper()
	return browseWith(t, repository, maxNodes)
}

func browseWith(t testing.TB, repository string, limit int) (dir string, c *child) {
	t.Helper()
	as := ""
	if os.Geteuid() != 0 { // then the original's owner would keep us out
		as = fmt.Sprintf("%d:%d", os.Geteuid(), os.Getegid())
	}
	dir = t.TempDir()
	c = startChild(t, "browse", nil, repository, dir, as, strconv.Itoa(limit))
	return dir, c
}

func expectQuiet(t *testing.T, c *child) {
	t.Helper()
	if lines := c.lines(); len(lines) > 0 {
		t.Errorf("logged:\n%s", strings.Join(lines, "\n"))
	}
}

func TestBrowseShowsWhatWasBackedUp(t *testing.T) {
	r, repository := newRepository(t)
	tree := sampleTree(rand.New(rand.NewPCG(seed(t), 0)))
	m := backUp(t, r, tree)
	dir, c := browseIn(t, repository)
	root := filepath.Join(dir, "main", m.ID)
	for range 2 { // the second time from the kernel's caches
		checkTree(t, root, tree)
	}
	expectQuiet(t, c)
}

// TestBrowseIsConsistent has testing/fstest compare what listings, stat, open and read say.
func TestBrowseIsConsistent(t *testing.T) {
	r, repository := newRepository(t)
	tree := sampleTree(rand.New(rand.NewPCG(seed(t), 0)))
	maps.DeleteFunc(tree, func(name string, f lowerFile) bool {
		return len(f.content) > 20_000 || strings.HasPrefix(name, "pgdata/global/") && !strings.HasPrefix(name, "pgdata/global/1")
	})
	m := backUp(t, r, tree)
	dir, c := browseIn(t, repository)
	root := os.DirFS(filepath.Join(dir, "main", m.ID))
	if err := fstest.TestFS(root, "pgdata/PG_VERSION", "pgdata/base/5/1000", manifestName); err != nil {
		t.Error(err)
	}
	expectQuiet(t, c)
}

// checkTree compares the mounted backup at root with what was written.
func checkTree(t *testing.T, root string, want lowerTree) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(root, func(name string, d iofs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, name)
		if err != nil || rel == "." || rel == manifestName {
			return err
		}
		seen++
		f, ok := want[rel]
		if !ok {
			t.Errorf("%q was not backed up", rel)
			return nil
		}
		return f.check(t, name, rel, d)
	})
	if err != nil {
		t.Error(err)
	}
	if seen != len(want) {
		t.Errorf("%d entries shown, %d written", seen, len(want))
	}
}

func (f lowerFile) check(t *testing.T, name, rel string, d iofs.DirEntry) error {
	info, err := os.Lstat(name)
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	uid, gid := f.e.UID, f.e.GID
	if euid := os.Geteuid(); euid != 0 {
		uid, gid = uint32(euid), uint32(os.Getegid())
	}
	if info.Mode() != f.e.Mode || d.Type() != f.e.Mode.Type() || st.Uid != uid || st.Gid != gid || !info.ModTime().Equal(f.e.ModTime) {
		t.Errorf("%q: %v of %d:%d at %v, want %v of %d:%d at %v", rel, info.Mode(), st.Uid, st.Gid, info.ModTime(), f.e.Mode, uid, gid, f.e.ModTime)
	}
	switch {
	case f.e.IsDir():
		return nil
	case f.e.Link != "":
		return checkLink(t, name, rel, f.e.Link)
	}
	got, err := os.ReadFile(name)
	if err == nil && (info.Size() != int64(len(f.content)) || !bytes.Equal(got, f.content)) {
		t.Errorf("%q: other bytes than written", rel)
	}
	return err
}

func checkLink(t *testing.T, name, rel, want string) error {
	got, err := os.Readlink(name)
	if path.Dir(rel) == "pgdata/pg_tblspc" {
		want = "../../tablespaces/" + path.Base(rel)
	}
	if err == nil && got != want {
		t.Errorf("%q leads to %q, want %q", rel, got, want)
	}
	if _, err := os.Stat(name); err != nil {
		return err
	}
	return err
}

func TestBrowseTop(t *testing.T) {
	r, repository := newRepository(t)
	bindCluster(t, r, "empty")
	m := backUp(t, r, lowerTree{})
	segments := map[string][]byte{}
	for _, name := range []string{"000000010000000000000002", "000000010000000000000003", "000000020000000000000003"} {
		segments[name] = putSegment(t, r, name)
	}
	history, _ := pg.ParseWALName("00000002.history")
	segments["00000002.history"] = []byte("1\t0/300000\tno recovery target specified\n")
	if err := r.PutWAL(t.Context(), "main", history, segments["00000002.history"]); err != nil {
		t.Fatal(err)
	}
	dir, c := browseIn(t, repository)
	for name, want := range map[string]string{
		"": "empty main", "empty": "wal", "empty/wal": "", "main": m.ID + " latest wal", "main/" + m.ID: "manifest.json",
		"main/wal": "00000001 00000002", "main/wal/00000001": "000000010000000000000002 000000010000000000000003",
		"main/wal/00000002": "00000002.history 000000020000000000000003",
	} {
		if got := strings.Join(names(t, filepath.Join(dir, name)), " "); got != want {
			t.Errorf("%q holds %q, want %q", name, got, want)
		}
	}
	for name, want := range segments {
		checkShown(t, filepath.Join(dir, "main/wal", name[:8], name), want)
	}
	if got, err := os.Readlink(filepath.Join(dir, "main/latest")); err != nil || got != m.ID {
		t.Errorf("latest leads to %q, %v, want %q", got, err, m.ID)
	}
	manifest, err := r.ManifestJSON(t.Context(), "main", m.ID)
	if err != nil {
		t.Fatal(err)
	}
	checkShown(t, filepath.Join(dir, "main/latest/manifest.json"), manifest)
	for _, name := range []string{".git", "none", "main/20200101T000000Z-0000", "main/x", "main/wal/00000003", "main/wal/1", "empty/latest",
		"main/wal/00000001/000000010000000000000009", "main/wal/00000001/000000020000000000000003", "main/wal/00000001/x", "main/" + m.ID + "/none"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, iofs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	expectQuiet(t, c)
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func checkShown(t *testing.T, name string, want []byte) {
	t.Helper()
	info, err := os.Stat(name)
	if err != nil {
		t.Error(err)
		return
	}
	got, err := os.ReadFile(name)
	if err != nil || !bytes.Equal(got, want) || info.Size() != int64(len(want)) {
		t.Errorf("%s: %d bytes of %d, %v; want %d other ones", name, len(got), info.Size(), err, len(want))
	}
}

func TestBrowseConcurrentReaders(t *testing.T) {
	r, repository := newRepository(t)
	s := seed(t)
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	for i := range 4 {
		tree.file(fmt.Sprintf("pgdata/%d", i), 0o600, random(rand.New(rand.NewPCG(s, uint64(i))), 4<<20+i*777))
	}
	m := backUp(t, r, tree)
	dir, c := browseIn(t, repository)
	var wg sync.WaitGroup
	for reader := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(s, uint64(100+reader)))
			if err := readAround(filepath.Join(dir, "main", m.ID), tree, rng); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	expectQuiet(t, c)
}

// readAround reads ranges of all sizes from all over the files.
func readAround(root string, tree lowerTree, rng *rand.Rand) error {
	p := make([]byte, 1<<20)
	for range rounds(200) {
		name := fmt.Sprintf("pgdata/%d", rng.IntN(4))
		want := tree[name].content
		f, err := os.Open(filepath.Join(root, name))
		if err != nil {
			return err
		}
		off := rng.IntN(len(want))
		n, err := f.ReadAt(p[:1+rng.IntN(1<<rng.IntN(21))], int64(off))
		f.Close()
		if err != nil && err != io.EOF {
			return err
		}
		if !bytes.Equal(p[:n], want[off:off+n]) {
			return fmt.Errorf("%s: other bytes at %d+%d", name, off, n)
		}
	}
	return nil
}

// TestBrowseForgets walks while the kernel is made to forget all the time.
func TestBrowseForgets(t *testing.T) {
	r, repository := newRepository(t)
	tree := sampleTree(rand.New(rand.NewPCG(seed(t), 0)))
	m := backUp(t, r, tree)
	dir, c := browseWith(t, repository, 20)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { checkTree(t, filepath.Join(dir, "main", m.ID), tree) })
	}
	wg.Wait()
	expectQuiet(t, c)
}

// TestBrowseForgetsDirectories does so with directories that are forgotten as a whole. Somebody who works in one keeps the name of
// where he is.
func TestBrowseForgetsDirectories(t *testing.T) {
	r, repository := newRepository(t)
	tree := lowerTree{}
	for _, name := range []string{"pgdata", "pgdata/base", "pgdata/base/1", "pgdata/base/2", "pgdata/base/3"} {
		tree.dir(name, 0o755)
	}
	for i := range 3 * trimLeast {
		tree.file(fmt.Sprintf("pgdata/base/%d/%d", 1+i%3, i), 0o644, fmt.Appendf(nil, "%d", i))
	}
	m := backUp(t, r, tree)
	dir, c := browseWith(t, repository, trimLeast*3/2)
	base := filepath.Join(dir, "main", m.ID, "pgdata/base")
	walk := func(name string) { checkTree(t, filepath.Join(base, name), tree.under("pgdata/base/"+name)) }
	walk("1")
	who := exec.Command("cat") // which ends with its input
	who.Dir = filepath.Join(base, "1")
	in, err := who.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := who.Start(); err != nil {
		t.Fatal(err)
	}
	walk("2") // in the midst of which all is forgotten
	walk("3")
	if at, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", who.Process.Pid)); err != nil || at != who.Dir {
		t.Errorf("who works in %s is in %s, %v", who.Dir, at, err)
	}
	if err := errors.Join(in.Close(), who.Wait()); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() { checkTree(t, base, tree.under("pgdata/base")) })
	}
	all.Wait()
	expectQuiet(t, c)
}

func inode(t *testing.T, name string) uint64 {
	t.Helper()
	info, err := os.Lstat(name)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

// TestBrowseSeesWhatIsNew writes to the repository while it is mounted, and takes a backup away.
func TestBrowseSeesWhatIsNew(t *testing.T) {
	r, repository := newRepository(t)
	first := backUp(t, r, lowerTree{})
	dir, c := browseIn(t, repository)
	if got := names(t, filepath.Join(dir, "main")); !slices.Equal(got, []string{first.ID, "latest", "wal"}) {
		t.Fatalf("at first: %q", got)
	}
	if got := names(t, filepath.Join(dir, "main/wal")); got != nil {
		t.Fatalf("WAL at first: %q", got)
	}
	link := filepath.Join(dir, "main/latest")
	toFirst := inode(t, link)
	if target, err := os.Readlink(link); err != nil || target != first.ID {
		t.Fatalf("latest leads to %q, %v", target, err)
	}
	tree := sampleTree(rand.New(rand.NewPCG(seed(t), 0)))
	second := backUp(t, r, tree)
	bindCluster(t, r, "second")
	segment := putSegment(t, r, "000000010000000000000002")
	eventually(t, "latest leads to the new backup", func() bool {
		target, err := os.Readlink(filepath.Join(dir, "main/latest"))
		return err == nil && target == second.ID
	})
	if inode(t, link) == toFirst {
		t.Error("the kernel may keep where latest led before")
	}
	checkTree(t, filepath.Join(dir, "main/latest")+"/", tree)
	eventually(t, "the new cluster", func() bool { return len(names(t, dir)) == 2 })
	eventually(t, "the new segment", func() bool { return len(names(t, filepath.Join(dir, "main/wal"))) == 1 })
	checkShown(t, filepath.Join(dir, "main/wal/00000001/000000010000000000000002"), segment)
	if err := os.Remove(filepath.Join(repository, "backups/main", second.ID+".json")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pruned backup is gone", func() bool {
		_, err := os.Stat(filepath.Join(dir, "main", second.ID, "pgdata/PG_VERSION"))
		return errors.Is(err, iofs.ErrNotExist)
	})
	expectQuiet(t, c)
}

// TestBrowseDamage flips a byte of one chunk: that chunk's file gives EIO there, and all else the right bytes.
func TestBrowseDamage(t *testing.T) {
	r, repository := newRepository(t)
	tree := sampleTree(rand.New(rand.NewPCG(seed(t), 0)))
	m := backUp(t, r, tree)
	const hurt = "pgdata/base/5/1010"
	content := tree[hurt].content
	flip(t, repository, content[1<<20:1<<20+64])
	dir, c := browseIn(t, repository)
	root := filepath.Join(dir, "main", m.ID)
	f, err := os.Open(filepath.Join(root, hurt))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 4096)
	if _, err := f.ReadAt(p, 1<<20); !errors.Is(err, syscall.EIO) {
		t.Errorf("read of the damaged chunk: %v", err)
	}
	if _, err := f.ReadAt(p, 2<<20); err != nil || !bytes.Equal(p, content[2<<20:2<<20+4096]) {
		t.Errorf("read of another chunk: %v, or other bytes", err)
	}
	if _, err := os.ReadFile(filepath.Join(root, hurt)); !errors.Is(err, syscall.EIO) {
		t.Errorf("read of the damaged file: %v", err)
	}
	eventually(t, "the error in the log", func() bool { return len(c.lines()) > 0 })
	lines := c.lines()
	if len(lines) != 1 || !strings.Contains(lines[0], hurt) || !strings.Contains(lines[0], "packs/") {
		t.Errorf("want one line that names the file and the object, got:\n%s", strings.Join(lines, "\n"))
	}
	for name, f := range tree {
		if f.e.Mode.IsRegular() && name != hurt {
			checkShown(t, filepath.Join(root, name), f.content)
		}
	}
}

// flip changes a bit of the stored bytes that begin with text, which must be incompressible and so be there as they are.
func flip(t *testing.T, repository string, text []byte) {
	t.Helper()
	found := 0
	err := filepath.WalkDir(repository, func(name string, d iofs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(name)
		if i := bytes.Index(b, text); err == nil && i >= 0 {
			found++
			b[i] ^= 0x40
			err = os.WriteFile(name, b, 0o600)
		}
		return err
	})
	if err != nil || found != 1 {
		t.Fatalf("found the bytes %d times, %v", found, err)
	}
}

// TestBrowseLostPack: a missing pack is an error, never a missing file.
func TestBrowseLostPack(t *testing.T) {
	r, repository := newRepository(t)
	m := backUp(t, r, sampleTree(rand.New(rand.NewPCG(seed(t), 0))))
	if err := os.RemoveAll(filepath.Join(repository, "packs")); err != nil {
		t.Fatal(err)
	}
	dir, c := browseIn(t, repository)
	if _, err := os.ReadDir(filepath.Join(dir, "main", m.ID)); !errors.Is(err, syscall.EIO) {
		t.Errorf("listing: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "main", m.ID, "pgdata")); !errors.Is(err, syscall.EIO) {
		t.Errorf("lookup: %v", err)
	}
	eventually(t, "the error in the log", func() bool { return len(c.lines()) > 0 })
}

func TestBrowseReadOnly(t *testing.T) {
	r, repository := newRepository(t)
	m := backUp(t, r, sampleTree(rand.New(rand.NewPCG(seed(t), 0))))
	dir, _ := browseIn(t, repository)
	file := filepath.Join(dir, "main", m.ID, "pgdata/PG_VERSION")
	for what, err := range map[string]error{
		"create": os.WriteFile(filepath.Join(dir, "x"), nil, 0o600), "write": os.WriteFile(file, nil, 0o600), "remove": os.Remove(file),
		"mkdir": os.Mkdir(filepath.Join(dir, "main/x"), 0o700), "chmod": os.Chmod(file, 0o777),
	} {
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestBrowseHoles(t *testing.T) {
	r, repository := newRepository(t)
	m := backUp(t, r, sampleTree(rand.New(rand.NewPCG(seed(t), 0))))
	dir, _ := browseIn(t, repository)
	f, err := os.Open(filepath.Join(dir, "main", m.ID, "pgdata/base/5/holes"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	end := 2<<20 + roundUp(200_000, repo.ChunkSize)
	tail := int64(5<<20 - repo.ChunkSize)
	for _, c := range []struct {
		whence    int
		off, want int64
	}{
		{unix.SEEK_HOLE, 0, 0}, {unix.SEEK_DATA, 0, 2 << 20}, {unix.SEEK_DATA, 2<<20 + 5, 2<<20 + 5}, {unix.SEEK_HOLE, 2 << 20, end},
		{unix.SEEK_HOLE, 2<<20 + 5, end}, {unix.SEEK_DATA, end, tail}, {unix.SEEK_HOLE, tail, 5 << 20}, {unix.SEEK_HOLE, end + 3, end + 3},
	} {
		if got, err := f.Seek(c.off, c.whence); err != nil || got != c.want {
			t.Errorf("seek %d from %d: %d, %v, want %d", c.whence, c.off, got, err, c.want)
		}
	}
	if _, err := f.Seek(5<<20, unix.SEEK_DATA); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("data at the end: %v", err)
	}
}

// TestBrowseStableInodes mounts twice.
func TestBrowseStableInodes(t *testing.T) {
	r, repository := newRepository(t)
	m := backUp(t, r, sampleTree(rand.New(rand.NewPCG(seed(t), 0))))
	var first map[string]uint64
	for range 2 {
		dir, _ := browseIn(t, repository)
		got := inodes(t, filepath.Join(dir, "main", m.ID))
		if first != nil && !maps.Equal(got, first) {
			t.Error("inode numbers changed")
		}
		first = got
	}
	if n := len(slices.Compact(slices.Sorted(maps.Values(first)))); n != len(first) {
		t.Errorf("%d inode numbers of %d entries", n, len(first))
	}
}

func inodes(t *testing.T, root string) map[string]uint64 {
	t.Helper()
	all := map[string]uint64{}
	err := filepath.WalkDir(root, func(name string, d iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		rel, _ := filepath.Rel(root, name)
		all[rel] = info.Sys().(*syscall.Stat_t).Ino
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestBrowseEnds: by signal while somebody uses the mount, and by umount from outside.
func TestBrowseEnds(t *testing.T) {
	r, repository := newRepository(t)
	backUp(t, r, lowerTree{})
	dir, c := browseIn(t, repository)
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	c.cmd.Process.Signal(syscall.SIGTERM)
	if err := c.wait(); err != nil {
		t.Error(err)
	}
	f.Close()
	if got := names(t, dir); got != nil {
		t.Errorf("the bare directory holds %q", got)
	}

	dir, c = browseIn(t, repository)
	if err := unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := c.wait(); err != nil {
		t.Error(err)
	}
}

// TestBrowseAsOrdinaryUser mounts by fusermount3 and reads everything as one's own.
func TestBrowseAsOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("every other test does this when it is not run as root")
	}
	const uid, gid = 65534, 65534
	r, repository := newRepository(t)
	tree := sampleTree(rand.New(rand.NewPCG(seed(t), 0)))
	m := backUp(t, r, tree)
	room := openRoom(t, uid, gid, repository)
	dir := filepath.Join(room, "mnt")
	startChild(t, "browse", func(cmd *exec.Cmd) {
		cmd.Path = filepath.Join(room, "test")
		cmd.Dir = room
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	}, filepath.Join(room, "repository"), dir, "65534:65534", strconv.Itoa(maxNodes))
	script := fmt.Sprintf(`stat -c %%u:%%g:%%a main/%s/pgdata/PG_VERSION && cat main/latest/pgdata/PG_VERSION && wc -c <main/latest/pgdata/base/5/1010`, m.ID)
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = room
	cmd.Args[2] = "cd mnt && " + script
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	out, err := cmd.CombinedOutput()
	want := "65534:65534:600\n15\n" + strconv.Itoa(len(tree["pgdata/base/5/1010"].content)) + "\n"
	if err != nil || string(out) != want {
		t.Errorf("%v, got %q, want %q", err, out, want)
	}
}

// openRoom makes a directory that another user reaches, with this binary, the repository and a mount point in it.
func openRoom(t *testing.T, uid, gid int, repository string) string {
	t.Helper()
	room, err := os.MkdirTemp("", "TestBrowse")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(room) })
	self, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		os.Chmod(room, 0o755),
		os.WriteFile(filepath.Join(room, "test"), self, 0o755),
		os.Rename(repository, filepath.Join(room, "repository")),
		os.Mkdir(filepath.Join(room, "mnt"), 0o700),
		filepath.WalkDir(room, func(name string, _ iofs.DirEntry, err error) error {
			return errors.Join(err, os.Lchown(name, uid, gid))
		}))
	if err != nil {
		t.Fatal(err)
	}
	return room
}
