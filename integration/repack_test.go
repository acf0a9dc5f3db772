package integration

import (
	"fmt"
	"strings"
	"testing"
)

// repacked is what this test reads of repo prune --json.
type repacked struct {
	Collected []any `json:"collected"`
	Repacked  struct {
		Packs   int   `json:"packs"`
		Read    int64 `json:"read_bytes"`
		Written int64 `json:"written_bytes"`
		Won     int64 `json:"won_bytes"`
		Maps    int   `json:"maps"`
		Left    int   `json:"left_packs"`
	} `json:"repacked"`
}

// TestRepack backs a cluster up whose tables are rewritten in turn, deletes all but the last two backups, and prunes: packs that are
// mostly dead become smaller, and both backups stay what they were.
func TestRepack(t *testing.T) {
	t.Parallel()
	p := postgresql(t, 18)
	a := newArchived(t, p, smallSegments)
	const tables = 12
	for i := range tables {
		a.SQL(fmt.Sprintf("CREATE TABLE t%d AS SELECT g, md5(g::text || 'x') || md5(g::text) AS note FROM generate_series(1, 20000) g", i))
	}
	for round := range 6 {
		for i := range 5 {
			table := (2*round + i) % tables
			a.SQL(fmt.Sprintf("UPDATE t%d SET note = md5(g::text || %d) || md5(note)", table, round))
			a.SQL(fmt.Sprintf("VACUUM FULL t%d", table))
		}
		a.pgthaw(t, "backup", "main", "--pg-connection", a.dsn("postgres")).ok(t)
	}
	backups := a.backups(t)
	backups = backups[len(backups)-2:]
	was := map[string]map[string]fileState{}
	for _, b := range backups {
		was[b.ID] = a.restored(t, b.ID)
	}
	shell(t, "find "+a.repo+" -type f -exec touch -d '3 days ago' {} +")
	a.pgthaw(t, "repo", "prune", "--keep-last", "2", "--grace", "0", "--repack-limit", "0", "--yes").ok(t)

	size := func() (n int64) {
		for key, bytes := range objects(t, a.repo) {
			if strings.HasPrefix(key, "packs/") {
				n += bytes
			}
		}
		return n
	}
	before := size()
	args := []string{"repo", "prune", "--grace", "0", "--json"}
	var preview, p2, again repacked
	a.pgthaw(t, args...).ok(t).into(t, &preview)
	if size() != before || preview.Repacked.Won < before/5 {
		t.Errorf("of %d bytes the preview would win %+v", before, preview.Repacked)
	}
	a.pgthaw(t, append(args, "--yes", "--repack-limit", "8kB")...).ok(t).into(t, &p2)
	if p2.Repacked.Left == 0 {
		t.Errorf("with a limit of 8 kB: %+v", p2.Repacked)
	}
	a.pgthaw(t, append(args, "--yes")...).ok(t).into(t, &p2)
	after := size()
	t.Logf("%d bytes of packs became %d: %+v", before, after, p2.Repacked)
	if p2.Repacked.Packs == 0 || before-after < before/5 {
		t.Errorf("%d bytes became %d: %+v", before, after, p2.Repacked)
	}
	a.pgthaw(t, append(args, "--yes")...).ok(t).into(t, &again)
	if again.Repacked.Packs > 0 {
		t.Errorf("a second prune repacked %+v", again.Repacked)
	}
	a.pgthaw(t, "repo", "check", "--read-data").ok(t)
	for _, b := range backups {
		sameTrees(t, a.restored(t, b.ID), was[b.ID])
	}
	a.SQL("UPDATE t3 SET note = note WHERE g = 1")
	a.pgthaw(t, "backup", "main", "--pg-connection", a.dsn("postgres")).ok(t)
	a.pgthaw(t, "repo", "check", "--read-data").ok(t)
}

// restored is what a restore of a backup makes, but for times.
func (a archived) restored(t *testing.T, id string) map[string]fileState {
	t.Helper()
	dir := newTarget(t)
	a.copyTo(t, asPostgres, "restore", id, dir, "--to-immediate").ok(t)
	files := tree(t, dir)
	delete(files, autoConf)
	return timeless(files)
}
