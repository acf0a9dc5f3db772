package main

import (
	"strings"
	"testing"
	"time"
)

func TestSize(t *testing.T) {
	for bytes, want := range map[int64]string{
		0: "0 bytes", 1023: "1023 bytes", 1024: "1.0 kB", 8192: "8.0 kB", 10188: "9.9 kB", 10240: "10 kB", 1 << 20: "1.0 MB",
		1023 << 20: "1.0 GB", 312 << 20: "312 MB", 3651 << 20: "3.6 GB", 1 << 62: "4.0 EB",
	} {
		if got := size(bytes); got != want {
			t.Errorf("size(%d) = %q, want %q", bytes, got, want)
		}
	}
}

func TestDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		311 * time.Millisecond: "0.31 s", 7 * time.Second: "7 s", 59400 * time.Millisecond: "59 s",
		125 * time.Second: "2 min 5 s", 192*time.Minute + 30*time.Second: "3 h 12 min",
	} {
		if got := duration(d); got != want {
			t.Errorf("duration(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestTableAligns(t *testing.T) {
	tab := table{{"NAME", ">SIZE", "NOTE"}}
	tab.row("a", "1.2 GB", "")
	tab.row("längst", "12 kB", "x")
	var b strings.Builder
	if err := tab.print(&b); err != nil {
		t.Fatal(err)
	}
	want := "NAME      SIZE  NOTE\na       1.2 GB\nlängst   12 kB  x\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestProgressLine(t *testing.T) {
	got := (&progress{}).line("backup", 1200<<20, 3400<<20, 624<<20, 2*time.Second)
	if want := "backup: 1.2 GB of 3.3 GB, 312 MB/s, 7 s left"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := (&progress{}).line("sync", 0, 0, 0, 0); got != "sync: 0 bytes" {
		t.Errorf("got %q", got)
	}
	if got := (&progress{objects: true}).line("deleting packs", 1500, 4500, 1500, time.Second); got != "deleting packs: 1500 of 4500, 1500/s, 2 s left" {
		t.Errorf("got %q", got)
	}
}

func TestProgressPrintsALineEveryTenSeconds(t *testing.T) {
	var b strings.Builder
	now := time.Unix(0, 0)
	p := &progress{w: &b, now: func() time.Time { return now }}
	for i := range 25 {
		p.update("backup", int64(i)<<20, 25<<20)
		now = now.Add(time.Second)
	}
	p.done()
	want := "backup: 10 MB of 25 MB, 1.0 MB/s, 15 s left\nbackup: 20 MB of 25 MB, 1.0 MB/s, 5 s left\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}
