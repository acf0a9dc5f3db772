package integration

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// repairedJSON is what these tests read of repo check --json.
type repairedJSON struct {
	Findings []struct {
		Object   string                    `json:"object"`
		Recorded bool                      `json:"recorded"`
		Backups  []struct{ Backup string } `json:"backups"`
		Repair   *struct {
			Outcome string `json:"outcome"`
			Next    string `json:"next"`
		} `json:"repair"`
	} `json:"findings"`
}

// outcomes are what was done about each finding, "" without --repair.
func (r repairedJSON) outcomes() map[string]string {
	all := map[string]string{}
	for _, f := range r.Findings {
		all[f.Object] = ""
		if f.Repair != nil {
			all[f.Object] = f.Repair.Outcome
		}
	}
	return all
}

const allAccounts = "SELECT md5(string_agg(a::text, ',' ORDER BY aid)) FROM pgbench_accounts a"

// TestRepair damages the repository of a real cluster: a chunk of table data, the pack list, the cluster's document, a WAL segment. After the
// repair the next backup, an ordinary one, is whole, and the old one is named as damaged until prune takes it.
func TestRepair(t *testing.T) {
	t.Parallel()
	p := postgresql(t, 15)
	for name, flags := range map[string][]string{"encrypted": nil, "plain": {"--no-encryption"}} {
		t.Run(name, func(t *testing.T) {
			a := newArchived(t, p, clusterOptions{walSegmentMB: 1, checksums: true, pgbenchScale: 2, conf: []string{"fsync = off"}}, flags...)
			old := a.newest(t)
			a.pgbench("--client", "2", "--transactions", "200")
			a.fillSegments(3)
			a.waitArchived()
			d := a.damage(t, old)
			a.repairDamage(t, d)
			next := a.healed(t, d, old)
			a.oldIsNamed(t, d, old, next)
		})
	}
}

// harmed are the keys of the objects that a test damages, and a whole copy of the WAL file among them.
type harmed struct{ pack, list, cluster, wal, walFile string }

func (a archived) damage(t *testing.T, b listed) harmed {
	t.Helper()
	r := repository{t, a.repo}
	d := harmed{list: "backups/main/" + b.ID + ".packs", cluster: "clusters/main"}
	size := int64(0)
	for key, n := range objects(t, a.repo) {
		if strings.HasPrefix(key, "packs/") && n > size {
			d.pack, size = key, n
		}
	}
	names := a.walObjects(t)
	segment := names[len(names)-2]
	d.wal = "wal/main/" + segment[:8] + "/" + segment
	dir := postgresDir(t)
	d.walFile = filepath.Join(dir, segment)
	a.pgthaw(t, "wal", "fetch", "main", segment, d.walFile).ok(t)
	for _, key := range []string{d.pack, d.cluster, d.wal} {
		r.rewrite(key, flipMiddle)
	}
	r.rewrite(d.list, func(b []byte) []byte { return b[:len(b)-3] })
	return d
}

// checks runs repo check --read-data, which exits with the code.
func (a archived) checks(t *testing.T, code int, args ...string) (out repairedJSON) {
	t.Helper()
	a.pgthaw(t, append([]string{"repo", "check", "--read-data", "--json"}, args...)...).exits(t, code).into(t, &out)
	return out
}

func (a archived) repairDamage(t *testing.T, d harmed) {
	t.Helper()
	want := map[string]string{d.pack: "", d.list: "", d.cluster: "", d.wal: ""}
	if got := a.checks(t, 16).outcomes(); !maps.Equal(got, want) {
		t.Fatalf("check finds %v, want %v", got, want)
	}
	want = map[string]string{d.pack: "recorded", d.list: "repaired", d.cluster: "repaired", d.wal: "removed"}
	repaired := a.checks(t, 16, "--repair")
	if got := repaired.outcomes(); !maps.Equal(got, want) {
		t.Fatalf("repair does %v, want %v", got, want)
	}
	for _, f := range repaired.Findings {
		if (f.Repair.Next == "") != (f.Repair.Outcome == "repaired") {
			t.Errorf("%s: next %q", f.Object, f.Repair.Next)
		}
	}
	into := filepath.Join(filepath.Dir(d.walFile), "fetched")
	a.pgthaw(t, "wal", "fetch", "main", filepath.Base(d.walFile), into).exits(t, 200) // never the end of WAL
	if _, err := os.Stat(into); err == nil {
		t.Error("wal fetch gave something")
	}
	if text := a.pgthaw(t, "wal", "list", "main", "--json").ok(t).stdout; !strings.Contains(text, `"missing_before": 1`) {
		t.Errorf("wal list shows no gap:\n%s", text)
	}
	a.pgthaw(t, "list", "main").ok(t)
	a.pgthaw(t, "wal", "push", "main", d.walFile).ok(t)
	if got, want := a.checks(t, 16).outcomes(), map[string]string{d.pack: ""}; !maps.Equal(got, want) {
		t.Errorf("after the repair check finds %v, want %v", got, want)
	}
}

// healed makes the next backup, without any flag, and restores it.
func (a archived) healed(t *testing.T, d harmed, old listed) listed {
	t.Helper()
	next := a.newest(t)
	want, err := a.query("postgres", allAccounts)
	if err != nil {
		t.Fatal(err)
	}
	out := a.checks(t, 16)
	if len(out.Findings) != 1 || out.Findings[0].Object != d.pack || !out.Findings[0].Recorded ||
		len(out.Findings[0].Backups) != 1 || out.Findings[0].Backups[0].Backup != old.ID {
		t.Errorf("check finds %+v, want backup %s alone to be damaged", out.Findings, old.ID)
	}
	data := newTarget(t)
	var got copied
	a.copyTo(t, invocation{postgres: true}, "restore", next.ID, data, "--start").ok(t).into(t, &got)
	s := started{got.server(t, a.installation, data), got.SocketDir}
	if accounts := s.psql(t, allAccounts); accounts != want {
		t.Errorf("accounts are %s, want %s", accounts, want)
	}
	s.done(t)
	return next
}

// oldIsNamed has the old backup refused until it is pruned; then all is whole.
func (a archived) oldIsNamed(t *testing.T, d harmed, old, next listed) {
	t.Helper()
	if r := a.copyTo(t, invocation{postgres: true}, "restore", old.ID, newTarget(t)).exits(t, 16); !strings.Contains(r.stderr, d.pack) {
		t.Errorf("restore of the old backup says\n%s", r.stderr)
	}
	a.pgthaw(t, "repo", "prune", "--keep-last", "1", "--grace", "0", "--yes").ok(t)
	if out := a.checks(t, 0); len(out.Findings) != 0 {
		t.Errorf("%+v", out)
	}
	if all := a.backups(t); len(all) != 1 || all[0].ID != next.ID {
		t.Errorf("listed: %+v", all)
	}
}
