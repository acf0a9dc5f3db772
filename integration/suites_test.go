package integration

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"
	"time"
)

// suiteLimit bounds each program of a suite.
const suiteLimit = 90 * time.Minute

// suites is where setup.sh has put what others wrote. The tests that use it are long and run by make suites only.
func suites(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("PGTHAW_SUITES")
	if dir == "" {
		t.Skip("only for make suites: set PGTHAW_SUITES")
	}
	return dir
}

// suiteCommand runs a program that may fail in a directory, as root or as user postgres, and gives what it printed.
func suiteCommand(t *testing.T, v invocation, dir string, env []string, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), suiteLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	if v.postgres {
		becomePostgres(t, cmd)
	} else {
		cmd.SysProcAttr, cmd.Env = &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT}, environment("HOME="+dir)
	}
	cmd.Dir, cmd.Env = dir, append(cmd.Env, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestSuiteRegress runs PostgreSQL's regression suite natively, thaws a backup of what that left, without hydration, and has the
// copy answer as the original: the same dump, and the same results of the suite.
func TestSuiteRegress(t *testing.T) {
	dir := suites(t)
	p := postgresql(t, 15)
	a := newArchived(t, p, clusterOptions{checksums: true})
	native := regress(t, a.cluster, dir)
	if ok := native.count("ok"); ok < 200 || len(native.tests) > ok {
		t.Logf("natively %d of %d tests succeed", ok, len(native.tests))
	}
	a.backup(t)
	dump := a.dumpRegression()
	a.Stop()
	data := newTarget(t)
	var r copied
	a.copyTo(t, invocation{}, "thaw", "latest", data, "--start", "--hydrate", "off").ok(t).into(t, &r)
	c := r.server(t, p, data)
	if got := c.dumpRegression(); got != dump {
		t.Errorf("the copy's dump has %d bytes that differ from the original's %d", len(got), len(dump))
	}
	thawed := regress(t, c, dir)
	thawed.compare(t, native)
	st := overlayStatus(t, invocation{}, data)
	if st.State != "hydrating" || !st.Mounted {
		t.Errorf("the suite ran on a copy that is %+v", st)
	}
	t.Logf("%d of %d tests succeed natively, %d on the overlay; %d MB read from the repository", native.count("ok"), len(native.tests), thawed.count("ok"), st.RepositoryBytesRead>>20)
	c.SQL("DROP DATABASE regression")
	c.amcheck()
	c.Stop()
	p.checksums(t, data)
}

// dumpRegression is what the suite leaves, but for what recovery empties.
func (c *cluster) dumpRegression() string {
	c.t.Helper()
	dump := c.run(c.t, "pg_dump", "--no-unlogged-table-data", "--dbname", c.dsn("regression"))
	return restrict.ReplaceAllString(dump, "")
}

// restrict is a line with a random key, which pg_dump writes since 15.14.
var restrict = regexp.MustCompile(`(?m)^\\(un)?restrict .*$`)

// regressed is what a run of pg_regress gave: ok or FAILED by test, and the output of each.
type regressed struct {
	tests   map[string]string
	results string // a directory
}

// pg_regress 15: "test boolean ... ok 123 ms", indented and without "test" in a group that runs in parallel.
var regressLine = regexp.MustCompile(`(?m)^(?:test| {4,})\s*(\S+)\s+\.\.\. (?:failed \(ignored\)|(ok|FAILED))`)

func regress(t *testing.T, c *cluster, dir string) regressed {
	t.Helper()
	source, out := filepath.Join(dir, "src/test/regress"), postgresDir(t)
	text, _ := suiteCommand(t, asPostgres, out, nil, filepath.Join(c.bin, "../lib/pgxs/src/test/regress/pg_regress"),
		"--inputdir", source, "--outputdir", out, "--dlpath", filepath.Join(dir, "lib"), "--bindir", c.bin, "--schedule", filepath.Join(source, "parallel_schedule"),
		"--max-concurrent-tests", "20", "--host", "127.0.0.1", "--port", fmt.Sprint(c.port), "--user", "postgres")
	r := regressed{make(map[string]string), filepath.Join(out, "results")}
	for _, m := range regressLine.FindAllStringSubmatch(text, -1) {
		r.tests[m[1]] = m[2]
	}
	if len(r.tests) < 200 {
		t.Fatalf("pg_regress ran %d tests:\n%s", len(r.tests), text)
	}
	return r
}

func (r regressed) count(status string) (n int) {
	for _, s := range r.tests {
		if s == status {
			n++
		}
	}
	return n
}

// compare wants each test to have succeeded that did natively, and one that failed there to fail in the same way.
func (r regressed) compare(t *testing.T, native regressed) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(native.tests)) {
		if r.tests[name] != native.tests[name] {
			t.Errorf("%s: %s, natively %s", name, r.tests[name], native.tests[name])
			r.show(t, name, native)
		} else if r.tests[name] != "ok" && r.output(name) != native.output(name) {
			t.Errorf("%s fails in another way than natively", name)
			r.show(t, name, native)
		}
	}
}

