package integration

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestCrashPowerLoss runs a server on a copy whose disk writes down all that is done to it, from the first start to the end of
// `overlay finish`, and then takes the copy up on what power cuts would have left at some of the flushes: each commit that was
// acknowledged before is there. Only in long campaigns. What is tried on each flush without a server is fusefs's test of this name.
func TestCrashPowerLoss(t *testing.T) {
	t.Parallel()
	rounds := environmentNumber(t, "PGTHAW_CRASH_ROUNDS", 0)
	if rounds == 0 {
		t.Skip("only in long campaigns: set PGTHAW_CRASH_ROUNDS")
	}
	seed := environmentNumber(t, "PGTHAW_SEED", int(time.Now().UnixNano()&0xffffffff))
	t.Logf("PGTHAW_SEED=%d", seed)
	r := rand.New(rand.NewPCG(uint64(seed), 0))
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			d := newForgetful(t)
			k := &life{crashSource: newCrashSource(t, p), t: t, r: r, note: func(kill) {}}
			k.dir = d.dir
			acknowledged := d.record(k)
			all := d.cuts()
			cutsOfServer := 0
			for i := range min(rounds, 10) {
				c := all[r.IntN(len(all))]
				if i == 0 {
					c = all[len(all)-1] // the end
				}
				n := acknowledged.before(c.synced())
				if n > len(k.crashSource.l.commits) && n < len(k.l.commits) {
					cutsOfServer++
				}
				d.cutPower(k, c, n)
			}
			t.Logf("%d flushes; %d cuts came while commits were acknowledged", len(all)/2, cutsOfServer)
			if cutsOfServer == 0 && rounds >= 10 {
				t.Error("no cut came while commits were acknowledged")
			}
		})
	}
}

// forgetful is a disk of fusefs's tests, volatile there, with a file system on it.
type forgetful struct {
	t                     *testing.T
	dir                   string // where the file system is mounted
	binary                string // of fusefs's tests
	room, log, now, first string
}

// powerCut is fusefs's cut.
type powerCut struct {
	at, since int64
	torn      bool
}

// synced is the last place up to which the disk keeps its promises.
func (c powerCut) synced() int64 {
	if c.torn {
		return c.since
	}
	return c.at
}

func newForgetful(t *testing.T) *forgetful {
	t.Helper()
	d := &forgetful{t: t, dir: tempDir(t), room: tempDir(t), binary: filepath.Join(scratch, "bin", "fusefs.test")}
	shell(t, "cd .. && go test -c -o "+d.binary+" ./fusefs")
	d.log, d.now, d.first = filepath.Join(d.room, "log"), filepath.Join(d.room, "now"), filepath.Join(d.room, "first")
	disk := filepath.Join(d.room, "disk")
	shell(t, fmt.Sprintf("mkdir %s; touch %s %s; truncate -s 700M %[3]s; mkfs.ext4 -q %[3]s", disk, d.log, d.now))
	server := d.child("disk", disk, d.now, d.log)
	hold, err := server.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := server.StdoutPipe()
	if err == nil {
		err = server.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		hold.Close()
		if err := server.Wait(); err != nil {
			t.Error(err)
		}
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the disk says %q, %v", line, err)
	}
	d.mount(filepath.Join(disk, "image"))
	return d
}

func (d *forgetful) child(args ...string) *exec.Cmd {
	cmd := exec.Command(d.binary, args[1:]...)
	cmd.Env, cmd.Stderr = append(os.Environ(), "PGTHAW_TEST_CHILD="+args[0]), os.Stderr
	return cmd
}

func (d *forgetful) mount(image string) {
	d.t.Helper()
	shell(d.t, "mount -o loop "+image+" "+d.dir)
	d.t.Cleanup(func() { // in case of a failure
		if mounted(d.dir) {
			unmount(d.dir)
		}
	})
}

// written is how much the disk has written down.
func (d *forgetful) written() int64 {
	st, err := os.Stat(d.log)
	if err != nil {
		return 0
	}
	return st.Size()
}

