//go:build bench

package integration

import (
	"fmt"
	"slices"
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

// bootImage backs up a server that archives while it writes much WAL, and thaws the backup without and with its boot images: to its
// own end, and to the end of WAL that was written after it.
func (b *bench) bootImage() {
	b.t.Helper()
	a := newArchived(b.t, b.c.installation, clusterOptions{conf: slices.Clone(benchConf)})
	fillBench(a.cluster, benchGB()/4)
	i := &bench{t: b.t, c: a.cluster, dir: b.dir, repo: a.repo}
	load := make(chan string)
	go func() { load <- a.cluster.pgbench("--client", "4", "--time", "30", "--no-vacuum") }()
	rate := strconv.Itoa(int(benchGB() / 4 * 1e6 / 30)) // the backup takes half a minute
	took, peak := i.pgthaw("backup", "main", "--full", "--boot-image", "--bindir", i.c.bin, "--max-rate", rate, "--pg-connection", i.socket(i.c))
	<-load
	a.cluster.pgbench("--client", "4", "--time", "10", "--no-vacuum")
	a.waitArchived()
	thaws := func(args ...string) string {
		return fmt.Sprintf("%.2f s", median(repeat(5, func() time.Duration { return i.thaw("main", args...) })).Seconds())
	}
	b.row("backup under load, with boot images: WAL from its start to its end", i.walOf("main"), "")
	b.row("its time and peak memory", fmt.Sprintf("%.1f s, %d MiB", took.Seconds(), peak), "")
	b.row("time to first query, to the backup's end, without image", thaws("--to-immediate", "--no-boot-image"), "")
	b.row("time to first query, to the backup's end", thaws("--to-immediate"), "<= 0.5 s")
	b.row("time to first query, on the way to the end of WAL", thaws(), "<= 0.5 s")
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
