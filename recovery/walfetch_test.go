package recovery

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// TestFetchWAL asks for what a repository has and has not. The segments are a real server's first six on timeline 1.
func TestFetchWAL(t *testing.T) {
	s := newSource(t)
	s.sql("create table ledger (n int primary key)")
	for n := range 6 {
		s.transact(n)
		s.switchWAL()
	}
	size := s.control().SegmentSize
	first := s.firstArchived()
	name := func(no uint64) string { return pg.SegmentName(1, first+no-1, size).String() }
	s.push(name(3)) // a gap
	// The last segment came only as a partial one, as a promotion leaves it.
	last := filepath.Join(s.archive, name(6))
	if err := os.Rename(last, last+".partial"); err != nil {
		t.Fatal(err)
	}
	fresh := *s
	fresh.openRepositoryAt("partial")
	fresh.push(name(3))
	history := pg.WALName{Kind: pg.WALHistory, Timeline: 2}
	promoted := fmt.Appendf(nil, "1\t%s\tno recovery target specified\n", size.Start(first+5))
	if err := fresh.repo.PutWAL(t.Context(), cluster, history, promoted); err != nil {
		t.Fatal(err)
	}
	wal := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(s.archive, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const gone, other = "no such file", "another error"
	for _, c := range []struct {
		name string
		want string
		file []byte
	}{
		{name(1), "", wal(name(1))},
		{name(3), other, nil},                    // a gap
		{name(5), "", wal(name(5))},              //
		{name(6), "", wal(name(6) + ".partial")}, // nothing later
		{name(6) + ".partial", "", wal(name(6) + ".partial")},
		{name(7), gone, nil},
		{name(0), other, nil}, // before all that is there
		{pg.SegmentName(2, first+5, size).String(), gone, nil},
		{"00000002.history", "", promoted},
		{"00000003.history", gone, nil},
		{"RECOVERYXLOG", other, nil},
		{"../../etc/passwd", other, nil},
	} {
		path := filepath.Join(t.TempDir(), "RECOVERYXLOG")
		for range 2 { // the same file may be asked for again
			err := FetchWAL(t.Context(), fresh.repo, cluster, c.name, path)
			got := ""
			if errors.Is(err, repo.ErrNoWAL) {
				got = gone
			} else if err != nil {
				got = other
			}
			if got != c.want {
				t.Errorf("%s: %v, want %q", c.name, err, c.want)
			}
		}
		if b, _ := os.ReadFile(path); !bytes.Equal(b, c.file) {
			t.Errorf("%s: other bytes than were pushed", c.name)
		}
		if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), walTemp+"*")); len(left) > 0 {
			t.Errorf("%s: left %v", c.name, left)
		}
	}
	if err := FetchWAL(t.Context(), s.repo, "other", name(1), "x"); err == nil || errors.Is(err, repo.ErrNoWAL) {
		t.Errorf("of a cluster that does not exist: %v", err)
	}
	s.testDamagedWAL(name(2))
}

// firstArchived is the number of the first segment in the archive.
func (s *source) firstArchived() uint64 {
	s.t.Helper()
	entries, err := os.ReadDir(s.archive)
	if err != nil || len(entries) == 0 {
		s.t.Fatalf("nothing is archived: %v", err)
	}
	name, err := pg.ParseWALName(entries[0].Name())
	if err != nil {
		s.t.Fatal(err)
	}
	no, err := name.SegmentNo(s.control().SegmentSize)
	if err != nil {
		s.t.Fatal(err)
	}
	return no
}

// testDamagedWAL takes the repository away, and then damages a segment: neither may look like the end of WAL.
func (s *source) testDamagedWAL(name string) {
	t := s.t
	top := filepath.Join(s.top, "repo")
	object := filepath.Join(top, "wal", cluster, name[:8], name)
	b, err := os.ReadFile(object)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.top, "RECOVERYXLOG")
	flipped := slices.Clone(b)
	flipped[len(b)/2] ^= 1
	for what, damage := range map[string][]byte{"flipped": flipped, "cut": b[:len(b)-1], "empty": {}} {
		if err := os.WriteFile(object, damage, 0o600); err != nil {
			t.Fatal(err)
		}
		err := FetchWAL(t.Context(), s.repo, cluster, name, path)
		if err == nil || errors.Is(err, repo.ErrNoWAL) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := os.Rename(top, top+"-away"); err != nil {
		t.Fatal(err)
	}
	err = FetchWAL(t.Context(), s.repo, cluster, "000000010000000000000099", path)
	if err == nil || errors.Is(err, repo.ErrNoWAL) {
		t.Errorf("the repository is away: %v", err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("a file was put in place")
	}
}