// acknowledged is how many commits were, at least, when the disk had written down so much.
type acknowledged struct {
	at []struct {
		written int64
		n       int
	}
}

func (a *acknowledged) before(written int64) (n int) {
	for _, one := range a.at {
		if one.written <= written {
			n = one.n
		}
	}
	return n
}

// record lets a copy live on the disk.
func (d *forgetful) record(k *life) *acknowledged {
	d.t.Helper()
	ownedByPostgres(d.t, d.dir)
	k.data = filepath.Join(d.dir, "data")
	k.beneath = d.dir
	k.thawTo("5MB")
	shell(d.t, "sync -f "+d.dir+"; cp --sparse=always "+d.now+" "+d.first+"; truncate -s 0 "+d.log)
	a := &acknowledged{}
	ctx, stop := context.WithCancel(context.Background())
	var recording sync.WaitGroup
	recording.Go(func() {
		for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
			n := k.l.acknowledged()
			a.at = append(a.at, struct {
				written int64
				n       int
			}{d.written(), n})
		}
	})
	k.start()
	k.l.write(1)
	for _, w := range works {
		if w.watch != nil {
			continue
		}
		s := k.startSession(w)
		waitFor(d.t, time.Minute, w.name, func() bool { return s.number() >= len(w.loop) || s.failed() })
		if err := s.end(); err != nil {
			d.t.Errorf("%s: %v", w.name, err)
		}
	}
	k.l.waitCommits(20)
	k.l.Stop()
	stop()
	recording.Wait()
	k.c.Stop()
	pgthaw(d.t, "overlay", "finish", k.data).exits(d.t, 0, 17)
	d.settle()
	return a
}

// settle takes the file system off when nobody uses it any more.
func (d *forgetful) settle() {
	d.t.Helper()
	waitFor(d.t, stopLimit, "end of the overlay", func() bool { return len(mountsBelow(d.dir)) == 1 })
	waitFor(d.t, stopLimit, "end of those who use the disk", func() bool { return exec.Command("umount", d.dir).Run() == nil })
}

func (d *forgetful) cuts() (all []powerCut) {
	d.t.Helper()
	out, err := d.child("cuts", d.log).Output()
	if err != nil {
		d.t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		var c powerCut
		if _, err := fmt.Sscan(line, &c.at, &c.since, &c.torn); err != nil {
			d.t.Fatal(err)
		}
		all = append(all, c)
	}
	if len(all) < 100 {
		d.t.Fatalf("the disk was flushed %d times", len(all)/2)
	}
	return all
}

// cutPower takes the copy up on what a power cut left. The first n commits must be there.
func (d *forgetful) cutPower(k *life, c powerCut, n int) {
	d.t.Helper()
	image := filepath.Join(d.room, "left")
	shell(d.t, "cp --sparse=always "+d.first+" "+image)
	if err := d.child("replay", d.log, image, fmt.Sprint(c.at), fmt.Sprint(c.since), fmt.Sprint(c.torn), fmt.Sprint(k.r.Uint32())).Run(); err != nil {
		d.t.Fatalf("replay: %v", err)
	}
	d.mount(image)
	whole := k.l
	defer func() { k.l = whole }()
	k.l = &ledger{t: d.t, source: k.c, commits: whole.commits[:n], doubt: slices.Clone(whole.doubt)}
	for _, late := range whole.commits[n:] {
		k.l.doubt = append(k.l.doubt, late.row)
	}
	pgthaw(d.t, "overlay", "resume", k.data).exits(d.t, 0, 17)
	k.start()
	k.dropInvalid()
	k.check(nil)
	k.c.Stop()
	pgthaw(d.t, "overlay", "finish", k.data).exits(d.t, 0, 17)
	k.start()
	k.check(nil)
	k.c.Stop()
	d.settle()
	d.t.Logf("%+v: %d of %d commits", c, n, len(whole.commits))
}
