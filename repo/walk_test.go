package repo

import (
	"testing"
	"testing/synctest"
	"time"
)

// places are the pieces that a backup consists of.
func places(t testing.TB, b *Backup) map[Ref]bool {
	t.Helper()
	all := make(chan Ref, 1<<16)
	w := newPieceWalk(b.r, func(_ byte, ref Ref) error { all <- ref; return nil })
	if err := w.backup(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	close(all)
	set := map[Ref]bool{}
	for ref := range all {
		set[ref] = true
	}
	return set
}

// What no listed backup refers to any more, no later one does: a writer finds content again where its prior backup has it, not
// wherever a pack that this uses has it.
func TestWriterRefersToWhatIsReferredTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newMemRepository(t)
		gone, stays := incompressible(40), pagesOf(7, 20)
		first := writeTestBackup(t, r, testFiles{"pgdata/a": gone, "pgdata/b": stays}, nil)
		time.Sleep(time.Second)
		second := writeTestBackup(t, r, testFiles{"pgdata/b": stays}, first)
		time.Sleep(time.Second)
		third := writeTestBackup(t, r, testFiles{"pgdata/b": stays, "pgdata/c": gone, "pgdata/d": stays}, second)

		may := places(t, second)
		again := 0
		for ref := range places(t, third) {
			if may[ref] {
				again++
			} else if ref.Pack.by() == second.Manifest.Root.Pack.by() || ref.Pack.by() == first.Manifest.Root.Pack.by() {
				t.Errorf("it refers to a piece at %d of pack %s, which its prior backup does not need", ref.Offset, ref.Pack)
			}
		}
		if again < 2 {
			t.Errorf("it has %d pieces in common with its prior backup", again)
		}
		checkFiles(t, third, testFiles{"pgdata/b": stays, "pgdata/c": gone, "pgdata/d": stays})
	})
}
