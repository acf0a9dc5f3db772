package repo

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"pgthaw/repo/pg"
)

// Policy says which backups of a cluster are kept: those that any of its rules keeps, and always the newest. The zero
// value keeps all. A backup's time is when it ended, by the server's clock.
type Policy struct {
	Last                           int           // so many newest
	Within                         time.Duration // those that ended since then
	Daily, Weekly, Monthly, Yearly int           // the newest of each of the last so many periods that have any
	Window                         time.Duration // what recovery to any point since then needs: also the WAL
}

// Decision on one backup.
type Decision struct {
	Backup     *Manifest
	Keep       bool
	Reasons    []string // words for a person, at least one
	Standalone bool     // it is kept, but by no rule that needs the WAL behind it
}

// Decide tells for each backup of a cluster, oldest first, whether it is kept. held gives the reason of a hold. Days, weeks
// and so on are those of now's zone. Of timelines it needs how they came out of each other, and when they ended; without
// any it takes them for one.
//
// A backup whose time is to come was made by a clock that is wrong, or now is: it is kept, and counts in no rule.
func (p Policy) Decide(backups []*Manifest, t *walTimes, held func(id string) (reason string, ok bool), now time.Time) []Decision {
	d := decider{policy: p, now: now, timelines: t}
	for _, m := range backups {
		d.all = append(d.all, &Decision{Backup: m})
	}
	slices.SortFunc(d.all, func(a, b *Decision) int { return byTime(a.Backup, b.Backup) })
	for _, b := range d.all {
		if b.Backup.StoppedAt.After(now) {
			b.keep("its time is to come: " + minute(b.Backup.StoppedAt, now))
		} else {
			d.past = append(d.past, b)
		}
	}
	d.decide(held)
	all := make([]Decision, len(d.all))
	for i, b := range d.all {
		if all[i] = *b; !b.Keep {
			all[i].Reasons = []string{"no rule keeps it"}
		}
	}
	return all
}

func byTime(a, b *Manifest) int {
	return cmp.Or(a.StoppedAt.Compare(b.StoppedAt), cmp.Compare(a.ID, b.ID))
}

func (d *Decision) keep(reason string) {
	d.Keep = true
	d.Reasons = append(d.Reasons, reason)
}

type decider struct {
	policy    Policy
	now       time.Time
	timelines *walTimes   // nil: not known
	all, past []*Decision // past are those whose time is not to come; both oldest first
}

func (d *decider) decide(held func(id string) (string, bool)) {
	if d.policy == (Policy{}) {
		for _, b := range d.past {
			b.keep("there is no rule")
		}
		return
	}
	d.keepWindow()
	alone := d.policy.Window > 0
	for _, b := range d.all {
		b.Standalone = alone && !b.Keep
	}
	d.keepNewest()
	for i, b := range d.past {
		if i >= len(d.past)-d.policy.Last {
			b.keep(fmt.Sprintf("one of the last %d", d.policy.Last))
		}
		if since := d.now.Add(-d.policy.Within); d.policy.Within > 0 && !b.Backup.StoppedAt.Before(since) {
			b.keep("ended since " + minute(since, d.now))
		}
	}
	d.keepPeriods()
	for _, b := range d.all {
		if reason, ok := held(b.Backup.ID); ok {
			b.keep("held: " + reason)
		}
		b.Standalone = b.Standalone && b.Keep
	}
}

// keepNewest keeps the newest by time, and the one that Latest stands for, which is another where a clock was wrong. Both
// with the WAL behind them.
func (d *decider) keepNewest() {
	newest := map[*Decision]bool{}
	if len(d.all) > 0 {
		newest[slices.MaxFunc(d.all, func(a, b *Decision) int { return cmp.Compare(a.Backup.ID, b.Backup.ID) })] = true
	}
	if n := len(d.past); n > 0 {
		newest[d.past[n-1]] = true
	}
	for b := range newest {
		b.keep("the newest")
		b.Standalone = false
	}
}

// keepPeriods keeps the newest backup of each of the last days, weeks, months and years.
func (d *decider) keepPeriods() {
	for _, rule := range []struct {
		n    int
		name string
		of   func(time.Time) string
	}{
		{d.policy.Daily, "day", func(t time.Time) string { return t.Format("2006-01-02") }},
		{d.policy.Weekly, "week", isoWeek},
		{d.policy.Monthly, "month", func(t time.Time) string { return t.Format("2006-01") }},
		{d.policy.Yearly, "year", func(t time.Time) string { return t.Format("2006") }},
	} {
		last, n := "", 0
		for _, b := range slices.Backward(d.past) {
			period := rule.of(b.Backup.StoppedAt.In(d.now.Location()))
			if n == rule.n {
				break
			}
			if period != last {
				b.keep(fmt.Sprintf("newest of the %s %s", rule.name, period))
				last = period
				n++
			}
		}
	}
}

func isoWeek(t time.Time) string {
	year, week := t.ISOWeek()
	return fmt.Sprintf("%d-W%02d", year, week)
}

// minute writes a time for a person, in the zone of now.
func minute(t, now time.Time) string { return t.In(now.Location()).Format("2006-01-02 15:04") }

// keepWindow keeps what ended in the window, and before that the newest backup from which its beginning can be reached: on
// every line of timelines that was alive since.
func (d *decider) keepWindow() {
	if d.policy.Window <= 0 || len(d.all) == 0 {
		return
	}
	start := d.now.Add(-d.policy.Window)
	bases := d.bases(start)
	for _, b := range d.past {
		switch {
		case b.Backup.StoppedAt.After(start):
			b.keep("ended since " + minute(start, d.now))
		case bases[b]:
			b.keep("needed for any point since " + minute(start, d.now))
		}
	}
}

// bases are the backups that ended before the window, and that are needed for points in it.
func (d *decider) bases(start time.Time) map[*Decision]bool {
	bases := map[*Decision]bool{}
	add := func(fits func(*Manifest) bool) {
		for _, b := range slices.Backward(d.past) {
			if !b.Backup.StoppedAt.After(start) && fits(b.Backup) {
				bases[b] = true
				return
			}
		}
	}
	add(func(*Manifest) bool { return true })
	if d.timelines == nil {
		return bases
	}
	for _, tli := range d.aliveSince(start) {
		if d.timelines.lost(tli, d.oldest()) { // nobody knows which it came out of
			for below := range d.timelinesOfBackups() {
				add(func(m *Manifest) bool { return m.Timeline == below && below <= tli })
			}
			continue
		}
		l := d.timelines.line(tli)
		add(func(m *Manifest) bool { return l.from(m) != nil })
	}
	return bases
}

// aliveSince are the timelines on which something may have happened since the window began.
func (d *decider) aliveSince(start time.Time) []pg.Timeline {
	alive := map[pg.Timeline]bool{}
	for tli, last := range d.timelines.last {
		alive[tli] = last.IsZero() || !last.Before(start)
	}
	for _, b := range d.all {
		if b.Backup.StoppedAt.After(start) {
			alive[b.Backup.Timeline] = true
		}
	}
	maps.DeleteFunc(alive, func(_ pg.Timeline, is bool) bool { return !is })
	return slices.Sorted(maps.Keys(alive))
}

func (d *decider) timelinesOfBackups() map[pg.Timeline]bool {
	all := map[pg.Timeline]bool{}
	for _, b := range d.all {
		all[b.Backup.Timeline] = true
	}
	return all
}

// oldest is the lowest timeline of any backup.
func (d *decider) oldest() pg.Timeline {
	return slices.Min(slices.Collect(maps.Keys(d.timelinesOfBackups())))
}
