package fusefs

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// lowerError is an error of the repository, met while reading a hole. To whoever reads the file it is EIO.
type lowerError struct {
	path string
	off  int64
	err  error
}

func (e *lowerError) Error() string {
	return fmt.Sprintf("read %s of the backup at %d: %v", e.path, e.off, e.err)
}
func (e *lowerError) Unwrap() error { return e.err }

// file is the content of a regular file: data in the backing file, and below the limit, where that has holes, the lower
// file's bytes.
//
// Two facts carry all else. A hole that was filled or written stays data: nothing punches holes but what a write that
// failed has not written. And the limit falls only.
type file struct {
	name      func() string                          // names the inode for open(2)
	openLower func(path string) (io.ReaderAt, error) // of the backup
	block     int64                                  // the file system's block size, bytes
	traffic   *traffic                               // told of whoever waits for the repository
	touched   func(path string, off, n int64)        // told of what they wait for; nil: nobody listens

	open handles

	load     sync.Mutex  // held while the attribute is read, when the node is in the table: not before, for another node of this inode might still lower the limit
	loaded   atomic.Bool // it has been read
	clean    sync.Once   // sees to it that holes are dependable
	cleanErr error

	// content is held shared by what reads or writes the backing file, exclusively by what fills holes or moves the limit.
	// Nothing holds it while the repository is read, nor while the hydrator writes to the disk: see fillDirect.
	content  sync.RWMutex
	limit    int64 // guarded by content; 0: no lower
	path     string
	unsynced atomic.Bool // the limit changed since the last fsync
	filled   atomic.Bool // no hole is left below the limit; never false again
	careful  atomic.Bool // a write into a hole has failed: more may
	spoilt   atomic.Bool // a failed write left zeros in holes that could not be made holes again
	beside   beside      // what is filled without content being held

	// lowerMu is held while the lower file is opened, which reads the repository: who waits wants the same file.
	lowerMu sync.Mutex
	lower   io.ReaderAt
}

// attach reads what the placeholder's attribute says, until it has succeeded: whose permissions did not allow it may get others.
func (f *file) attach() error {
	if f.loaded.Load() {
		return nil
	}
	f.load.Lock()
	defer f.load.Unlock()
	if f.loaded.Load() {
		return nil
	}
	p, err := readPlaceholder(f.name())
	if err == nil {
		f.setPlaceholder(p)
	}
	return err
}

// made is attach for a file that was just made, and has no lower: its permissions need not let its attributes be read.
func (f *file) made() {
	f.load.Lock()
	defer f.load.Unlock()
	if !f.loaded.Load() {
		f.setPlaceholder(placeholder{})
	}
}

// setPlaceholder is told what the attribute says. Caller holds load.
func (f *file) setPlaceholder(p placeholder) {
	f.content.Lock()
	defer f.content.Unlock()
	f.limit, f.path = p.limit, p.path
	f.filled.Store(p.limit == 0)
	f.loaded.Store(true)
}

// ready is attach for whoever has the file open: after it, holes can be relied on.
func (f *file) ready(fd int) error {
	if err := f.attach(); err != nil {
		return err
	}
	f.clean.Do(func() {
		f.content.Lock()
		defer f.content.Unlock()
		if f.limit > 0 {
			f.cleanErr = discardUnwritten(fd, f.limit)
		}
	})
	if f.spoilt.Load() {
		return errors.New("a write failed and left zeros where bytes of the backup belong")
	}
	return f.cleanErr
}

// placeholder returns the limit and path as they are now.
func (f *file) placeholder() (placeholder, error) {
	if err := f.attach(); err != nil {
		return placeholder{}, err
	}
	f.content.RLock()
	defer f.content.RUnlock()
	return placeholder{f.limit, f.path}, nil
}

// readAt fills p from off and returns how much there is before the end of the file. With fill, it writes what came from
// the repository into the holes.
func (f *file) readAt(fd int, p []byte, off int64, fill bool) (int, error) {
	return f.read(fd, p, off, func(holes []span) error { return f.fromLower(fd, p, off, holes, fill) })
}

// read is readAt for which lower reads the holes.
func (f *file) read(fd int, p []byte, off int64, lower func(holes []span) error) (int, error) {
	if err := f.ready(fd); err != nil {
		return 0, err
	}
	if f.filled.Load() {
		return preadFull(fd, p, off)
	}
	var few [8]span
	n, holes, err := f.readUpper(fd, p, off, few[:0])
	if err != nil || len(holes) == 0 {
		return n, err
	}
	f.tell(holes)
	if err := lower(holes); err != nil {
		return 0, err
	}
	return n, nil
}

