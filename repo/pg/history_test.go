package pg

import (
	"slices"
	"testing"
)

func TestParseHistory(t *testing.T) {
	got, err := ParseHistory([]byte("1\t0/3000158\tno recovery target specified\n\n" +
		"# by hand\n  2\t0/5000000\tbefore 2026-11-20 22:16:37.5+00\r\n\t\n3 1/A at restore point \"x\""))
	want := []HistoryEntry{
		{1, 0x3000158, "no recovery target specified"},
		{2, 0x5000000, "before 2026-11-20 22:16:37.5+00"},
		{3, 0x10000000A, `at restore point "x"`},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := ParseHistory(nil); err != nil || got != nil {
		t.Errorf("an empty file: %+v, %v", got, err)
	}
}

func TestParseHistoryRefuses(t *testing.T) {
	for _, s := range []string{"x\t0/1\tr", "1", "1\t", "1\t0/\tr", "1\t01\tr", "-1\t0/1\tr", "4294967296\t0/1\tr", "0\t0/1\tr", "2\t0/1\tr\n2\t0/2\tr", "2\t0/1\tr\n1\t0/2\tr"} {
		if got, err := ParseHistory([]byte(s)); err == nil {
			t.Errorf("%q: %+v", s, got)
		}
	}
}

func FuzzParseHistory(f *testing.F) {
	f.Add([]byte("1\t0/3000158\tno recovery target specified\n\n# c\n2 0/5000000 x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var entries []HistoryEntry
		withinMemory(t, len(b), func() { entries, _ = ParseHistory(b) })
		for i := 1; i < len(entries); i++ {
			if entries[i].Timeline <= entries[i-1].Timeline {
				t.Errorf("timeline %s after %s", entries[i].Timeline, entries[i-1].Timeline)
			}
		}
	})
}
