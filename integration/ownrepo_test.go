package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// ofRoot hands the repository to root alone, its files too.
func (a archived) ofRoot(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(a.repo, func(path string, d os.DirEntry, err error) error {
		if err == nil {
			err = os.Chown(path, 0, 0)
		}
		return err
	})
	if err == nil {
		err = os.Chmod(a.repo, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestRepositoryOfRoot: the server's user cannot read the repository. A restore says so before it writes; a thawed server
// gets its WAL from the daemon, by the same rules.
func TestRepositoryOfRoot(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			a := newArchived(t, p, smallSegments)
			a.backup(t)
			a.fillSegments(4)
			a.waitArchived()
			a.Stop()
			a.ofRoot(t)

			data := newTarget(t)
			a.copyTo(t, invocation{}, "restore", "latest", data).exits(t, 18)
			absent(t, data)
			var got copied
			r := a.copyTo(t, invocation{}, "thaw", "latest", data, "--start", "--hydrate", "off").exits(t, 0)
			r.into(t, &got)
			if !strings.Contains(r.stderr, "cannot read the repository") {
				t.Errorf("it did not say that the server depends on the daemon:\n%s", r.stderr)
			}
			c := started{got.server(t, p, data), got.SocketDir}
			if got := c.psql(t, "SELECT count(*) FROM filled"); got != "4" {
				t.Errorf("filled has %s rows, want 4", got)
			}
			a.testFetchFromOverlay(t, data)
			c.done(t)
			a.overlayRefuses(t, asPostgres, data, "main", a.walObjects(t)[0], 200)
		})
	}
}

// testFetchFromOverlay asks the daemon of the overlay at data for every kind of answer.
func (a archived) testFetchFromOverlay(t *testing.T, data string) {
	all := a.walObjects(t)
	into := filepath.Join(data, "pg_wal/RECOVERYXLOG")
	for i, name := range all {
		want := a.overlayPath(t)
		pgthaw(t, "--repo", a.repo, "wal", "fetch", "main", name, want).ok(t)
		for _, path := range []string{a.overlayPath(t), into} { // there the segment before lies
			asPostgres.run(t, "--repo", a.repo, "wal", "fetch", "--overlay", data, "main", name, path).ok(t)
			sameAs(t, path, want)
		}
		if i%2 == 0 { // as PostgreSQL takes it away
			os.Remove(into)
		}
	}
	os.Remove(into)
	last := all[len(all)-1]
	a.overlayRefuses(t, asPostgres, data, "main", last[:8]+"FFFFFFFF000000FF", 1)
	a.overlayRefuses(t, asPostgres, data, "main", "00000009.history", 1)
	a.overlayRefuses(t, asPostgres, data, "main", "nonsense", 200)
	a.overlayRefuses(t, asPostgres, data, "other", last, 200)
	a.overlayRefuses(t, asPostgres, filepath.Dir(data), "main", last, 200)
	if out := shellAs(t, "nobody", a.overlayFetch(data, last, "/tmp/never")+" || echo $?"); !strings.HasSuffix(out, "\n200") || !strings.Contains(out, "may not") {
		t.Errorf("nobody got %s", out)
	}

	damaged := all[len(all)-3]
	if err := os.Truncate(a.walFile(damaged), 500); err != nil {
		t.Fatal(err)
	}
	a.overlayRefuses(t, asPostgres, data, "main", damaged, 200)
	a.removeWAL(t, damaged)
	a.overlayRefuses(t, asPostgres, data, "main", damaged, 200)
}

// overlayFetch is the command line.
func (a archived) overlayFetch(data, name, path string) string {
	return strings.Join([]string{filepath.Join(scratch, "bin", "pgthaw"), "--repo", a.repo, "wal fetch --overlay", data, "main", name, path, "2>&1"}, " ")
}

// overlayPath is where anybody may have a file of WAL put.
func (a archived) overlayPath(t *testing.T) string {
	t.Helper()
	dir := tempDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "RECOVERYXLOG")
}

// overlayRefuses fails the test unless the answer is code, and nothing is put anywhere.
func (a archived) overlayRefuses(t *testing.T, v invocation, data, cluster, name string, code int) {
	t.Helper()
	path := a.overlayPath(t)
	v.run(t, "--repo", a.repo, "wal", "fetch", "--overlay", data, cluster, name, path).exits(t, code)
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("%s: it left %v", name, left)
	}
}
