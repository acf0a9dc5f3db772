//go:build bench

package integration

import (
	"cmp"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestBench measures the bars of docs/benchmarks.md beside Debian's pgBackRest, on one cluster and in one run, and
// prints the table of that page. PGTHAW_BENCH_GB is the cluster's size, 4 by default.
func TestBench(t *testing.T) {
	b := newBench(t)
	b.fullBackup()
	b.timeToFirstQuery()
	b.bootImage()
	b.fullRestore()
	b.mount()
	b.secondBackup()
	b.encryption()
	b.hydration()
	b.thawed()
	fmt.Println(b.table())
}

// bench is one run: a large and a small cluster, and two repositories.
type bench struct {
	t     *testing.T
	c     *cluster
	small *cluster
	dir   string
	repo  string
	rows  [][3]string // what, figure, bar

}

func newBench(t *testing.T) *bench {
	p := postgresql(t, 15)
	dir := postgresDir(t)
	b := &bench{t: t, dir: dir, repo: filepath.Join(dir, "repo")}
	b.c = newCluster(t, p, clusterOptions{conf: append(slices.Clone(benchConf), "archive_mode = on", "archive_command = '"+strings.Join(b.pgbackrest("archive-push", "%p"), " ")+"'")})
	b.writePgBackRestConf()
	b.runAsPostgres(b.pgbackrest("stanza-create")...)
	fillBench(b.c, benchGB())
	asPostgres.run(t, "repo", "init", b.repo, "--no-encryption").ok(t) // as pgBackRest's is not
	return b
}

var benchConf = []string{"shared_buffers = 256MB", "max_wal_size = 8GB", "fsync = on", "autovacuum = off"}

func benchGB() float64 {
	if gb, err := strconv.ParseFloat(os.Getenv("PGTHAW_BENCH_GB"), 64); err == nil {
		return gb
	}
	return 4
}

// fillBench makes a cluster of about gb gigabytes: half of it pgbench's tables, half rows of text and numbers with
// their indexes, which compress about 3:1 as people's do.
func fillBench(c *cluster, gb float64) {
	c.t.Helper()
	c.pgbench("--initialize", "--quiet", "--scale", strconv.Itoa(int(gb*33)))
	c.SQL(fmt.Sprintf(`CREATE TABLE orders AS SELECT i AS id, md5((i %% 100000)::text) AS customer, md5(i::text) AS token,
		(random() * 1000)::numeric(10,2) AS amount, now() - i * interval '1 second' AS at,
		'{"state": "shipped", "lines": ' || (i %% 17) || ', "note": "left at the door ' || md5((i %% 5000)::text) || '"}' AS doc
		FROM generate_series(1, %d) i`, int(gb*1.85e6)))
	for _, statement := range []string{"CREATE TABLE bystander AS SELECT i, md5(i::text) FROM generate_series(1, 1000000) i", "CREATE INDEX ON orders (id)", "CREATE INDEX ON orders (token)", "VACUUM ANALYZE", "CHECKPOINT"} {
		c.SQL(statement)
	}
}

func (b *bench) writePgBackRestConf() {
	b.t.Helper()
	conf := fmt.Sprintf("[global]\nrepo1-path=%[1]s/pgbackrest\nlog-path=%[1]s\nlock-path=%[1]s/lock\nspool-path=%[1]s\nlog-level-console=warn\nlog-level-file=off\n"+
		"compress-type=zst\ncompress-level=3\nprocess-max=2\nstart-fast=y\n[bench]\npg1-path=%[2]s\npg1-port=%[3]d\npg1-socket-path=%[4]s\npg1-user=postgres\n",
		b.dir, b.c.data, b.c.port, b.c.dir)
	if err := os.WriteFile(filepath.Join(b.dir, "pgbackrest.conf"), []byte(conf), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) pgbackrest(args ...string) []string {
	return append([]string{"pgbackrest", "--config=" + filepath.Join(b.dir, "pgbackrest.conf"), "--stanza=bench"}, args...)
}

// runAsPostgres runs a program to its end and gives the time and the greatest resident set, in MiB.
func (b *bench) runAsPostgres(args ...string) (time.Duration, int64) {
	b.t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	becomePostgres(b.t, cmd)
	cmd.Dir, cmd.Env = "/", environment()
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return time.Since(began), cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss >> 10
}

func (b *bench) pgthaw(args ...string) (time.Duration, int64) {
	b.t.Helper()
	return b.runAsPostgres(append([]string{filepath.Join(scratch, "bin", "pgthaw"), "--repo", b.repo}, args...)...)
}

// socket connects as somebody on the server's host does: by its unix socket.
func (b *bench) socket(c *cluster) string {
	return fmt.Sprintf("host=%s port=%d user=postgres", c.dir, c.port)
}

func (b *bench) row(what, figure, bar string) {
	b.t.Logf("%s: %s (%s)", what, figure, bar)
	b.rows = append(b.rows, [3]string{what, figure, bar})
}

func (b *bench) table() string {
	var s strings.Builder
	fmt.Fprintf(&s, "| what | measured | bar |\n|---|---|---|\n")
	for _, r := range b.rows {
		fmt.Fprintf(&s, "| %s | %s | %s |\n", r[0], r[1], r[2])
	}
	return s.String()
}

// repeat collects what f gives.
func repeat[T any](n int, f func() T) (all []T) {
	for range n {
		all = append(all, f())
	}
	return all
}

func median[T cmp.Ordered](all []T) T { return slices.Sorted(slices.Values(all))[len(all)/2] }

// inSeconds compares the medians.
func inSeconds(ours, theirs []time.Duration) string {
	x, y := median(ours).Seconds(), median(theirs).Seconds()
	return fmt.Sprintf("%.1f s / %.1f s = %.2f", x, y, x/y)
}

// fullBackup takes turns, so that a slow minute of the machine hits both.
func (b *bench) fullBackup() {
	var ours, theirs []time.Duration
	var peak int64
	for range 3 {
		theirs = append(theirs, first(b.runAsPostgres(b.pgbackrest("--type=full", "backup")...)))
		took, rss := b.pgthaw("backup", "bench", "--full", "--pg-connection", b.socket(b.c))
		ours, peak = append(ours, took), max(peak, rss)
	}
	size := b.c.SQL("SELECT sum(pg_database_size(oid)) FROM pg_database")
	n, _ := strconv.ParseInt(size, 10, 64)
	b.row("cluster", fmt.Sprintf("%.2f GB", float64(n)/1e9), "")
	b.row("full backup, pgthaw / pgBackRest (zst 3, 2 processes)", inSeconds(ours, theirs), "<= 1.0")
	b.row("backup, peak memory", fmt.Sprintf("%d MiB", peak), "< 512 MiB")
	stored, pgbackrest := b.repositorySizes()
	b.row("stored, pgthaw / pgBackRest", fmt.Sprintf("%.0f MB / %.0f MB = %.2f", stored/1e6, pgbackrest/1e6, stored/pgbackrest), "<= 1.0")
}

func first(d time.Duration, _ int64) time.Duration { return d }

// repositorySizes compares one full backup each, without WAL.
func (b *bench) repositorySizes() (ours, theirs float64) {
	b.t.Helper()
	var list []struct {
		StoredBytes int64 `json:"stored_bytes"`
	}
	pgthaw(b.t, "--repo", b.repo, "list", "bench", "--json").ok(b.t).into(b.t, &list)
	latest, err := filepath.EvalSymlinks(filepath.Join(b.dir, "pgbackrest/backup/bench/latest"))
	if err != nil {
		b.t.Fatal(err)
	}
	return float64(list[len(list)-1].StoredBytes), float64(fileBytes(b.t, latest))
}

// timeToFirstQuery thaws both clusters, and has pgBackRest restore and PostgreSQL start on the large one.
func (b *bench) timeToFirstQuery() {
	b.small = newCluster(b.t, b.c.installation, clusterOptions{conf: benchConf})
	fillBench(b.small, 0.4)
	b.pgthaw("backup", "small", "--pg-connection", b.socket(b.small))
	large := median(repeat(5, func() time.Duration { return b.thaw("bench") }))
	small := median(repeat(5, func() time.Duration { return b.thaw("small") }))
	b.row("time to first query, thawed", fmt.Sprintf("%.2f s", large.Seconds()), "<= 1.0 s")
	b.row("the same, of a cluster of a tenth", fmt.Sprintf("%.2f s, ratio %.2f", small.Seconds(), large.Seconds()/small.Seconds()), "<= 1.3")
	theirs := median(repeat(3, b.pgbackrestRestore))
	b.row("pgBackRest restore, start, first query", fmt.Sprintf("%.1f s, ratio %.0f", theirs.Seconds(), theirs.Seconds()/large.Seconds()), ">= 20")
}

// thaw is the time to the first query of a copy that is discarded then.
func (b *bench) thaw(cluster string, args ...string) time.Duration {
	b.t.Helper()
	target := newTarget(b.t)
	var done struct {
		ReadyMS int64 `json:"ready_ms"`
	}
	args = append([]string{"--repo", b.repo, "--json", "thaw", cluster, "latest", "--target", target, "--start", "--hydrate", "off", "--bindir", b.c.bin}, args...)
	asPostgres.run(b.t, args...).ok(b.t).into(b.t, &done)
	b.runAsPostgres(b.c.tool(b.t, "pg_ctl"), "stop", "-m", "immediate", "-D", target)
	asPostgres.run(b.t, "--repo", b.repo, "overlay", "discard", target).ok(b.t)
	return time.Duration(done.ReadyMS) * time.Millisecond
}

// restored starts a server on a directory that was restored.
func (b *bench) restored() *cluster {
	b.t.Helper()
	target := newTarget(b.t)
	b.pgthaw("restore", "bench", "latest", "--target", target)
	c := adopt(b.t, b.c.installation, target)
	c.waitRecovered()
	return c
}

// thawedServer starts a server on a copy, as root does.
func (b *bench) thawedServer(args ...string) *cluster {
	b.t.Helper()
	target := newTarget(b.t)
	b.t.Cleanup(func() { discard(b.t, target) })
	var r copied
	args = append([]string{"--repo", b.repo, "--json", "thaw", "bench", "latest", "--target", target, "--start", "--bindir", b.c.bin}, args...)
	pgthaw(b.t, args...).ok(b.t).into(b.t, &r)
	c := r.server(b.t, b.c.installation, target)
	c.waitRecovered()
	return c
}

func (b *bench) pgbackrestRestore() time.Duration {
	b.t.Helper()
	target := filepath.Join(b.dir, "pgbackrest-restored")
	defer os.RemoveAll(target)
	began := time.Now()
	b.runAsPostgres(b.pgbackrest("--pg1-path="+target, "--archive-mode=off", "restore")...)
	c := adopt(b.t, b.c.installation, target)
	took := time.Since(began)
	c.StopImmediate()
	return took
}

func (b *bench) fullRestore() {
	var ours, theirs []time.Duration
	var peak int64
	for range 3 {
		target := filepath.Join(b.dir, "restored")
		took, rss := b.pgthaw("restore", "bench", "latest", "--target", target)
		ours, peak = append(ours, took), max(peak, rss)
		os.RemoveAll(target)
		theirs = append(theirs, first(b.runAsPostgres(b.pgbackrest("--pg1-path="+target, "--archive-mode=off", "restore")...)))
		os.RemoveAll(target)
	}
	b.row("full restore, pgthaw / pgBackRest", inSeconds(ours, theirs), "<= 1.0")
	b.row("restore, peak memory", fmt.Sprintf("%d MiB", peak), "< 512 MiB")
}

// mount reads the largest relation through the browser.
func (b *bench) mount() {
	dir := filepath.Join(b.dir, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	pgthaw(b.t, "--repo", b.repo, "mount", dir).ok(b.t)
	file := largest(b.t, filepath.Join(dir, "bench", "latest", "pgdata", "base"))
	began := time.Now()
	n := readAll(b.t, file)
	took := time.Since(began)
	b.row("mount, sequential", fmt.Sprintf("%.0f MB/s", float64(n)/1e6/took.Seconds()), ">= 600 MB/s")
	p50 := randomReads(b.t, file, 3000)
	b.row("mount, random 8 KiB, p50", fmt.Sprintf("%.3f ms", p50.Seconds()*1000), "<= 0.4 ms")
	for pid := range processesNaming(dir) {
		b.row("mount, peak memory", fmt.Sprintf("%d MiB", peakMemory(b.t, pid)>>20), "< 512 MiB")
	}
	pgthaw(b.t, "umount", dir).ok(b.t)
}

func largest(t *testing.T, dir string) (path string) {
	t.Helper()
	var size int64
	err := filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() && info.Size() > size {
			path, size = name, info.Size()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func readAll(t *testing.T, name string) int64 {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, f, make([]byte, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// randomReads reads pages of another gigabyte than readAll left in the kernel's cache: the cache is dropped first.
func randomReads(t *testing.T, name string, n int) time.Duration {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := dropCache(f); err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, 8192)
	random := rand.New(rand.NewPCG(1, 1))
	return median(repeat(n, func() time.Duration {
		off := random.Int64N(info.Size()/8192) * 8192
		began := time.Now()
		if _, err := f.ReadAt(page, off); err != nil {
			t.Fatal(err)
		}
		return time.Since(began)
	}))
}

// secondBackup rewrites about 5 % of the pages at random and compares what the next backup stores with those pages
// alone, compressed.
func (b *bench) secondBackup() {
	b.pgthaw("backup", "bench", "--full", "--pg-connection", b.socket(b.c))
	before := filepath.Join(b.dir, "before")
	b.pgthaw("restore", "bench", "latest", "--target", before)
	pages, err := strconv.Atoi(b.c.SQL("SELECT sum(relpages) / 20 FROM pg_class WHERE relname IN ('pgbench_accounts', 'orders')"))
	if err != nil {
		b.t.Fatal(err)
	}
	b.c.SQL(fmt.Sprintf("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid IN (SELECT 1 + (random() * (SELECT max(aid) - 1 FROM pgbench_accounts))::int FROM generate_series(1, %d))", pages/2))
	b.c.SQL(fmt.Sprintf("UPDATE orders SET amount = amount + 1 WHERE id IN (SELECT 1 + (random() * (SELECT max(id) - 1 FROM orders))::int FROM generate_series(1, %d))", pages/2))
	b.c.SQL("CHECKPOINT")
	took, _ := b.pgthaw("backup", "bench", "--pg-connection", b.socket(b.c))
	after := filepath.Join(b.dir, "after")
	b.pgthaw("restore", "bench", "latest", "--target", after)
	stored, _ := b.repositorySizes()
	changed, total, compressed := changedPages(b.t, before, after)
	b.row("second backup", fmt.Sprintf("%.1f s, %.1f %% of pages changed", took.Seconds(), 100*float64(changed)/float64(total)), "")
	b.row("its stored bytes / changed pages compressed", fmt.Sprintf("%.1f MB / %.1f MB = %.2f", stored/1e6, float64(compressed)/1e6, stored/float64(compressed)), "<= 1.3")
}
