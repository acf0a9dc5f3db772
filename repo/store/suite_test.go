package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// suite is what every medium must do; each test gets an empty store.
var suite = []struct {
	name string
	test func(t *testing.T, s Store)
}{
	{"create", testCreate},
	{"conflict", testConflict},
	{"ranges", testRanges},
	{"short range", testShortRange},
	{"list order and prefix", testList},
	{"list stops", testListStops},
	{"delete", testDelete},
	{"absent", testAbsent},
	{"odd keys", testOddKeys},
	{"invalid keys", testInvalidKeys},
	{"bytes are copied", testCopied},
	{"cancelled", testCancelled},
}

func TestStores(t *testing.T) {
	media := []struct {
		name string
		open func(t *testing.T) Store
	}{
		{"mem", func(t *testing.T) Store { return NewMem() }},
		{"patient", func(t *testing.T) Store { return NewPatient(NewMem(), time.Minute, slog.New(slog.DiscardHandler)) }},
		{"file", func(t *testing.T) Store { return newFile(t, filepath.Join(t.TempDir(), "absent", "root")) }},
	}
	for _, m := range media {
		for _, c := range suite {
			t.Run(m.name+"/"+c.name, func(t *testing.T) {
				t.Parallel() // most of the time is fsync's
				c.test(t, m.open(t))
			})
		}
	}
}

// newFile opens the store in dir; when the test ends, nothing may lie in tmp.
func newFile(t *testing.T, dir string) *File {
	s, err := OpenFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if names := tmpFiles(t, dir); len(names) > 0 {
			t.Errorf("left in tmp: %q", names)
		}
	})
	return s
}

func tmpFiles(t *testing.T, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "tmp", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func put(t *testing.T, s Store, key, body string) {
	t.Helper()
	if err := s.Put(t.Context(), key, []byte(body)); err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, s Store, key string) string {
	t.Helper()
	b, err := s.Get(t.Context(), key, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func list(t *testing.T, s Store, prefix string) []string {
	t.Helper()
	var keys []string
	for o, err := range s.List(t.Context(), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, o.Key)
	}
	return keys
}

func testCreate(t *testing.T, s Store) {
	before := time.Now().Add(-time.Minute)
	put(t, s, "a/b/c", "hello")
	put(t, s, "empty", "")
	if got := get(t, s, "a/b/c"); got != "hello" {
		t.Errorf("got %q", got)
	}
	if got := get(t, s, "empty"); got != "" {
		t.Errorf("empty object holds %q", got)
	}
	for o, err := range s.List(t.Context(), "a/") {
		if err != nil {
			t.Fatal(err)
		}
		if o.Key != "a/b/c" || o.Size != 5 || o.Modified.Before(before) || o.Modified.After(time.Now().Add(time.Minute)) {
			t.Errorf("listed as %+v", o)
		}
	}
	err := s.Put(t.Context(), "a/b/c", []byte("other"))
	if !errors.Is(err, ErrExist) || !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "a/b/c") {
		t.Errorf("second Put: %v", err)
	}
	if got := get(t, s, "a/b/c"); got != "hello" {
		t.Errorf("after the second Put: %q", got)
	}
}

// testConflict races writers of one key, each in a directory that nobody has made yet.
func testConflict(t *testing.T, s Store) {
	const writers = 16
	for round := range 8 {
		key := fmt.Sprintf("round/%d/key", round)
		errs := make([]error, writers)
		var wg sync.WaitGroup
		for i := range writers {
			wg.Go(func() { errs[i] = s.Put(t.Context(), key, bytes.Repeat([]byte{byte('a' + i)}, 100_000)) })
		}
		wg.Wait()
		winner := slices.Index(errs, nil)
		for i, err := range errs {
			if i != winner && !errors.Is(err, ErrExist) {
				t.Errorf("round %d, writer %d: %v", round, i, err)
			}
		}
		if winner < 0 || get(t, s, key) != strings.Repeat(string(rune('a'+winner)), 100_000) {
			t.Errorf("round %d: the object is not writer %d's", round, winner)
		}
	}
}

func testRanges(t *testing.T, s Store) {
	put(t, s, "k", "0123456789")
	for _, c := range []struct {
		off, n int64
		want   string
	}{{0, 10, "0123456789"}, {0, -1, "0123456789"}, {3, 4, "3456"}, {9, 1, "9"}, {4, -1, "456789"}, {10, -1, ""}, {10, 0, ""}, {0, 0, ""}} {
		got, err := s.Get(t.Context(), "k", c.off, c.n)
		if err != nil || string(got) != c.want {
			t.Errorf("Get(%d, %d) = %q, %v, want %q", c.off, c.n, got, err, c.want)
		}
	}
}

func testShortRange(t *testing.T, s Store) {
	put(t, s, "k", "0123456789")
	for _, c := range []struct{ off, n int64 }{{0, 11}, {10, 1}, {11, -1}, {11, 0}, {5, 1 << 62}, {1 << 62, 1 << 62}, {-1, 3}} {
		got, err := s.Get(t.Context(), "k", c.off, c.n)
		if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "get k:") {
			t.Errorf("Get(%d, %d) = %q, %v", c.off, c.n, got, err)
		}
	}
}