// fromLower reads holes of p, which begins at off.
func (f *file) fromLower(fd int, p []byte, off int64, holes []span, fill bool) error {
	if err := f.readHoles(holes, p, off); err != nil {
		return err
	}
	if fill && !f.beside.busy.Load() { // else it would wait with the hydrator for the disk
		// What was read is right without it: a full disk must not fail a read.
		_ = f.fillFrom(fd, holes, p, off)
	}
	return nil
}

// readUpper reads data and the zeros of holes at or above the limit, and appends the holes below it to holes.
func (f *file) readUpper(fd int, p []byte, off int64, holes []span) (int, []span, error) {
	f.content.RLock()
	defer f.content.RUnlock()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, nil, fmt.Errorf("stat: %w", err)
	}
	end := min(off+int64(len(p)), st.Size)
	for pos := off; pos < end; {
		hole, to, err := f.runAt(fd, pos, end)
		if err != nil {
			return 0, nil, err
		}
		if hole {
			lower := max(pos, min(to, f.limit))
			if pos < lower {
				holes = append(holes, span{pos, lower})
			}
			clear(p[lower-off : to-off])
		} else if n, err := preadFull(fd, p[pos-off:to-off], pos); err != nil || n < int(to-pos) {
			return 0, nil, errors.Join(err, shortRead(n, int(to-pos)))
		}
		pos = to
	}
	return int(max(0, end-off)), holes, nil
}

func shortRead(n, want int) error {
	if n < want {
		return fmt.Errorf("read %d bytes of %d: %w", n, want, io.ErrUnexpectedEOF)
	}
	return nil
}

// readLower fills p with the lower file's bytes from off. Nobody holds a lock that others need.
func (f *file) readLower(p []byte, off int64) error {
	r, err := f.lowerFile()
	if err == nil {
		err = readFull(r, p, off)
	}
	if err != nil {
		return &lowerError{f.path, off, err}
	}
	return nil
}

// readFull reads all of p: an end of the file before it is an error.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return shortRead(n, len(p))
	}
	return err
}

func (f *file) lowerFile() (io.ReaderAt, error) {
	f.lowerMu.Lock()
	defer f.lowerMu.Unlock()
	if f.lower == nil {
		r, err := f.openLower(f.path)
		if err != nil {
			return nil, err
		}
		f.lower = r
	}
	return f.lower, nil
}

// writeAt writes p at off. Where an edge of p lies inside a block that is still a hole below the limit, that block gets
// the lower's bytes first; whole blocks need none.
func (f *file) writeAt(fd int, p []byte, off int64) (int, error) {
	var n int
	err := f.onBlocks(fd, off, off+int64(len(p)), func(holes []span) (err error) {
		n, err = f.pwrite(fd, p, off, holes)
		return err
	})
	return n, err
}

// onBlocks calls change, which makes data or unwritten extents of [off, end), when no edge of that range needs the lower's
// bytes any more. change gets the holes of the range below the limit; content is held, exclusively if there are any.
func (f *file) onBlocks(fd int, off, end int64, change func(holes []span) error) error {
	if err := f.ready(fd); err != nil {
		return err
	}
	for {
		edge, err := f.tryOnBlocks(fd, off, end, change)
		if err != nil || edge < 0 {
			return err
		}
		if err := f.copyUp(fd, edge); err != nil {
			return err
		}
	}
}

// copyUp fills one block, because a write needs it.
func (f *file) copyUp(fd int, block int64) error {
	defer f.traffic.enter()()
	f.tell([]span{{block, block + f.block}})
	_, err := f.fill(fd, span{block, block + f.block}, make([]byte, f.block))
	return err
}

// tryOnBlocks calls change unless there is an edge to be filled first, whose block it returns, else -1.
func (f *file) tryOnBlocks(fd int, off, end int64, change func(holes []span) error) (edge int64, err error) {
	unlock, err := f.lockForChange(fd, off, end)
	defer unlock()
	if err != nil {
		return -1, err
	}
	if f.filled.Load() {
		return -1, change(nil)
	}
	if edge, err := f.edge(fd, off, end); err != nil || edge >= 0 {
		return edge, err
	}
	holes, err := appendHoles(nil, fd, off, min(end, f.limit))
	if err != nil {
		return -1, err
	}
	return -1, change(holes)
}

// lockForChange takes content, exclusively if there are holes in [off, end) below the limit: nobody may see what a write
// that fails makes of them. It waits for what is being filled there.
func (f *file) lockForChange(fd int, off, end int64) (unlock func(), err error) {
	f.content.RLock()
	f.beside.changed.Store(true)
	if f.filled.Load() {
		return f.content.RUnlock, nil
	}
	blocks := span{roundDown(off, f.block), roundUp(end, f.block)}
	holes, err := appendHoles(nil, fd, off, min(end, f.limit))
	if err != nil || len(holes) == 0 && f.beside.over(blocks) == nil {
		return f.content.RUnlock, err
	}
	f.content.RUnlock()
	f.lockBeside(blocks)
	f.beside.changed.Store(true)
	return f.content.Unlock, nil
}

