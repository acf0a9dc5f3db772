package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"pgthaw/repo/store"
)

// simStore is a store whose every operation waits until the scheduler of a simulation picks it, and then may fail, be
// done with its answer lost, be done much later, or twice; whose listings are taken piece by piece and may be stale.
// It keeps all that ever was in it, and the log of what was done.
type simStore struct {
	rng     *rand.Rand
	keys    []string // all there ever were, sorted
	objects map[string][]*simObject
	offset  time.Duration // by which the store's clock is ahead of the hosts'
	seq     int

	stale    time.Duration // listings show what was less than this before
	replaces bool          // a put of what is there replaces it
	faults   int           // of so many operations in a thousand something goes wrong

	mu      sync.Mutex // only callers of one simHandle run at once, but a process has several
	asked   int
	pending []*simOp
	late    []*simOp // answered already, and to be carried out some time

	changed func(op *simOp) // after a put that was carried out, before a deletion
	log     []simEvent
	stats   simStats
}

// simObject is an object from when it was put until it was deleted.
type simObject struct {
	body            []byte
	modified        time.Time // by the store's clock
	put, gone       time.Time
	putSeq, goneSeq int // goneSeq 0: it is there
}

// simStats counts what happened.
type simStats map[string]int

// simEvent is a line of the log.
type simEvent struct {
	at    time.Time
	actor string
	what  string
	op    *simOp
}

func (e simEvent) String() string {
	line := fmt.Sprintf("%s %-9s %s", e.at.UTC().Format("02T15:04:05"), e.actor, e.what)
	if e.op != nil {
		line += fmt.Sprintf(" %s %s", e.op.kind, e.op.key)
	}
	return line
}

// Kinds of operations.
const (
	opGet    = "get"
	opPut    = "put"
	opDelete = "delete"
	opList   = "list"
	opPage   = "list on" // the next part of a listing
	opThink  = "think"   // the process does something that takes time
)

// simOp is an operation that a process has asked for.
type simOp struct {
	h      *simHandle
	kind   string
	key    string // or prefix
	body   []byte
	off, n int64
	list   *simListing
	no     int // in the order in which they were asked for
	reply  chan simReply
	want   map[string][]byte // content of the backup that is being written
	wal    simRange          // the same
	orphan bool              // who asked waits no more
}

type simReply struct {
	body []byte
	page []store.Object
	more bool
	err  error
}

// simListing is one under way.
type simListing struct {
	start    time.Time
	startSeq int
	stale    bool
	shows    time.Time // what it shows, if stale
	mixed    bool      // each key by itself is as it was at any time since that time
	next     string    // the first key that is not listed yet
}

var errSim = errors.New("the store is out of reach")
var errCrashed = errors.New("this process is dead")

// simHandle is the store as one process has it.
type simHandle struct {
	s     *simStore
	no    int
	name  string
	dead  bool
	until time.Time // it stands still until then
	calm  bool      // nothing goes wrong for it

	want  map[string][]byte // content of the backup that it writes
	wal   simRange          // the same
	wrote map[string]bool   // packs

	listedWAL int // when it began to list WAL last, as a seq
	protect   *simProtection
	fault     func(*simOp) (simReply, bool) // answers in the store's place: a step of the protocol that is left out
	still     func(*simOp) bool             // before what it stands still for days
}

// standsStill is long enough for everybody else to give a process up.
const standsStill = 60 * time.Hour

func (h *simHandle) isDead() bool {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.dead
}

// writes is what the process is about to put into a backup.
func (h *simHandle) writes() (want map[string][]byte, wal simRange) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return h.want, h.wal
}

// setWrites comes before writes: signs of life are other goroutines' operations.
func (h *simHandle) setWrites(want map[string][]byte, wal simRange) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	h.want, h.wal = want, wal
}

// do waits for the scheduler.
func (h *simHandle) do(ctx context.Context, op *simOp) simReply {
	if err := ctx.Err(); err != nil {
		return simReply{err: err}
	}
	op.h, op.reply = h, make(chan simReply, 1)
	op.want, op.wal = h.writes()
	if h.fault != nil && !h.isDead() {
		if r, ok := h.fault(op); ok {
			return r
		}
	}
	h.s.mu.Lock()
	dead := h.dead
	if !dead {
		h.s.asked++
		op.no = h.s.asked
		if h.still != nil && h.still(op) {
			h.until = time.Now().Add(standsStill)
		}
		h.s.pending = append(h.s.pending, op)
	}
	h.s.mu.Unlock()
	if dead {
		return simReply{err: errCrashed}
	}
	select {
	case r := <-op.reply:
		return r
	case <-ctx.Done():
		h.s.mu.Lock()
		op.orphan = true
		h.s.mu.Unlock()
		return simReply{err: ctx.Err()}
	}
}

func (h *simHandle) think(ctx context.Context) { h.do(ctx, &simOp{kind: opThink}) }

func (h *simHandle) Put(ctx context.Context, key string, body []byte) error {
	return h.do(ctx, &simOp{kind: opPut, key: key, body: slices.Clone(body)}).err
}

