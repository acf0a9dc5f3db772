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
	"testing"

	"golang.org/x/sys/unix"
)

// TestOverlayRandom compares a mount with a model through random system calls, hydration beside them, and crashes of the
// daemon between them. PGTHAW_STEPS makes it longer.
func TestOverlayRandom(t *testing.T) {
	steps := rounds(800)
	if text := os.Getenv("PGTHAW_STEPS"); text != "" {
		steps, _ = strconv.Atoi(text)
	}
	modes(t, func(t *testing.T, o OverlayOptions) {
		rng := rand.New(rand.NewPCG(seed(t), 0))
		tree := lowerTree{}
		tree.dir("pgdata", 0o700)
		tree.dir("pgdata/d", 0o700)
		m := &model{t: t, rng: rng, files: make(map[string]*modelFile)}
		for i := range 12 {
			name := fmt.Sprintf("f%d", i)
			if i%3 == 0 {
				name = "d/" + name
			}
			size := rng.IntN(200_000)
			if i%2 == 0 {
				size = 1<<20 + rng.IntN(1<<20)
			}
			tree.file("pgdata/"+name, 0o600, random(rng, size))
			m.files[name] = &modelFile{content: bytes.Clone(tree["pgdata/"+name].content)}
		}
		m.v = thaw(t, tree, o)
		for m.done = range steps {
			m.step()
		}
		m.check()
		m.closeAll()
		m.awaitHydration()
		m.v.do("hydrate")
		m.check()
		m.v.do("unmount")
		m.check()
		checkNoAttribute(t, m.v.dir)
		expectQuiet(t, m.v.c)
	})
}

// model is what the mount must look like.
type model struct {
	t       *testing.T
	rng     *rand.Rand
	v       *thawed
	files   map[string]*modelFile
	handles []modelHandle
	made    int // files that were created
	done    int // steps

	hydration chan string // the error text of a hydration under way
}

// modelFile is a file, of any number of names.
type modelFile struct{ content []byte }

type modelHandle struct {
	f    *os.File
	file *modelFile
}

func (m *model) path(name string) string { return filepath.Join(m.v.dir, name) }

func (m *model) fatal(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("step %d: %s", m.done, fmt.Sprintf(format, args...))
}

func (m *model) must(err error) {
	m.t.Helper()
	if err != nil {
		m.fatal("%v", err)
	}
}

func (m *model) anyName() string {
	names := slices.Sorted(maps.Keys(m.files))
	return names[m.rng.IntN(len(names))]
}

// newName is a name that may be taken.
func (m *model) newName() string {
	name := fmt.Sprintf("n%d", m.rng.IntN(20))
	if m.rng.IntN(3) == 0 {
		name = "d/" + name
	}
	return name
}

func (m *model) step() {
	operations := []struct {
		weight int
		run    func()
	}{
		{30, m.write}, {30, m.read}, {12, m.open}, {10, m.close}, {12, m.truncate}, {6, m.create}, {5, m.rename}, {3, m.exchange},
		{4, m.link}, {4, m.unlink}, {6, m.sync}, {6, m.allocate}, {2, m.append}, {3, m.hydrate}, {1, m.crash}, {1, m.checkNames},
	}
	total := 0
	for _, op := range operations {
		total += op.weight
	}
	pick := m.rng.IntN(total)
	for _, op := range operations {
		if pick -= op.weight; pick < 0 {
			op.run()
			return
		}
	}
}

// handle returns an open file, most often one that is open already.
func (m *model) handle() modelHandle {
	if len(m.handles) == 0 || m.rng.IntN(8) == 0 {
		m.open()
	}
	return m.handles[m.rng.IntN(len(m.handles))]
}

