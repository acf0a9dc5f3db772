package recovery

import (
	"reflect"
	"testing"

	"pgthaw/repo"
)

func TestFirstBytes(t *testing.T) {
	all := []repo.Span{{Path: "a", Len: 10}, {Path: "b", Len: 5}, {Path: "a", Off: 20, Len: 1}}
	for n, want := range map[int64]int{0: 0, 9: 0, 10: 1, 14: 1, 15: 2, 16: 3, 100: 3} {
		first, rest := firstBytes(all, n)
		if len(first) != want || !reflect.DeepEqual(append(append([]repo.Span{}, first...), rest...), all) {
			t.Errorf("of %d bytes: %v, %v", n, first, rest)
		}
	}
}
