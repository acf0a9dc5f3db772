package recovery

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

// forger is the server's user, who owns a thawed directory and writes into it what it likes.
type forger struct {
	t   *testing.T
	top string // root's, open to everybody
	dir string // the data directory
}

func newForger(t *testing.T) *forger {
	t.Helper()
	if postgresUser(t) == nil {
		t.Skip("needs root, whom a forged record may deceive")
	}
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f := &forger{t, top, filepath.Join(top, "data")}
	write(t, filepath.Join(f.dir, "base", "1"), "a relation")
	write(t, filepath.Join(f.dir, lockName), "")
	own(t, f.dir, filepath.Join(f.dir, "base"), filepath.Join(f.dir, "base", "1"))
	return f
}

// record claims that all these are ours.
func (f *forger) record(roots ...string) record {
	r := record{Version: recordVersion, Target: f.dir}
	for _, dir := range roots {
		r.Roots = append(r.Roots, root{Path: "tablespaces/1", Dir: dir, Made: true})
	}
	return r
}

func (f *forger) writeRecord(r record) {
	f.t.Helper()
	text, err := json.Marshal(r)
	if err != nil {
		f.t.Fatal(err)
	}
	write(f.t, filepath.Join(f.dir, recordName), string(text))
}

// precious makes a file in a directory, both root's, that no discard may touch. With open, everybody may write there.
func (f *forger) precious(dir string, open bool) (file string) {
	f.t.Helper()
	file = filepath.Join(dir, "precious")
	write(f.t, file, "root's")
	mode := fs.FileMode(0o755)
	if open {
		mode = 0o777
	}
	if err := os.Chmod(dir, mode); err != nil {
		f.t.Fatal(err)
	}
	return file
}

func (f *forger) isThere(path string) {
	f.t.Helper()
	if _, err := os.Lstat(path); err != nil {
		f.t.Errorf("%v", err)
	}
}

// TestDiscardForgedRecord: root deletes nothing that the directory's owner could not delete.
func TestDiscardForgedRecord(t *testing.T) {
	for name, forge := range map[string]func(f *forger, roots ...string){
		"record": func(f *forger, roots ...string) { f.writeRecord(f.record(roots...)) },
		"mark": func(f *forger, roots ...string) {
			bare, err := openBare(f.dir)
			if err != nil {
				f.t.Fatal(err)
			}
			defer bare.Close()
			write(f.t, filepath.Join(f.dir, versionFile), "15\n")
			if err := errors.Join(bare.clean(), bare.mark(f.record(roots...))); err != nil {
				f.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Run("a tablespace of root's", func(t *testing.T) {
				f := newForger(t)
				for i, open := range []bool{false, true} {
					other := filepath.Join(f.top, "other", string(rune('a'+i)))
					file := f.precious(other, open)
					forge(f, f.dir, other)
					if err := Discard(t.Context(), f.dir); !errors.Is(err, ErrTargetDir) {
						t.Errorf("got %v, want a refusal", err)
					}
					f.isThere(file)
					f.isThere(filepath.Join(f.dir, "base", "1"))
				}
			})
			t.Run("an empty directory of root's", func(t *testing.T) {
				f := newForger(t)
				other := filepath.Join(f.top, "other")
				if err := os.Mkdir(other, 0o755); err != nil {
					t.Fatal(err)
				}
				forge(f, f.dir, other)
				if err := Discard(t.Context(), f.dir); !errors.Is(err, ErrTargetDir) {
					t.Errorf("got %v, want a refusal", err)
				}
				f.isThere(other)
			})
			t.Run("another data directory", func(t *testing.T) {
				f := newForger(t)
				other := filepath.Join(f.top, "other")
				file := f.precious(other, false)
				forge(f, other)
				if err := Discard(t.Context(), f.dir); !errors.Is(err, ErrNoOverlay) {
					t.Errorf("got %v, want ErrNoOverlay", err)
				}
				f.isThere(file)
			})
			t.Run("a link for a tablespace", func(t *testing.T) {
				f := newForger(t)
				other, link := filepath.Join(f.top, "other"), filepath.Join(f.dir, "link")
				file := f.precious(other, false)
				if err := os.Symlink(other, link); err != nil {
					t.Fatal(err)
				}
				own(t, link)
				forge(f, f.dir, link)
				if err := Discard(t.Context(), f.dir); !errors.Is(err, ErrTargetDir) {
					t.Errorf("got %v, want a refusal", err)
				}
				f.isThere(file)
			})
			t.Run("what root keeps in it", func(t *testing.T) {
				f := newForger(t)
				side := filepath.Join(f.top, "side")
				file := f.precious(filepath.Join(side, "root's"), false)
				own(t, side)
				forge(f, f.dir, side)
				if err := Discard(t.Context(), f.dir); !errors.Is(err, unix.EACCES) {
					t.Errorf("got %v, want EACCES", err)
				}
				f.isThere(file)
			})
		})
	}
}

// TestDiscardFollowsNoLink: what a copy's links lead to is not of the copy.
func TestDiscardFollowsNoLink(t *testing.T) {
	f := newForger(t)
	other := filepath.Join(f.top, "other")
	file := f.precious(other, true)
	for name, target := range map[string]string{"absolute": other, "relative": "../other", "base/deep": other, privateDir + "/ours": other} {
		if err := os.Symlink(target, filepath.Join(f.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	f.writeRecord(f.record(f.dir))
	if err := Discard(t.Context(), f.dir); err != nil {
		t.Error(err)
	}
	f.isThere(file)
	if _, err := os.Lstat(f.dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the data directory is still there: %v", err)
	}
}

// TestResumeForgedRecord: root serves nothing that the server's user may have made up.
func TestResumeForgedRecord(t *testing.T) {
	f := newForger(t)
	f.writeRecord(f.record(f.dir))
	spawned := 0
	spawn := func(context.Context, string) error { spawned++; return nil }
	if err := Resume(t.Context(), f.dir, spawn); err != nil || spawned != 1 {
		t.Errorf("root's own record: %v", err)
	}
	own(t, filepath.Join(f.dir, recordName))
	if err := Resume(t.Context(), f.dir, spawn); !errors.Is(err, ErrTargetDir) || spawned != 1 {
		t.Errorf("a forged record: %v", err)
	}
	open := func(context.Context, string, KeyFiles) (*repo.Repository, error) {
		t.Error("the repository is opened")
		return nil, errors.New("not here")
	}
	if err := Serve(t.Context(), f.dir, open, func() error { return nil }, nil); !errors.Is(err, ErrTargetDir) {
		t.Errorf("serve: %v", err)
	}
}
