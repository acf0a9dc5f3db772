//go:build bench

package integration

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestBenchThawed is the part of TestBench that compares servers on copies in all their states with one on a directory that was
// restored: PGTHAW_BENCH_GB=2 make bench ARGS='-run TestBenchThawed'
func TestBenchThawed(t *testing.T) {
	b := newBench(t)
	b.pgthaw("backup", "bench", "--full", "--pg-connection", b.socket(b.c))
	b.thawed()
	fmt.Println(b.table())
}

// thawed has both servers run all the while, and asks them in turns: whatever else the machine does hits both.
func (b *bench) thawed() {
	b.coldReads()
	p := benchPair{b: b, native: b.restored()}
	defer p.native.StopImmediate()
	p.native.SQL("COPY (SELECT * FROM orders WHERE id <= 300000) TO '" + p.rows() + "'")
	p.held()
	p.bound()
}

// benchPair is two servers on copies of one backup.
type benchPair struct {
	b              *bench
	native, thawed *cluster
}

// rows is a file with what is copied into a table.
func (p *benchPair) rows() string { return filepath.Join(p.b.c.dir, "rows") }

// held keeps base in the mount: somebody has had a file of it open since before it was whole, which no server uses.
func (p *benchPair) held() {
	end := p.thaw(func(target string) {
		f, err := os.Open(filepath.Join(target, p.b.c.SQL("SELECT pg_relation_filepath('bystander')")))
		if err != nil {
			p.b.t.Fatal(err)
		}
		p.b.t.Cleanup(func() { f.Close() })
	})
	defer end()
	if n := p.look(); n.has(filepath.Join(p.thawed.data, "base")) || !n.has(filepath.Join(p.thawed.data, "pg_wal")) {
		p.b.t.Fatalf("base was to be held, and pg_wal not: %+v", n)
	}
	p.transactions("hydrated, base in the mount", 0.97, 0.9)
}

// bound has all directories leave the mount, under the server.
func (p *benchPair) bound() {
	end := p.thaw(func(string) {})
	defer end()
	waitFor(p.b.t, startLimit, "base leaves the mount", func() bool { return p.look().has(filepath.Join(p.thawed.data, "base")) })
	p.transactions("hydrated and bound", 0.97, 0.97)
	p.inTurns("hydrated and bound, COPY", 0.97, func(c *cluster) float64 {
		c.SQL("CREATE TABLE copied (LIKE orders)")
		defer c.SQL("DROP TABLE copied")
		return 1 / seconds(func() { c.SQL("COPY copied FROM '" + p.rows() + "'") })
	})
	p.inTurns("hydrated and bound, CREATE INDEX", 0.97, func(c *cluster) float64 {
		defer c.SQL("DROP INDEX again")
		return 1 / seconds(func() { c.SQL("CREATE INDEX again ON orders (customer)") })
	})
}

// thaw starts a server on a copy, and waits until that is hydrated and the server has closed all files that it had open before.
func (p *benchPair) thaw(first func(target string)) (end func()) {
	p.thawed = p.b.thawedServer()
	first(p.thawed.data)
	waitFor(p.b.t, 10*time.Minute, "hydration", func() bool { return p.look().State == "hydrated" })
	p.thawed.SQL("CREATE DATABASE barrier")
	p.thawed.SQL("DROP DATABASE barrier")
	return p.thawed.StopImmediate
}

func (p *benchPair) look() (n native) {
	pgthaw(p.b.t, "--json", "overlay", "status", p.thawed.data).ok(p.b.t).into(p.b.t, &n)
	return n
}

// transactions begins with both in memory: as the server reads them, for what is read through the mount lies elsewhere than what is
// read past it.
func (p *benchPair) transactions(state string, selectOnly, tpcB float64) {
	p.b.remember(p.native.data)
	p.b.remember(p.thawed.data)
	p.inTurns(state+", select-only", selectOnly, func(c *cluster) float64 { return p.b.tps(c, 3, "--select-only") })
	p.inTurns(state+", TPC-B", tpcB, func(c *cluster) float64 { return p.b.tps(c, 3) })
}

