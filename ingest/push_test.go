package ingest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// archivedFiles are what the server's archive_command has copied away so far.
func (s *testServer) archivedFiles() (names []string) {
	s.t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.top, "archive"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range entries {
		if _, err := pg.ParseWALName(e.Name()); err == nil {
			names = append(names, e.Name())
		}
	}
	return names
}

// startArchiving starts a server that archives with cp.
func startArchiving(t testing.TB, bin string, initdb ...string) *testServer {
	t.Helper()
	s := initServer(t, bin, initdb...)
	dir := s.mkdir("archive")
	s.configure("archive_mode = on", "archive_command = 'cp %p "+dir+"/%f.tmp && mv "+dir+"/%f.tmp "+dir+"/%f'")
	s.start()
	return s
}

// switchWAL fills n segments, a little.
func (s *testServer) switchWAL(n int) {
	s.t.Helper()
	for range n {
		s.sql("create table if not exists w(i int)", "insert into w select generate_series(1, 100)", "select pg_switch_wal()")
	}
}

// checkSameAsArchive compares the repository's WAL files with the archive's, those that both have; it wants at least n.
func checkSameAsArchive(t *testing.T, r *repo.Repository, s *testServer, n int) {
	t.Helper()
	same := 0
	for _, file := range s.archivedFiles() {
		name, err := pg.ParseWALName(file)
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.WAL(t.Context(), "main", name)
		if errors.Is(err, repo.ErrNoWAL) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join(s.top, "archive", file))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs from the archive's", name)
		}
		same++
	}
	if same < n {
		t.Errorf("%d files in the repository and in the archive, want %d", same, n)
	}
}

func TestPushWAL(t *testing.T) {
	t.Parallel()
	s := startArchiving(t, oldest(t), "--wal-segsize=1")
	s.switchWAL(2)
	eventually(t, "two segments are archived", func() bool { return len(s.archivedFiles()) >= 2 })
	r := newRepository(t)
	push := func(path string) error { return PushWAL(t.Context(), r, "main", path) }
	segment := filepath.Join(s.top, "archive", s.archivedFiles()[0])

	history := filepath.Join(t.TempDir(), "00000002.history")
	write(t, history, []byte("1\t0/3000000\tno recovery target specified\n"))
	var hinted *Error
	if err := push(history); !errors.Is(err, repo.ErrNoCluster) || !errors.As(err, &hinted) {
		t.Errorf("history before anything tells whose it is: %v", err)
	}
	inPlace := filepath.Join(s.data, "pg_wal", "00000002.history")
	write(t, inPlace, []byte("1\t0/3000000\tno recovery target specified\n"))
	if err := push(inPlace); err != nil {
		t.Errorf("history in the data directory: %v", err)
	}
	if err := push(segment); err != nil {
		t.Fatal(err)
	}
	if err := push(segment); err != nil {
		t.Errorf("the same again: %v", err)
	}
	checkSameAsArchive(t, r, s, 1)
	checkRefusedPushes(t, push, segment)

	other := startArchiving(t, oldest(t), "--wal-segsize=1", "--data-checksums") // another initdb, another system
	other.switchWAL(1)
	eventually(t, "a segment is archived", func() bool { return len(other.archivedFiles()) >= 1 })
	if err := push(filepath.Join(other.top, "archive", other.archivedFiles()[0])); !errors.Is(err, repo.ErrOtherCluster) {
		t.Errorf("another server's segment: %v", err)
	}
}

// checkRefusedPushes takes a segment that was pushed.
func checkRefusedPushes(t *testing.T, push func(path string) error, segment string) {
	t.Helper()
	content, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	refused := func(name string, content []byte) error {
		t.Helper()
		path := filepath.Join(dir, name)
		write(t, path, content)
		err := push(path)
		if err == nil {
			t.Errorf("%s of %d bytes was taken", name, len(content))
		}
		return err
	}
	changed := bytes.Clone(content)
	changed[len(changed)-1] ^= 1
	if err := refused(filepath.Base(segment), changed); !errors.Is(err, repo.ErrWALConflict) {
		t.Errorf("other bytes: %v", err)
	}
	refused("0000000100000000000000FF", content) // another place
	refused("0000000100000000000000FE", content[:8192])
	refused("0000000100000000000000FE", nil)
	refused("RECOVERYXLOG", content)
}

func write(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSamePartial(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"abc\x00\x00", "abc\x00\x00", true},
		{"abc\x00\x00", "abcde", true},
		{"abcde", "ab\x00\x00\x00", true},
		{"abcde", "abx\x00\x00", false},
	} {
		if got := samePartial([]byte(c.a), []byte(c.b)); got != c.want {
			t.Errorf("samePartial(%q, %q) = %v", c.a, c.b, got)
		}
	}
}
