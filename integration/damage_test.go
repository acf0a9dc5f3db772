package integration

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// damageLimit bounds each look at a damaged repository; a sound one takes a second.
const damageLimit = time.Minute

// damaged is a small repository of two backups and some WAL, and what a sound copy of it gives.
type damaged struct {
	archived
	backups  [2]string
	segments []string
	objects  []string // keys
	targets  string   // in memory: restores sync

	restored [2]map[string]fileState
	shown    [2]map[string][sha256.Size]byte // by the mount
	wal      map[string][sha256.Size]byte
}

// harm is one damage to one object.
type harm struct {
	object string
	what   string // flip, truncate, delete
	offset int64  // of the flipped byte, or the new length
	mask   byte   // bits flipped
}

func (h harm) String() string {
	return fmt.Sprintf("%s %s at %d with %#x", h.what, h.object, h.offset, h.mask)
}

// TestDamage flips, truncates and deletes every object: each read gives right bytes, or an error that names the object.
func TestDamage(t *testing.T) {
	t.Parallel()
	rounds := environmentNumber(t, "PGTHAW_DAMAGE_ROUNDS", 120)
	seed := uint64(environmentNumber(t, "PGTHAW_SEED", int(time.Now().UnixNano()&0xffffffff)))
	t.Logf("PGTHAW_SEED=%d", seed)
	d := newDamaged(t)
	all := d.plan(t, rounds, rand.New(rand.NewPCG(seed, 0)))
	t.Run("cases", func(t *testing.T) {
		for i, h := range all {
			t.Run(strconv.Itoa(i), func(t *testing.T) {
				t.Parallel()
				d.endure(t, h, i)
			})
		}
	})
}

// environmentNumber reads a variable that makes a campaign longer, or repeats it.
func environmentNumber(t *testing.T, name string, usually int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return usually
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

func newDamaged(t *testing.T) *damaged {
	t.Helper()
	a := newArchived(t, postgresql(t, 15), clusterOptions{walSegmentMB: 1, checksums: true, conf: []string{"fsync = off"}})
	l := startLedger(t, a.cluster, 2)
	d := &damaged{archived: a, wal: map[string][sha256.Size]byte{}}
	for i := range d.backups {
		l.waitCommits(300)
		d.backups[i] = a.newest(t).ID
	}
	l.waitCommits(2000)
	l.Stop()
	a.Stop()
	d.listObjects(t)
	dir := mountTemp(t, "tmpfs", "mode=755")
	d.targets = dir
	for i := range d.backups {
		target := filepath.Join(dir, strconv.Itoa(i))
		d.restore(t, a.repo, i, target).ok(t)
		d.restored[i] = contents(tree(t, target))
	}
	mount := a.mount(t, invocation{})
	for i := range d.backups {
		d.shown[i] = map[string][sha256.Size]byte{}
		if err := d.look(mount, i, func(path string, sum [sha256.Size]byte) { d.shown[i][path] = sum }); err != nil {
			t.Fatal(err)
		}
	}
	checkUmount(t, mount)
	for _, name := range d.segments {
		path := filepath.Join(dir, name)
		d.fetch(t, a.repo, name, path).ok(t)
		d.wal[name] = sumOf(t, path)
	}
	return d
}

func (d *damaged) listObjects(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(d.repo, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			key, _ := filepath.Rel(d.repo, path)
			d.objects = append(d.objects, key)
			if strings.HasPrefix(key, "wal/") {
				d.segments = append(d.segments, filepath.Base(key))
			}
		}
		return err
	})
	if err != nil || len(d.segments) < 5 {
		t.Fatalf("the repository holds %q, %v", d.objects, err)
	}
}

// contents leaves out what differs from one restore to the next: times, and the names of repository and target.
func contents(files map[string]fileState) map[string]fileState {
	for name, s := range files {
		s.modified = time.Time{}
		if name == "postgresql.auto.conf" {
			s.size, s.sum = 0, [sha256.Size]byte{}
		}
		files[name] = s
	}
	return files
}

func sumOf(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(content)
}

