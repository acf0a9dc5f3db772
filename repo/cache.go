package repo

import (
	"container/list"
	"sync"
)

// cache keeps the values that were used last, up to a total cost, and loads a missing one once however many ask.
type cache[K comparable, V any] struct {
	max int64

	mu    sync.Mutex
	cost  int64
	items map[K]*list.Element // of *cached[K, V]
	order list.List           // most recently used first
}

type cached[K comparable, V any] struct {
	key    K
	loaded chan struct{} // closed when value or err is there
	value  V
	err    error
	cost   int64 // 0 while it is being loaded: such an item stays
}

func newCache[K comparable, V any](max int64) *cache[K, V] {
	return &cache[K, V]{max: max, items: map[K]*list.Element{}}
}

// get returns the value of key, calling load if nobody has it. What load returned as an error is not kept: who waited
// for a load of somebody else that failed tries for itself, for the failure may be the other's cancelled context.
func (c *cache[K, V]) get(key K, load func() (value V, cost int64, err error)) (V, error) {
	for {
		it, mine := c.claim(key)
		if mine {
			var cost int64
			it.value, cost, it.err = load()
			c.settle(it, cost)
			close(it.loaded)
			return it.value, it.err
		}
		<-it.loaded
		if it.err == nil {
			return it.value, nil
		}
	}
}

// has tells whether the value of key is there, or being loaded.
func (c *cache[K, V]) has(key K) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.items[key]
	return ok
}

// forget drops the value of key. One that is being loaded stays.
func (c *cache[K, V]) forget(key K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.items[key]; ok && e.Value.(*cached[K, V]).cost > 0 {
		c.drop(e)
	}
}

// claim returns the item of key; mine means that the caller has to load it.
func (c *cache[K, V]) claim(key K) (it *cached[K, V], mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.items[key]; ok {
		c.order.MoveToFront(e)
		return e.Value.(*cached[K, V]), false
	}
	it = &cached[K, V]{key: key, loaded: make(chan struct{})}
	c.items[key] = c.order.PushFront(it)
	return it, true
}

// settle accounts for an item that was loaded and drops the least recently used ones over the limit. An item that is over
// the limit by itself counts less, or it would drive out all others and they it: one such is kept.
func (c *cache[K, V]) settle(it *cached[K, V], cost int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if it.err != nil {
		c.drop(c.items[it.key])
		return
	}
	it.cost = min(cost, max(1, c.max/4*3))
	c.cost += it.cost
	for e := c.order.Back(); e != nil && c.cost > c.max; {
		prev := e.Prev()
		if old := e.Value.(*cached[K, V]); old.cost > 0 && old != it {
			c.drop(e)
		}
		e = prev
	}
}

// drop forgets an item. Caller holds mu.
func (c *cache[K, V]) drop(e *list.Element) {
	it := c.order.Remove(e).(*cached[K, V])
	delete(c.items, it.key)
	c.cost -= it.cost
}
