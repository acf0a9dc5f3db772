package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// ailing is a store that does first what the test says.
type ailing struct {
	Store
	asked atomic.Int64
	first atomic.Pointer[func(ctx context.Context) error]
}

// ails says what each call does first.
func (a *ailing) ails(first func(ctx context.Context) error) { a.first.Store(&first) }

func (a *ailing) ail(ctx context.Context) error { return (*a.first.Load())(ctx) }

func (a *ailing) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	a.asked.Add(1)
	if err := a.ail(ctx); err != nil {
		return nil, err
	}
	return a.Store.Get(ctx, key, off, n)
}

func (a *ailing) Put(ctx context.Context, key string, body []byte) error {
	if err := a.ail(ctx); err != nil {
		return err
	}
	return a.Store.Put(ctx, key, body)
}

func (a *ailing) Delete(ctx context.Context, key string) error {
	if err := a.ail(ctx); err != nil {
		return err
	}
	return a.Store.Delete(ctx, key)
}

func (a *ailing) List(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		for o, err := range a.Store.List(ctx, prefix) {
			if fault := a.ail(ctx); fault != nil {
				err = fault
			}
			if !yield(o, err) {
				return
			}
		}
	}
}

const patience = 10 * time.Second

// patientTest has a store with two objects; the clock is synctest's.
func patientTest(t *testing.T, test func(t *testing.T, a *ailing, p *Patient, log *bytes.Buffer)) {
	synctest.Test(t, func(t *testing.T) {
		a := &ailing{Store: NewMem()}
		a.ails(func(context.Context) error { return nil })
		put(t, a, "a", "hello")
		put(t, a, "b", "world")
		defer time.Sleep(4 * time.Hour) // what nobody waits for any more ends
		var log bytes.Buffer
		test(t, a, NewPatient(a, patience, slog.New(slog.NewTextHandler(&log, nil))), &log)
	})
}

// TestPatientOutlasts: an outage that is shorter than the limit is a slow answer, and the log tells of it and of its end.
func TestPatientOutlasts(t *testing.T) {
	outages := map[string]func(end time.Time) func(context.Context) error{
		"errors": func(end time.Time) func(context.Context) error {
			return func(context.Context) error {
				if time.Now().Before(end) {
					return syscall.EIO
				}
				return nil
			}
		},
		"out of reach": func(end time.Time) func(context.Context) error {
			return func(context.Context) error {
				if time.Now().Before(end) {
					return fmt.Errorf("%w: %w", ErrOutOfReach, ErrNotExist)
				}
				return nil
			}
		},
		"silence": func(end time.Time) func(context.Context) error {
			return func(context.Context) error { time.Sleep(time.Until(end)); return nil }
		},
	}
	for name, outage := range outages {
		t.Run(name, func(t *testing.T) {
			patientTest(t, func(t *testing.T, a *ailing, p *Patient, log *bytes.Buffer) {
				began := time.Now()
				a.ails(outage(began.Add(patience * 8 / 10)))
				go func() {
					time.Sleep(noticeAfter + time.Second)
					w, long := p.Waiting()
					if !long || !w.Since.Equal(began) || w.Key != "a" || (w.Err == nil) != (name == "silence") {
						t.Errorf("it waits for %v since %v (%v)", w, w.Since.Sub(began), long)
					}
				}()
				if got := get(t, p, "a"); got != "hello" {
					t.Errorf("got %q", got)
				}
				if took := time.Since(began); took < patience*8/10 || took > patience {
					t.Errorf("it took %v", took)
				}
				if _, long := p.Waiting(); long {
					t.Error("it still waits")
				}
				for _, want := range []string{"does not answer", "answers again"} {
					if n := strings.Count(log.String(), want); n != 1 {
						t.Errorf("the log says %q %d times:\n%s", want, n, log)
					}
				}
			})
		})
	}
}

