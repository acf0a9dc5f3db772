package pg

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
)

// HistoryEntry is a line of a timeline history file: the history left Timeline at Switch.
type HistoryEntry struct {
	Timeline Timeline
	Switch   LSN // the first byte that is not of Timeline any more
	Reason   string
}

// ParseHistory reads a timeline history file as timeline.c's readTimeLineHistory does: blank lines and comments
// count for nothing, and timelines must ascend, oldest first. The file's own timeline is its name's, and is above
// every entry's; the caller, who knows the name, checks that.
func ParseHistory(b []byte) ([]HistoryEntry, error) {
	var entries []HistoryEntry
	var last Timeline
	for line := range bytes.Lines(b) {
		s := strings.TrimSpace(string(line))
		if s == "" || s[0] == '#' {
			continue
		}
		e, err := parseHistoryLine(s)
		if err != nil {
			return nil, fmt.Errorf("timeline history: %w", err)
		}
		if e.Timeline <= last {
			return nil, fmt.Errorf("timeline history: timeline %s after timeline %s", e.Timeline, last)
		}
		last = e.Timeline
		entries = append(entries, e)
	}
	return entries, nil
}

// parseHistoryLine reads "timeline LSN reason", separated by white space.
func parseHistoryLine(s string) (HistoryEntry, error) {
	tli, rest := cutSpace(s)
	lsn, reason := cutSpace(rest)
	t, err := strconv.ParseUint(tli, 10, 32)
	if err != nil {
		return HistoryEntry{}, fmt.Errorf("no timeline in line %q", s)
	}
	at, err := ParseLSN(lsn)
	if err != nil {
		return HistoryEntry{}, fmt.Errorf("no switch point in line %q: %w", s, err)
	}
	return HistoryEntry{Timeline: Timeline(t), Switch: at, Reason: reason}, nil
}

// cutSpace splits s after its first word.
func cutSpace(s string) (word, rest string) {
	i := strings.IndexAny(s, " \t")
	if i < 0 {
		return s, ""
	}
	return s[:i], strings.TrimLeft(s[i:], " \t")
}
