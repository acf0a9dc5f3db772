package fusefs

import (
	"errors"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// What the model does to the content of files.

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
	name, flags := m.anyName(), os.O_RDWR
	switch m.rng.IntN(16) {
	case 0:
		flags |= os.O_TRUNC
	case 1:
		flags |= unix.O_DSYNC
	case 2, 3:
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(m.path(name), flags, 0)
	if errors.Is(err, unix.EINVAL) && flags&unix.O_DIRECT != 0 { // open(2): the file system has no direct I/O
		f, err = os.OpenFile(m.path(name), os.O_RDWR, 0)
		flags = os.O_RDWR
	}
	m.must(err)
	file := m.files[name]
	if flags&os.O_TRUNC != 0 {
		file.resize(0)
	}
	m.handles = append(m.handles, modelHandle{f, file, flags&unix.O_DIRECT != 0})
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

// some returns n random bytes, in the buffer.
func (m *model) some(n int) []byte {
	from := m.rng.IntN(len(m.noise) - n)
	return m.buffer[:copy(m.buffer, m.noise[from:from+n])]
}

// aligned rounds a place as a handle for direct I/O wants it.
func (h modelHandle) aligned(off, n int) (int, int) {
	if h.direct {
		return off - off%directUnit, n + (directUnit-n%directUnit)%directUnit
	}
	return off, n
}

func (m *model) write() {
	h, kind := m.handle(), "write"
	off, n := m.offset(h.file), 8192
	if m.rng.IntN(2) == 0 {
		n = 1 + m.rng.IntN(largestWrite)
	}
	off, n = h.aligned(off, n)
	if h.direct {
		kind = "write direct"
	}
	m.did(kind)
	p := m.some(n)
	_, err := h.f.WriteAt(p, int64(off))
	m.must(err)
	h.file.write(p, off)
}

func (f *modelFile) write(p []byte, off int) {
	f.grow(off + len(p))
	copy(f.content[off:], p)
}

// grow makes a file that is shorter as long as that. It is modified.
func (f *modelFile) grow(size int) { f.resize(max(size, len(f.content))) }

func (f *modelFile) resize(size int) {
	f.modified = time.Time{}
	if size <= len(f.content) {
		f.content = f.content[:size]
		return
	}
	f.content = append(f.content, make([]byte, size-len(f.content))...)
}

func (m *model) append() {
	name := m.anyName()
	f, err := os.OpenFile(m.path(name), os.O_WRONLY|os.O_APPEND, 0)
	m.must(err)
	m.did("append")
	p := m.some(1 + m.rng.IntN(9000))
	_, err = f.Write(p)
	m.must(errors.Join(err, f.Close()))
	m.files[name].write(p, len(m.files[name].content))
}

// part is what a file has of [off, off+n).
func (f *modelFile) part(off, n int) []byte {
	return f.content[min(off, len(f.content)):min(off+n, len(f.content))]
}

func (m *model) read() {
	h, kind := m.handle(), "read"
	off, n := h.aligned(m.offset(h.file), 1+m.rng.IntN(60_000))
	if h.direct {
		kind = "read direct"
	}
	m.did(kind)
	got, _ := h.f.ReadAt(m.buffer[:n], int64(off))
	m.compare(h.f.Name(), off, m.buffer[:got], h.file.part(off, n))
}

// mapped calls use with a shared mapping of a part of a file, if it can be mapped.
func (m *model) mapped(use func(h modelHandle, p []byte, off int) error) {
	h := m.handle()
	if len(h.file.content) == 0 {
		return
	}
	page := os.Getpagesize()
	off := m.rng.IntN(len(h.file.content))
	off -= off % page
	n := min(1+m.rng.IntN(60_000), len(h.file.content)-off)
	p, err := unix.Mmap(int(h.f.Fd()), int64(off), n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if errors.Is(err, unix.ENODEV) { // served for direct I/O, see handles.add
		m.did("map refused")
		return
	}
	m.must(err)
	m.must(errors.Join(use(h, p, off), unix.Munmap(p)))
}

func (m *model) storeMapped() {
	m.mapped(func(h modelHandle, p []byte, off int) error {
		m.did("store mapped")
		at := m.rng.IntN(len(p))
		q := m.some(1 + m.rng.IntN(min(len(p)-at, largestWrite)))
		copy(p[at:], q)
		h.file.write(q, off+at)
		return unix.Msync(p, unix.MS_SYNC)
	})
}

func (m *model) loadMapped() {
	m.mapped(func(h modelHandle, p []byte, off int) error {
		m.did("load mapped")
		m.compare(h.f.Name(), off, p, h.file.part(off, len(p)))
		return nil
	})
}

// copy copies from file to file without a buffer.
func (m *model) copy() {
	from := m.handle()
	to := m.handles[m.rng.IntN(len(m.handles))]
	if from.file == to.file || from.direct || to.direct || len(from.file.content) == 0 {
		return
	}
	offFrom, offTo := int64(m.rng.IntN(len(from.file.content))), int64(m.offset(to.file))
	at, start := int(offFrom), int(offTo)
	n, err := unix.CopyFileRange(int(from.f.Fd()), &offFrom, int(to.f.Fd()), &offTo, 1+m.rng.IntN(60_000), 0)
	if errors.Is(err, unix.EXDEV) && m.v.o.Leave != Never { // one lies natively by now
		return
	}
	m.must(err)
	if n == 0 && m.outlived(from) { // the kernel knows no more of a file that has left, see the package's comment
		return
	}
	m.did("copy")
	to.file.write(from.file.part(at, n), start)
}

// outlived tells whether a handle is of the mount, while the branch is not any more.
func (m *model) outlived(h modelHandle) bool {
	var file, branch unix.Stat_t
	m.must(unix.Fstat(int(h.f.Fd()), &file))
	m.must(unix.Stat(m.path("d"), &branch))
	return file.Dev != branch.Dev
}

func (m *model) truncate() {
	name := m.anyName()
	file, cut := m.files[name], func(size int64) error { return os.Truncate(m.path(name), size) }
	if m.rng.IntN(2) == 0 {
		h := m.handle()
		file, cut = h.file, h.f.Truncate
	}
	size := m.offset(file)
	m.did(map[bool]string{true: "extend", false: "truncate"}[size > len(file.content)])
	m.must(cut(int64(size)))
	file.resize(size)
}

func (m *model) sync() {
	h := m.handle()
	m.did("sync")
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
	if m.fallocate(h, mode, off, n, "allocate") && mode == 0 {
		h.file.grow(off + n)
	}
}

// punch makes zeros.
func (m *model) punch() {
	h := m.handle()
	off, n := m.offset(h.file), 1+m.rng.IntN(50_000)
	mode := []uint32{unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE}[m.rng.IntN(3)]
	if !m.fallocate(h, mode, off, n, "punch") {
		return
	}
	if mode&unix.FALLOC_FL_KEEP_SIZE == 0 {
		h.file.grow(off + n)
	}
	clear(h.file.part(off, n))
}

// fallocate tells whether it was done. It may be refused for a file that has a lower.
func (m *model) fallocate(h modelHandle, mode uint32, off, n int, kind string) bool {
	err := unix.Fallocate(int(h.f.Fd()), mode, int64(off), int64(n))
	if errors.Is(err, unix.EOPNOTSUPP) && (h.file.lower || mode&unix.FALLOC_FL_ZERO_RANGE != 0) {
		m.did(kind + " refused")
		return false
	}
	m.must(err)
	m.did(kind)
	h.file.modified = time.Time{}
	return true
}

func (m *model) stat() {
	h := m.handle()
	m.did("stat")
	st, err := h.f.Stat()
	m.must(err)
	m.checkStat(h.f.Name(), st, h.file)
}

// setTimes sets a time of modification, which nothing but a change may move from then on.
func (m *model) setTimes() {
	name := m.anyName()
	at := time.Unix(1_500_000_000+m.rng.Int64N(1e8), m.rng.Int64N(1e9))
	m.must(os.Chtimes(m.path(name), time.Time{}, at))
	m.did("set times")
	m.files[name].modified = at
}
