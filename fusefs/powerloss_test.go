package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	iofs "io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCrashPowerLoss does some hundred things on an overlay whose disk is volatile: writes, truncations, files replaced, made
// and removed as PostgreSQL does it, hydration beside them, directories that leave the mount, and the mount's end. Then the
// overlay is taken up on what a power cut at a flush would have left, with and without a part of what was not flushed: what was
// synced must be there, nothing else than what was once written, and of files that nobody wrote to the backup's bytes.
//
// It is a sample of the flushes; in a campaign (PGTHAW_CRASH_ROUNDS) it is all of them.
func TestCrashPowerLoss(t *testing.T) {
	onDisks(t, func(t *testing.T, kind, mkfs string) {
		rng := rand.New(rand.NewPCG(seed(t), 0))
		p := newPowerLoss(t, rng, newVolatile(t, mkfs, map[string]int64{"ext4": 96, "xfs": 320}[kind]))
		p.work(rounds(240))
		all := p.disk.cuts()
		if len(all) < 100 {
			t.Errorf("the disk was flushed only %d times", len(all)/2)
		}
		p.noticesALostFlush(all)
		chosen := all
		if os.Getenv("PGTHAW_CRASH_ROUNDS") == "" {
			rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
			chosen = all[:rounds(12)]
		}
		for _, c := range chosen {
			if err := p.verify(c, c.synced()); err != nil {
				t.Errorf("%v: %v", c, err)
			}
		}
		t.Logf("%d of %d power cuts", len(chosen), len(all))
	})
}

// noticesALostFlush: with a disk that has forgotten what it was told to flush, the same check fails.
func (p *powerLoss) noticesALostFlush(all []cut) {
	p.t.Helper()
	for i := len(all) - 1; i > 40; i -= 10 {
		if p.verify(all[i-40], all[i].at) != nil {
			return
		}
	}
	p.t.Error("nothing is noticed of a disk that forgets what was synced")
}

// powerLoss is an overlay on a volatile disk.
type powerLoss struct {
	t     *testing.T
	rng   *rand.Rand
	disk  *volatile
	v     *thawed
	names map[string][]event
	made  int // names
}

// event is a change to what a name stands for.
type event struct {
	from, to int64  // places in what the disk wrote down, before and after the system call
	content  []byte // nil: there is nothing of that name
	durable  bool   // it is synced, the name too
}

func newPowerLoss(t *testing.T, rng *rand.Rand, d *volatile) *powerLoss {
	t.Helper()
	tree := lowerTree{}
	p := &powerLoss{t: t, rng: rng, disk: d, names: map[string][]event{}}
	for _, dir := range []string{"pgdata", "pgdata/a", "pgdata/b"} {
		tree.dir(dir, 0o700)
	}
	for i := range 30 {
		name := fmt.Sprintf("%sf%d", []string{"", "a/", "b/"}[i%3], i)
		size := 600 + rng.IntN(60_000)
		if i%5 == 0 {
			size = smallFile + rng.IntN(smallFile/2)
		}
		tree.file("pgdata/"+name, 0o600, random(rng, size))
		p.names[name] = []event{{content: tree["pgdata/"+name].content, durable: true}}
	}
	p.v = thawIn(t, d.dir, tree, OverlayOptions{Passthrough: true, FillOnRead: true, Leave: Directories})
	d.begin()
	return p
}

func (p *powerLoss) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *powerLoss) path(name string) string { return filepath.Join(p.v.dir, name) }

// does notes what a system call makes of a name.
func (p *powerLoss) does(name string, content []byte, durable bool, call func() error) {
	p.t.Helper()
	from := p.disk.now()
	p.must(call())
	p.names[name] = append(p.names[name], event{from, p.disk.now(), content, durable})
}

func (p *powerLoss) content(name string) []byte {
	all := p.names[name]
	return all[len(all)-1].content
}

// work does n things, with hydration beside the middle of them, and ends the mount.
func (p *powerLoss) work(n int) {
	p.t.Helper()
	hydrated := make(chan error, 1)
	for i := range n {
		if i == n/4 {
			go func() {
				_, err := p.v.ask("crawl")
				hydrated <- err
			}()
		}
		if i == n*3/4 {
			p.must(<-hydrated)
		}
		p.step()
	}
	p.v.do("hydrate")
	left, _ := p.v.leave()
	if len(left) == 0 {
		p.t.Error("no directory has left the mount")
	}
	p.step()
	p.v.do("unmount")
	p.v.c.kill()
	p.disk.run("sync", "-f", p.disk.dir)
}

// step does one thing to one of the names that are written to; a third of them nobody but the hydrator writes to.
func (p *powerLoss) step() {
	p.t.Helper()
	var some []string
	for name, events := range p.names {
		if content := events[len(events)-1].content; content != nil && len(content)%3 > 0 {
			some = append(some, name)
		}
	}
	slices.Sort(some)
	if p.made == 0 || len(some) == 0 {
		some = append(some, p.create())
	}
	name := some[p.rng.IntN(len(some))]
	switch p.rng.IntN(12) {
	case 0:
		p.create()
	case 1:
		p.replace(name)
	case 2:
		p.remove(name)
	case 3:
		_, err := p.v.ask("leave")
		p.must(err)
	case 4:
		if got := readAll(p.t, p.path(name)); !bytes.Equal(got, p.content(name)) {
			p.t.Fatalf("%s has other bytes than were written", name)
		}
	default:
		p.change(name)
	}
}

// size avoids those that are divided by three, which change and create leave alone.
func (p *powerLoss) size(n int) int { return n + (3-n%3)%3 + 1 }

