package integration

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// slowRequest is what an object store takes for a request.
const slowRequest = 30 * time.Millisecond

// TestStartRecord starts copies from a repository where each request takes a while: what a start wants is recorded, by the maker of the
// boot image already, and the next one reads that in few large reads, of another backup, too.
func TestStartRecord(t *testing.T) {
	t.Parallel()
	p := postgresql(t, 17)
	a := newArchived(t, p, clusterOptions{checksums: true, pgbenchScale: 5})
	a.backup(t, "--boot-image", "--bindir", p.bin)
	store := newTroubled(t, a.repo)
	store.set(slow)
	fast := a
	a.repo = store.dir
	rehearsed := a.timedStart(t, store)
	if err := os.RemoveAll(filepath.Join(fast.repo, "starts")); err != nil {
		t.Fatal(err)
	}
	without := a.timedStart(t, store)
	second := a.timedStart(t, store)
	t.Logf("with the record of the boot image %+v, without one %+v, with that one's %+v", rehearsed, without, second)
	if rehearsed.total >= without.total || second.total >= without.total {
		t.Errorf("with the record of the boot image %+v, without one %+v, with that one's %+v", rehearsed, without, second)
	}
	fast.cluster.SQL("UPDATE pgbench_branches SET bbalance = 1; CHECKPOINT")
	fast.backup(t)
	other := a.timedStart(t, store)
	t.Logf("another backup, without boot image: %+v", other)
	if records, _ := filepath.Glob(filepath.Join(fast.repo, "starts", "main", "*")); len(records) != 1 {
		t.Errorf("start records: %v", records)
	}
}

type startCost struct {
	asked int // requests to the repository until the first answer
	total int // and when the server has stopped
	ready time.Duration
}

// timedStart thaws, waits for the first answer, stops the server and discards the copy.
func (a archived) timedStart(t *testing.T, store *troubled) (c startCost) {
	t.Helper()
	data := newTarget(t)
	var r booted
	store.requests.Store(0)
	a.copyTo(t, invocation{}, "thaw", "latest", data, "--start", "--hydrate", "off", "--to-immediate", "--action", "promote").ok(t).into(t, &r)
	c.asked, c.ready = int(store.requests.Load()), time.Duration(r.ReadyMS)*time.Millisecond
	s := r.server(t, a.installation, data)
	if got := s.SQL("SELECT count(*) FROM pgbench_branches"); got != "5" {
		t.Errorf("%s branches", got)
	}
	s.Stop()
	pgthaw(t, "overlay", "discard", data).ok(t)
	c.total = int(store.requests.Load())
	return c
}

// TestWALAhead recovers through WAL without images from a repository where each request takes a while: the pages that it names are
// read together before PostgreSQL asks for each.
func TestWALAhead(t *testing.T) {
	t.Parallel()
	p := postgresql(t, 15)
	a := newArchived(t, p, clusterOptions{checksums: true, pgbenchScale: 5, conf: []string{"full_page_writes = off", "autovacuum = off", "max_wal_size = 1GB"}})
	a.cluster.SQL("CHECKPOINT")
	a.backup(t)
	a.cluster.pgbench("--client", "4", "--transactions", "4000", "--no-vacuum")
	balance := a.cluster.SQL("SELECT sum(abalance), count(*) FROM pgbench_accounts")
	a.Stop()
	store := newTroubled(t, a.repo)
	store.set(slow)
	a.repo = store.dir
	data := newTarget(t)
	var r booted
	began := time.Now()
	a.copyTo(t, invocation{}, "thaw", "latest", data, "--start", "--hydrate", "off").ok(t).into(t, &r)
	took, asked := time.Since(began), store.requests.Load()
	c := r.server(t, a.installation, data)
	store.set(none)
	if got := c.SQL("SELECT sum(abalance), count(*) FROM pgbench_accounts"); got != balance {
		t.Errorf("the copy has %s, want %s", got, balance)
	}
	t.Logf("%d requests, ready after %d ms, recovered after %v", asked, r.ReadyMS, took)
	if asked > 250 { // the table alone has 512 chunks
		t.Errorf("recovery took %d requests", asked)
	}
	c.StopImmediate()
	pgthaw(t, "overlay", "discard", data).ok(t)
}