func (h *simHandle) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	if strings.HasPrefix(key, clustersPrefix) { // it never changes
		return h.s.get(key, off, n)
	}
	r := h.do(ctx, &simOp{kind: opGet, key: key, off: off, n: n})
	return r.body, r.err
}

func (h *simHandle) Delete(ctx context.Context, key string) error {
	return h.do(ctx, &simOp{kind: opDelete, key: key}).err
}

func (h *simHandle) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	if prefix == clustersPrefix {
		return observer{h.s}.List(ctx, prefix)
	}
	return func(yield func(store.Object, error) bool) {
		op := &simOp{kind: opList, key: prefix, list: &simListing{next: prefix}}
		for {
			r := h.do(ctx, op)
			if r.err != nil {
				yield(store.Object{}, r.err)
				return
			}
			for _, o := range r.page {
				if !yield(o, nil) {
					return
				}
			}
			if !r.more {
				return
			}
			op = &simOp{kind: opPage, key: prefix, list: op.list}
		}
	}
}

// observer reads what is there and changes nothing: what the tests ask with.
type observer struct{ s *simStore }

func (o observer) Put(context.Context, string, []byte) error { return nil }
func (o observer) Delete(context.Context, string) error      { return nil }
func (o observer) Get(_ context.Context, key string, off, n int64) ([]byte, error) {
	return o.s.get(key, off, n)
}

func (o observer) List(_ context.Context, prefix string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		for _, key := range o.s.keys {
			if v := o.s.object(key); v != nil && strings.HasPrefix(key, prefix) {
				if !yield(store.Object{Key: key, Size: int64(len(v.body)), Modified: v.modified}, nil) {
					return
				}
			}
		}
	}
}

// object is what is there under a key, or nil.
func (s *simStore) object(key string) *simObject {
	if all := s.objects[key]; len(all) > 0 && all[len(all)-1].goneSeq == 0 {
		return all[len(all)-1]
	}
	return nil
}

func (s *simStore) get(key string, off, n int64) ([]byte, error) {
	o := s.object(key)
	switch {
	case o == nil:
		return nil, fmt.Errorf("get %s: %w", key, store.ErrNotExist)
	case n < 0:
		n = int64(len(o.body)) - off
	}
	if off < 0 || n < 0 || off+n > int64(len(o.body)) {
		return nil, io.ErrUnexpectedEOF
	}
	return slices.Clone(o.body[off : off+n]), nil
}

// now is the store's clock.
func (s *simStore) now() time.Time { return time.Now().Add(s.offset) }

// put carries out a put.
func (s *simStore) put(key string, body []byte) error {
	if o := s.object(key); o != nil {
		if !s.replaces {
			return fmt.Errorf("put %s: %w", key, store.ErrExist)
		}
		o.body, o.modified = body, s.now()
		return nil
	}
	s.seq++
	if s.objects[key] == nil {
		i, _ := slices.BinarySearch(s.keys, key)
		s.keys = slices.Insert(s.keys, i, key)
	}
	s.objects[key] = append(s.objects[key], &simObject{body: body, modified: s.now(), put: time.Now(), putSeq: s.seq})
	return nil
}

func (s *simStore) delete(key string) {
	if o := s.object(key); o != nil {
		s.seq++
		o.gone, o.goneSeq = time.Now(), s.seq
	}
}

// begin decides what a listing shows.
func (s *simStore) begin(l *simListing) {
	l.start, l.startSeq = time.Now(), s.seq
	l.mixed = s.rng.IntN(2) == 0
	if s.stale > 0 && s.rng.IntN(3) > 0 {
		l.stale = true
		l.shows = l.start.Add(-time.Duration(s.rng.Int64N(int64(s.stale))))
		if l.mixed {
			l.shows = l.start.Add(1 - s.stale)
		}
	}
}

// visible tells whether a listing shows an object, and counts where that matters.
func (s *simStore) visible(l *simListing, o *simObject) bool {
	there := o.putSeq <= l.startSeq
	gone := o.goneSeq > 0 && o.goneSeq <= l.startSeq
	if l.stale {
		there, gone = !o.put.After(l.shows), o.goneSeq > 0 && !o.gone.After(l.shows)
	}
	if l.mixed {
		there, gone = there || s.rng.IntN(2) == 0, gone || o.goneSeq > 0 && s.rng.IntN(2) == 0
	}
	return there && !gone
}

// page takes the next part of a listing.
func (s *simStore) page(l *simListing, prefix string) (page []store.Object, more bool) {
	left := 1000
	if s.rng.IntN(3) == 0 {
		left = 1 + s.rng.IntN(3)
	}
	i, _ := slices.BinarySearch(s.keys, l.next)
	for ; i < len(s.keys) && strings.HasPrefix(s.keys[i], prefix); i++ {
		key := s.keys[i]
		if left == 0 {
			l.next = key
			return page, true
		}
		for _, o := range slices.Backward(s.objects[key]) {
			shown := s.visible(l, o)
			if shown != (o.goneSeq == 0) {
				s.stats["listings that show what is gone, or not what is there"]++
			}
			if shown {
				page = append(page, store.Object{Key: key, Size: int64(len(o.body)), Modified: o.modified})
				left--
				break
			}
		}
	}
	return page, false
}

