package fusefs

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"
)

// TestRate: never more than the rate allows, but for the piece at hand, however many ask, and no credit for idle times.
func TestRate(t *testing.T) {
	const perSecond = 10 << 20
	r := rate{bytesPerSecond: perSecond}
	rng := rand.New(rand.NewPCG(seed(t), 0))
	began := time.Unix(1_700_000_000, 0)
	now, written := began, int64(0)
	for range 1000 {
		n := 1 + rng.Int64N(r.most())
		from := r.allow(now, n)
		if from.Before(now) {
			t.Fatalf("allowed %v ago", now.Sub(from))
		}
		if most := int64(from.Sub(began).Seconds()*perSecond) + 1024; written > most { // nanoseconds are whole
			t.Fatalf("%d bytes when %d were allowed", written, most)
		}
		written += n
		if rng.IntN(3) == 0 {
			now = from
		}
	}
	if took, want := r.next.Sub(began).Seconds(), float64(written)/perSecond; took < want-0.001 || took > want+0.001 {
		t.Errorf("%d bytes take %.3f s, want %.3f", written, took, want)
	}
	later := r.next.Add(time.Hour)
	if from := r.allow(later, perSecond); from != later {
		t.Errorf("allowed at %v, want %v", from, later)
	}
	if from := r.allow(later, 1); from != later.Add(time.Second) {
		t.Errorf("an idle hour counts: allowed at %v, want %v", from, later.Add(time.Second))
	}
	for perSecond, want := range map[int64]int64{0: pieceSize, 1: directLeast, 3 << 20: 3 * directLeast, 1 << 40: pieceSize} {
		r := rate{bytesPerSecond: perSecond}
		if got := r.most(); got != want {
			t.Errorf("at %d a second %d at once, want %d", perSecond, got, want)
		}
	}
}

// TestTurns: one worker at a time beside others, all of them when nobody is there.
func TestTurns(t *testing.T) {
	v := new(Overlay)
	h := newTurns(v, pieceSize)
	ended, end := context.WithCancel(t.Context())
	end()
	for range 3 {
		if got, err := h.turn(t.Context()); err != nil || got.narrow || got.size != pieceSize {
			t.Errorf("alone: %+v, %v", got, err)
		}
	}
	leave := v.traffic.enter()
	first, err := h.turn(t.Context())
	if err != nil || !first.narrow || first.size != besideOthers {
		t.Errorf("beside a request: %+v, %v", first, err)
	}
	if got, err := h.turn(ended); err == nil {
		t.Errorf("beside a request and another worker: %+v", got)
	}
	if h.end(ended, first) == nil {
		t.Error("it did not rest")
	}
	if got, err := h.turn(t.Context()); err != nil || !got.narrow {
		t.Errorf("after another worker: %+v, %v", got, err)
	} else {
		<-h.narrow
	}
	leave()
	v.traffic.since = time.Now().Add(-time.Minute) // that it has been quiet
	v.o.Busy = func() bool { return true }
	if got, err := h.turn(t.Context()); err != nil || !got.narrow {
		t.Errorf("beside somebody who makes no requests: %+v, %v", got, err)
	} else {
		<-h.narrow
	}
	v.o.Busy = func() bool { return false }
	if got, err := h.turn(t.Context()); err != nil || got.narrow {
		t.Errorf("when nobody is there any more: %+v, %v", got, err)
	}
}