func (p *powerLoss) change(name string) {
	p.t.Helper()
	h, err := os.OpenFile(p.path(name), os.O_RDWR, 0)
	p.must(err)
	defer h.Close()
	content := p.content(name)
	switch off := p.rng.IntN(len(content) + 1); p.rng.IntN(6) {
	case 0:
		size := p.size(off)
		p.does(name, resized(content, size), false, func() error { return h.Truncate(int64(size)) })
	case 1, 2:
		off -= off % 8192
		fallthrough
	default:
		b := random(p.rng, 1+p.rng.IntN(16_384))
		if end := off + len(b); end > len(content) {
			b = random(p.rng, p.size(end)-off)
		}
		changed := bytes.Clone(resized(content, max(len(content), off+len(b))))
		copy(changed[off:], b)
		p.does(name, changed, false, func() error { _, err := h.WriteAt(b, int64(off)); return err })
	}
	sync := []func() error{h.Sync, func() error { return unix.Fdatasync(int(h.Fd())) }, nil}[p.rng.IntN(3)]
	if sync != nil {
		p.does(name, p.content(name), true, sync)
	}
}

// put writes a file and syncs its bytes.
func (p *powerLoss) put(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Sync(), f.Close())
}

// syncDir is fsync(2) of the directory that a name lies in.
func (p *powerLoss) syncDir(name string) error {
	d, err := os.Open(filepath.Dir(p.path(name)))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (p *powerLoss) fresh() []byte { return random(p.rng, p.size(p.rng.IntN(40_000))) }

func (p *powerLoss) create() string {
	p.t.Helper()
	p.made++
	name, content := fmt.Sprintf("%snew%d", []string{"", "a/", "b/"}[p.made%3], p.made), p.fresh()
	p.names[name] = []event{{durable: true}, {from: p.disk.now(), to: p.disk.now(), content: []byte{}}}
	p.does(name, content, false, func() error { return p.put(p.path(name), content) })
	p.does(name, content, true, func() error { return p.syncDir(name) })
	return name
}

// replace is PostgreSQL's durable_rename.
func (p *powerLoss) replace(name string) {
	p.t.Helper()
	content := p.fresh()
	p.must(p.put(p.path(name)+".tmp", content))
	p.does(name, content, false, func() error { return os.Rename(p.path(name)+".tmp", p.path(name)) })
	p.does(name, content, true, func() error { return p.syncDir(name) })
}

// remove is PostgreSQL's durable_unlink.
func (p *powerLoss) remove(name string) {
	p.t.Helper()
	p.does(name, nil, false, func() error { return os.Remove(p.path(name)) })
	p.does(name, nil, true, func() error { return p.syncDir(name) })
}

// verify takes the overlay up on what a power cut left, and compares it, as it is and hydrated, with what may be there when
// all was synced that was up to a place.
func (p *powerLoss) verify(c cut, synced int64) error {
	p.t.Helper()
	room := p.t.TempDir()
	image, dir := filepath.Join(room, "image"), filepath.Join(room, "fs")
	p.must(os.Mkdir(dir, 0o755))
	p.disk.after(c, p.rng, image)
	p.disk.run("mount", "-o", "loop", image, dir)
	defer func() {
		p.disk.run("umount", dir)
		p.must(os.Remove(image))
	}()
	v := &thawed{t: p.t, repository: p.v.repository, dir: filepath.Join(dir, "pgdata"), o: p.v.o}
	v.mount()
	defer v.c.kill()
	err := p.compare(v.dir, synced, max(synced, c.at))
	v.do("hydrate")
	v.leave()
	err = errors.Join(err, p.compare(v.dir, synced, max(synced, c.at)))
	v.do("unmount")
	return errors.Join(err, p.compare(v.dir, synced, max(synced, c.at)))
}

// compare looks at all names; written is the place up to which anything may be on the disk.
func (p *powerLoss) compare(dir string, synced, written int64) error {
	var errs []error
	for name, events := range p.names {
		if err := survives(filepath.Join(dir, name), possible(events, synced, written), p.disk.block()); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	err := filepath.WalkDir(dir, func(path string, e iofs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(dir, path); err == nil && !e.IsDir() && p.names[rel] == nil && !strings.HasSuffix(rel, ".tmp") {
			return fmt.Errorf("%s is there", rel)
		}
		return err
	})
	return errors.Join(append(errs, err)...)
}

// possible is what a name may stand for after a power cut: what was synced last before it, or anything that was written since.
func possible(events []event, synced, written int64) (all [][]byte) {
	for _, e := range events {
		if e.durable && e.to <= synced {
			all = nil
		}
		if e.from <= written {
			all = append(all, e.content)
		}
	}
	return all
}

// survives compares a file with what it may be, block by block: of what was not synced any part may be there.
func survives(path string, all [][]byte, block int) error {
	got, err := os.ReadFile(path)
	absent := slices.ContainsFunc(all, func(b []byte) bool { return b == nil })
	if errors.Is(err, iofs.ErrNotExist) && absent {
		return nil
	}
	f := &writtenFile{versions: slices.DeleteFunc(slices.Clone(all), func(b []byte) bool { return b == nil })}
	if err != nil || len(f.versions) == 0 {
		return fmt.Errorf("%d bytes are there, %v; may it be absent: %v", len(got), err, absent)
	}
	shortest, longest := len(f.versions[0]), 0
	for _, v := range f.versions {
		shortest, longest = min(shortest, len(v)), max(longest, len(v))
	}
	if len(got) < shortest || len(got) > longest {
		return fmt.Errorf("it has %d bytes, want %d to %d", len(got), shortest, longest)
	}
	for at := 0; at < len(got); at += block {
		if end := min(at+block, len(got)); !f.was(got[at:end], at) {
			return fmt.Errorf("block at %d of %d was never so; %d versions", at, len(got), len(f.versions))
		}
	}
	return nil
}