// TestPatientGivesUp: after the limit, whatever the store does; and a caller who has gone does not wait for it.
func TestPatientGivesUp(t *testing.T) {
	for name, first := range map[string]func(context.Context) error{
		"errors":  func(context.Context) error { return syscall.EIO },
		"silence": func(context.Context) error { time.Sleep(time.Hour); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			patientTest(t, func(t *testing.T, a *ailing, p *Patient, _ *bytes.Buffer) {
				a.ails(first)
				began := time.Now()
				_, err := p.Get(t.Context(), "a", 0, -1)
				if took := time.Since(began); !errors.Is(err, ErrNoAnswer) || took != patience {
					t.Errorf("after %v: %v", took, err)
				}
				if errors.Is(err, syscall.EIO) != (name == "errors") {
					t.Errorf("the error does not tell the cause: %v", err)
				}
				for _, err = range p.List(t.Context(), "") {
				}
				if !errors.Is(err, ErrNoAnswer) {
					t.Errorf("list: %v", err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, err := p.Get(ctx, "a", 0, -1); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrNoAnswer) {
					t.Errorf("a caller who has gone got %v", err)
				}
			})
		})
	}
}

// TestPatientWrites: a writer gets the store's error at once, and waits for a silent one as long as a reader does.
func TestPatientWrites(t *testing.T) {
	patientTest(t, func(t *testing.T, a *ailing, p *Patient, _ *bytes.Buffer) {
		for name, write := range map[string]func() error{
			"put":    func() error { return p.Put(t.Context(), "c", []byte("!")) },
			"delete": func() error { return p.Delete(t.Context(), "a") },
		} {
			a.ails(func(context.Context) error { return syscall.EIO })
			began := time.Now()
			if err := write(); !errors.Is(err, syscall.EIO) || time.Since(began) > 0 {
				t.Errorf("%s: %v after %v", name, err, time.Since(began))
			}
			a.ails(func(context.Context) error { time.Sleep(time.Hour); return nil })
			if err := write(); !errors.Is(err, ErrNoAnswer) || time.Since(began) != patience {
				t.Errorf("%s: %v after %v", name, err, time.Since(began))
			}
		}
	})
}

// TestPatientAsksOnce where the answer is final.
func TestPatientAsksOnce(t *testing.T) {
	for _, final := range []error{nil, ErrNotExist, io.ErrUnexpectedEOF, syscall.EACCES} {
		patientTest(t, func(t *testing.T, a *ailing, p *Patient, _ *bytes.Buffer) {
			a.ails(func(context.Context) error { return final })
			if _, err := p.Get(t.Context(), "a", 0, -1); !errors.Is(err, final) || a.asked.Load() != 1 {
				t.Errorf("%v after %d questions, want %v", err, a.asked.Load(), final)
			}
		})
	}
}

// TestPatientLists: a long list is no silence, and one that broke off is begun anew.
func TestPatientLists(t *testing.T) {
	patientTest(t, func(t *testing.T, a *ailing, p *Patient, _ *bytes.Buffer) {
		steps := 0
		a.ails(func(context.Context) error {
			time.Sleep(patience * 4 / 10)
			if steps++; steps == 2 {
				return syscall.EIO
			}
			return nil
		})
		if got := strings.Join(list(t, p, ""), " "); got != "a b" || steps != 4 {
			t.Errorf("listed %s in %d steps", got, steps)
		}
	})
}

// TestPatientKeepsFewThreads: of a store that hangs no more is asked than there are slots, and once it answers all is well.
func TestPatientKeepsFewThreads(t *testing.T) {
	patientTest(t, func(t *testing.T, a *ailing, p *Patient, _ *bytes.Buffer) {
		end := time.Now().Add(time.Hour)
		a.ails(func(context.Context) error { time.Sleep(time.Until(end)); return nil })
		failed := make(chan error)
		for range 3 * underWay {
			go func() {
				_, err := p.Get(t.Context(), "a", 0, -1)
				failed <- err
			}()
		}
		for range 3 * underWay {
			if err := <-failed; !errors.Is(err, ErrNoAnswer) {
				t.Error(err)
			}
		}
		if n := a.asked.Load(); n != underWay {
			t.Errorf("%d questions are under way, want %d", n, underWay)
		}
		time.Sleep(time.Until(end))
		if got := get(t, p, "b"); got != "world" {
			t.Errorf("got %q", got)
		}
	})
}
