package integration

import (
	"fmt"
	"path/filepath"
	"testing"
)

// archived is a cluster that archives into a repository by wal push, as its documentation tells.
type archived struct {
	*cluster
	repo string
}

// pgthaw runs the binary as the server's user, with the repository in its environment.
func (a archived) pgthaw(t *testing.T, args ...string) result {
	t.Helper()
	return invocation{postgres: true, env: []string{"PGTHAW_REPO=" + a.repo}}.run(t, args...)
}

// newArchived makes the repository as "repo init" does by itself, which is encrypted; or with other flags.
func newArchived(t *testing.T, p installation, o clusterOptions, init ...string) archived {
	t.Helper()
	dir := postgresDir(t)
	repo := filepath.Join(dir, "repo")
	asPostgres.run(t, append([]string{"repo", "init", repo}, init...)...).ok(t)
	binary := filepath.Join(scratch, "bin", "pgthaw")
	o.conf = append(o.conf, "archive_mode = on", fmt.Sprintf("archive_command = '%s --repo %s wal push main \"%%p\"'", binary, repo))
	return archived{newCluster(t, p, o), repo}
}

// plainFor has the tests of one major use a repository that is not encrypted.
func plainFor(p installation, major int) []string {
	if p.major == major {
		return []string{"--no-encryption"}
	}
	return nil
}

// listed is what these tests read of list --json.
type listed struct {
	ID       string `json:"id"`
	StopLSN  string `json:"stop_lsn"`
	StartLSN string `json:"start_lsn"`
}

// TestRoundTrip backs up under load, and restores to the end of the WAL, to a name, and to the backup's own end.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			a := newArchived(t, p, clusterOptions{checksums: true, pgbenchScale: 2, tablespaces: []string{"fast", "slow"}}, plainFor(p, 16)...)
			l := startLedger(t, a.cluster, 2)
			l.waitCommits(50)
			a.pgthaw(t, "backup", "main", "--pg-connection", a.dsn("postgres")).ok(t)
			l.waitCommits(50)
			m := l.Mark("here")
			a.cluster.pgbench("--client", "2", "--transactions", "200")
			l.waitCommits(50)
			l.Stop()
			a.Stop() // archives the last segment

			var backups []listed
			a.pgthaw(t, "list", "main", "--json").ok(t).into(t, &backups)
			if len(backups) != 1 {
				t.Fatalf("%d backups, want 1", len(backups))
			}
			stop, err := parseLSN(backups[0].StopLSN)
			if err != nil {
				t.Fatal(err)
			}
			least, most := l.atLSN(stop, true)
			all := len(l.commits)
			for _, to := range []struct {
				name        string
				args        []string
				least, most int
			}{
				{"end", nil, all, all},
				{"name", []string{"--to-name", m.name}, m.n, m.n},
				{"immediate", []string{"--to-immediate"}, least, most},
			} {
				t.Run(to.name, func(t *testing.T) { a.restoreAndCheck(t, l, to.args, to.least, to.most) })
			}
		})
	}
}

// restoreAndCheck restores the latest backup, has it recover, and compares it with the ledger.
func (a archived) restoreAndCheck(t *testing.T, l *ledger, target []string, least, most int) {
	t.Helper()
	dir := postgresDir(t)
	data := filepath.Join(dir, "data")
	args := []string{"restore", "main", "latest", "--target", data}
	for _, name := range []string{"fast", "slow"} {
		args = append(args, "--tablespace-mapping", filepath.Join(a.dir, "tablespace "+name)+"="+filepath.Join(dir, name))
	}
	a.pgthaw(t, append(args, target...)...).ok(t)
	c := adopt(t, a.installation, data)
	c.waitRecovered()
	l.check(c, least, most)
	if got := c.SQL("SELECT count(*), sum(i) FROM in_slow"); got != "1000|500500" {
		t.Errorf("in_slow holds %s", got)
	}
	c.pgbenchBalances()
	c.amcheck()
	c.Stop()
	a.checksums(t, data)
}
