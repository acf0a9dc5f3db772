package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// amcheck fails the test unless pg_amcheck finds every table and index of every database sound. Not for a hot standby.
func (c *cluster) amcheck(more ...string) {
	c.t.Helper()
	c.run(c.t, "pg_amcheck", append(more, "--all", "--install-missing", "--heapallindexed",
		"--host", "127.0.0.1", "--port", strconv.Itoa(c.port), "--username", "postgres")...)
}

// checksums fails the test unless pg_checksums finds every page of a cleanly shut down PGDATA sound.
func (p installation) checksums(t *testing.T, data string) {
	t.Helper()
	if p.borrows(t, "pg_checksums") {
		defer nameTablespacesAs15(t, data)()
	}
	p.run(t, "pg_checksums", "--check", "--pgdata", data)
}

// nameTablespacesAs15 links each tablespace's directory to the name under which 15's pg_checksums, which reads
// 16's pages well, looks for it. The function it returns takes the links away.
func nameTablespacesAs15(t *testing.T, data string) (restore func()) {
	t.Helper()
	var links []string
	directories, _ := filepath.Glob(filepath.Join(data, "pg_tblspc", "*", "PG_16_*"))
	for _, dir := range directories {
		link := filepath.Join(filepath.Dir(dir), "PG_15_202209061")
		if err := os.Symlink(filepath.Base(dir), link); err != nil {
			t.Fatal(err)
		}
		links = append(links, link)
	}
	return func() {
		for _, link := range links {
			_ = os.Remove(link)
		}
	}
}

// verifyBackup fails the test unless pg_verifybackup accepts dir. A borrowed one cannot read another major's WAL.
func (p installation) verifyBackup(t *testing.T, dir string, args ...string) {
	t.Helper()
	if p.borrows(t, "pg_verifybackup") {
		args = append(args, "--no-parse-wal")
	}
	p.run(t, "pg_verifybackup", append(args, dir)...)
}

// pgbenchBalances fails the test unless the sums that every pgbench transaction keeps equal are equal.
func (c *cluster) pgbenchBalances() {
	c.t.Helper()
	sums := c.SQL(`SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
		(SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)`)
	if f := strings.Split(sums, "|"); f[0] != f[1] || f[1] != f[2] || f[2] != f[3] {
		c.t.Errorf("pgbench's sums differ: %s", sums)
	}
}
