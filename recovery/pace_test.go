package recovery

import (
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	var p pace
	now := time.Unix(1_700_000_000, 0)
	var done int64
	advance := func(seconds int, perSecond int64) {
		for range seconds {
			now, done = now.Add(time.Second), done+perSecond
			p.note(now, done)
		}
	}
	for _, step := range []struct {
		seconds         int
		perSecond, want int64
	}{{1, 100, 0}, {1, 100, 100}, {9, 100, 100}, {15, 300, 220}, {40, 300, 300}, {40, 0, 0}, {30, 7, 7}} {
		advance(step.seconds, step.perSecond)
		if got := p.perSecond(); got != step.want {
			t.Errorf("after %d seconds of %d: %d, want %d", step.seconds, step.perSecond, got, step.want)
		}
	}
	if n := len(p.marks); n > 32 {
		t.Errorf("%d marks are kept", n)
	}
	if got := left(700, 7); got != 100*time.Second {
		t.Errorf("left: %v", got)
	}
	if got := left(700, 0); got != 0 {
		t.Errorf("left at no pace: %v", got)
	}
}