// inTurns compares how fast both servers are, by the medians of some turns; each begins with the other, and they are short, for the
// machine's pace changes within a minute. A turn before does not count.
// What a transaction, or another unit, takes of the processors is compared, too: on a machine with a load that is the surer figure.
func (p *benchPair) inTurns(what string, bar float64, speed func(*cluster) float64) {
	p.b.t.Helper()
	daemon := overlayStatus(p.b.t, invocation{}, p.thawed.data).PID
	both, rates, costs := []*cluster{p.native, p.thawed}, map[*cluster][]float64{}, map[*cluster][]float64{}
	for range 10 {
		for _, c := range both {
			c.SQL("CHECKPOINT")
			began, before := time.Now(), p.processorTime(c, daemon)
			rate := speed(c)
			used := p.processorTime(c, daemon) - before
			rates[c], costs[c] = append(rates[c], rate), append(costs[c], used.Seconds()*1000/(rate*time.Since(began).Seconds()))
		}
		slices.Reverse(both)
	}
	thawed, native := median(rates[p.thawed][1:]), median(rates[p.native][1:])
	cost, nativeCost := median(costs[p.thawed][1:]), median(costs[p.native][1:])
	p.b.row(what+", thawed / restored", fmt.Sprintf("%.3g / %.3g a second = %.2f; processor time of each %.3g ms / %.3g ms = %.2f",
		thawed, native, thawed/native, cost, nativeCost, cost/nativeCost), fmt.Sprintf(">= %v", bar))
}

// processorTime is what a server has used, and for a copy what its daemon has.
func (p *benchPair) processorTime(c *cluster, daemon int) (used time.Duration) {
	pid := c.pid()
	used = statTimes(pid, 4)
	for _, child := range childrenOf(pid) {
		used += statTimes(child, 2)
	}
	if c == p.thawed {
		used += statTimes(daemon, 2)
	}
	return used
}

func seconds(f func()) float64 {
	began := time.Now()
	f()
	return time.Since(began).Seconds()
}

// coldReads compares copies of which nothing is hydrated with directories that were restored, of which nothing is in memory. The scan's
// bar is compared with a scan of what is in memory, too.
func (b *bench) coldReads() {
	var native, thawed, scanned, scannedLazily, warm []float64
	scan := func(c *cluster) float64 { return seconds(func() { c.SQL("SELECT count(*) FROM orders") }) }
	for range 3 {
		c, end := b.cold()
		native = append(native, b.tps(c, 5, "--select-only"))
		scanned = append(scanned, scan(c))
		warm = append(warm, scan(c))
		end()
		c, end = b.lazy()
		thawed = append(thawed, b.tps(c, 5, "--select-only"))
		scannedLazily = append(scannedLazily, scan(c))
		end()
	}
	t, n := median(thawed), median(native)
	b.row("nothing hydrated, select-only, thawed / restored and cold", fmt.Sprintf("%.0f / %.0f a second = %.2f", t, n, t/n), ">= 0.3")
	s, cold, inMemory := median(scannedLazily), median(scanned), median(warm)
	b.row("nothing hydrated, sequential scan, thawed / restored, cold and in memory",
		fmt.Sprintf("%.2f s / %.2f s = %.1f, / %.2f s = %.1f", s, cold, s/cold, inMemory, s/inMemory), "<= 2.5 times")
}

// cold starts a server on a directory that was restored and is not in memory.
func (b *bench) cold() (c *cluster, end func()) {
	c = b.restored()
	c.Stop()
	b.forget(c.data)
	c.Start()
	return c, func() { c.StopImmediate(); os.RemoveAll(c.data) }
}

// forget drops the files of a directory from memory.
func (b *bench) forget(dir string) { b.eachFile(dir, dropCache) }

// remember reads the files of a directory into memory.
func (b *bench) remember(dir string) {
	b.eachFile(dir, func(f *os.File) error {
		_, err := io.Copy(io.Discard, f)
		return err
	})
}

// eachFile passes over files that go away meanwhile.
func (b *bench) eachFile(dir string, do func(*os.File) error) {
	b.t.Helper()
	err := filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return ignoreGone(err)
		}
		f, err := os.Open(name)
		if err != nil {
			return ignoreGone(err)
		}
		defer f.Close()
		return do(f)
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

func ignoreGone(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// lazy starts a server on a copy that is not hydrated.
func (b *bench) lazy() (c *cluster, end func()) {
	c = b.thawedServer("--hydrate", "off")
	return c, func() { c.StopImmediate(); discard(b.t, c.data) }
}
