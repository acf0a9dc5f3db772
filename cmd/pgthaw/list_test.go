package main

import (
	"slices"
	"testing"

	"pgthaw/recovery"
	"pgthaw/repo/pg"
)

func TestWindowsThatTouchAreOne(t *testing.T) {
	at := func(from, to pg.LSN) listed {
		return listed{Window: &recovery.Window{From: recovery.Point{LSN: from}, To: recovery.Point{LSN: to}}}
	}
	got := joined([]listed{at(10, 20), at(15, 18), {}, at(20, 30), at(40, 50)})
	want := []recovery.Window{*at(10, 30).Window, *at(40, 50).Window}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestWALListingCountsWhatIsMissing(t *testing.T) {
	const size = pg.DefaultSegmentSize
	var l walListing
	for _, name := range []string{
		"000000010000000000000002", "000000010000000000000003", "0000000100000000000000FF", "000000010000000100000000",
		"000000020000000100000004",
	} {
		n, err := pg.ParseWALName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.add(n, size); err != nil {
			t.Fatal(err)
		}
	}
	want := []walRun{
		{1, "000000010000000000000002", "000000010000000000000003", 2, 0x2000000, 0x4000000, 0, 3},
		{1, "0000000100000000000000FF", "000000010000000100000000", 2, 0xFF000000, 0x101000000, 0xFB, 0x100},
		{2, "000000020000000100000004", "000000020000000100000004", 1, 0x104000000, 0x105000000, 0, 0x104},
	}
	if !slices.Equal(l.Runs, want) {
		t.Errorf("got %v, want %v", l.Runs, want)
	}
}
