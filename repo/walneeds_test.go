package repo

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgthaw/repo/pg"
)

// walOf lists segments first to last of each timeline, and their history files.
func walOf(histories map[pg.Timeline][]pg.HistoryEntry, segments map[pg.Timeline][2]uint64) *walListing {
	w := &walListing{walTimes: walTimes{newTimelines(testSegmentSize), map[pg.Timeline]time.Time{}}, cluster: "main"}
	for tli := pg.Timeline(1); tli < 10; tli++ {
		if h, ok := histories[tli]; ok {
			w.histories[tli] = h
			w.objects = append(w.objects, walObject{name: pg.WALName{Kind: pg.WALHistory, Timeline: tli}, bytes: 1})
		}
		if run, ok := segments[tli]; ok {
			for no := run[0]; no <= run[1]; no++ {
				w.objects = append(w.objects, walObject{name: testSegment(tli, no), bytes: 100})
			}
		}
	}
	return w
}

// backupOn is one that needs segments first to last of a timeline.
func backupOn(id string, tli pg.Timeline, first, last uint64) *Manifest {
	return &Manifest{ID: id, Cluster: "main", Timeline: tli, StartLSN: pg.LSN(first*testSegmentSize + 0x28), StopLSN: pg.LSN(last*testSegmentSize + 0x100),
		WALFirst: testSegment(tli, first).String(), WALLast: testSegment(tli, last).String()}
}

// gone writes what goes: "1: 2-7" are segments 2 to 7 of timeline 1.
func gone(w *walListing, users ...walUser) string {
	var runs []string
	stays := w.needs(users)
	for _, r := range w.ranges(stays, stays) {
		first, err1 := pg.ParseWALName(r.First)
		last, err2 := pg.ParseWALName(r.Last)
		if err1 != nil || err2 != nil || r.Fate != WALGoes {
			continue
		}
		from, _ := first.SegmentNo(w.size)
		to, _ := last.SegmentNo(w.size)
		runs = append(runs, fmt.Sprintf("%s: %d-%d", r.Timeline, from, to))
	}
	return strings.Join(runs, ", ")
}

func TestWALNeeds(t *testing.T) {
	// Timeline 2 left 1 in segment 20, 3 left 1 in segment 8, 4 left 2 in segment 30.
	at := func(no uint64) pg.LSN { return pg.LSN(no*testSegmentSize + 0x8000) }
	histories := map[pg.Timeline][]pg.HistoryEntry{
		2: {{Timeline: 1, Switch: at(20)}},
		3: {{Timeline: 1, Switch: at(8)}},
		4: {{Timeline: 1, Switch: at(20)}, {Timeline: 2, Switch: at(30)}},
	}
	all := map[pg.Timeline][2]uint64{1: {1, 22}, 2: {20, 33}, 3: {8, 12}, 4: {30, 40}}
	a, b, c, d := backupOn("a", 1, 5, 6), backupOn("b", 1, 15, 16), backupOn("c", 2, 24, 25), backupOn("d", 4, 38, 39)
	for _, test := range []struct {
		name  string
		users []walUser
		want  string
	}{
		{"no backup", nil, ""},
		{"all", []walUser{{a, false}, {b, false}, {c, false}, {d, false}}, "1: 1-4"},
		{"behind the fork of the third", []walUser{{b, false}, {c, false}, {d, false}}, "1: 1-14, 3: 8-11"},
		{"from the second timeline on", []walUser{{c, false}, {d, false}}, "1: 1-21, 2: 20-23, 3: 8-11"},
		{"the newest only", []walUser{{d, false}}, "1: 1-21, 2: 20-32, 3: 8-11, 4: 30-37"},
		{"one alone", []walUser{{a, true}, {d, false}}, "1: 1-4, 1: 7-21, 2: 20-32, 3: 8-11, 4: 30-37"},
		{"two alone", []walUser{{a, true}, {b, true}, {c, false}, {d, false}}, "1: 1-4, 1: 7-14, 1: 17-21, 2: 20-23, 3: 8-11"},
		{"an old one only: nothing newer goes", []walUser{{b, false}}, "1: 1-14, 3: 8-11"},
	} {
		if got := gone(walOf(histories, all), test.users...); got != test.want {
			t.Errorf("%s: %q goes, want %q", test.name, got, test.want)
		}
	}

	t.Run("history", func(t *testing.T) {
		users := []walUser{{b, false}, {d, false}}
		for name, lose := range map[string]func(*walListing){
			"missing":    func(w *walListing) { delete(w.histories, 3) },
			"unreadable": func(w *walListing) { w.unread[3] = true },
		} {
			w := walOf(histories, all)
			lose(w)
			stays := w.needs(users)
			if got := gone(w, users...); got != "1: 1-14" {
				t.Errorf("%s: %q goes", name, got)
			}
			if !slices.Contains(stays, "which backups can use it is not known: the history of timeline 3 is missing or damaged") {
				t.Errorf("%s: it does not say so", name)
			}
		}
	})
	t.Run("other files", func(t *testing.T) {
		w := walOf(histories, all)
		for no := range uint64(20) {
			name := testSegment(1, no+1)
			name.Kind = pg.WALPartial
			w.objects = append(w.objects, walObject{name: name, bytes: 100})
			name.Kind, name.Offset = pg.WALBackupHistory, 0x28
			w.objects = append(w.objects, walObject{name: name, bytes: 100})
		}
		strange := testSegment(1, 1)
		strange.Seg = 0xFFFF
		w.objects = append(w.objects, walObject{name: strange, bytes: 100})
		stays := w.needs([]walUser{{b, false}, {d, false}})
		segments := map[uint64]bool{}
		for i, o := range w.objects {
			no, err := o.name.SegmentNo(w.size)
			switch {
			case err != nil:
				if stays[i] == "" {
					t.Errorf("%s goes", o.name)
				}
			case o.name.Timeline == 1 && o.name.Kind == pg.WALSegment:
				segments[no] = stays[i] == ""
			case o.name.Timeline == 1 && segments[no] != (stays[i] == ""):
				t.Errorf("%s does not go or stay as its segment", o.name)
			}
		}
	})
}