// pwrite writes p at off, or the first n bytes of it: then what is left of the holes is holes as before. holes are those
// of the range below the limit; if there are any, caller holds content exclusively.
//
// A write that finds no room for all of a folio leaves zeros in the blocks it did get (Linux: folio_zero_new_buffers),
// and those would be data where lower bytes belong. They are made holes again; but as a daemon that is killed before that
// would leave them, each block is written by itself where space is short.
func (f *file) pwrite(fd int, p []byte, off int64, holes []span) (n int, err error) {
	short := len(holes) > 0 && f.shortOfSpace(fd)
	for n < len(p) && err == nil {
		at, end := off+int64(n), len(p)
		if short {
			end = min(end, n+int(f.block-at%f.block))
		}
		var m int
		m, err = pwriteFull(fd, p[n:end], at)
		n += m
	}
	if err == nil || len(holes) == 0 {
		return n, err
	}
	f.careful.Store(true)
	whole := roundDown(off+int64(n), f.block)
	if undone := f.makeHoles(fd, holes, whole); undone != nil {
		f.spoilt.Store(true)
		err = errors.Join(err, undone)
	}
	return int(max(0, whole-off)), err
}

// spareSpace is more than what is written at the same time as one pwrite, bytes.
const spareSpace = 64 << 20

// shortOfSpace tells whether a write may fail for want of space.
func (f *file) shortOfSpace(fd int) bool {
	var st unix.Statfs_t
	err := unix.Fstatfs(fd, &st)
	return f.careful.Load() || err != nil || int64(st.Bavail)*int64(st.Bsize) < spareSpace
}

// makeHoles makes of holes what they were, from an offset on. Caller holds content exclusively.
func (f *file) makeHoles(fd int, holes []span, from int64) error {
	for _, h := range holes {
		at, end := max(from, h.from), roundUp(h.to, f.block)
		if at >= end {
			continue
		}
		still, err := appendHoles(nil, fd, at, h.to)
		if err == nil && len(still) == 1 && still[0] == (span{at, h.to}) {
			continue
		}
		if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, end-at); err != nil {
			return fmt.Errorf("make a hole again at %d: %w", at, err)
		}
	}
	return nil
}

// edge returns a block that must have the lower's bytes before [off, end) is changed, or -1: one that the range covers in
// part, is a hole and has lower bytes in its other part, or the limit's own block. Caller holds content.
func (f *file) edge(fd int, off, end int64) (int64, error) {
	first, last := roundDown(off, f.block), roundDown(end, f.block)
	if first < off && first < f.limit {
		if hole, _, err := runAt(fd, first, first+f.block); err != nil || hole {
			return first, err
		}
	}
	if last < end && end < f.limit {
		if hole, _, err := runAt(fd, last, last+f.block); err != nil || hole {
			return last, err
		}
	}
	return f.tail(fd, end)
}

// tail returns the limit's block if the limit lies inside it, it is a hole and the file is changed up to a place beyond
// it; else -1. Where such a file grows, btrfs writes zeros into the block at its old end (btrfs_cont_expand), which would
// be data where lower bytes belong. Caller holds content.
func (f *file) tail(fd int, end int64) (int64, error) {
	block := roundDown(f.limit, f.block)
	if end <= f.limit || block == f.limit {
		return -1, nil
	}
	if hole, _, err := runAt(fd, block, f.limit); err != nil || hole {
		return block, err
	}
	return -1, nil
}

// fill writes the lower's bytes into the holes below the limit in s, which starts at a block and ends at one or at the
// limit or beyond. buf has room for s. It tells how many bytes it wrote.
func (f *file) fill(fd int, s span, buf []byte) (int64, error) {
	holes, err := f.holes(fd, s)
	if err == nil {
		err = f.readHoles(holes, buf, s.from)
	}
	if err != nil {
		return 0, err
	}
	return total(holes), f.fillFrom(fd, holes, buf, s.from)
}

// readHoles reads the lower's bytes of holes into p, which begins at base.
func (f *file) readHoles(holes []span, p []byte, base int64) error {
	for _, h := range holes {
		if err := f.readLower(p[h.from-base:h.to-base], h.from); err != nil {
			return err
		}
	}
	return nil
}

// holes returns the holes of s below the limit.
func (f *file) holes(fd int, s span) ([]span, error) {
	if err := f.ready(fd); err != nil {
		return nil, err
	}
	f.content.RLock()
	defer f.content.RUnlock()
	return appendHoles(nil, fd, s.from, min(s.to, f.limit))
}