func testList(t *testing.T, s Store) {
	var want []string
	for i := range 1100 {
		want = append(want, fmt.Sprintf("many/%d", i))
	}
	others := []string{"many-more", "many.more", "man", "other/x", "a/b-c", "a/b/d", "a/b.c", "a/b0", "a/ä", "a/b/a"}
	for _, key := range slices.Concat(want, others) {
		put(t, s, key, key)
	}
	slices.Sort(want)
	if got := list(t, s, "many/"); !slices.Equal(got, want) {
		t.Errorf("many/ has %d keys, not the %d put, or in another order", len(got), len(want))
	}
	all := slices.Concat(want, others)
	slices.Sort(all)
	if got := list(t, s, ""); !slices.Equal(got, all) {
		t.Errorf("the listing of all is in another order")
	}
	if got, want := list(t, s, "a/b"), []string{"a/b-c", "a/b.c", "a/b/a", "a/b/d", "a/b0"}; !slices.Equal(got, want) {
		t.Errorf("a/b: %q, want %q", got, want)
	}
	if got := list(t, s, "nothing/"); got != nil {
		t.Errorf("nothing/: %q", got)
	}
}

func testListStops(t *testing.T, s Store) {
	for _, key := range []string{"a/1", "a/b/1", "a/b/2", "c"} {
		put(t, s, key, "")
	}
	n := 0
	for range s.List(t.Context(), "") {
		if n++; n == 2 {
			break
		}
	}
	if n != 2 {
		t.Errorf("%d objects after a break at 2", n)
	}
}

func testDelete(t *testing.T, s Store) {
	put(t, s, "a/b", "1")
	put(t, s, "a/c", "2")
	for range 2 {
		if err := s.Delete(t.Context(), "a/b"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Errorf("Delete of leading parts: %v", err)
	}
	if got := list(t, s, ""); !slices.Equal(got, []string{"a/c"}) {
		t.Errorf("left: %q", got)
	}
	put(t, s, "a/b", "again")
	if got := get(t, s, "a/b"); got != "again" {
		t.Errorf("got %q", got)
	}
}

func testAbsent(t *testing.T, s Store) {
	check := func() {
		t.Helper()
		for _, key := range []string{"nothing", "a/nothing", "a", "a/b/c"} {
			_, err := s.Get(t.Context(), key, 0, 1)
			if !errors.Is(err, ErrNotExist) || !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), key) {
				t.Errorf("Get(%s): %v", key, err)
			}
			if err := s.Delete(t.Context(), key); err != nil {
				t.Errorf("Delete(%s): %v", key, err)
			}
		}
		if got := list(t, s, "a/nothing/"); got != nil {
			t.Errorf("listed: %q", got)
		}
	}
	check()
	put(t, s, "a/b", "1")
	check()
}

func testOddKeys(t *testing.T, s Store) {
	keys := []string{
		" ", "-", "--help", "tmpfile", "x/tmp/y", "%2F", "a+b&c=d?e#f", "a\\b", "'\"", ".hidden", "...", "x/..y",
		"Ünïcode/日本", "UPPER", "upper", "a:b", "line\nbreak", strings.Repeat("n", 200) + "/" + strings.Repeat("m", 200),
	}
	for _, key := range keys {
		put(t, s, key, "of "+key)
	}
	for _, key := range keys {
		if got := get(t, s, key); got != "of "+key {
			t.Errorf("%q holds %q", key, got)
		}
	}
	slices.Sort(keys)
	if got := list(t, s, ""); !slices.Equal(got, keys) {
		t.Errorf("listed %q, want %q", got, keys)
	}
}

func testInvalidKeys(t *testing.T, s Store) {
	for _, key := range []string{"", ".", "..", "/a", "a/", "a//b", "a/../b", "../a", "a/.", "tmp", "tmp/a", "a\x00b", "a\xffb"} {
		if err := s.Put(t.Context(), key, nil); err == nil || errors.Is(err, ErrExist) {
			t.Errorf("Put(%q): %v", key, err)
		}
		if _, err := s.Get(t.Context(), key, 0, -1); err == nil || errors.Is(err, ErrNotExist) {
			t.Errorf("Get(%q): %v", key, err)
		}
		if err := s.Delete(t.Context(), key); err == nil {
			t.Errorf("Delete(%q): nil", key)
		}
	}
}

