package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Mem keeps objects in memory, by the same contract, for as long as the process lives.
type Mem struct {
	mu      sync.RWMutex
	objects map[string]memObject
}

type memObject struct {
	body     []byte
	modified time.Time
}

// NewMem returns an empty store.
func NewMem() *Mem { return &Mem{objects: make(map[string]memObject)} }

func (s *Mem) Put(ctx context.Context, key string, body []byte) error {
	err := errors.Join(checkKey(key), ctx.Err())
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.objects[key]; ok && err == nil {
		err = ErrExist
	}
	if err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	s.objects[key] = memObject{body: bytes.Clone(body), modified: time.Now()}
	return nil
}

func (s *Mem) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	err := errors.Join(checkKey(key), ctx.Err())
	o, ok := s.object(key)
	if !ok && err == nil {
		err = ErrNotExist
	}
	if err == nil {
		off, n, err = extent(int64(len(o.body)), off, n)
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	return append([]byte{}, o.body[off:off+n]...), nil
}

func (s *Mem) object(key string) (memObject, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, ok := s.objects[key]
	return o, ok
}

func (s *Mem) keys() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Sorted(maps.Keys(s.objects))
}

func (s *Mem) List(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		for _, key := range s.keys() {
			if err := ctx.Err(); err != nil {
				yield(Object{}, fmt.Errorf("list %s: %w", prefix, err))
				return
			}
			o, ok := s.object(key)
			if !ok || !strings.HasPrefix(key, prefix) {
				continue
			}
			if !yield(Object{Key: key, Size: int64(len(o.body)), Modified: o.modified}, nil) {
				return
			}
		}
	}
}

func (s *Mem) Delete(ctx context.Context, key string) error {
	if err := errors.Join(checkKey(key), ctx.Err()); err != nil {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, key)
	return nil
}
