package pg

import "testing"

func TestQuoteConf(t *testing.T) {
	for s, want := range map[string]string{
		"":                               `''`,
		"plain":                          `'plain'`,
		`pgthaw wal fetch 'a b' %f "%p"`: `'pgthaw wal fetch ''a b'' %f "%p"'`,
		`C:\n`:                           `'C:\\n'`,
		"two\nlines":                     `'two\nlines'`,
	} {
		if got := QuoteConf(s); got != want {
			t.Errorf("QuoteConf(%q) = %s, want %s", s, got, want)
		}
	}
}