// plan damages each object in each way, and then goes on at random.
func (d *damaged) plan(t *testing.T, rounds int, r *rand.Rand) []harm {
	t.Helper()
	var all []harm
	for len(all) < rounds {
		for _, object := range d.objects {
			info, err := os.Stat(filepath.Join(d.repo, object))
			if err != nil {
				t.Fatal(err)
			}
			size, mask := info.Size(), byte(1+r.IntN(255))
			all = append(all, harm{object, "flip", r.Int64N(size), mask})
			switch len(all) / len(d.objects) % 4 {
			case 0:
				all = append(all, harm{object: object, what: "delete"})
			case 1:
				all = append(all, harm{object: object, what: "truncate", offset: r.Int64N(size)})
			case 2:
				all = append(all, harm{object, "flip", r.Int64N(min(size, 64)), mask}) // the head
			case 3:
				all = append(all, harm{object, "flip", size - 1 - r.Int64N(min(size, 512)), mask}) // the table of contents
			}
		}
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:rounds]
}

// inflict gives a copy of the repository in which one object is damaged; all others are links to the sound ones.
func (d *damaged) inflict(t *testing.T, h harm, dir string) string {
	t.Helper()
	repo := filepath.Join(dir, "repo")
	shell(t, "cp -al "+d.repo+" "+repo)
	path := filepath.Join(repo, h.object)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	switch h.what {
	case "delete":
		return repo
	case "flip":
		content[h.offset] ^= h.mask
	case "truncate":
		content = content[:h.offset]
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return repo
}

// endure reads everything that a damaged repository still gives.
func (d *damaged) endure(t *testing.T, h harm, i int) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Log(h)
		}
	}()
	dir := tempDir(t)
	repo := d.inflict(t, h, dir)
	errs := []error{
		d.endureRestore(t, h, repo, i%2, filepath.Join(d.targets, "case "+strconv.Itoa(i))),
		d.endureMount(t, h, repo, (i+1)%2),
		d.endureFetch(t, h, repo, dir, i),
	}
	check := d.run(t, repo, "repo", "check", "--read-data")
	d.quiet(t, check)
	if err := errors.Join(errs...); check.code == 0 && err != nil && !h.unseen() {
		t.Errorf("repo check --read-data finds nothing, but: %v", err)
	}
	if check.code != 0 {
		h.named(t, check)
	}
}

// unseen holds for what looks as if it had never been there: a backup exists when its manifest does, and the end of the
// WAL, or a gap between backups, is not the repository's damage.
func (h harm) unseen() bool {
	return h.what == "delete" && (strings.HasSuffix(h.object, ".json") || strings.HasPrefix(h.object, "wal/"))
}

// id is by what an error names the object.
func (h harm) id() string {
	if h.what == "delete" && strings.HasPrefix(h.object, "keys/") {
		return "key slot"
	}
	base := filepath.Base(h.object)
	return strings.TrimSuffix(strings.TrimSuffix(base, ".json"), ".packs")
}

// named fails the test unless a run that failed says which object is the matter, with an exit code that fits.
func (h harm) named(t *testing.T, r result) {
	t.Helper()
	codes := []int{13, 16} // 13: the version is what was flipped
	if h.what == "delete" {
		codes = append(codes, 10, 14, 15)
	}
	text := r.stdout + r.stderr
	if slices.Contains(r.args, "fetch") {
		codes = []int{200}
	}
	if !slices.Contains(codes, r.code) {
		t.Errorf("pgthaw %q: exit code %d, want one of %v\n%s", r.args, r.code, codes, text)
	}
	if !strings.Contains(text, h.id()) && h.object != "config" {
		t.Errorf("pgthaw %q does not name %s:\n%s", r.args, h.id(), text)
	}
}

// quiet fails the test if a run ended in a panic.
func (d *damaged) quiet(t *testing.T, r result) {
	t.Helper()
	if strings.Contains(r.stderr, "goroutine ") {
		t.Errorf("pgthaw %q:\n%s", r.args, r.stderr)
	}
}

func (d *damaged) run(t *testing.T, repo string, args ...string) result {
	t.Helper()
	return invocation{env: unseen(repo), limit: damageLimit}.run(t, args...)
}

func (d *damaged) restore(t *testing.T, repo string, i int, target string) result {
	t.Helper()
	return d.run(t, repo, "restore", "main", d.backups[i], "--target", target, "--bindir", d.bin)
}

func (d *damaged) fetch(t *testing.T, repo, name, path string) result {
	t.Helper()
	return d.run(t, repo, "wal", "fetch", "main", name, path)
}