// carryOut does what an operation asks for.
func (s *simStore) carryOut(op *simOp) (r simReply) {
	switch op.kind {
	case opGet:
		r.body, r.err = s.get(op.key, op.off, op.n)
	case opPut:
		if r.err = s.put(op.key, op.body); r.err == nil {
			s.changed(op)
		}
	case opDelete:
		if s.object(op.key) != nil {
			s.changed(op)
			s.delete(op.key)
		}
	case opList:
		s.begin(op.list)
		if strings.HasPrefix(op.key, walRoot) {
			op.h.listedWAL = s.seq
		}
		r.page, r.more = s.page(op.list, op.key)
	case opPage:
		r.page, r.more = s.page(op.list, op.key)
	}
	return r
}

// serve answers an operation, by chance wrongly.
func (s *simStore) serve(op *simOp) {
	changes := op.kind == opPut || op.kind == opDelete
	chance := s.rng.IntN(1000)
	if op.h.calm || op.kind == opThink || chance >= s.faults {
		s.note(op, "")
		op.reply <- s.carryOut(op)
		return
	}
	switch fate := s.rng.IntN(6); {
	case !changes || fate == 0:
		s.note(op, "fails")
		op.reply <- simReply{err: errSim}
	case fate == 1:
		s.note(op, "done, reply lost")
		s.carryOut(op)
		op.reply <- simReply{err: errSim}
	case fate == 2:
		s.note(op, "done, tried again")
		r := s.carryOut(op)
		if op.kind == opPut && r.err == nil && !s.replaces {
			r.err = store.ErrExist
		}
		op.reply <- r
	case fate == 3:
		s.note(op, "done, and again later")
		r := s.carryOut(op)
		s.late = append(s.late, op)
		op.reply <- r
	default:
		s.note(op, "fails, done later")
		s.late = append(s.late, op)
		op.reply <- simReply{err: errSim}
	}
}

// note writes the log, and counts what went wrong by what it was.
func (s *simStore) note(op *simOp, what string) {
	if what != "" || op.key == "" || op.class() != op.kind+" sessions.<sign>" {
		s.log = append(s.log, simEvent{time.Now(), op.h.name, what, op})
	}
	if what != "" {
		s.stats[what+": "+op.class()]++
	}
}

// class is what an operation is in the protocol.
func (op *simOp) class() string {
	key, _, _ := strings.Cut(op.key, "/")
	if i := strings.LastIndexByte(op.key, '.'); i >= 0 {
		key += op.key[i:]
		if strings.HasPrefix(op.key, sessionsPrefix) && !strings.HasSuffix(key, begunSuffix) && !strings.HasSuffix(key, givenUpSuffix) {
			key = "sessions.<sign>"
		}
	}
	return op.kind + " " + key
}

// carryOutLate does one of the operations that nobody waits for any more.
func (s *simStore) carryOutLate(i int) {
	op := s.late[i]
	s.late = slices.Delete(s.late, i, i+1)
	s.note(op, "now done late")
	s.carryOut(op)
}

// ready takes the operations that may be served, in an order that does not depend on the Go scheduler. Those that nobody
// waits for are lost, or carried out late.
func (s *simStore) ready() []*simOp {
	s.mu.Lock()
	defer s.mu.Unlock()
	slices.SortStableFunc(s.pending, func(a, b *simOp) int {
		return cmp.Or(cmp.Compare(a.h.no, b.h.no), cmp.Compare(a.kind, b.kind), cmp.Compare(a.key, b.key))
	})
	var ready []*simOp
	s.pending = slices.DeleteFunc(s.pending, func(op *simOp) bool {
		if op.orphan {
			s.forget(op)
		} else if !time.Now().Before(op.h.until) {
			ready = append(ready, op)
		}
		return op.orphan
	})
	return ready
}

// forget drops an operation, or carries it out some time.
func (s *simStore) forget(op *simOp) {
	if (op.kind == opPut || op.kind == opDelete) && s.rng.IntN(3) == 0 {
		s.late = append(s.late, op)
	}
}

// take serves one of the pending operations.
func (s *simStore) take(op *simOp) {
	s.mu.Lock()
	s.pending = slices.DeleteFunc(s.pending, func(o *simOp) bool { return o == op })
	s.mu.Unlock()
	s.serve(op)
}

// crash ends a process: nothing it does from now on has an effect, but for what is on its way.
func (s *simStore) crash(h *simHandle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h.dead = true
	s.log = append(s.log, simEvent{time.Now(), h.name, "crashes", nil})
	s.pending = slices.DeleteFunc(s.pending, func(op *simOp) bool {
		if op.h != h {
			return false
		}
		s.stats["crash before: "+op.class()]++
		s.forget(op)
		op.reply <- simReply{err: errCrashed}
		return true
	})
}
