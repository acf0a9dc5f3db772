package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// memoryLimit is the promise for backup, restore and mount at any size of the database.
const memoryLimit = 512 << 20

// TestManyRelations backs up, restores and thaws a cluster of very many small files.
func TestManyRelations(t *testing.T) {
	t.Parallel()
	relations := environmentNumber(t, "PGTHAW_RELATIONS", 100_000)
	p := postgresql(t, 15)
	a := newArchived(t, p, clusterOptions{conf: []string{"fsync = off", "full_page_writes = off", "max_wal_size = 4GB", "autovacuum = off",
		"shared_buffers = 1GB", "max_locks_per_transaction = 1024"}})
	began := time.Now()
	a.makeRelations(t, relations)
	t.Logf("%d relations made in %v", relations, time.Since(began))
	all := a.SQL("SELECT count(*) FROM pg_class WHERE relkind = 'r'")

	first := a.measured(t, "backup", "main", "--pg-connection", a.dsn("postgres"))
	stored := repositorySize(t, a.repo)
	a.SQL("UPDATE many_17 SET i = i + 1; CHECKPOINT")
	second := a.measured(t, "backup", "main", "--pg-connection", a.dsn("postgres"))
	if grown := repositorySize(t, a.repo) - stored; grown > stored/10 {
		t.Errorf("a second backup added %d bytes to %d", grown, stored)
	}
	a.Stop()
	t.Logf("%d bytes stored; first backup %v, second %v", stored, first.took, second.took)

	restored := newTarget(t)
	t.Logf("restore %v", a.measured(t, "restore", "main", "latest", "--target", restored, "--bindir", p.bin).took)
	c := adopt(t, p, restored)
	checkRelations(t, c, all)
	c.Stop()

	a.thawMany(t, all)
}

// thawMany uses a copy while nothing is hydrated, and while all is.
func (a archived) thawMany(t *testing.T, all string) {
	t.Helper()
	data := newTarget(t)
	t.Cleanup(func() { discard(t, data) })
	t.Logf("thaw %v", a.measured(t, "thaw", "main", "latest", "--target", data, "--bindir", a.bin, "--hydrate", "off").took)
	c := adopt(t, a.installation, data)
	checkRelations(t, c, all)
	shellAs(t, "postgres", "ls -lR "+data+" | wc -l")
	daemonWithinLimit(t, "nothing hydrated", data)

	began := time.Now()
	asPostgres.run(t, "overlay", "finish", data).exits(t, 1, 17, 19) // the server runs
	t.Logf("hydrated in %v", time.Since(began))
	checkRelations(t, c, all)
	if st := daemonWithinLimit(t, "hydrated", data); st.State != "hydrated" {
		t.Errorf("status is %+v", st)
	}
	c.Stop()
	asPostgres.run(t, "overlay", "finish", data).ok(t)
	c.Start()
	checkRelations(t, c, all)
	c.Stop()
}

// daemonWithinLimit looks at the most memory that an overlay's daemon had up to now.
func daemonWithinLimit(t *testing.T, when, data string) thawed {
	t.Helper()
	st := overlayStatus(t, asPostgres, data)
	peak := peakMemory(t, st.PID)
	t.Logf("%s: the daemon's peak is %d MB", when, peak>>20)
	if peak > memoryLimit {
		t.Errorf("%s: the daemon needs %d bytes of memory", when, peak)
	}
	return st
}

// makeRelations makes small tables, a row in each.
func (a archived) makeRelations(t *testing.T, n int) {
	t.Helper()
	const batch = 1000
	for from := 0; from < n; from += batch {
		a.SQL(fmt.Sprintf(`DO $$ BEGIN FOR i IN %d..%d LOOP
			EXECUTE format('CREATE TABLE many_%%s AS SELECT %%s AS i', i, i); END LOOP; END $$`, from, min(n, from+batch)-1))
	}
}

func checkRelations(t *testing.T, c *cluster, all string) {
	t.Helper()
	if got := c.SQL("SELECT count(*) FROM pg_class WHERE relkind = 'r'"); got != all {
		t.Errorf("there are %s tables, want %s", got, all)
	}
	for _, i := range []int{0, 17, 999, 5000, 9999} {
		want := i
		if i == 17 {
			want++
		}
		if got := c.SQL(fmt.Sprintf("SELECT i FROM many_%d", i)); got != strconv.Itoa(want) {
			t.Errorf("many_%d holds %s, want %d", i, got, want)
		}
	}
}

// measured runs pgthaw as the server's user and fails the test if it needed too much memory.
func (a archived) measured(t *testing.T, args ...string) result {
	t.Helper()
	binary := filepath.Join(scratch, "bin", "pgthaw")
	cmd := exec.Command(binary, args...)
	becomePostgres(t, cmd)
	cmd.SysProcAttr.Pdeathsig = 0
	cmd.Env, cmd.Dir = environment("PGTHAW_REPO="+a.repo, "HOME="+filepath.Join(scratch, "home"), stateHome(t, "postgres")), "/"
	began := time.Now()
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("pgthaw %q: %v\n%s", args, err, text)
	}
	const kilobyte = 1 << 10 // getrusage(2): ru_maxrss
	peak := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss * kilobyte
	t.Logf("%s: %d MB", args[0], peak>>20)
	if peak > memoryLimit {
		t.Errorf("pgthaw %q needs %d bytes of memory", args, peak)
	}
	return result{args: args, took: time.Since(began)}
}

// peakMemory is the most that a process has had in memory, bytes.
func peakMemory(t *testing.T, pid int) int64 {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	kB, err := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kB << 10
}
