package recovery

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// TestWALBlocks compares what is read of the pages in a server's WAL with what pg_waldump says.
func TestWALBlocks(t *testing.T) { oldestAndNewest(t, testWALBlocks) }

func testWALBlocks(t *testing.T, s *source) {
	s.sql("create table t (i int primary key, x text) with (fillfactor = 70)", "create index on t using gin (string_to_array(x, ' '))",
		"create table h (i int)", "create index on h using hash (i)",
		"insert into t select i, repeat('word ' || i || ' ', 20) from generate_series(1, 20000) i", "checkpoint",
		"insert into h select generate_series(1, 30000)", "update t set x = x || 'y' where i % 3 = 0", "vacuum t", "delete from t where i % 7 = 0", "vacuum freeze t, h",
		"create table big as select repeat('x', 1000) x from generate_series(1, 20000)", "set wal_compression = on", "checkpoint", "update t set x = 'z' where i % 5 = 0", "drop table big")
	s.switchWAL()
	s.stop()
	files, err := filepath.Glob(filepath.Join(s.archive, "0*"))
	if err != nil || len(files) < 3 {
		t.Fatalf("%d segments, %v", len(files), err)
	}
	slices.Sort(files)
	got, want := map[string]int{}, map[string]int{}
	var blocks pg.WALBlocks
	for _, f := range files {
		name, err := pg.ParseWALName(filepath.Base(f))
		if err != nil || name.Kind != pg.WALSegment {
			t.Fatalf("%s: %v", f, err)
		}
		seg, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		err = blocks.Segment(seg, name, pg.SegmentSize(len(seg)), func(at pg.LSN, b pg.BlockRef) {
			got[fmt.Sprintf("%s %d/%d/%d %d %d %v", at, b.Tablespace, b.Database, b.Relation, b.Fork, b.Block, b.Image)]++
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	out, _ := s.command("pg_waldump", "--path", s.archive, filepath.Base(files[0]), filepath.Base(files[len(files)-1])).Output()
	for line := range strings.Lines(string(out)) {
		_, rest, _ := strings.Cut(line, " lsn: ")
		lsn, rest, _ := strings.Cut(rest, ",")
		at, err := pg.ParseLSN(lsn)
		if err != nil {
			t.Fatalf("pg_waldump says %q", line)
		}
		for _, ref := range strings.Split(rest, "blkref #")[1:] {
			want[waldumpRef(t, at, ref)]++
		}
	}
	if len(want) < 5000 || !maps.Equal(got, want) {
		t.Errorf("%d pages, pg_waldump has %d", len(got), len(want))
		for ref := range want {
			if got[ref] != want[ref] {
				t.Fatalf("%s: %d times, not %d", ref, got[ref], want[ref])
			}
		}
	}
}

// waldumpRef reads "0: rel 1663/5/16384 fork fsm blk 7 FPW".
func waldumpRef(t *testing.T, at pg.LSN, ref string) string {
	t.Helper()
	fork, image := 0, strings.Contains(ref, "FPW")
	words := strings.Fields(strings.NewReplacer(",", " ").Replace(ref))
	if i := slices.Index(words, "fork"); i > 0 {
		fork = slices.Index([]string{"main", "fsm", "vm", "init"}, words[i+1])
		words = slices.Delete(words, i, i+2)
	}
	var no, block int
	var relation string
	if _, err := fmt.Sscanf(strings.Join(words, " "), "%d: rel %s blk %d", &no, &relation, &block); err != nil {
		t.Fatalf("%q: %v", ref, err)
	}
	return fmt.Sprintf("%s %s %d %d %v", at, relation, fork, block, image)
}

// TestWALPages: pages that WAL has an image of, or makes anew, are not wanted, nor any of them twice, and neighbours come together.
func TestWALPages(t *testing.T) {
	s := newSource(t, "full_page_writes = off")
	s.sql("create table t as select i, repeat('x', 100) x from generate_series(1, 20000) i", "checkpoint")
	s.switchWAL()
	s.sql("update t set x = '' where i % 100 = 0") // old versions lie all over the table, new ones on new pages
	path := s.sql("select pg_relation_filepath('t')")
	s.switchWAL()
	s.stop()
	files, _ := filepath.Glob(filepath.Join(s.archive, "0*"))
	slices.Sort(files)
	seg, err := os.ReadFile(files[len(files)-1])
	if err != nil {
		t.Fatal(err)
	}
	name, _ := pg.ParseWALName(filepath.Base(files[len(files)-1]))
	var w walPages
	file := func(b pg.BlockRef) (string, int64, bool) { _, name, off, ok := b.File(); return name, off, ok }
	spans, err := w.of(seg, name, pg.SegmentSize(len(seg)), file)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	var bytes int64
	for _, s := range spans {
		if s.Path == path {
			n++
			bytes += s.Len
			if s.Off%page != 0 || s.Len > pagesInRun*page || s.Off/page/pagesInRun != (s.Off+s.Len-1)/page/pagesInRun {
				t.Errorf("%+v", s)
			}
		}
	}
	if n < 10 || bytes < 100*page {
		t.Errorf("%d spans, %d bytes of %s", n, bytes, path)
	}
	again, err := w.of(seg, name, pg.SegmentSize(len(seg)), file)
	if err != nil || len(again) > 0 {
		t.Errorf("%d spans that were named before, %v", len(again), err)
	}
}

// TestWALAheadEnds: whenever the daemon ends, reading ahead does.
func TestWALAheadEnds(t *testing.T) {
	bare, err := openBare(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	synctest.Test(t, func(t *testing.T) {
		a := newWALAhead(&daemon{log: slog.New(slog.DiscardHandler), bare: bare}, &repo.Backup{Manifest: &repo.Manifest{SegmentSize: pg.DefaultSegmentSize}})
		ctx, cancel := context.WithCancel(t.Context())
		ended := false
		go func() {
			a.run(stoppedInTime{ctx}, false)
			ended = true
		}()
		synctest.Wait() // all wait for work
		cancel()
		synctest.Wait()
		if !ended {
			t.Fatal("it goes on")
		}
	})
}

// stoppedInTime is a context that has ended, and whose functions for that are stopped before their turn comes.
type stoppedInTime struct{ context.Context }

func (stoppedInTime) AfterFunc(func()) (stop func() bool) { return func() bool { return true } }

// Value hides the context that package context would know.
func (stoppedInTime) Value(any) any { return nil }
