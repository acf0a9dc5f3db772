package recovery

import (
	"math"
	"testing"
	"time"

	"pgthaw/repo"
)

// TestLeadsFrom: an image is used for what lies behind it, on a line that it is part of, and in doubt not.
func TestLeadsFrom(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	r := Route{line: line{{1, 0, 0x5000}, {2, 0x5000, math.MaxUint64}}, namedAt: 0x4000}
	image := repo.Image{Kind: repo.ImageRecovery, LSN: 0x3000, Timeline: 1, LastCommit: at, NextXid: 1000}
	with := func(change func(*repo.Image)) repo.Image { i := image; change(&i); return i }
	promoted := with(func(i *repo.Image) { i.Kind, i.Timeline = repo.ImagePromoted, 3 })
	alone := r
	alone.alone = true
	for _, c := range []struct {
		name  string
		route Route
		image repo.Image
		to    Target
		want  bool
	}{
		{"end", r, image, Target{}, true},
		{"end, standalone", alone, image, Target{}, false},
		{"end, before the switch", r, with(func(i *repo.Image) { i.LSN = 0x5000 }), Target{}, true},
		{"end, behind the switch", r, with(func(i *repo.Image) { i.LSN = 0x5001 }), Target{}, false},
		{"end, on the next timeline", r, with(func(i *repo.Image) { i.LSN, i.Timeline = 0x6000, 2 }), Target{}, true},
		{"end, on another timeline", r, with(func(i *repo.Image) { i.Timeline = 3 }), Target{}, false},
		{"immediate", r, image, Target{Immediate: true}, false},
		{"immediate, promoted", r, promoted, Target{Immediate: true}, true},
		{"immediate, promoted, paused", r, promoted, Target{Immediate: true, Action: "pause"}, false},
		{"end, promoted", r, promoted, Target{}, false},
		{"time", r, image, Target{Time: at}, true},
		{"time before", r, image, Target{Time: at.Add(-1)}, false},
		{"time, exclusive", r, image, Target{Time: at, Exclusive: true}, false},
		{"time behind, exclusive", r, image, Target{Time: at.Add(1), Exclusive: true}, true},
		{"LSN", r, image, Target{LSN: 0x3000}, true},
		{"LSN before", r, image, Target{LSN: 0x2fff}, false},
		{"xid", r, image, Target{Xid: 1000}, true},
		{"xid before", r, image, Target{Xid: 999}, false},
		{"xid, wrapped", r, with(func(i *repo.Image) { i.NextXid = math.MaxUint32 - 5 }), Target{Xid: 3}, true},
		{"name", r, image, Target{Name: "x"}, true},
		{"name before", r, with(func(i *repo.Image) { i.LSN = 0x4000 }), Target{Name: "x"}, false},
		{"unknown kind", r, with(func(i *repo.Image) { i.Kind = "other" }), Target{}, false},
	} {
		if got := c.route.leadsFrom(&c.image, c.to); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
