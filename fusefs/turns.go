package fusefs

import (
	"context"
	"sync"
	"time"
)

// When the hydrator may read and write: as fast as it is allowed to, and with all its workers as long as nobody else asks the mount for anything.

// rate bounds the bytes a second. The zero value has no bound.
type rate struct {
	bytesPerSecond int64

	mu   sync.Mutex
	next time.Time // when the bytes allowed so far have had their time
}

// wait returns when n more bytes may be written: those that were allowed before have had their time.
func (r *rate) wait(ctx context.Context, n int64) error {
	if r.bytesPerSecond <= 0 {
		return ctx.Err()
	}
	return sleep(ctx, time.Until(r.allow(time.Now(), n)))
}

// allow tells from when on n more bytes may be written.
func (r *rate) allow(now time.Time, n int64) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	from := r.next
	if from.Before(now) {
		from = now
	}
	r.next = from.Add(time.Duration(float64(n) / float64(r.bytesPerSecond) * float64(time.Second)))
	return from
}

// most is how much may be written at once.
func (r *rate) most() int64 {
	if r.bytesPerSecond <= 0 {
		return pieceSize
	}
	return min(pieceSize, max(directLeast, roundDown(r.bytesPerSecond/4, directLeast)))
}

func sleep(ctx context.Context, pause time.Duration) error {
	if pause <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return ctx.Err()
}

// traffic is the requests that the mount has in hand.
type traffic struct {
	mu    sync.Mutex
	busy  int           // requests
	since time.Time     // that busy is above 0, or fell to 0
	spent time.Duration // with busy above 0, up to since
}

// enter counts a request until the returned function is called.
func (t *traffic) enter() (leave func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.busy++; t.busy == 1 {
		t.since = time.Now()
	}
	return t.leave
}

func (t *traffic) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.busy--; t.busy == 0 {
		now := time.Now()
		t.spent += now.Sub(t.since)
		t.since = now
	}
}

// lull is how long the mount must have had nothing to do for the hydrator to take it that nobody is there.
const lull = 50 * time.Millisecond

// look tells for how long there have been requests, all in all, and whether somebody is there who makes some.
func (t *traffic) look() (spent time.Duration, lively bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	since := time.Since(t.since)
	if t.busy > 0 {
		return t.spent + since, true
	}
	return t.spent, t.spent > 0 && since < lull
}

// turns are handed out to workers that fill what nobody waits for yet.
type turns struct {
	v      *Overlay
	most   int64         // a turn's size when nobody else is there, bytes
	narrow chan struct{} // holds one while a worker has its turn beside others
}

func newTurns(v *Overlay, most int64) turns { return turns{v, most, make(chan struct{}, 1)} }

// turn is a worker's leave to fill one piece. Beside others who use the mount one worker at a time has it, fills little, and then
// rests for as long as they had requests meanwhile; if somebody waits for a processor, much longer.
type turn struct {
	size   int64
	narrow bool
	before time.Duration // as look tells
	began  time.Time
}

// begin is where the work of a turn begins.
func (t *turn) begin(v *Overlay) {
	t.before, _ = v.traffic.look()
	t.began = time.Now()
}

// restScarce is how many times as long as it worked a worker rests when there are more who want a processor than processors: it
// works a fifth of the time, and the others have what they would have without it, but for that.
const restScarce = 4

// besideOthers is how much is filled at once beside others, bytes: some milliseconds' work.
const besideOthers = 1 << 20

func (v *Overlay) busy() bool { return v.o.Busy != nil && v.o.Busy() }

// turn waits for one.
func (q *turns) turn(ctx context.Context) (turn, error) {
	before, lively := q.v.traffic.look()
	if !lively && !q.v.busy() {
		return turn{size: q.most, before: before}, ctx.Err()
	}
	select {
	case q.narrow <- struct{}{}:
	case <-ctx.Done():
		return turn{}, ctx.Err()
	}
	return turn{size: min(q.most, besideOthers), narrow: true, before: before}, nil
}

// end ends a turn.
func (q *turns) end(ctx context.Context, t turn) error {
	spent, _ := q.v.traffic.look()
	rest := spent - t.before
	if t.narrow && !t.began.IsZero() && scarce() {
		rest = restScarce * time.Since(t.began)
	}
	err := sleep(ctx, rest)
	if t.narrow {
		<-q.narrow
	}
	return err
}
