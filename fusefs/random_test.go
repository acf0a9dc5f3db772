package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// randomModes are modes, and with them directories that leave the mount.
var randomModes = map[string]OverlayOptions{
	"passthrough":      {Passthrough: true},
	"cached":           {},
	"fill":             {FillOnRead: true},
	"all":              {Passthrough: true, FillOnRead: true},
	"leaving":          {Passthrough: true, Leave: Directories},
	"leaving uncached": {Leave: Directories, FillOnRead: true},
}

// TestCrashRandom compares a mount with a model through random system calls, hydration beside them, directories that leave,
// remounts and crashes of the daemon between them. PGTHAW_CRASH_ROUNDS is how many rounds of longRound calls each mode gets,
// of an overlay of its own each: in a round of many more calls nothing would be left that is not hydrated. The log has the
// sum, by kind.
func TestCrashRandom(t *testing.T) {
	const longRound = 2000
	steps, campaign := rounds(800), 0
	if text := os.Getenv("PGTHAW_CRASH_ROUNDS"); text != "" {
		steps = longRound
		campaign, _ = strconv.Atoi(text)
	}
	done := make(map[string]int)
	for round := range max(1, campaign) {
		for mode, o := range randomModes {
			if o.Leave != Never && os.Geteuid() != 0 || testing.Short() && mode != "all" && mode != "leaving uncached" {
				continue
			}
			t.Run(mode, func(t *testing.T) { randomRound(t, o, steps, done) })
			if t.Failed() {
				return
			}
		}
		if round%100 == 99 {
			logSum(t, done)
		}
	}
	logSum(t, done)
	if campaign >= 5 {
		expectAllKinds(t, done)
	}
}

// logSum tells how many operations there were. Some are of two kinds; open, close and the like are of none.
func logSum(t *testing.T, done map[string]int) {
	var each []string
	for _, kind := range slices.Sorted(maps.Keys(done)) {
		each = append(each, fmt.Sprintf("%s %d", kind, done[kind]))
	}
	t.Logf("%s: %s", time.Now().UTC().Format(time.RFC3339), strings.Join(each, ", "))
}

// expectAllKinds fails a campaign in which something was never done.
func expectAllKinds(t *testing.T, done map[string]int) {
	for _, kind := range []string{"write", "write direct", "read", "read direct", "truncate", "extend", "allocate", "allocate refused",
		"punch", "punch refused", "store mapped", "load mapped", "rename", "rename over", "rename open", "exchange", "link", "unlink", "unlink open",
		"move directory", "copy", "set times", "hydrate", "prefetch", "leave", "left", "remount", "crash"} {
		if done[kind] == 0 {
			t.Errorf("nothing of this was done: %s", kind)
		}
	}
}

func randomRound(t *testing.T, o OverlayOptions, steps int, done map[string]int) {
	m := newModel(t, o, done)
	for m.step = range steps {
		m.operation()
	}
	m.check()
	m.closeAll()
	m.awaitHydration()
	m.v.do("hydrate")
	m.check()
	m.unmount()
	m.check()
	checkNoAttribute(t, m.v.dir)
	expectQuiet(t, m.v.c)
}

// model is what the mount must look like.
type model struct {
	t       *testing.T
	rng     *rand.Rand
	v       *thawed
	files   map[string]*modelFile
	dirs    map[string]bool // below "d", that is
	handles []modelHandle
	step    int
	done    map[string]int // how many operations, by kind
	buffer  []byte         // aligned, for one read or write
	noise   []byte         // without zeros, so that a hole taken for data shows

	hydration chan string // the error text of a hydration under way
}

// modelFile is a file, of any number of names.
type modelFile struct {
	content  []byte
	names    int
	lower    bool      // it may have holes
	modified time.Time // zero: not known
}

type modelHandle struct {
	f      *os.File
	file   *modelFile
	direct bool
}

const (
	largestWrite = 40_000
	directUnit   = 4096
)

