package repo

import (
	"context"
	"fmt"
	"math"

	"pgthaw/repo/pg"
)

// timelines is how a cluster's timelines came out of each other, as its history files tell.
type timelines struct {
	size      pg.SegmentSize
	histories map[pg.Timeline][]pg.HistoryEntry
	unread    map[pg.Timeline]bool // the history file is there, but cannot be believed
}

func newTimelines(size pg.SegmentSize) timelines {
	return timelines{size, map[pg.Timeline][]pg.HistoryEntry{}, map[pg.Timeline]bool{}}
}

// walStretch is the part of a line that belongs to one timeline.
type walStretch struct {
	timeline   pg.Timeline
	begin, end pg.LSN // begin inclusive, end exclusive
}

// walLine is the way from the first timeline to a certain one, oldest first.
type walLine []walStretch

// line is the way to a timeline, by its history file. Without one it begins there (timeline.c, readTimeLineHistory).
func (t *timelines) line(tli pg.Timeline) walLine {
	var l walLine
	var begin pg.LSN
	if !t.unread[tli] {
		for _, e := range t.histories[tli] {
			l = append(l, walStretch{e.Timeline, begin, e.Switch})
			begin = e.Switch
		}
	}
	return append(l, walStretch{tli, begin, math.MaxUint64})
}

// covers tells whether segment no holds WAL of the stretch.
func (t *timelines) covers(s walStretch, no uint64) bool {
	return no >= t.size.Segment(s.begin) && t.size.Start(no) < s.end
}

// from cuts the line off before the backup's timeline. It is empty where recovery of the backup cannot follow the line.
func (l walLine) from(m *Manifest) walLine {
	for i, s := range l {
		if s.timeline == m.Timeline && s.begin <= m.StopLSN && m.StopLSN <= s.end {
			return l[i:]
		}
	}
	return nil
}

// history reads a timeline's history file. Contents that cannot be believed are ErrCorrupt.
func (r *Repository) history(ctx context.Context, cluster string, name pg.WALName) ([]pg.HistoryEntry, error) {
	content, err := r.WAL(ctx, cluster, name)
	if err != nil {
		return nil, err
	}
	all, err := pg.ParseHistory(content)
	if err == nil && len(all) > 0 && all[len(all)-1].Timeline >= name.Timeline {
		err = fmt.Errorf("it names timeline %s as a parent", all[len(all)-1].Timeline)
	}
	if err != nil {
		return nil, corrupt(walKey(cluster, name), "%v", err)
	}
	return all, nil
}
