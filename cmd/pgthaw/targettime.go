package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// parseTime reads the time of a recovery target, in the zone of now where it names none:
//
//	2026-11-20T14:30:00Z                     RFC 3339
//	2026-11-20 14:30[:05[.123]] [+02|UTC]    as PostgreSQL prints it
//	yesterday 14:30, 3 days ago at 14:30     a clock time of a day; today, too
//	5 minutes ago, 1 hour 30 min ago, now    a span back
//
// The whole text must be understood: half a time is another time.
func parseTime(text string, now time.Time) (time.Time, error) {
	text = strings.Join(strings.Fields(text), " ")
	if t, ok, err := parseDate(text, now.Location()); ok {
		return t, err
	}
	words := strings.Fields(strings.ToLower(text))
	if len(words) == 1 && words[0] == "now" {
		return now, nil
	}
	if t, ok, err := parseDayAndClock(words, now); ok {
		return t, err
	}
	if back, ok := parseAgo(words); ok {
		return back.from(now), nil
	}
	return time.Time{}, &failure{err: fmt.Errorf("%q is not a time that pgthaw can tell for certain", text), code: exitUsage,
		hint: `Give it like "2026-11-20 14:30:05+02", "2026-11-20 14:30" (local zone), "5 minutes ago" or "yesterday 14:30".`}
}

// parseDate reads a date and a clock time, with a zone or without. ok is whether it is of that form.
func parseDate(text string, local *time.Location) (t time.Time, ok bool, err error) {
	text, isUTC := strings.CutSuffix(text, " UTC")
	for _, day := range []string{"2006-01-02 15:04", "2006-01-02T15:04", "2006-01-02 15:04:05", "2006-01-02T15:04:05"} {
		if isUTC {
			if t, err := time.ParseInLocation(day, text, time.UTC); err == nil {
				return t, true, nil
			}
			continue
		}
		if t, err := time.ParseInLocation(day, text, local); err == nil {
			return onlyOnce(t, day, text)
		}
		for _, zone := range []string{"Z07:00", "-07", "-0700", " Z07:00", " -07", " -0700"} {
			if t, err := time.Parse(day+zone, text); err == nil {
				return t, true, nil
			}
		}
	}
	return time.Time{}, false, nil
}

// onlyOnce refuses a local time that the clocks skipped, or showed twice, when they were changed.
func onlyOnce(t time.Time, layout, text string) (time.Time, bool, error) {
	const hint = "Add the offset from UTC, as in 02:30+01."
	wall := t.Format(layout)
	if !strings.HasPrefix(text, wall) {
		err := fmt.Errorf("%q did not exist in the local zone: the clocks were put forward", text)
		return t, true, &failure{err: err, code: exitUsage, hint: hint}
	}
	for _, shift := range []time.Duration{time.Hour, 30 * time.Minute} {
		if t.Add(shift).Format(layout) == wall || t.Add(-shift).Format(layout) == wall {
			err := fmt.Errorf("%q happened twice in the local zone: the clocks were put back", text)
			return t, true, &failure{err: err, code: exitUsage, hint: hint}
		}
	}
	return t, true, nil
}

// parseDayAndClock reads "yesterday 14:30", "today at 9:05:30", "3 days ago 14:30".
func parseDayAndClock(words []string, now time.Time) (t time.Time, ok bool, err error) {
	if len(words) < 2 {
		return t, false, nil
	}
	day, at := words[:len(words)-1], words[len(words)-1]
	if day[len(day)-1] == "at" {
		day = day[:len(day)-1]
	}
	date, ok := parseDay(day, now)
	if !ok {
		return t, false, nil
	}
	if len(at) > 1 && at[1] == ':' {
		at = "0" + at // 9:05
	}
	return parseDate(date+" "+at, now.Location())
}

// parseDay reads a day and gives it as a date.
func parseDay(words []string, now time.Time) (date string, ok bool) {
	back, ok := parseAgo(words)
	switch {
	case slices.Equal(words, []string{"today"}):
		back, ok = span{}, true
	case slices.Equal(words, []string{"yesterday"}):
		back, ok = span{days: 1}, true
	case ok && back.clock != 0: // "3 hours ago 14:30" is nonsense
		ok = false
	}
	return back.from(now).Format("2006-01-02"), ok
}

// span is a distance in calendar days and on the clock.
type span struct {
	days  int
	clock time.Duration
}

func (s span) from(now time.Time) time.Time { return now.AddDate(0, 0, -s.days).Add(-s.clock) }

// parseAgo reads "5 minutes ago", "1 hour 30 min ago", "an hour ago".
func parseAgo(words []string) (s span, ok bool) {
	if len(words) < 3 || len(words)%2 == 0 || words[len(words)-1] != "ago" {
		return s, false
	}
	for i := 0; i+1 < len(words); i += 2 {
		n, err := strconv.ParseUint(words[i], 10, 16)
		if words[i] == "a" || words[i] == "an" {
			n, err = 1, nil
		}
		if err != nil || !s.add(int(n), words[i+1]) {
			return s, false
		}
	}
	return s, true
}

func (s *span) add(n int, unit string) bool {
	switch unit {
	case "s", "sec", "second", "seconds":
		s.clock += time.Duration(n) * time.Second
	case "min", "minute", "minutes":
		s.clock += time.Duration(n) * time.Minute
	case "h", "hour", "hours":
		s.clock += time.Duration(n) * time.Hour
	case "d", "day", "days":
		s.days += n
	case "week", "weeks":
		s.days += 7 * n
	default:
		return false
	}
	return true
}
