//go:build bench

package integration

import (
	"fmt"
	"strconv"
	"testing"
	"time"
)

// TestBenchBootImage measures what a boot image spares, alone.
func TestBenchBootImage(t *testing.T) {
	b := newBench(t)
	b.bootImage()
	fmt.Println(b.table())
}

// bootImage backs up while the server writes much WAL, and thaws the backup without and with its boot image.
func (b *bench) bootImage() {
	b.t.Helper()
	rate := strconv.Itoa(int(benchGB() * 1e6 / 30)) // the backup takes half a minute
	load := make(chan string)
	go func() { load <- b.c.pgbench("--client", "4", "--time", "30", "--no-vacuum") }()
	b.pgthaw("backup", "images", "--full", "--max-rate", rate, "--pg-connection", b.socket(b.c))
	<-load
	took, peak := b.pgthaw("boot-image", "images", "latest", "--bindir", b.c.bin)
	without := median(3, func() time.Duration { return b.thaw("images", "--no-boot-image") })
	with := median(5, func() time.Duration { return b.thaw("images") })
	b.row("WAL from a backup's start to its end", b.walOf("images"), "")
	b.row("boot image of it, made", fmt.Sprintf("%.1f s, %d MiB", took.Seconds(), peak), "")
	b.row("time to first query, without its image", fmt.Sprintf("%.2f s", without.Seconds()), "")
	b.row("time to first query, with it", fmt.Sprintf("%.2f s", with.Seconds()), "<= 0.5 s")
}

// walOf is how much WAL lies between the start and the end of a cluster's newest backup.
func (b *bench) walOf(cluster string) string {
	b.t.Helper()
	var list []struct {
		Start string `json:"start_lsn"`
		Stop  string `json:"stop_lsn"`
	}
	pgthaw(b.t, "--repo", b.repo, "list", cluster, "--json").ok(b.t).into(b.t, &list)
	last := list[len(list)-1]
	return b.c.SQL(fmt.Sprintf("SELECT pg_size_pretty('%s'::pg_lsn - '%s'::pg_lsn)", last.Stop, last.Start))
}