// TestWALNeedsProperties replays all that recovery of each kept backup could ask for, on random trees of timelines.
func TestWALNeedsProperties(t *testing.T) {
	deleted := 0
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 2))
		histories, segments := randomWAL(r)
		w := walOf(histories, segments)
		var users []walUser
		for i := range 1 + r.IntN(6) {
			tli := pg.Timeline(1 + r.IntN(len(segments)))
			first := segments[tli][0] + 1 + r.Uint64N(8)
			users = append(users, walUser{backupOn(fmt.Sprint(i), tli, first, first+r.Uint64N(3)), r.IntN(3) == 0})
		}
		goes := map[pg.WALName]bool{}
		for i, stays := range w.needs(users) {
			if goes[w.objects[i].name] = stays == ""; stays == "" {
				deleted++
			}
		}
		for _, u := range users {
			for tli := range segments {
				checkReplay(t, seed, u, tli, append(slices.Clone(histories[tli]), pg.HistoryEntry{Timeline: tli, Switch: 1 << 40}), goes)
			}
		}
		for tli, run := range segments {
			if goes[testSegment(tli, run[1])] {
				t.Fatalf("seed %d: the newest segment of timeline %s goes", seed, tli)
			}
		}
	}
	if deleted < 1000 {
		t.Errorf("only %d files went", deleted)
	}
}

// randomWAL makes a tree of up to 9 timelines and their segments.
func randomWAL(r *rand.Rand) (map[pg.Timeline][]pg.HistoryEntry, map[pg.Timeline][2]uint64) {
	histories, segments := map[pg.Timeline][]pg.HistoryEntry{}, map[pg.Timeline][2]uint64{1: {1, 12 + r.Uint64N(20)}}
	for tli := pg.Timeline(2); r.IntN(6) > 0 && tli < 10; tli++ {
		parent := pg.Timeline(1 + r.IntN(int(tli)-1))
		run := segments[parent]
		fork := run[0] + 1 + r.Uint64N(run[1]-run[0])
		histories[tli] = append(slices.Clone(histories[parent]), pg.HistoryEntry{Timeline: parent, Switch: pg.LSN(fork*testSegmentSize + 0x8000)})
		segments[tli] = [2]uint64{fork, fork + 10 + r.Uint64N(20)}
	}
	return histories, segments
}

// checkReplay asks for segments as XLogFileReadAnyTLI does: of each timeline of the history that has begun, the newest first.
func checkReplay(t *testing.T, seed uint64, u walUser, target pg.Timeline, history []pg.HistoryEntry, goes map[pg.WALName]bool) {
	t.Helper()
	at := slices.IndexFunc(history, func(e pg.HistoryEntry) bool { return e.Timeline == u.Timeline && u.StopLSN <= e.Switch })
	begin := pg.LSN(0)
	if at > 0 {
		begin = history[at-1].Switch
	}
	if at < 0 || u.StopLSN < begin {
		return // PostgreSQL refuses to follow it
	}
	end := uint64(60)
	if u.alone {
		end = uint64(u.StopLSN / testSegmentSize)
		history = history[:at+1]
	}
	for no := uint64(u.StartLSN / testSegmentSize); no <= end; no++ {
		for i := at; i < len(history); i++ {
			if i > 0 && pg.LSN((no+1)*testSegmentSize) <= history[i-1].Switch || pg.LSN(no*testSegmentSize) >= history[i].Switch {
				continue
			}
			if name := testSegment(history[i].Timeline, no); goes[name] {
				t.Fatalf("seed %d: %s goes, which backup %s on timeline %s needs on the way to %s", seed, name, u.WALFirst, u.Timeline, target)
			}
		}
	}
}