func testCopied(t *testing.T, s Store) {
	body := []byte("body")
	if err := s.Put(t.Context(), "k", body); err != nil {
		t.Fatal(err)
	}
	body[0] = 'X'
	got, err := s.Get(t.Context(), "k", 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	got[1] = 'X'
	if got := get(t, s, "k"); got != "body" {
		t.Errorf("got %q", got)
	}
}

func testCancelled(t *testing.T, s Store) {
	put(t, s, "there", "1")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Put(ctx, "new", []byte("1")); !errors.Is(err, context.Canceled) {
		t.Errorf("Put: %v", err)
	}
	if _, err := s.Get(ctx, "there", 0, -1); !errors.Is(err, context.Canceled) {
		t.Errorf("Get: %v", err)
	}
	if err := s.Delete(ctx, "there"); !errors.Is(err, context.Canceled) {
		t.Errorf("Delete: %v", err)
	}
	var last error
	for _, err := range s.List(ctx, "") {
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("List: %v", last)
	}
	if got := list(t, s, ""); !slices.Equal(got, []string{"there"}) {
		t.Errorf("left: %q", got)
	}
}

func TestFileLeavesNothingOnError(t *testing.T) {
	s := newFile(t, t.TempDir())
	put(t, s, "a", "a file")
	if err := s.Put(t.Context(), "a/b", []byte("1")); err == nil || errors.Is(err, ErrExist) {
		t.Errorf("Put below a file: %v", err)
	}
	if err := os.Mkdir(s.path("dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), "dir", []byte("1")); err == nil {
		t.Error("Put over a directory succeeded")
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := writeSynced(ctx, f, make([]byte, 100)); !errors.Is(err, context.Canceled) {
		t.Errorf("a write after cancel: %v", err)
	}
}

// TestFileCrashLeftovers: what a killed Put leaves in tmp is never an object, and goes once it is old.
func TestFileCrashLeftovers(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, age := range map[string]time.Duration{"put-old": 2 * leftoverAge, "put-new": time.Hour} {
		path := filepath.Join(dir, "tmp", name)
		when := time.Now().Add(-age)
		if err := errors.Join(os.WriteFile(path, []byte("half"), 0o600), os.Chtimes(path, when, when)); err != nil {
			t.Fatal(err)
		}
	}
	s, err := OpenFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := list(t, s, ""); got != nil {
		t.Errorf("listed %q", got)
	}
	put(t, s, "a", "1")
	if got := tmpFiles(t, dir); !slices.Equal(got, []string{filepath.Join(dir, "tmp", "put-new")}) {
		t.Errorf("left in tmp: %q", got)
	}
	if got := list(t, s, ""); !slices.Equal(got, []string{"a"}) {
		t.Errorf("listed %q", got)
	}
}

// openRoot opens a new directory with files in it, each of which holds its own name.
func openRoot(t *testing.T, files ...string) *os.Root {
	t.Helper()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	for _, name := range files {
		if err := root.WriteFile(name, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestFileLinked: a Put that died between link and unlink has made its object.
func TestFileLinked(t *testing.T) {
	root := openRoot(t, "tmp", "other")
	if err := root.Link("tmp", "object"); err != nil {
		t.Fatal(err)
	}
	if err := publish(root, "tmp", "object"); err != nil {
		t.Errorf("publish after its own link: %v", err)
	}
	if err := publish(root, "other", "object"); err != ErrExist {
		t.Errorf("publish over another's: %v", err)
	}
}

// TestFileRenameNew covers file systems without hard links, where publish falls back on it.
func TestFileRenameNew(t *testing.T) {
	root := openRoot(t, "0", "1")
	if err := root.Mkdir("a", 0o700); err != nil {
		t.Fatal(err)
	}
	for i, want := range []error{nil, ErrExist} {
		if err := renameNew(root, fmt.Sprint(i), "a/object"); err != want {
			t.Errorf("renameNew %d: %v, want %v", i, err, want)
		}
	}
}

// TestFileVanishes takes the directory of a store away that was read from, leaving nothing, an empty directory, or one with
// something else in it, as does an unmounted file system. Nothing is absent then, and nothing is made there.
func TestFileVanishes(t *testing.T) {
	for name, after := range map[string][]string{"absent": nil, "empty": {"."}, "other": {"tmp", "x"}} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "root")
			s := newFile(t, dir)
			put(t, s, "config", "1")
			put(t, s, "a/b", "2")
			get(t, s, "config")
			if err := os.Rename(dir, dir+".away"); err != nil {
				t.Fatal(err)
			}
			for _, name := range after {
				if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			before, _ := fs.Glob(os.DirFS(dir), "*")
			for i := range 2 {
				checkOutOfReach(t, s, fmt.Sprintf("c%d/d", i))
			}
			if got, _ := fs.Glob(os.DirFS(dir), "*"); !slices.Equal(got, before) {
				t.Errorf("there is now %q", got)
			}
			if err := errors.Join(os.RemoveAll(dir), os.Rename(dir+".away", dir)); err != nil {
				t.Fatal(err)
			}
			put(t, s, "c/d", "3") // and back again
			if got := list(t, s, ""); !slices.Equal(got, []string{"a/b", "c/d", "config"}) {
				t.Errorf("back again there is %q", got)
			}
			if _, err := s.Get(t.Context(), "absent", 0, -1); !errors.Is(err, ErrNotExist) {
				t.Errorf("back again, Get of what is absent: %v", err)
			}
		})
	}
}

func checkOutOfReach(t *testing.T, s *File, key string) {
	t.Helper()
	_, getErr := s.Get(t.Context(), key, 0, -1)
	var listErr error
	for _, err := range s.List(t.Context(), "") {
		listErr = err
	}
	for what, err := range map[string]error{"Get": getErr, "List": listErr,
		"Put": s.Put(t.Context(), key, nil), "Delete": s.Delete(t.Context(), key)} {
		if !errors.Is(err, ErrOutOfReach) || errors.Is(err, ErrNotExist) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestFileDirectoryRemoved: who cleans empty directories away keeps nobody from writing for longer than one Put.
func TestFileDirectoryRemoved(t *testing.T) {
	dir := t.TempDir()
	s := newFile(t, dir)
	put(t, s, "a/b", "1")
	if err := errors.Join(s.Delete(t.Context(), "a/b"), os.Remove(filepath.Join(dir, "a")), os.Remove(filepath.Join(dir, "tmp"))); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), "a/b", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the first Put: %v", err)
	}
	put(t, s, "a/b", "2")
}

func TestFileModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	put(t, newFile(t, dir), "a/b", "1")
	for path, want := range map[string]fs.FileMode{"": fs.ModeDir | 0o700, "a": fs.ModeDir | 0o700, "tmp": fs.ModeDir | 0o700, "a/b": 0o600} {
		info, err := os.Stat(filepath.Join(dir, path))
		if err != nil || info.Mode() != want {
			t.Errorf("%q has mode %v, %v, want %v", path, info.Mode(), err, want)
		}
	}
}

// TestFileTakesAfterRoot: whom the operator gave the repository to can read what root puts into it.
func TestFileTakesAfterRoot(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	if err := errors.Join(os.Mkdir(root, 0o750), os.Chmod(root, 0o750)); err != nil {
		t.Fatal(err)
	}
	uid := os.Geteuid()
	if uid == 0 {
		uid = 65534
		if err := os.Chown(root, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	s, err := OpenFile(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), "a/b/c", []byte("x")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{"a": fs.ModeDir | 0o750, "a/b": fs.ModeDir | 0o750, "tmp": fs.ModeDir | 0o750, "a/b/c": 0o640} {
		info, err := os.Stat(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want || int(info.Sys().(*syscall.Stat_t).Uid) != uid {
			t.Errorf("%s has mode %v and owner %d, want %v and %d", name, info.Mode(), info.Sys().(*syscall.Stat_t).Uid, want, uid)
		}
	}
}

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	odd := filepath.Join(dir, "with space?")
	for _, c := range []struct{ raw, path, want string }{
		{"file://" + dir, dir, "file://" + dir},
		{"file://localhost" + dir, dir, "file://" + dir},
		{dir, dir, "file://" + dir},
		{"repo", filepath.Join(dir, "repo"), "file://" + dir + "/repo"},
		{"./a/../repo/", filepath.Join(dir, "repo"), "file://" + dir + "/repo"},
		{odd, odd, "file://" + dir + "/with%20space%3F"},
		{"file://" + dir + "/with%20space%3F", odd, "file://" + dir + "/with%20space%3F"},
	} {
		s, got, err := Open(t.Context(), c.raw)
		if err != nil || got != c.want || s.(*File).root != c.path {
			t.Errorf("Open(%s) = %v, %s, %v, want %s", c.raw, s, got, err, c.want)
		}
		if u, err := url.Parse(got); err != nil || u.Path != c.path {
			t.Errorf("%s has path %s, %v", got, u.Path, err)
		}
	}
	if _, err := os.Stat("repo"); err == nil {
		t.Error("Open made the directory")
	}
}

func TestOpenRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for raw, want := range map[string]string{
		"s3://bucket/x":       "scheme s3 is not supported by this build",
		"file://otherhost/x":  "absolute path",
		"file:///x?y=z":       "absolute path",
		"file://":             "no path given",
		"":                    "no path given",
		file:                  "is not a directory",
		"file:///%zz":         "invalid URL escape",
		"file:///x#fragment":  "absolute path",
		"gopher://user:pw@h/": "scheme gopher",
	} {
		if s, _, err := Open(t.Context(), raw); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open(%q) = %v, %v, want %q", raw, s, err, want)
		}
	}
}
