package recovery

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"pgthaw/repo"
)

func testManifest() *repo.Manifest {
	return &repo.Manifest{ID: "20261120T000000.000Z-0000", Timeline: 1, SystemIdentifier: 42,
		Tablespaces: []repo.Tablespace{{OID: 16385, Path: "/srv/side"}, {OID: 16386, Path: "pg_tblspc/16386", InPlace: true}}}
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCheckEmpty: each kind of directory is refused in words of its own.
func TestCheckEmpty(t *testing.T) {
	top := t.TempDir()
	for name, c := range map[string]struct {
		files map[string]string
		want  string
	}{
		"running":     {map[string]string{"PG_VERSION": "15", "postmaster.pid": strconv.Itoa(os.Getpid()) + "\n"}, "is running"},
		"thawed":      {map[string]string{recordName: "{}"}, "was thawed"},
		"half":        {map[string]string{"PG_VERSION": "15"}, "interrupted restore"},
		"cannot tell": {map[string]string{controlPath: "?"}, "cannot be told"},
		"files":       {map[string]string{"lost+found/x": ""}, "not empty"},
		"no parent/x": {nil, "no such file"},
	} {
		dir := filepath.Join(top, name)
		for file, content := range c.files {
			write(t, filepath.Join(dir, file), content)
		}
		_, err := checkEmpty(dir, testManifest())
		if !errors.Is(err, ErrTargetDir) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	absent, err := checkEmpty(filepath.Join(top, "absent"), testManifest())
	if !absent || err != nil {
		t.Errorf("absent: %v, %v", absent, err)
	}
	if absent, err := checkEmpty(t.TempDir(), testManifest()); absent || err != nil {
		t.Errorf("empty: %v, %v", absent, err)
	}
}

func TestRoots(t *testing.T) {
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m := testManifest()
	o := Options{Dir: top + "/data", TablespaceMapping: map[string]string{"/srv/side": top + "/side"}}
	roots, err := o.roots(m)
	if err != nil || len(roots) != 2 || roots[1] != (root{Path: "tablespaces/16385", Dir: top + "/side"}) {
		t.Fatalf("%+v, %v", roots, err)
	}
	if got := relink(roots, "pgdata/pg_tblspc/16385", "/srv/side"); got != top+"/side" {
		t.Errorf("the tablespace's link leads to %s", got)
	}
	if got := relink(roots, "pgdata/log", "/var/log"); got != "/var/log" {
		t.Errorf("another link leads to %s", got)
	}
	if err := checkRoots(roots, m); err != nil || !roots[0].Made || !roots[1].Made {
		t.Errorf("%+v, %v", roots, err)
	}
	write(t, top+"/side/x", "")
	var h interface{ Hint() string }
	if err := checkRoots(roots, m); !errors.Is(err, ErrTargetDir) || !errors.As(err, &h) || !strings.Contains(h.Hint(), "--tablespace-mapping=/srv/side=") {
		t.Errorf("a tablespace in use: %v", err)
	}
	o.TablespaceMapping = map[string]string{"/srv/side": top + "/data/side"}
	if roots, err = o.roots(m); err == nil {
		err = checkRoots(roots, m)
	}
	if !errors.Is(err, ErrTargetDir) {
		t.Errorf("a tablespace within the data directory: %v", err)
	}
	o.TablespaceMapping = map[string]string{"/elsewhere": top + "/x"}
	if _, err := o.roots(m); !errors.Is(err, ErrUsage) {
		t.Errorf("a mapping of nothing: %v", err)
	}
}

// TestDiscardOthers: only what the record names, at the place that it names, is deleted.
func TestDiscardOthers(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r := record{Version: recordVersion, Target: "/elsewhere", Roots: []root{{Path: "pgdata", Dir: "/elsewhere"}}}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, recordName), string(text))
	if err := Discard(t.Context(), dir); !errors.Is(err, ErrNoOverlay) {
		t.Errorf("a copy: %v", err)
	}
	if err := Discard(t.Context(), filepath.Dir(dir)); !errors.Is(err, ErrNoOverlay) {
		t.Errorf("something else: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, recordName)); err != nil {
		t.Error(err)
	}
}

// TestDiscardWhole: a directory that became whole by itself can be thrown away; one that was finished, or copied, cannot.
func TestDiscardWhole(t *testing.T) {
	top, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	made := func(name string) string {
		dir := filepath.Join(top, name)
		write(t, filepath.Join(dir, versionFile), "15\n")
		return dir
	}
	mark := func(dir, target string) {
		bare, err := openBare(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer bare.Close()
		r := record{Version: recordVersion, Target: target, Roots: []root{{Path: "pgdata", Dir: target, Made: true}}}
		if err := bare.mark(r); err != nil {
			t.Fatal(err)
		}
	}
	whole, copied, finished := made("whole"), made("copied"), made("finished")
	mark(whole, whole)
	mark(copied, whole)
	mark(finished, finished)
	if err := Finish(t.Context(), finished, nil); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{copied, finished} {
		if err := Discard(t.Context(), dir); !errors.Is(err, ErrNoOverlay) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	if err := Discard(t.Context(), whole); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(whole); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the whole one is still there: %v", err)
	}
}