func (d *damaged) endureRestore(t *testing.T, h harm, repo string, i int, target string) error {
	t.Helper()
	defer os.RemoveAll(target)
	r := d.restore(t, repo, i, target)
	d.quiet(t, r)
	if r.code == 0 {
		sameTrees(t, contents(tree(t, target)), d.restored[i])
		return nil
	}
	h.named(t, r)
	if _, err := os.Stat(filepath.Join(target, "global", "pg_control")); err == nil {
		t.Error("a restore that failed leaves pg_control")
	}
	return fmt.Errorf("restore: exit code %d", r.code)
}

// endureFetch fetches the damaged segment, or another one.
func (d *damaged) endureFetch(t *testing.T, h harm, repo, dir string, i int) error {
	t.Helper()
	name := d.segments[i%len(d.segments)]
	if strings.HasPrefix(h.object, "wal/") {
		name = filepath.Base(h.object)
	}
	path := filepath.Join(dir, name)
	r := d.fetch(t, repo, name, path)
	d.quiet(t, r)
	last := name == d.segments[len(d.segments)-1]
	switch {
	case r.code == 0 && sumOf(t, path) != d.wal[name]:
		t.Errorf("wal fetch %s gave wrong bytes", name)
	case r.code == 0:
		return nil
	case r.code == 1 && last && h.what == "delete":
		return nil // the WAL ends before it
	}
	h.named(t, r)
	if _, err := os.Stat(path); err == nil {
		t.Errorf("wal fetch %s failed and left a file", name)
	}
	return fmt.Errorf("wal fetch: exit code %d", r.code)
}

// endureMount reads all files of a backup, and all WAL, through a mount.
func (d *damaged) endureMount(t *testing.T, h harm, repo string, i int) error {
	t.Helper()
	dir := filepath.Join(tempDir(t), "m")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	log := dir + ".log"
	if r := d.run(t, repo, "mount", "--log-file", log, dir); r.code != 0 {
		d.quiet(t, r)
		h.named(t, r)
		return fmt.Errorf("mount: exit code %d", r.code)
	}
	// Programs that other cases start hold our open files for a moment: between fork and exec.
	defer waitFor(t, stopLimit, "umount", func() bool { return d.run(t, repo, "umount", dir).code == 0 })
	done := make(chan error, 1)
	go func() { done <- d.compare(t, dir, i) }()
	var err error
	select {
	case err = <-done:
	case <-time.After(damageLimit):
		for pid := range processesNaming(dir) {
			_ = syscall.Kill(pid, syscall.SIGQUIT)
		}
		err = fmt.Errorf("a read hangs: %w", <-done)
		t.Error(err)
	}
	text, _ := os.ReadFile(log)
	gone := h.what == "delete" && errors.Is(err, fs.ErrNotExist)
	switch {
	case bytes.Contains(text, []byte("goroutine ")):
		t.Errorf("the mount's process panicked:\n%s", text)
	case err != nil && !gone && !errors.Is(err, syscall.EIO):
		t.Errorf("the mount: %v, want EIO", err)
	case err != nil && !gone && !bytes.Contains(text, []byte(h.id())):
		t.Errorf("the mount's log does not name %s:\n%s", h.id(), text)
	}
	return err
}

// compare reads one backup and the WAL through a mount. Wrong bytes fail the test; errors are returned.
func (d *damaged) compare(t *testing.T, mount string, i int) error {
	seen := 0
	err := d.look(mount, i, func(path string, sum [sha256.Size]byte) {
		if seen++; sum != d.shown[i][path] {
			t.Errorf("the mount gives wrong bytes of %s", path)
		}
	})
	if err == nil && seen != len(d.shown[i]) {
		t.Errorf("the mount shows %d of %d files", seen, len(d.shown[i]))
	}
	for _, name := range d.segments {
		content, err2 := os.ReadFile(filepath.Join(mount, "main", "wal", name[:8], name))
		if err2 == nil && sha256.Sum256(content) != d.wal[name] {
			t.Errorf("the mount gives wrong bytes of WAL file %s", name)
		}
		err = errors.Join(err, err2)
	}
	return err
}

// look reads every file of a backup in a mount, going on after errors.
func (d *damaged) look(mount string, i int, see func(path string, sum [sha256.Size]byte)) error {
	backup := filepath.Join(mount, "main", d.backups[i])
	var errs []error
	_ = filepath.WalkDir(backup, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			var content []byte
			if content, err = os.ReadFile(path); err == nil {
				name, _ := filepath.Rel(backup, path)
				see(name, sha256.Sum256(content))
			}
		}
		if err != nil {
			errs = append(errs, err)
		}
		return nil
	})
	return errors.Join(errs...)
}