// output is a test's, with the names of its directories taken out.
func (r regressed) output(name string) string {
	b, _ := os.ReadFile(filepath.Join(r.results, name+".out"))
	return string(bytes.ReplaceAll(b, []byte(filepath.Dir(r.results)), []byte("OUT")))
}

func (r regressed) show(t *testing.T, name string, native regressed) {
	t.Helper()
	diff, _ := exec.Command("diff", "-U3", filepath.Join(native.results, name+".out"), filepath.Join(r.results, name+".out")).CombinedOutput()
	t.Logf("%.5000s", diff)
}

// TestSuiteRecovery runs PostgreSQL's recovery tests with all their clusters on a mount. One that fails has to fail natively too.
func TestSuiteRecovery(t *testing.T) {
	dir := suites(t)
	p := postgresql(t, 15)
	data := thawForSuite(t, p, invocation{}, "off").data
	onMount, beside := filepath.Join(data, "base/5/tap"), tempDir(t)
	for _, d := range []string{onMount, beside} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
		ownedByPostgres(t, d)
	}
	tests, _ := filepath.Glob(filepath.Join(dir, "src/test/recovery/t/*.pl"))
	if len(tests) < 30 {
		t.Fatalf("%d recovery tests are in %s", len(tests), dir)
	}
	for _, test := range tests {
		t.Run(filepath.Base(test), func(t *testing.T) {
			out, err := p.prove(t, dir, test, onMount)
			if err == nil {
				return
			}
			if nativeOut, nativeErr := p.prove(t, dir, test, beside); nativeErr != nil {
				t.Logf("it fails natively as well: %v\n%s", nativeErr, tail(nativeOut))
				return
			}
			t.Errorf("%v, but natively it succeeds\n%s", err, tail(out))
		})
	}
	if st := overlayStatus(t, invocation{}, data); st.State != "hydrating" || !st.Mounted {
		t.Errorf("the suite ran on a copy that is %+v", st)
	}
}

// prove runs a test of src/test/recovery with its clusters below a directory.
func (p installation) prove(t *testing.T, dir, test, room string) (string, error) {
	t.Helper()
	env := []string{
		"PATH=" + p.bin + ":" + os.Getenv("PATH"), "TESTDIR=" + room, "TMPDIR=" + postgresDir(t), "with_openssl=", "PGPORT=" + fmt.Sprint(freePort(t)),
		"PG_REGRESS=" + filepath.Join(p.bin, "../lib/pgxs/src/test/regress/pg_regress"), "REGRESS_SHLIB=" + filepath.Join(dir, "lib/regress.so"),
	}
	return suiteCommand(t, asPostgres, filepath.Join(dir, "src/test/recovery"), env, "prove", "-I", filepath.Join(dir, "src/test/perl"), "-I", ".", test)
}

func tail(text string) string { return text[max(0, len(text)-5000):] }

// suiteThaw is a copy on which a file-system suite runs.
type suiteThaw struct {
	*cluster
	by invocation
}

// suiteFile is a file of the backup for fio to write over, 16 MiB.
func suiteFile(data string, i int) string {
	return filepath.Join(data, fmt.Sprintf("base/5/suite%d", i))
}

const suiteFiles = 8

// thawForSuite thaws a cluster whose first database has some large files more.
func thawForSuite(t *testing.T, p installation, v invocation, hydrate string) suiteThaw {
	t.Helper()
	a := newArchived(t, p, clusterOptions{checksums: true, pgbenchScale: 2})
	noise, err := exec.Command("openssl", "rand", "16777216").Output()
	if err != nil {
		t.Fatal(err)
	}
	for i := range suiteFiles {
		if err := os.WriteFile(suiteFile(a.data, i), noise, 0o600); err != nil {
			t.Fatal(err)
		}
		ownedByPostgres(t, suiteFile(a.data, i))
	}
	a.backup(t)
	a.Stop()
	data := newTarget(t)
	var r copied
	a.copyTo(t, v, "thaw", "latest", data, "--start", "--hydrate", hydrate).ok(t).into(t, &r)
	return suiteThaw{r.server(t, p, data), v}
}
