package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// ErrNoAnswer: a store neither answered nor gave an error that is final for as long as a caller was to wait.
var ErrNoAnswer = errors.New("no answer")

const (
	// underWay bounds the questions that wait for an answer, those among them that nobody waits for any more: a question to
	// a file system that hangs keeps a thread of the process.
	underWay = 64
	// Between two attempts a question pauses, the longer the more have failed.
	firstPause, longestPause = 20 * time.Millisecond, time.Second
	// noticeAfter is how long a question waits before the log tells of it.
	noticeAfter = 3 * time.Second
)

// Patient has readers wait for a store that does not answer, or with an error that may pass, and no longer than a limit:
// then they get ErrNoAnswer. Writers get what the store gives, within the same limit. Whoever's context ends waits no longer,
// whatever the medium is doing.
type Patient struct {
	Store
	limit time.Duration
	log   *slog.Logger
	slots chan struct{}

	mu     sync.Mutex
	waits  map[*Wait]struct{}
	silent bool // the log told that it does not answer
}

// NewPatient makes readers of s wait up to limit.
func NewPatient(s Store, limit time.Duration, log *slog.Logger) *Patient {
	if f, ok := s.(*File); ok {
		f.KeepOpen()
	}
	return &Patient{Store: s, limit: limit, log: log, slots: make(chan struct{}, underWay), waits: map[*Wait]struct{}{}}
}

// Wait is a question without an answer yet.
type Wait struct {
	Key   string // or a prefix that is listed
	Since time.Time
	Err   error // what came instead of an answer; nil: nothing came
}

func (w Wait) String() string {
	if w.Err == nil {
		return w.Key
	}
	return fmt.Sprintf("%s: %v", w.Key, w.Err)
}

// Waiting returns the question that has waited longest, and false if none has waited long enough for the log.
func (p *Patient) Waiting() (w Wait, long bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for x := range p.waits {
		if w.Since.IsZero() || x.Since.Before(w.Since) {
			w = *x
		}
	}
	return w, !w.Since.IsZero() && time.Since(w.Since) >= noticeAfter
}

func (p *Patient) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	if f, ok := p.Store.(*File); ok {
		if b, ok := f.Cached(key, off, n); ok {
			return b, nil
		}
	}
	return persist(ctx, p, key, func(ctx context.Context, _ func()) ([]byte, error) { return p.Store.Get(ctx, key, off, n) })
}

// Close closes the store, if that can be closed.
func (p *Patient) Close() error {
	if c, ok := p.Store.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

func (p *Patient) Put(ctx context.Context, key string, body []byte) error {
	body = bytes.Clone(body) // it may be written after the caller has gone
	return p.attempt(ctx, key, func(ctx context.Context) error { return p.Store.Put(ctx, key, body) })
}

func (p *Patient) Delete(ctx context.Context, key string) error {
	return p.attempt(ctx, key, func(ctx context.Context) error { return p.Store.Delete(ctx, key) })
}

// attempt makes one.
func (p *Patient) attempt(ctx context.Context, key string, do func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, p.limit, ErrNoAnswer)
	defer cancel()
	w := p.begin(key)
	defer p.end(w)
	if _, err := once(ctx, p, w, func() (struct{}, error) { return struct{}{}, do(ctx) }); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

// List lists all before it yields the first object. It may take longer than the limit as long as objects come.
func (p *Patient) List(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		all, err := persist(ctx, p, prefix, func(ctx context.Context, alive func()) (all []Object, err error) {
			for o, err := range p.Store.List(ctx, prefix) {
				if err != nil {
					return nil, err
				}
				alive()
				all = append(all, o)
			}
			return all, nil
		})
		for _, o := range all {
			if !yield(o, nil) {
				return
			}
		}
		if err != nil {
			yield(Object{}, err)
		}
	}
}

// persist asks until there is an answer, a final error, or the limit is over. ask calls alive when it gets on.
func persist[T any](ctx context.Context, p *Patient, key string, ask func(ctx context.Context, alive func()) (T, error)) (answer T, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	over := time.AfterFunc(p.limit, func() { cancel(ErrNoAnswer) })
	defer over.Stop()
	alive := func() { over.Reset(p.limit) }
	w := p.begin(key)
	defer p.end(w)
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		answer, err = once(ctx, p, w, func() (T, error) { return ask(ctx, alive) })
		if err == nil || ctx.Err() == nil && final(err) {
			p.answered()
			return answer, err
		}
		p.note(w, err)
		if err := rest(ctx, pause); err != nil {
			return answer, p.givenUp(w, err)
		}
	}
}

// final tells an answer from what may pass: that an object is not there, or ends too early, or may not be read.
func final(err error) bool {
	return !errors.Is(err, ErrOutOfReach) && slices.ContainsFunc([]error{ErrNotExist, io.ErrUnexpectedEOF, fs.ErrPermission, fs.ErrInvalid}, func(e error) bool { return errors.Is(err, e) })
}

// once waits for one answer, or until ctx ends: the question may go on after that, and keeps its slot.
func once[T any](ctx context.Context, p *Patient, w *Wait, ask func() (T, error)) (answer T, err error) {
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return answer, context.Cause(ctx)
	}
	done := make(chan struct{})
	var late T
	var lateErr error
	go func() {
		defer func() { <-p.slots; close(done) }()
		late, lateErr = ask()
	}()
	notice := time.NewTimer(noticeAfter)
	defer notice.Stop()
	for {
		select {
		case <-done:
			return late, lateErr
		case <-notice.C:
			p.tell(w)
		case <-ctx.Done():
			return answer, context.Cause(ctx)
		}
	}
}

func rest(ctx context.Context, pause time.Duration) error {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

func (p *Patient) begin(key string) *Wait {
	w := &Wait{Key: key, Since: time.Now()}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waits[w] = struct{}{}
	return w
}

func (p *Patient) end(w *Wait) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.waits, w)
}

// note remembers what came instead of an answer, unless it is only that the caller has gone or the limit is over.
func (p *Patient) note(w *Wait, err error) {
	p.mu.Lock()
	if !errors.Is(err, ErrNoAnswer) && !errors.Is(err, context.Canceled) {
		w.Err = err
	}
	p.mu.Unlock()
	if time.Since(w.Since) >= noticeAfter {
		p.tell(w)
	}
}

// tell logs once that the store does not answer.
func (p *Patient) tell(w *Wait) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.silent {
		p.silent = true
		p.log.Warn("the repository does not answer: who reads from it waits", "key", w.Key, "since", w.Since, "error", w.Err, "limit", p.limit)
	}
}

func (p *Patient) answered() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.silent {
		p.silent = false
		p.log.Info("the repository answers again")
	}
}

// givenUp is the error of a question that nobody waits for any more.
func (p *Patient) givenUp(w *Wait, cause error) error {
	if !errors.Is(cause, ErrNoAnswer) {
		return cause
	}
	p.tell(w)
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.Err == nil {
		return fmt.Errorf("read %s: %w for %s", w.Key, ErrNoAnswer, p.limit)
	}
	return fmt.Errorf("read %s: %w for %s: %w", w.Key, ErrNoAnswer, p.limit, w.Err)
}
