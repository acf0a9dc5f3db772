package pg

import (
	"encoding/json"
	"testing"
)

func TestLSN(t *testing.T) {
	for s, want := range map[string]LSN{
		"0/0":               0,
		"0/16B3748":         0x16B3748,
		"A/ff":              0xA000000FF,
		"FFFFFFFF/FFFFFFFF": 0xFFFFFFFFFFFFFFFF,
		"00000001/00000002": 0x100000002, // PostgreSQL 19 pads
	} {
		if got, err := ParseLSN(s); err != nil || got != want {
			t.Errorf("ParseLSN(%q) = %v, %v", s, got, err)
		}
	}
	if got := LSN(0xA000000FF).String(); got != "A/FF" {
		t.Errorf("String = %q", got)
	}
}

func TestParseLSNRefuses(t *testing.T) {
	for _, s := range []string{"", "/", "0", "0/", "/0", "0/0/0", "123456789/0", "0/123456789", "0x1/0", "-1/0", "+1/0", "1_0/0", " 0/0", "0/G"} {
		if got, err := ParseLSN(s); err == nil {
			t.Errorf("ParseLSN(%q) = %v", s, got)
		}
	}
}

func TestLSNInJSON(t *testing.T) {
	b, err := json.Marshal(struct{ At LSN }{0x100000002})
	if err != nil || string(b) != `{"At":"1/2"}` {
		t.Fatalf("got %s, %v", b, err)
	}
	var v struct{ At LSN }
	if err := json.Unmarshal(b, &v); err != nil || v.At != 0x100000002 {
		t.Errorf("got %v, %v", v.At, err)
	}
	if err := json.Unmarshal([]byte(`{"At":"x"}`), &v); err == nil {
		t.Error("x is no LSN")
	}
}

func TestTimeline(t *testing.T) {
	if got := Timeline(26).String() + " " + Timeline(26).Hex(); got != "26 0000001A" {
		t.Errorf("got %q", got)
	}
}

func FuzzParseLSN(f *testing.F) {
	f.Add("0/16B3748")
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseLSN(s)
		if err != nil {
			return
		}
		if again, err := ParseLSN(l.String()); err != nil || again != l {
			t.Errorf("%q: %v became %v, %v", s, l, again, err)
		}
	})
}