// fillFrom writes lower bytes, p from base on, into what is still a hole of holes and still below the limit, in whole
// blocks. The file's modification time stays.
func (f *file) fillFrom(fd int, holes []span, p []byte, base int64) error {
	f.content.Lock()
	defer f.content.Unlock()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	wrote := false
	for _, h := range holes {
		still, err := appendHoles(nil, fd, roundUp(h.from, f.block), f.wholeBlocks(h.to))
		if err != nil {
			return err
		}
		for _, s := range still {
			if f.beside.over(s) != nil { // somebody else is at it
				continue
			}
			wrote = true
			if _, err := f.pwrite(fd, p[s.from-base:s.to-base], s.from, []span{s}); err != nil {
				return errors.Join(err, setModified(fd, st.Mtim))
			}
		}
	}
	if !wrote {
		return nil
	}
	return setModified(fd, st.Mtim)
}

func setModified(fd int, at unix.Timespec) error {
	return unix.UtimesNanoAt(unix.AT_FDCWD, procPath(fd), []unix.Timespec{{Nsec: unix.UTIME_OMIT}, at}, 0)
}

// wholeBlocks is the end of the blocks before to that may be written: the limit's own block is written up to the limit.
// Caller holds content.
func (f *file) wholeBlocks(to int64) int64 {
	if to >= f.limit {
		return f.limit
	}
	return roundDown(to, f.block)
}

// truncate gives the file a size. The limit is lowered first, so that after a crash between the two no byte that was cut
// off comes back from the repository.
func (f *file) truncate(fd int, size int64) error {
	if err := f.ready(fd); err != nil {
		return err
	}
	for {
		tail, err := f.tryTruncate(fd, size)
		if err != nil || tail < 0 {
			return err
		}
		if err := f.copyUp(fd, tail); err != nil {
			return err
		}
	}
}

// tryTruncate gives the file a size unless there is a tail to be filled first, whose block it returns, else -1.
func (f *file) tryTruncate(fd int, size int64) (tail int64, err error) {
	f.beside.writing.Lock()
	defer f.beside.writing.Unlock()
	f.content.Lock()
	defer f.content.Unlock()
	f.beside.changed.Store(true)
	if tail, err := f.tail(fd, size); err != nil || tail >= 0 {
		return tail, err
	}
	if size < f.limit {
		if err := f.setLimit(size); err != nil {
			return -1, err
		}
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		return -1, fmt.Errorf("truncate to %d: %w", size, err)
	}
	return -1, nil
}

// setLimit lowers the limit, on disk and here. Caller holds content exclusively.
func (f *file) setLimit(limit int64) error {
	if err := (placeholder{limit, f.path}).write(f.name()); err != nil {
		return err
	}
	f.unsynced.Store(true)
	f.limit = limit
	if limit == 0 {
		f.filled.Store(true)
	}
	return nil
}

// allocate is fallocate(2) with mode 0 or FALLOC_FL_KEEP_SIZE, of bytes that have no lower: in an unwritten extent ext4
// may write zeros around a written block (extent_max_zeroout_kb), which would be data where lower bytes belong.
func (f *file) allocate(fd int, mode uint32, off, size int64) error {
	return f.onBlocks(fd, off, off+size, func([]span) error {
		if off < f.limit && !f.filled.Load() {
			return fmt.Errorf("fallocate at %d, below the limit %d: %w", off, f.limit, unix.EOPNOTSUPP)
		}
		return unix.Fallocate(fd, mode, off, size)
	})
}

// sync is fsync(2), or fdatasync(2), which does not promise to bring a changed attribute to disk.
func (f *file) sync(fd int, dataOnly bool) error {
	if f.unsynced.Swap(false) || !dataOnly {
		if err := unix.Fsync(fd); err != nil {
			f.unsynced.Store(true)
			return fmt.Errorf("fsync: %w", err)
		}
		return nil
	}
	if err := unix.Fdatasync(fd); err != nil {
		return fmt.Errorf("fdatasync: %w", err)
	}
	return nil
}

// checkFilled tells whether no hole is left below the limit.
func (f *file) checkFilled(fd int) (bool, error) {
	if err := f.ready(fd); err != nil {
		return false, err
	}
	if f.filled.Load() {
		return true, nil
	}
	f.content.RLock()
	defer f.content.RUnlock()
	hole, err := f.holeBelow(fd)
	if err == nil && !hole {
		f.filled.Store(true)
	}
	return !hole, err
}

// holeBelow tells whether a hole is left below the limit. Caller holds content.
func (f *file) holeBelow(fd int) (bool, error) {
	if len(f.beside.fills) > 0 {
		return true, nil
	}
	return holeBelow(fd, f.limit)
}

// detach takes the attribute away. The file is known to be filled, and what filled it is on disk.
func (f *file) detach() error {
	f.content.Lock()
	defer f.content.Unlock()
	if !f.filled.Load() {
		return errors.New("a hole is left in a hydrated file")
	}
	if f.limit == 0 {
		return nil
	}
	return f.setLimit(0)
}
