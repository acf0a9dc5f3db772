package ingest

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// startStream streams until the test ends, or the function that it returns is called.
func startStream(t *testing.T, r *repo.Repository, s *testServer) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- StreamWAL(ctx, r, StreamOptions{Cluster: "main", ConnString: s.connString(), CreateSlot: true})
	}()
	stop = func() {
		cancel()
		if err, running := <-done; running {
			close(done)
			if err != nil {
				t.Errorf("stream: %v", err)
			}
		}
	}
	t.Cleanup(stop)
	eventually(t, "the stream has begun", func() bool {
		return s.sql("select count(*) from pg_stat_replication where application_name = 'pgthaw' and state = 'streaming'") == "1"
	})
	return stop
}

// segments are the whole segments that the repository has.
func segments(t testing.TB, r *repo.Repository) (names []string) {
	t.Helper()
	all, err := r.WALNames(t.Context(), "main")
	if errors.Is(err, repo.ErrNoCluster) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range all {
		if n.Kind == pg.WALSegment {
			names = append(names, n.String())
		}
	}
	return names
}

// arrives waits until the repository has the segment that the server has just left.
func arrives(t testing.TB, r *repo.Repository, s *testServer) {
	t.Helper()
	want := s.sql("select pg_walfile_name(pg_current_wal_lsn() - 1)")
	eventually(t, want+" is in the repository", func() bool {
		all := segments(t, r)
		return len(all) > 0 && all[len(all)-1] >= want
	})
}

// checkNoGap wants the repository to have each segment of timeline 1 between its first and its last.
func checkNoGap(t testing.TB, r *repo.Repository, size pg.SegmentSize) {
	t.Helper()
	var last uint64
	for _, s := range segments(t, r) {
		name, err := pg.ParseWALName(s)
		if err != nil {
			t.Fatal(err)
		}
		segno, err := name.SegmentNo(size)
		if err != nil {
			t.Fatal(err)
		}
		if last != 0 && segno != last+1 {
			t.Errorf("gap before %s", s)
		}
		last = segno
	}
}

func TestStreamWAL(t *testing.T) {
	for _, bin := range oldestAndNewest(t) {
		t.Run(testName(bin), func(t *testing.T) {
			t.Parallel()
			s := startArchiving(t, bin, "--wal-segsize=1")
			r := newRepository(t)
			stop := startStream(t, r, s)
			s.switchWAL(3)
			arrives(t, r, s)
			checkFlushed(t, r, s)

			stop()
			s.switchWAL(3)
			startStream(t, r, s)
			arrives(t, r, s)

			s.stop(syscall.SIGINT)
			s.start()
			s.switchWAL(2)
			arrives(t, r, s)
			checkNoGap(t, r, 1<<20)
			eventually(t, "the archiver is done", func() bool { return len(s.archivedFiles()) >= 8 })
			checkSameAsArchive(t, r, s, 7)
		})
	}
}

// checkFlushed wants the server to know of what is in the repository and of no more.
func checkFlushed(t *testing.T, r *repo.Repository, s *testServer) {
	t.Helper()
	all := segments(t, r)
	newest := all[len(all)-1]
	eventually(t, "the slot has moved on", func() bool {
		return s.sql("select pg_walfile_name(restart_lsn - 1) from pg_replication_slots") >= newest
	})
	if got := s.sql("select pg_walfile_name(flush_lsn - 1) from pg_stat_replication"); got > newest {
		t.Errorf("flushed through %s, but the repository ends with %s", got, newest)
	}
	if s.sql("select count(replay_lsn) from pg_stat_replication where replay_lsn > '0/0'") != "0" {
		t.Error("the stream reports WAL as replayed")
	}
}

func TestStreamNeedsSlot(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t))
	err := StreamWAL(t.Context(), newRepository(t), StreamOptions{Cluster: "main", ConnString: s.connString()})
	var hinted *Error
	if !errors.Is(err, ErrRefused) || !errors.As(err, &hinted) || hinted.Hint() == "" {
		t.Errorf("got %v", err)
	}
}

func TestStreamFollowsPromotion(t *testing.T) {
	t.Parallel()
	s := startServer(t, oldest(t), "--wal-segsize=1")
	sb := s.standby()
	r := newRepository(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- StreamWAL(ctx, r, StreamOptions{Cluster: "main", ConnString: sb.connString(), CreateSlot: true})
	}()
	s.switchWAL(2)
	s.sql("insert into w select generate_series(1, 100)")
	target := s.sql("select pg_current_wal_flush_lsn()")
	eventually(t, "the standby has sent everything", func() bool {
		return sb.sql("select coalesce(bool_or(sent_lsn >= '"+target+"'), false) from pg_stat_replication") == "t"
	})
	s.stop(syscall.SIGQUIT)
	sb.sql("select pg_promote()")
	sb.switchWAL(2)
	arrives(t, r, sb)
	cancel()
	if err := <-done; err != nil {
		t.Errorf("stream: %v", err)
	}
	kinds := map[pg.WALKind]int{}
	names, err := r.WALNames(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if n.Kind != pg.WALSegment {
			t.Log(n)
			kinds[n.Kind]++
		}
	}
	if kinds[pg.WALHistory] != 1 || kinds[pg.WALPartial] != 1 {
		t.Errorf("history and partial segment: %v", kinds)
	}
}

func TestResume(t *testing.T) {
	const none = ^uint64(0)
	two := course{{2, none}, {1, 10}}
	for _, c := range []struct {
		name     string
		course   course
		slot     place
		have     []place
		slotOnly bool
		want     place
		early    bool
	}{
		{"empty repository", course{{1, none}}, place{1, 5}, nil, false, place{1, 5}, false},
		{"after the newest", course{{1, none}}, place{1, 5}, []place{{1, 5}, {1, 6}}, false, place{1, 7}, false},
		{"a hole that the slot still keeps", course{{1, none}}, place{1, 5}, []place{{1, 5}, {1, 8}}, false, place{1, 6}, false},
		{"slot made anew", course{{1, none}}, place{1, 9}, []place{{1, 5}}, false, place{1, 6}, true},
		{"and that WAL is gone", course{{1, none}}, place{1, 9}, []place{{1, 5}}, true, place{1, 9}, false},
		{"slot made after a promotion", two, place{2, 12}, []place{{1, 7}}, false, place{1, 8}, true},
		{"older timeline is complete", two, place{2, 12}, []place{{1, 9}}, false, place{1, 10}, true},
		{"WAL that the course does not go through", two, place{2, 12}, []place{{1, 9}, {1, 10}, {1, 11}}, false, place{1, 10}, true},
		{"slot on the older timeline", two, place{1, 8}, []place{{1, 8}, {1, 9}, {1, 10}}, false, place{1, 10}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var names []pg.WALName
			for _, p := range c.have {
				names = append(names, pg.SegmentName(p.timeline, p.segno, 1<<20))
			}
			got, early := c.course.resume(c.slot, newArchived(names, 1<<20), c.slotOnly)
			if got != c.want || early != c.early {
				t.Errorf("got %v early %v, want %v early %v", got, early, c.want, c.early)
			}
		})
	}
}
