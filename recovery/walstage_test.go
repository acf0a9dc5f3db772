package recovery

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestStagedFile(t *testing.T) {
	dir := t.TempDir()
	b, err := openBare(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	for _, sub := range []string{privateDir, "pg_wal"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = 4242, 4243
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	stale := filepath.Join(dir, stageDir, "stale")
	for range 2 { // nothing there, and what an earlier daemon left
		if err := b.clearStage(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(stale); err == nil {
			t.Fatal("a file that nobody vouches for is still there")
		}
		if err := os.WriteFile(stale, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.clearStage(); err != nil {
		t.Fatal(err)
	}

	var s stagedFile
	if err := s.put(b, []byte("segment")); err != nil {
		t.Fatal(err)
	}
	if !s.linkAs(b, "RECOVERYXLOG") {
		t.Fatal("it was not given")
	}
	expectPut(t, dir, "segment", uid, gid)
	if s.linkAs(b, "another") {
		t.Error("it was given twice")
	}

	for _, name := range []string{"RECOVERYXLOG", "../RECOVERYXLOG", "..", ".", ""} {
		var s stagedFile
		if err := s.put(b, []byte("another")); err != nil {
			t.Fatal(err)
		}
		if s.linkAs(b, name) {
			t.Errorf("it was given as %q", name)
		}
	}
	expectPut(t, dir, "segment", uid, gid)

	var late stagedFile
	late.remove(b)
	if err := late.put(b, []byte("late")); err != nil {
		t.Fatal(err)
	}
	if late.linkAs(b, "late") {
		t.Error("a file that was removed was given")
	}
	if left, err := os.ReadDir(filepath.Join(dir, stageDir)); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
}

// expectPut looks at the only file in pg_wal.
func expectPut(t *testing.T, dir, content string, uid, gid int) {
	t.Helper()
	files, err := os.ReadDir(filepath.Join(dir, "pg_wal"))
	if err != nil || len(files) != 1 || files[0].Name() != "RECOVERYXLOG" {
		t.Fatalf("pg_wal has %v, %v", files, err)
	}
	info, err := files[0].Info()
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if int(st.Uid) != uid || int(st.Gid) != gid || st.Nlink != 1 || info.Mode() != 0o600 {
		t.Errorf("it is %v, of user %d and group %d, with %d names", info.Mode(), st.Uid, st.Gid, st.Nlink)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "pg_wal/RECOVERYXLOG")); err != nil || string(got) != content {
		t.Errorf("it has %q, %v; want %q", got, err, content)
	}
}
