package repo

import "testing"

// TestCacheKeepsWhatIsTooLarge looks names up in a directory whose listing alone is over the cache's limit, as overlays and
// mounts do: from the root down, again and again.
func TestCacheKeepsWhatIsTooLarge(t *testing.T) {
	c := newCache[string, int](100)
	costs := map[string]int64{"root": 1, "base": 2, "database": 1000, "other": 1000}
	loads := map[string]int{}
	get := func(key string) {
		if _, err := c.get(key, func() (int, int64, error) { loads[key]++; return 0, costs[key], nil }); err != nil {
			t.Fatal(err)
		}
	}
	for range 100 {
		get("root")
		get("base")
		get("database")
	}
	if loads["database"] > 2 || loads["root"] > 2 || loads["base"] > 2 {
		t.Errorf("loaded %v", loads)
	}
	get("other")
	if get("database"); loads["database"] < 2 {
		t.Error("two listings over the limit were kept")
	}
}