func (m *model) open() {
	if len(m.handles) > 10 {
		m.close()
	}
	name := m.anyName()
	flags := os.O_RDWR
	if m.rng.IntN(10) == 0 {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(m.path(name), flags, 0)
	m.must(err)
	file := m.files[name]
	if flags&os.O_TRUNC != 0 {
		file.content = nil
	}
	m.handles = append(m.handles, modelHandle{f, file})
}

func (m *model) close() {
	if len(m.handles) == 0 {
		return
	}
	i := m.rng.IntN(len(m.handles))
	m.must(m.handles[i].f.Close())
	m.handles = slices.Delete(m.handles, i, i+1)
}

func (m *model) closeAll() {
	for len(m.handles) > 0 {
		m.close()
	}
}

func (m *model) offset(file *modelFile) int {
	off := m.rng.IntN(len(file.content) + 10_000)
	switch m.rng.IntN(4) {
	case 0, 1:
		off -= off % 8192
	case 2:
		off -= off % 4096
	}
	return off
}

func (m *model) write() {
	h := m.handle()
	off, n := m.offset(h.file), 8192
	if m.rng.IntN(2) == 0 {
		n = 1 + m.rng.IntN(40_000)
	}
	p := random(m.rng, n)
	_, err := h.f.WriteAt(p, int64(off))
	m.must(err)
	h.file.write(p, off)
}

func (f *modelFile) write(p []byte, off int) {
	f.content = bytes.Clone(resized(f.content, max(len(f.content), off+len(p))))
	copy(f.content[off:], p)
}

func (m *model) append() {
	name := m.anyName()
	f, err := os.OpenFile(m.path(name), os.O_WRONLY|os.O_APPEND, 0)
	m.must(err)
	p := random(m.rng, 1+m.rng.IntN(9000))
	_, err = f.Write(p)
	m.must(errors.Join(err, f.Close()))
	m.files[name].write(p, len(m.files[name].content))
}

func (m *model) read() {
	h := m.handle()
	off, p := m.offset(h.file), make([]byte, 1+m.rng.IntN(60_000))
	n, _ := h.f.ReadAt(p, int64(off))
	want := h.file.content[min(off, len(h.file.content)):min(off+len(p), len(h.file.content))]
	if !bytes.Equal(p[:n], want) {
		m.fatal("read %s %d+%d: %d bytes, want %d; first difference at %d", h.f.Name(), off, len(p), n, len(want), firstDifference(p[:min(n, len(want))], want))
	}
}

func (m *model) truncate() {
	if m.rng.IntN(2) == 0 {
		h := m.handle()
		size := m.offset(h.file)
		m.must(h.f.Truncate(int64(size)))
		h.file.content = resized(h.file.content, size)
		return
	}
	name := m.anyName()
	file := m.files[name]
	size := m.offset(file)
	m.must(os.Truncate(m.path(name), int64(size)))
	file.content = resized(file.content, size)
}

func (m *model) create() {
	name := m.newName()
	f, err := os.OpenFile(m.path(name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o640)
	if m.files[name] != nil {
		if !errors.Is(err, unix.EEXIST) {
			m.fatal("create %s over a file: %v", name, err)
		}
		return
	}
	m.must(err)
	m.made++
	m.files[name] = &modelFile{}
	m.handles = append(m.handles, modelHandle{f, m.files[name]})
}

func (m *model) rename() {
	from, to := m.anyName(), m.newName()
	m.must(os.Rename(m.path(from), m.path(to)))
	if m.files[from] == m.files[to] { // rename(2): two names of one file both stay
		return
	}
	m.files[to] = m.files[from]
	delete(m.files, from)
}

func (m *model) exchange() {
	a, b := m.anyName(), m.anyName()
	m.must(unix.Renameat2(unix.AT_FDCWD, m.path(a), unix.AT_FDCWD, m.path(b), unix.RENAME_EXCHANGE))
	m.files[a], m.files[b] = m.files[b], m.files[a]
}

func (m *model) link() {
	from, to := m.anyName(), m.newName()
	err := os.Link(m.path(from), m.path(to))
	if m.files[to] != nil {
		if !errors.Is(err, unix.EEXIST) {
			m.fatal("link %s over a file: %v", to, err)
		}
		return
	}
	m.must(err)
	m.files[to] = m.files[from]
}

func (m *model) unlink() {
	if len(m.files) < 6 {
		return
	}
	name := m.anyName()
	m.must(os.Remove(m.path(name)))
	delete(m.files, name)
}

func (m *model) sync() {
	h := m.handle()
	if m.rng.IntN(2) == 0 {
		m.must(h.f.Sync())
	} else {
		m.must(unix.Fdatasync(int(h.f.Fd())))
	}
}

func (m *model) allocate() {
	h := m.handle()
	off, n := m.offset(h.file), 1+m.rng.IntN(50_000)
	mode := uint32(0)
	if m.rng.IntN(2) == 0 {
		mode = unix.FALLOC_FL_KEEP_SIZE
	}
	err := unix.Fallocate(int(h.f.Fd()), mode, int64(off), int64(n))
	if errors.Is(err, unix.EOPNOTSUPP) {
		return
	}
	m.must(err)
	if mode == 0 {
		h.file.content = resized(h.file.content, max(len(h.file.content), off+n))
	}
}

// hydrate lets the hydrator run beside the steps that follow.
func (m *model) hydrate() {
	if m.hydration != nil || m.rng.IntN(3) > 0 {
		return
	}
	v, result := m.v, make(chan string, 1)
	m.hydration = result
	go func() {
		r, err := v.ask("crawl")
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

func (m *model) crash() {
	m.v.crash()
	for _, h := range m.handles {
		h.f.Close() // ENOTCONN
	}
	m.handles = nil
	m.awaitHydration()
	m.v.mount()
	m.check()
}

func (m *model) checkNames() {
	var got []string
	for _, dir := range []string{"", "d/"} {
		entries, err := os.ReadDir(m.path(dir))
		m.must(err)
		for _, e := range entries {
			if !e.IsDir() {
				got = append(got, dir+e.Name())
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
		got := readAll(m.t, m.path(name))
		if !bytes.Equal(got, file.content) {
			n := min(len(got), len(file.content))
			m.fatal("%s: %d bytes, want %d; first difference at %d", name, len(got), len(file.content), firstDifference(got[:n], file.content))
		}
	}
}
