package main

import (
	"strings"
	"testing"

	"pgthaw/recovery"
)

func TestPrintPace(t *testing.T) {
	for want, s := range map[string]recovery.OverlayStatus{
		"":                                       {State: "hydrated"},
		"auto":                                   {Hydrate: "auto"},
		"auto, 100 MB/s, 2 min 5 s left":         {Hydrate: "auto", BytesPerSecond: 100 << 20, SecondsLeft: 125},
		"at most 50MB a second, 49 MB/s, 3 s":    {Hydrate: "50MB", BytesPerSecond: 49 << 20, SecondsLeft: 3},
		"off: what is read or written is copied": {Hydrate: "off"},
		"begins when recovery has ended":         {Hydrate: "held"},
	} {
		var out strings.Builder
		if err := printStatus(&out, s); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(out.String(), "Hydration"); got != (want != "") || !strings.Contains(out.String(), want) {
			t.Errorf("%+v gives\n%s\nwant %q", s, out.String(), want)
		}
	}
}
