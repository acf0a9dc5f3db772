package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// campaign is a series of cycles, each of which follows from the seed and its number, though not its races. In its directory
// lie "state", with the seed, the number of cycles that have passed and what they hit, and "log", with a line for each kill.
// A campaign that is run again goes on; a cycle that failed, or was interrupted, is repeated.
type campaign struct {
	t   *testing.T
	dir string // "": nothing is kept

	Seed   uint64
	Cycles int
	Kills  map[string]*tally // by work and victim

	sources map[int]*crashSource // by major
	before  map[string]tally     // this run's
}

// tally is how many kills were aimed at something, and how many hit it while it was under way.
type tally struct{ Tried, Hit int }

// kill is one kill.
type kill struct {
	major        int
	work, victim string
	seen         string // what the server, or the kernel, said of the work just before; "": it was not hit
	commits      int    // acknowledged to the ledger so far
}

func openCampaign(t *testing.T, dir string) *campaign {
	t.Helper()
	seed := environmentNumber(t, "PGTHAW_SEED", int(time.Now().UnixNano()&0xffffffff))
	c := &campaign{t: t, dir: dir, Seed: uint64(seed), Kills: map[string]*tally{}, sources: map[int]*crashSource{}, before: map[string]tally{}}
	if dir != "" {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(dir, "state"))
		if err == nil {
			err = json.Unmarshal(text, c)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	for name, n := range c.Kills {
		c.before[name] = *n
	}
	t.Logf("PGTHAW_SEED=%d, from cycle %d", c.Seed, c.Cycles)
	return c
}

// termination ends with SIGTERM: a campaign that is kept then stops after the cycle that is under way, and leaves nothing behind.
func (c *campaign) termination() context.Context {
	if c.dir == "" {
		return c.t.Context()
	}
	ctx, cancel := signal.NotifyContext(c.t.Context(), syscall.SIGTERM)
	c.t.Cleanup(cancel)
	return ctx
}

func (c *campaign) save() {
	c.t.Helper()
	if c.dir == "" {
		return
	}
	text, err := json.MarshalIndent(c, "", " ")
	path := filepath.Join(c.dir, "state")
	if err == nil {
		err = os.WriteFile(path+".new", append(text, '\n'), 0o644)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// note counts and logs a kill.
func (c *campaign) note(t *testing.T, k kill) {
	t.Helper()
	name := k.work + ", " + k.victim
	if c.Kills[name] == nil {
		c.Kills[name] = &tally{}
	}
	c.Kills[name].Tried++
	seen := "missed"
	if k.seen != "" {
		c.Kills[name].Hit++
		seen = "hit: " + k.seen
	}
	line := fmt.Sprintf("cycle %d, PostgreSQL %d, %d commits: %s: %s", c.Cycles, k.major, k.commits, name, seen)
	t.Log(line)
	if c.dir == "" {
		return
	}
	f, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err == nil {
		_, err = fmt.Fprintln(f, time.Now().UTC().Format(time.RFC3339), line)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Error(err)
	}
}

// worksPerCycle is how many kinds of work each life of a copy is killed in.
const worksPerCycle = 3

// choose gives the work of a cycle: all kinds get their turn, in an order that is shuffled again and again. What needs a copy
// that is not whole yet comes first.
func (c *campaign) choose(cycle int) (chosen []*work) {
	for i := cycle * worksPerCycle; i < (cycle+1)*worksPerCycle; i++ {
		turn, at := i/len(works), i%len(works)
		order := rand.New(rand.NewPCG(c.Seed, uint64(turn)<<32)).Perm(len(works))
		chosen = append(chosen, works[order[at]])
	}
	slices.SortStableFunc(chosen, func(a, b *work) int { return b.early() - a.early() })
	return chosen
}

// source makes the cluster of a major when it is first wanted.
func (c *campaign) source(p installation) *crashSource {
	if c.sources[p.major] == nil {
		c.sources[p.major] = newCrashSource(c.t, p)
	}
	return c.sources[p.major]
}

// judge fails a campaign that would have passed whatever the product does: whose kills came when nothing was under way.
func (c *campaign) judge() {
	c.t.Helper()
	byWork, now := map[string]tally{}, tally{}
	for _, name := range slices.Sorted(maps.Keys(c.Kills)) {
		n, work := *c.Kills[name], cutVictim(name)
		c.t.Logf("%-40s %5d kills, %5d hit", name, n.Tried, n.Hit)
		byWork[work] = tally{byWork[work].Tried + n.Tried, byWork[work].Hit + n.Hit}
		now = tally{now.Tried + n.Tried - c.before[name].Tried, now.Hit + n.Hit - c.before[name].Hit}
	}
	for work, n := range byWork {
		if n.Tried >= 10 && n.Hit*5 < n.Tried {
			c.t.Errorf("%s: of %d kills only %d hit", work, n.Tried, n.Hit)
		}
	}
	if now.Hit*2 < now.Tried || now.Hit == 0 {
		c.t.Errorf("of %d kills only %d hit what they were aimed at", now.Tried, now.Hit)
	}
	c.t.Logf("%d cycles; in this run %d kills, of which %d hit", c.Cycles, now.Tried, now.Hit)
}

func cutVictim(name string) string {
	for i := range name {
		if name[i] == ',' {
			return name[:i]
		}
	}
	return name
}
