package main

import (
	"testing"
	"time"
)

func berlin(t *testing.T) *time.Location {
	t.Helper()
	loc, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	return loc
}

func TestParseTime(t *testing.T) {
	now := time.Date(2026, 11, 20, 14, 30, 5, 123e6, berlin(t))
	for text, want := range map[string]string{
		"2026-11-19T22:00:00Z":          "2026-11-19T22:00:00Z",
		"2026-11-19T22:00:00.5+05:30":   "2026-11-19T22:00:00.5+05:30",
		"2026-11-19 22:00":              "2026-11-19T22:00:00+01:00",
		"2026-07-19 22:00":              "2026-07-19T22:00:00+02:00",
		"2026-11-19 22:00:07.123456":    "2026-11-19T22:00:07.123456+01:00",
		"2026-11-19 22:00:07+02":        "2026-11-19T22:00:07+02:00",
		"2026-11-19 22:00 -0330":        "2026-11-19T22:00:00-03:30",
		"2026-11-19 22:00:07.5 UTC":     "2026-11-19T22:00:07.5Z",
		"2026-10-25 02:30+01":           "2026-10-25T02:30:00+01:00",
		"now":                           "2026-11-20T14:30:05.123+01:00",
		"5 minutes ago":                 "2026-11-20T14:25:05.123+01:00",
		"  an hour   ago ":              "2026-11-20T13:30:05.123+01:00",
		"1 hour 30 min ago":             "2026-11-20T13:00:05.123+01:00",
		"30 days ago":                   "2026-10-21T14:30:05.123+02:00",
		"yesterday 14:30":               "2026-11-19T14:30:00+01:00",
		"Yesterday at 9:05:30":          "2026-11-19T09:05:30+01:00",
		"today 00:00":                   "2026-11-20T00:00:00+01:00",
		"3 days ago at 07:15":           "2026-11-17T07:15:00+01:00",
		"2 weeks ago 07:15:00.25":       "2026-11-06T07:15:00.25+01:00",
		"1 day 2 hours ago":             "2026-11-19T12:30:05.123+01:00",
		"1 week 1 day 10 sec ago":       "2026-11-12T14:29:55.123+01:00",
		"2026-11-19T22:00:07.000001-02": "2026-11-19T22:00:07.000001-02:00",
	} {
		t.Run(text, func(t *testing.T) {
			got, err := parseTime(text, now)
			if err != nil {
				t.Fatal(err)
			}
			if want, err := time.Parse(time.RFC3339Nano, want); err != nil || !got.Equal(want) {
				t.Errorf("got %s, want %s (%v)", got.Format(time.RFC3339Nano), want, err)
			}
		})
	}
}

// Half a time is another time, so the whole text must be one.
func TestParseTimeRefuses(t *testing.T) {
	now := time.Date(2026, 11, 20, 14, 30, 5, 0, berlin(t))
	for _, text := range []string{
		"", "yesterday", "today", "14:30", "2026-11-19", "5 minutes", "minutes ago", "ago", "5 m ago", "5 months ago",
		"-5 minutes ago", "5.5 hours ago", "5 minutes ago 14:30", "yesterday 25:00", "yesterday 14", "yesterday 14:30 or so",
		"backup of 2026-11-19 22:00", "2026-11-19 22:00 tomorrow", "2026-02-30 12:00", "11/19/2026 22:00", "2026-11-19 22:00 CEST",
		"2026-11-19 2:00 pm", "last friday", "99999999999 days ago", "2026-11-19 22:00 UTC UTC", "2026-11-19 22:00+02 UTC",
		"2026-03-29 02:30", // skipped in Berlin
		"2026-10-25 02:30", // twice in Berlin
	} {
		t.Run(text, func(t *testing.T) {
			got, err := parseTime(text, now)
			if err == nil {
				t.Fatalf("got %s, want an error", got.Format(time.RFC3339Nano))
			}
			if exitCode(err) != exitUsage || hintFor(err) == "" {
				t.Errorf("%v: exit code %d, hint %q; want 2 and a hint", err, exitCode(err), hintFor(err))
			}
		})
	}
}
