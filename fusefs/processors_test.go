package fusefs

import "testing"

func TestScarce(t *testing.T) {
	for text, want := range map[string]bool{
		"0.92 0.80 1.95 3/412 12345\n": true, "0.92 0.80 1.95 2/412 12345\n": false, "9.9 9.9 9.9 10/12 1\n": true,
		"": false, "0 0 0": false, "0 0 0 x/y 1": false,
	} {
		if got := scarceBy(text, 2); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
