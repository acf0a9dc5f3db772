//go:build bench

package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestBenchHydration is the part of TestBench that compares hydration with a restore, and a copy that is being hydrated with one that
// was restored: PGTHAW_BENCH_GB=2 make bench ARGS='-run TestBenchHydration'
func TestBenchHydration(t *testing.T) {
	b := newBench(t)
	b.pgthaw("backup", "bench", "--full", "--pg-connection", b.socket(b.c))
	b.hydration()
	fmt.Println(b.table())
}

func (b *bench) hydration() {
	restored, hydrated := &benchSide{b: b, repo: b.repo}, &benchSide{b: b, repo: b.repo}
	for range 3 {
		restored.restore()
		hydrated.hydrate()
	}
	b.row("hydration / restore", timeRatio(hydrated, restored), "<= 1.2")
	b.latency()
	b.whileHydrating()
}

// whileHydrating compares the medians of some turns.
func (b *bench) whileHydrating() {
	var native, lazy []float64
	early := 0
	for range 5 {
		native = append(native, b.onRestored())
		tps, whole := b.onThawed()
		if lazy = append(lazy, tps); whole {
			early++
		}
	}
	figure := fmt.Sprintf("%.0f / %.0f a second = %.2f (%.0f / %.0f)", median(lazy), median(native), median(lazy)/median(native), lazy, native)
	if early > 0 {
		figure += fmt.Sprintf(", %d times whole before the end", early)
	}
	b.row("TPC-B while hydrating / on a restored directory", figure, ">= 0.7")
}

// hydrate thaws, and has the directory made an ordinary one. Laying the tree is part of it, as making the files is of a restore.
func (s *benchSide) hydrate() {
	t := s.b.t
	t.Helper()
	target := filepath.Join(s.b.dir, "hydrated")
	before := s.cpu
	s.pgthaw("thaw", "bench", "latest", "--target", target, "--hydrate", "off")
	laid, usage := s.took[len(s.took)-1], watchProcess(t, overlayStatus(t, invocation{}, target).PID)
	s.pgthaw("overlay", "finish", target)
	finished := s.took[len(s.took)-1]
	s.took = append(s.took[:len(s.took)-2], laid+finished)
	s.cpu += usage()
	t.Logf("hydration: %v of processor time", s.cpu-before)
	if err := os.RemoveAll(target); err != nil {
		t.Fatal(err)
	}
}

// watchProcess follows a process to its end; the function that it returns waits for that, and tells the processor time that was seen last.
func watchProcess(t *testing.T, pid int) (usage func() time.Duration) {
	last := make(chan time.Duration, 1)
	go func() {
		var used time.Duration
		pollEvery(5*time.Millisecond, 10*time.Minute, func() bool {
			used = max(used, statTimes(pid, 2))
			return !alive(pid)
		})
		last <- used
	}()
	return func() time.Duration { t.Helper(); return <-last }
}

// latency reads pages at random that nobody has read yet, while nothing is hydrated and while all is.
func (b *bench) latency() {
	var figures []string
	for _, hydrate := range []string{"off", "auto"} {
		target := filepath.Join(b.dir, "lazy")
		pgthaw(b.t, "--repo", b.repo, "thaw", "bench", "latest", "--target", target, "--hydrate", hydrate).ok(b.t)
		began := overlayStatus(b.t, invocation{}, target).BytesHydrated
		p50, p99 := b.lazyReads(largest(b.t, filepath.Join(target, "base")))
		at := overlayStatus(b.t, invocation{}, target)
		figures = append(figures, fmt.Sprintf("%s: p50 %.3f ms, p99 %.2f ms", hydrate, p50.Seconds()*1000, p99.Seconds()*1000))
		b.t.Logf("%s: %d MB came meanwhile, state %s", hydrate, (at.BytesHydrated-began)>>20, at.State)
		pgthaw(b.t, "overlay", "discard", target).ok(b.t)
	}
	b.row("random 8 KiB of what is not on disk, without and with hydration", strings.Join(figures, "; "), "<= 2 times")
}

// lazyReads leaves out what took no longer than the page cache takes: hydration was there before.
func (b *bench) lazyReads(name string) (p50, p99 time.Duration) {
	b.t.Helper()
	const reads, inCache = 2000, 100 * time.Microsecond
	f, err := os.Open(name)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		b.t.Fatal(err)
	}
	page, random := make([]byte, 8192), rand.New(rand.NewPCG(1, 1))
	var all []time.Duration
	for range reads {
		off, began := random.Int64N(info.Size()/8192)*8192, time.Now()
		if _, err := f.ReadAt(page, off); err != nil {
			b.t.Fatal(err)
		}
		if took := time.Since(began); took > inCache {
			all = append(all, took)
		}
	}
	slices.Sort(all)
	b.t.Logf("%d of %d reads were of what was not on disk", len(all), reads)
	if len(all) == 0 {
		return 0, 0
	}
	return all[len(all)/2], all[len(all)*99/100]
}

// onRestored gives the transactions a second.
func (b *bench) onRestored() float64 {
	c := b.restored()
	defer os.RemoveAll(c.data)
	defer c.StopImmediate()
	return b.tps(c, 10)
}

func (b *bench) onThawed() (tps float64, whole bool) {
	c := b.thawedServer()
	defer discard(b.t, c.data)
	defer c.StopImmediate()
	tps = b.tps(c, 10)
	return tps, overlayStatus(b.t, invocation{}, c.data).State != "hydrating"
}

var pgbenchTPS = regexp.MustCompile(`tps = ([0-9.]+)`)

// tps has pgbench run for some seconds.
func (b *bench) tps(c *cluster, seconds int, args ...string) float64 {
	b.t.Helper()
	report := c.pgbench(append(args, "--client", "8", "--jobs", "2", "--time", strconv.Itoa(seconds), "--no-vacuum")...)
	m := pgbenchTPS.FindStringSubmatch(report)
	if m == nil {
		b.t.Fatalf("pgbench says\n%s", report)
	}
	tps, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		b.t.Fatal(err)
	}
	return tps
}