func newModel(t *testing.T, o OverlayOptions, done map[string]int) *model {
	m := &model{t: t, rng: rand.New(rand.NewPCG(seed(t), 0)), done: done, files: make(map[string]*modelFile), dirs: map[string]bool{"d/s0": true}}
	buffer, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	m.must(err)
	t.Cleanup(func() { unix.Munmap(buffer) })
	m.buffer, m.noise = buffer, random(m.rng, 1<<20)
	tree := lowerTree{}
	for _, dir := range []string{"pgdata", "pgdata/d", "pgdata/d/s0"} {
		tree.dir(dir, 0o700)
	}
	for i := range 12 {
		name := []string{"", "d/", "d/s0/"}[i%3] + fmt.Sprintf("f%d", i)
		size := m.rng.IntN(200_000)
		if i%2 == 0 {
			size = smallFile + m.rng.IntN(smallFile/2)
		}
		tree.file("pgdata/"+name, 0o600, random(m.rng, size))
		f := tree["pgdata/"+name]
		m.files[name] = &modelFile{bytes.Clone(f.content), 1, true, f.e.ModTime}
	}
	m.v = thaw(t, tree, o)
	return m
}

func (m *model) path(name string) string { return filepath.Join(m.v.dir, name) }

func (m *model) fatal(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("step %d: %s", m.step, fmt.Sprintf(format, args...))
}

func (m *model) must(err error) {
	m.t.Helper()
	if err != nil {
		m.fatal("%v", err)
	}
}

func (m *model) did(kind string) { m.done[kind]++ }

func (m *model) anyName() string {
	names := slices.Sorted(maps.Keys(m.files))
	return names[m.rng.IntN(len(names))]
}

// newName is a name that may be taken.
func (m *model) newName() string {
	dirs := append([]string{"", "", "d"}, slices.Sorted(maps.Keys(m.dirs))...)
	return filepath.Join(dirs[m.rng.IntN(len(dirs))], fmt.Sprintf("n%d", m.rng.IntN(15)))
}

// operations are what may be done next, by weight.
var operations = []struct {
	weight int
	run    func(*model)
}{
	{60, (*model).write}, {60, (*model).read}, {24, (*model).open}, {20, (*model).close}, {24, (*model).truncate}, {12, (*model).sync},
	{10, (*model).allocate}, {10, (*model).punch}, {6, (*model).append}, {10, (*model).storeMapped}, {10, (*model).loadMapped}, {8, (*model).copy},
	{12, (*model).create}, {10, (*model).rename}, {6, (*model).exchange}, {8, (*model).link}, {8, (*model).unlink}, {3, (*model).moveDirectory},
	{8, (*model).stat}, {4, (*model).setTimes}, {2, (*model).checkNames}, {2, (*model).hydrate}, {1, (*model).leave}, {1, (*model).restart},
}

func (m *model) operation() {
	m.did("operations")
	total := 0
	for _, op := range operations {
		total += op.weight
	}
	pick := m.rng.IntN(total)
	for _, op := range operations {
		if pick -= op.weight; pick < 0 {
			op.run(m)
			return
		}
	}
}

// apart tells whether two names are in branches between which no file may move.
func (m *model) apart(a, b string) bool {
	return m.v.o.Leave != Never && strings.HasPrefix(a, "d/") != strings.HasPrefix(b, "d/")
}

// expect fails but for an error, or for none.
func (m *model) expect(err, want error, what string, names ...string) {
	m.t.Helper()
	if !errors.Is(err, want) {
		m.fatal("%s %q: %v, want %v", what, names, err, want)
	}
}

// give gives a file one more name, in place of what has that name.
func (m *model) give(name string, file *modelFile) {
	m.take(name)
	m.files[name] = file
	file.names++
}

func (m *model) take(name string) {
	if file := m.files[name]; file != nil {
		file.names--
		delete(m.files, name)
	}
}

