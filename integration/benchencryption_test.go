//go:build bench

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestBenchEncryption is the part of TestBench that measures what encryption costs:
// PGTHAW_BENCH_GB=1 make bench ARGS='-run TestBenchEncryption'
func TestBenchEncryption(t *testing.T) {
	b := newBench(t)
	b.encryption()
	fmt.Println(b.table())
}

// benchSide is one of two repositories of the same cluster.
type benchSide struct {
	b    *bench
	repo string
	init []string // flags of repo init
	key  []string // flags of every other command
	took []time.Duration
	cpu  time.Duration // of pgthaw, user and system, of all runs
}

// encryption backs up and restores with and without it in turns, each time beginning with the other, so that a slow minute of the
// machine hits both. Each backup goes into a new repository.
func (b *bench) encryption() {
	key := []string{"--key-file", filepath.Join(b.dir, "key")}
	plain := &benchSide{b: b, repo: filepath.Join(b.dir, "plain"), init: []string{"--no-encryption"}}
	sealed := &benchSide{b: b, repo: filepath.Join(b.dir, "encrypted"), init: key, key: key}
	sides := []*benchSide{plain, sealed}
	b.inTurns(sides, (*benchSide).backup)
	b.row("backup, speed with encryption / without", timeRatio(plain, sealed), ">= 0.9")
	b.inTurns(sides, (*benchSide).restore)
	b.row("restore, speed with encryption / without", timeRatio(plain, sealed), "")
	var p50 []time.Duration
	for _, s := range sides {
		p50 = append(p50, s.randomReads())
	}
	b.row("mount, random 8 KiB, p50 without / with encryption", fmt.Sprintf("%.3f ms / %.3f ms", p50[0].Seconds()*1000, p50[1].Seconds()*1000), "")
	for _, s := range sides {
		if err := os.RemoveAll(s.repo); err != nil {
			b.t.Fatal(err)
		}
	}
}

// inTurns runs f of both sides five times.
func (b *bench) inTurns(sides []*benchSide, f func(*benchSide)) {
	for _, s := range sides {
		s.took, s.cpu = nil, 0
	}
	for range 5 {
		for _, s := range sides {
			f(s)
		}
		slices.Reverse(sides)
	}
	slices.Reverse(sides)
}

// timeRatio is that of the medians, beside that of the processor time of one run.
func timeRatio(a, b *benchSide) string {
	x, y := a.cpu.Seconds()/float64(len(a.took)), b.cpu.Seconds()/float64(len(b.took))
	return inSeconds(a.took, b.took) + fmt.Sprintf("; processor time %.2f s / %.2f s = %.2f", x, y, x/y)
}

func (s *benchSide) backup() {
	s.b.t.Helper()
	if err := os.RemoveAll(s.repo); err != nil {
		s.b.t.Fatal(err)
	}
	asPostgres.run(s.b.t, append([]string{"repo", "init", s.repo}, s.init...)...).ok(s.b.t)
	s.pgthaw("backup", "bench", "--full", "--pg-connection", s.b.socket(s.b.c))
}

func (s *benchSide) restore() {
	s.b.t.Helper()
	target := filepath.Join(s.b.dir, "restored")
	s.pgthaw("restore", "bench", "latest", "--target", target)
	if err := os.RemoveAll(target); err != nil {
		s.b.t.Fatal(err)
	}
}

// pgthaw runs it to its end and enters what that took.
func (s *benchSide) pgthaw(args ...string) {
	s.b.t.Helper()
	cmd := exec.Command(filepath.Join(scratch, "bin", "pgthaw"), slices.Concat([]string{"--repo", s.repo}, s.key, args)...)
	becomePostgres(s.b.t, cmd)
	cmd.Dir, cmd.Env = "/", environment(stateHome(s.b.t, "postgres"))
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		s.b.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	s.took = append(s.took, time.Since(began))
	s.cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
}

func (s *benchSide) randomReads() time.Duration {
	s.b.t.Helper()
	dir := tempDir(s.b.t)
	pgthaw(s.b.t, append(append([]string{"--repo", s.repo}, s.key...), "mount", dir)...).ok(s.b.t)
	defer func() { pgthaw(s.b.t, "umount", dir).ok(s.b.t) }()
	return randomReads(s.b.t, largest(s.b.t, filepath.Join(dir, "bench", "latest", "pgdata", "base")), 3000)
}
