package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

func walListCommand() *cli.Command {
	return &cli.Command{
		Name: "list", Usage: "list a cluster's WAL: timelines, runs of segments and the gaps between them", ArgsUsage: "CLUSTER",
		Action: walList,
	}
}

// walRun is a run of segments without a gap on one timeline.
type walRun struct {
	Timeline pg.Timeline `json:"timeline"`
	First    string      `json:"first"`
	Last     string      `json:"last"`
	Segments int         `json:"segments"`
	StartLSN pg.LSN      `json:"start_lsn"`
	EndLSN   pg.LSN      `json:"end_lsn"`
	Missing  uint64      `json:"missing_before"` // segments between the run before, on this timeline, and this one

	last uint64 // number of its last segment
}

type walListing struct {
	Cluster string   `json:"cluster"`
	Runs    []walRun `json:"runs"`
	Others  []string `json:"others"` // histories, partial segments, backup histories
	Older   []string `json:"older_than_seen,omitempty"`
}

func walList(c *cli.Context) error {
	args, err := arguments(c, "CLUSTER")
	if err != nil {
		return err
	}
	r, err := openToLook(c)
	if err != nil {
		return err
	}
	defer r.Close()
	unseen := asSeen(c.Context, r, args[0])
	l, err := listWAL(c.Context, r, args[0])
	if err != nil {
		return errors.Join(unseen, err)
	}
	l.Older = olderThanSeen(unseen)
	if c.Bool("json") {
		return errors.Join(unseen, printJSON(c.App.Writer, l))
	}
	return errors.Join(unseen, l.print(c.App.Writer))
}

func listWAL(ctx context.Context, r *repo.Repository, name string) (walListing, error) {
	l := walListing{Cluster: name, Runs: []walRun{}, Others: []string{}}
	cluster, err := r.Cluster(ctx, name)
	if err != nil {
		return l, err
	}
	names, err := r.WALNames(ctx, name)
	if err != nil {
		return l, err
	}
	removed, err := r.RemovedWAL(ctx, name)
	if err != nil {
		return l, err
	}
	for _, n := range names {
		if removed[n] {
			continue // a gap
		}
		if n.Kind != pg.WALSegment {
			l.Others = append(l.Others, n.String())
			continue
		}
		if err := l.add(n, cluster.SegmentSize); err != nil {
			return l, err
		}
	}
	return l, nil
}

// add takes the next segment; they come in order of timeline, then number.
func (l *walListing) add(n pg.WALName, size pg.SegmentSize) error {
	no, err := n.SegmentNo(size)
	if err != nil {
		return err
	}
	var missing uint64
	if i := len(l.Runs) - 1; i >= 0 && l.Runs[i].Timeline == n.Timeline {
		if missing = no - l.Runs[i].last - 1; missing == 0 {
			run := &l.Runs[i]
			run.Last, run.last, run.EndLSN = n.String(), no, size.Start(no+1)
			run.Segments++
			return nil
		}
	}
	l.Runs = append(l.Runs, walRun{Timeline: n.Timeline, First: n.String(), Last: n.String(), Segments: 1,
		StartLSN: size.Start(no), EndLSN: size.Start(no + 1), Missing: missing, last: no})
	return nil
}

func (l walListing) print(w io.Writer) error {
	if len(l.Runs)+len(l.Others) == 0 {
		_, err := fmt.Fprintln(w, "No WAL yet.")
		return err
	}
	t := table{{">TLI", "FIRST", "LAST", ">SEGMENTS", "START LSN", "END LSN", ">MISSING BEFORE"}}
	for _, r := range l.Runs {
		t.row(r.Timeline.String(), r.First, r.Last, strconv.Itoa(r.Segments), r.StartLSN.String(), r.EndLSN.String(), strconv.FormatUint(r.Missing, 10))
	}
	if err := t.print(w); err != nil {
		return err
	}
	for _, name := range l.Others {
		fmt.Fprintln(w, name)
	}
	return nil
}