func (m *model) create() {
	name := m.newName()
	f, err := os.OpenFile(m.path(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o640)
	if m.files[name] != nil {
		m.expect(err, unix.EEXIST, "create", name)
		return
	}
	m.must(err)
	m.did("create")
	file := &modelFile{}
	m.give(name, file)
	m.handles = append(m.handles, modelHandle{f: f, file: file})
}

func (m *model) rename() {
	from, to := m.anyName(), m.newName()
	err := os.Rename(m.path(from), m.path(to))
	file := m.files[from]
	switch {
	case m.apart(from, to):
		m.expect(err, unix.EXDEV, "rename", from, to)
		return
	case err != nil:
		m.fatal("rename %s to %s: %v", from, to, err)
	case file == m.files[to]: // rename(2): two names of one file both stay
		return
	case m.files[to] != nil:
		m.did("rename over")
	default:
		m.did("rename")
	}
	if m.isOpen(file) {
		m.did("rename open")
	}
	m.give(to, file)
	m.take(from)
}

func (m *model) isOpen(file *modelFile) bool {
	return slices.ContainsFunc(m.handles, func(h modelHandle) bool { return h.file == file })
}

func (m *model) exchange() {
	a, b := m.anyName(), m.anyName()
	err := unix.Renameat2(unix.AT_FDCWD, m.path(a), unix.AT_FDCWD, m.path(b), unix.RENAME_EXCHANGE)
	if m.apart(a, b) {
		m.expect(err, unix.EXDEV, "exchange", a, b)
		return
	}
	m.expect(err, nil, "exchange", a, b)
	m.did("exchange")
	m.files[a], m.files[b] = m.files[b], m.files[a]
}

func (m *model) link() {
	from, to := m.anyName(), m.newName()
	err := os.Link(m.path(from), m.path(to))
	switch {
	case m.apart(from, to) && m.files[to] == nil:
		m.expect(err, unix.EXDEV, "link", from, to)
	case m.apart(from, to):
		if err == nil {
			m.fatal("link %s to %s, which is there and elsewhere", from, to)
		}
	case m.files[to] != nil:
		m.expect(err, unix.EEXIST, "link", from, to)
	default:
		m.expect(err, nil, "link", from, to)
		m.did("link")
		m.give(to, m.files[from])
	}
}

func (m *model) unlink() {
	if len(m.files) < 8 {
		return
	}
	name := m.anyName()
	m.expect(os.Remove(m.path(name)), nil, "unlink", name)
	m.did("unlink")
	if m.files[name].names == 1 && m.isOpen(m.files[name]) {
		m.did("unlink open")
	}
	m.take(name)
}

// moveDirectory makes a directory, removes one, or gives one another name, with what is in it.
func (m *model) moveDirectory() {
	from, to := fmt.Sprintf("d/s%d", m.rng.IntN(3)), fmt.Sprintf("d/s%d", m.rng.IntN(3))
	switch {
	case !m.dirs[from]:
		m.expect(os.Mkdir(m.path(from), 0o700), nil, "mkdir", from)
		m.dirs[from] = true
	case from == to && len(m.below(from)) > 0:
		m.expect(os.Remove(m.path(from)), unix.ENOTEMPTY, "rmdir", from)
	case from == to:
		m.expect(os.Remove(m.path(from)), nil, "rmdir", from)
		delete(m.dirs, from)
	case len(m.below(to)) > 0:
		m.expect(unix.Rename(m.path(from), m.path(to)), unix.ENOTEMPTY, "rename", from, to)
	default:
		m.expect(unix.Rename(m.path(from), m.path(to)), nil, "rename", from, to)
		m.did("move directory")
		delete(m.dirs, from)
		m.dirs[to] = true
		for _, name := range m.below(from) {
			m.files[to+strings.TrimPrefix(name, from)] = m.files[name]
			delete(m.files, name)
		}
	}
}

// below lists the files in a directory.
func (m *model) below(dir string) (names []string) {
	for name := range m.files {
		if strings.HasPrefix(name, dir+"/") {
			names = append(names, name)
		}
	}
	return names
}

// hydrate lets the hydrator run beside the operations that follow.
func (m *model) hydrate() {
	if m.hydration != nil || m.rng.IntN(3) > 0 {
		return
	}
	command := []string{"hydrate", "crawl", "crawl", "prefetch"}[m.rng.IntN(4)]
	m.did(map[bool]string{true: "prefetch", false: "hydrate"}[command == "prefetch"])
	v, result := m.v, make(chan string, 1)
	m.hydration = result
	go func() {
		r, err := v.ask(command)
		if err != nil { // the daemon was killed meanwhile
			r.Err = ""
		}
		result <- r.Err
	}()
}

func (m *model) awaitHydration() {
	if m.hydration == nil {
		return
	}
	if text := <-m.hydration; text != "" {
		m.fatal("hydrate: %s", text)
	}
	m.hydration = nil
}

// leave lets go what is whole.
func (m *model) leave() {
	if m.v.o.Leave == Never {
		return
	}
	m.did("leave")
	if left, _ := m.v.leave(); len(left) > 0 {
		m.did("left")
	}
}

// restart takes the mount off and makes it again, most often by a crash.
func (m *model) restart() {
	var killed time.Time
	if m.rng.IntN(3) == 0 {
		m.did("remount")
		m.awaitHydration()
		m.closeAll()
		m.unmount()
	} else {
		m.did("crash")
		killed = time.Now()
		m.v.crash()
		for _, h := range m.handles {
			h.f.Close() // ENOTCONN
		}
		m.handles = nil
		m.awaitHydration()
	}
	m.v.mount()
	if !killed.IsZero() {
		m.takeOverTimes(killed)
	}
	m.check()
}

// takeOverTimes knows that a daemon that is killed while it fills holes has not set the file's modification time back.
func (m *model) takeOverTimes(killed time.Time) {
	for name, file := range m.files {
		st, err := os.Stat(m.path(name))
		m.must(err)
		if at := st.ModTime(); file.lower && !file.modified.IsZero() && at.After(killed.Add(-time.Minute)) && at.After(file.modified) {
			file.modified = at
		}
	}
}

// unmount waits for the last handle's release, of which the kernel tells after close(2).
func (m *model) unmount() {
	m.t.Helper()
	last := ""
	eventually(m.t, "the unmount", func() bool {
		r, err := m.v.ask("unmount")
		m.must(err)
		if r.Err != "" && r.Err != last {
			last = r.Err
			m.t.Log(last)
		}
		return r.Err == ""
	})
}

func (m *model) checkNames() {
	got := []string{}
	for _, dir := range append([]string{"", "d"}, slices.Sorted(maps.Keys(m.dirs))...) {
		entries, err := os.ReadDir(m.path(dir))
		m.must(err)
		for _, e := range entries {
			if !e.IsDir() {
				got = append(got, filepath.Join(dir, e.Name()))
			}
		}
	}
	slices.Sort(got)
	if want := slices.Sorted(maps.Keys(m.files)); !slices.Equal(got, want) {
		m.fatal("names\n%s\nwant\n%s", strings.Join(got, " "), strings.Join(want, " "))
	}
}

// check compares all files.
func (m *model) check() {
	m.t.Helper()
	m.checkNames()
	for name, file := range m.files {
		st, err := os.Stat(m.path(name))
		m.must(err)
		m.checkStat(name, st, file)
		m.compare(name, 0, readAll(m.t, m.path(name)), file.content)
	}
}

func (m *model) checkStat(name string, st os.FileInfo, want *modelFile) {
	m.t.Helper()
	sys := st.Sys().(*syscall.Stat_t)
	if st.Size() != int64(len(want.content)) || int(sys.Nlink) != want.names || !want.modified.IsZero() && !st.ModTime().Equal(want.modified) {
		m.fatal("%s: %d bytes, %d names, modified at %v; want %d, %d, %v", name, st.Size(), sys.Nlink, st.ModTime(), len(want.content), want.names, want.modified)
	}
}

// compare fails if what was read at an offset is not what is wanted.
func (m *model) compare(name string, off int, got, want []byte) {
	m.t.Helper()
	if !bytes.Equal(got, want) {
		n := min(len(got), len(want))
		m.fatal("%s from %d on: %d bytes, want %d; first difference at %d", name, off, len(got), len(want), firstDifference(got[:n], want))
	}
}
