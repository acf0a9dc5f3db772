package repo

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgthaw/repo/pg"
)

var retentionNow = time.Date(2026, 11, 21, 14, 0, 0, 0, time.FixedZone("CET", 3600))

const day = 24 * time.Hour

// ended makes a backup that ended so long before retentionNow.
func ended(before time.Duration) *Manifest {
	at := retentionNow.Add(-before).UTC()
	return &Manifest{ID: newBackupID(at.Add(-time.Minute), [2]byte{}), Cluster: "main", Timeline: 1, StartedAt: at.Add(-time.Minute), StoppedAt: at}
}

func notHeld(string) (string, bool) { return "", false }

// keptDays writes decisions as one word each, oldest first: how many days ago the backup ended, "alone" if it is, "-" if it goes.
func keptDays(all []Decision) string {
	var words []string
	for _, d := range all {
		word := fmt.Sprint(int(retentionNow.Sub(d.Backup.StoppedAt).Round(time.Hour) / day))
		switch {
		case !d.Keep:
			word = "-"
		case d.Standalone:
			word += "alone"
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

func TestPolicy(t *testing.T) {
	var daily []*Manifest
	for i := range 9 {
		daily = append(daily, ended(time.Duration(8-i)*day+time.Hour))
	}
	held := func(id string) (string, bool) { return "migration, until 2027-01-01 00:00", id == daily[1].ID }
	for _, c := range []struct {
		name string
		p    Policy
		held func(string) (string, bool)
		want string
	}{
		{"no rule", Policy{}, notHeld, "8 7 6 5 4 3 2 1 0"},
		{"last", Policy{Last: 3}, notHeld, "- - - - - - 2 1 0"},
		{"last of more than there are", Policy{Last: 30}, notHeld, "8 7 6 5 4 3 2 1 0"},
		{"within", Policy{Within: 2*day + 2*time.Hour}, notHeld, "- - - - - - 2 1 0"},
		{"within nothing", Policy{Within: time.Minute}, notHeld, "- - - - - - - - 0"},
		{"weekly", Policy{Weekly: 2}, notHeld, "- - 6 - - - - - 0"}, // the 15th was a Sunday
		{"monthly", Policy{Monthly: 9}, notHeld, "- - - - - - - - 0"},
		{"window", Policy{Window: 2 * day}, notHeld, "- - - - - - 2 1 0"},
		{"window whose beginning is in a backup", Policy{Window: 2*day + time.Hour}, notHeld, "- - - - - - 2 1 0"},
		{"window and weekly", Policy{Window: 2 * day, Weekly: 2}, notHeld, "- - 6alone - - - 2 1 0"},
		{"held", Policy{Last: 1}, held, "- 7 - - - - - - 0"},
		{"held before a window", Policy{Window: time.Hour}, held, "- 7alone - - - - - - 0"},
		{"window longer than there are backups", Policy{Window: 90 * day}, notHeld, "8 7 6 5 4 3 2 1 0"},
	} {
		if got := keptDays(c.p.Decide(daily, nil, c.held, retentionNow)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestPolicyReasons(t *testing.T) {
	all := []*Manifest{ended(400 * day), ended(20 * day), ended(10 * day), ended(2 * time.Hour), ended(time.Hour)}
	held := func(id string) (string, bool) { return "audit", id == all[0].ID }
	p := Policy{Last: 1, Daily: 1, Weekly: 2, Yearly: 1, Window: 14 * day, Within: 3 * time.Hour}
	var got []string
	for _, d := range p.Decide(all, nil, held, retentionNow) {
		got = append(got, strings.Join(d.Reasons, "; "))
	}
	want := []string{
		"held: audit",
		"needed for any point since 2026-11-07 14:00",
		"ended since 2026-11-07 14:00; newest of the week 2026-W46",
		"ended since 2026-11-07 14:00; ended since 2026-11-21 11:00",
		"ended since 2026-11-07 14:00; the newest; one of the last 1; ended since 2026-11-21 11:00; newest of the day 2026-11-21; " +
			"newest of the week 2026-W47; newest of the year 2026",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A period begins where it does on the clock on the wall.
func TestPolicyZone(t *testing.T) {
	// 00:30 on the 20th and 23:50 on the 19th in the zone of now; both the 19th in UTC.
	all := []*Manifest{ended(38*time.Hour + 10*time.Minute), ended(37*time.Hour + 30*time.Minute), ended(time.Hour)}
	if got := keptDays(Policy{Daily: 3}.Decide(all, nil, notHeld, retentionNow)); strings.Contains(got, "-") {
		t.Errorf("%s: three days", got)
	}
	if got := keptDays(Policy{Daily: 3}.Decide(all, nil, notHeld, retentionNow.UTC())); !strings.HasPrefix(got, "- ") {
		t.Errorf("%s: two days", got)
	}
}

// A backup from a clock that is ahead is kept, and takes no other's place.
func TestPolicyFuture(t *testing.T) {
	all := []*Manifest{ended(3 * day), ended(2 * day), ended(day), ended(-400 * day), ended(-500 * day)}
	for _, p := range []Policy{{Last: 2}, {Daily: 2}, {Yearly: 1, Last: 2}, {Window: 36 * time.Hour}} {
		if got, want := keptDays(p.Decide(all, nil, notHeld, retentionNow)), "- 2 1 -400 -500"; got != want {
			t.Errorf("%+v: %s, want %s", p, got, want)
		}
	}
}

// The server's clock was put back: the newest by time is another than the one that is called latest. Both are kept.
func TestPolicyClockPutBack(t *testing.T) {
	byTime, byName := ended(day), ended(2*day)
	byName.ID = newBackupID(retentionNow, [2]byte{})
	if got := keptDays(Policy{Last: 1}.Decide([]*Manifest{ended(3 * day), byTime, byName}, nil, notHeld, retentionNow)); got != "- 2 1" {
		t.Errorf("got %s", got)
	}
}

// on puts a backup on a timeline, its end at an LSN.
func (m *Manifest) on(tli pg.Timeline, end pg.LSN) *Manifest {
	m.Timeline, m.StartLSN, m.StopLSN = tli, end-10, end
	m.ID = m.ID[:len(m.ID)-4] + fmt.Sprintf("%04x", tli)
	return m
}

func timesOf(last map[pg.Timeline]time.Time, histories map[pg.Timeline][]pg.HistoryEntry) *walTimes {
	w := &walTimes{newTimelines(1 << 20), last}
	w.histories = histories
	return w
}

// Somebody promotes a copy, which archives and is backed up, and then the original goes on: the window is kept on both.
func TestPolicyWindowOfTwoTimelines(t *testing.T) {
	all := []*Manifest{ended(9*day).on(1, 100), ended(8*day).on(1, 200), ended(6*day).on(2, 300), ended(5*day).on(2, 310), ended(day).on(1, 900)}
	fork := map[pg.Timeline][]pg.HistoryEntry{2: {{Timeline: 1, Switch: 250}}}
	window := Policy{Window: 2 * day}
	for _, c := range []struct {
		name      string
		last      time.Time // commit on timeline 2
		histories map[pg.Timeline][]pg.HistoryEntry
		want      string
	}{
		{"both alive", retentionNow, fork, "- 8 - 5 1"},
		{"not known", time.Time{}, fork, "- 8 - 5 1"},
		{"the second ended before", retentionNow.Add(-5 * day), fork, "- 8 - 5 1"},
		{"history lost", retentionNow, nil, "- 8 - 5 1"},
	} {
		times := timesOf(map[pg.Timeline]time.Time{1: retentionNow, 2: c.last}, c.histories)
		if got := keptDays(window.Decide(all, times, notHeld, retentionNow)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}

	// The other way round: after a failover the old timeline needs nothing once it has ended before the window.
	after := []*Manifest{ended(9*day).on(1, 100), ended(6*day).on(2, 300), ended(5*day).on(2, 310), ended(day).on(2, 900)}
	for last, want := range map[time.Duration]string{day: "9 - 5 1", 7 * day: "- - 5 1"} {
		times := timesOf(map[pg.Timeline]time.Time{1: retentionNow.Add(-last), 2: retentionNow}, fork)
		if got := keptDays(window.Decide(after, times, notHeld, retentionNow)); got != want {
			t.Errorf("the old primary ended %s ago: %s, want %s", last, got, want)
		}
	}
}

// randomPolicy makes a policy, and one that is more permissive.
func randomPolicy(r *rand.Rand) (p, more Policy) {
	n := func(most int) int { return max(0, r.IntN(2*most)-most) }
	p = Policy{n(6), time.Duration(n(20)) * day, n(8), n(6), n(6), n(3), time.Duration(n(25)) * day}
	more = Policy{p.Last + n(3), p.Within + time.Duration(n(5))*day, p.Daily + n(3), p.Weekly + n(3), p.Monthly + n(2), p.Yearly + n(2),
		p.Window + time.Duration(n(9))*day}
	return p, more
}

// randomHistory makes backups on a tree of timelines. Some clocks are wrong, if that is asked for.
func randomHistory(r *rand.Rand, skewed bool) ([]*Manifest, *walTimes) {
	w := timesOf(map[pg.Timeline]time.Time{}, map[pg.Timeline][]pg.HistoryEntry{})
	at := map[pg.Timeline]pg.LSN{1: 1000}
	timelines := pg.Timeline(1)
	var all []*Manifest
	for ago := time.Duration(60) * day; ago > -2*day; ago -= time.Duration(1+r.IntN(60)) * time.Hour {
		on := pg.Timeline(1 + r.IntN(int(timelines)))
		if r.IntN(8) == 0 {
			timelines++
			w.histories[timelines] = append(slices.Clone(w.histories[on]), pg.HistoryEntry{Timeline: on, Switch: at[on]})
			at[timelines] = at[on]
			on = timelines
		}
		at[on] += pg.LSN(100 + r.IntN(1000))
		if w.last[on] = retentionNow.Add(-ago); r.IntN(30) == 0 {
			w.last[on] = time.Time{}
		}
		skew := time.Duration(0)
		if skewed && r.IntN(10) == 0 {
			skew = time.Duration(r.IntN(200)-100) * time.Hour
		}
		m := ended(ago+skew).on(on, at[on])
		m.ID = newBackupID(retentionNow.Add(-ago), [2]byte{byte(len(all) >> 8), byte(len(all))})
		all = append(all, m)
	}
	for tli := range w.histories {
		switch r.IntN(30) {
		case 0:
			w.unread[tli] = true
		case 1:
			delete(w.histories, tli)
		}
	}
	return all, w
}

func keptIDs(all []Decision) map[string]bool {
	ids := map[string]bool{}
	for _, d := range all {
		if d.Keep {
			ids[d.Backup.ID] = true
		}
	}
	return ids
}

// TestPolicyProperties: a more permissive policy keeps no less; deciding again on what is kept changes nothing; there is always a
// backup left; and a point of the window that a backup led to is still led to by one that may be followed.
func TestPolicyProperties(t *testing.T) {
	for seed := range uint64(800) {
		r := rand.New(rand.NewPCG(seed, 1))
		skewed := seed%3 == 0
		all, times := randomHistory(r, skewed)
		p, more := randomPolicy(r)
		heldOne := all[r.IntN(len(all))].ID
		held := func(id string) (string, bool) { return "it is", id == heldOne && seed%2 == 0 }
		decisions := p.Decide(all, times, held, retentionNow)
		keep := keptIDs(decisions)
		if len(keep) == 0 || !keep[all[len(all)-1].ID] {
			t.Fatalf("seed %d: %+v keeps %d backups, not the newest", seed, p, len(keep))
		}
		if p != (Policy{}) {
			for id := range keep {
				if !keptIDs(more.Decide(all, times, held, retentionNow))[id] {
					t.Fatalf("seed %d: %+v keeps %s, %+v does not", seed, p, id, more)
				}
			}
		}
		left := slices.DeleteFunc(slices.Clone(all), func(m *Manifest) bool { return !keep[m.ID] })
		for i, d := range p.Decide(left, times, held, retentionNow) {
			if was := decisions[slices.IndexFunc(decisions, func(o Decision) bool { return o.Backup == d.Backup })]; !d.Keep || d.Standalone != was.Standalone {
				t.Fatalf("seed %d: %+v, asked again, decides %+v about %s, and did %+v", seed, p, d, left[i].ID, was)
			}
		}
		if !skewed { // else nobody knows what is in the window
			checkWindow(t, seed, p, all, times, decisions)
		}
	}
}

// checkWindow takes each place in the WAL that any backup of the window lies behind or at, on each line of timelines.
func checkWindow(t *testing.T, seed uint64, p Policy, all []*Manifest, times *walTimes, decisions []Decision) {
	t.Helper()
	start := retentionNow.Add(-p.Window)
	leads := func(b, to *Manifest) bool {
		l := times.line(to.Timeline)
		return p.Window > 0 && b.StopLSN <= to.StopLSN && !b.StoppedAt.After(start) && l.from(b) != nil
	}
	for _, to := range all {
		if to.StoppedAt.Before(start) || to.StoppedAt.After(retentionNow) {
			continue
		}
		had := slices.ContainsFunc(all, func(b *Manifest) bool { return leads(b, to) })
		has := slices.ContainsFunc(decisions, func(d Decision) bool { return d.Keep && !d.Standalone && leads(d.Backup, to) })
		if had && !has {
			t.Fatalf("seed %d: with %+v nothing leads to %s on timeline %s from before %s any more", seed, p, to.StopLSN, to.Timeline, start)
		}
	}
}
