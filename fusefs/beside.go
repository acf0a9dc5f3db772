package fusefs

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// The hydrator writes large pieces around the page cache (O_DIRECT): copying them into it takes six times the processor time,
// and drives out what PostgreSQL has there. But then each write waits for the disk, and nobody else may wait with it. So it
// is done beside the lock, and what is being written is entered in a list. Until it is taken out again
//
//   - it counts as a hole: who reads it reads the lower. What lseek(2) and the page cache say of it is worth nothing, for
//     the blocks are there before their bytes are, and read-ahead may have zeros of them;
//   - who changes it waits, and so does whoever cuts the file;
//   - the file's modification time is what it was before.

const (
	// directAlign is what direct I/O asks of addresses, offsets and lengths: the largest logical block of disks.
	directAlign = 4096
	// directLeast is the least that is written so. Less is better gathered in the page cache: each would wait for the disk.
	directLeast = 256 << 10
)

// beside is what is written into a file without content being held.
type beside struct {
	// writing is held shared by those who write, exclusively by who cuts the file. It is taken before content.
	writing sync.RWMutex

	fills    []*sideFill   // guarded by content
	busy     atomic.Bool   // there are fills
	modified unix.Timespec // guarded by content: the modification time before the first of fills
	changed  atomic.Bool   // somebody has changed the file since, which gave it a newer one
}

// sideFill is a range that is being written.
type sideFill struct {
	span
	done chan struct{} // closed when it is not any more
}

// over returns a fill that has a byte of s, or nil. Caller holds content.
func (b *beside) over(s span) *sideFill {
	for _, fill := range b.fills {
		if fill.overlaps(s) {
			return fill
		}
	}
	return nil
}

// lockBeside takes content exclusively, at a moment at which nothing of s is being filled.
func (f *file) lockBeside(s span) {
	for {
		f.content.Lock()
		fill := f.beside.over(s)
		if fill == nil {
			return
		}
		f.content.Unlock()
		<-fill.done
	}
}

// runAt is runAt of the backing file, in which what is being filled is a hole. Caller holds content.
func (f *file) runAt(fd int, pos, end int64) (hole bool, to int64, err error) {
	for _, fill := range f.beside.fills {
		switch {
		case fill.to <= pos || end <= fill.from:
		case fill.from <= pos:
			return true, min(fill.to, end), nil
		default:
			end = fill.from
		}
	}
	return runAt(fd, pos, end)
}

// fillDirect is fillFrom, but writes what is large and aligned by direct, a descriptor for direct I/O; p is aligned like
// base; large is what is no less than least. What fails is a hole again.
func (f *file) fillDirect(fd, direct int, holes []span, p []byte, base, least int64) error {
	if err := f.writeBeside(fd, direct, holes, p, base, least); err != nil {
		return err
	}
	return f.fillFrom(fd, holes, p, base) // what is left: the end of a file, small holes
}

func (f *file) writeBeside(fd, direct int, holes []span, p []byte, base, least int64) error {
	if f.shortOfSpace(fd) {
		return nil
	}
	f.beside.writing.RLock()
	defer f.beside.writing.RUnlock()
	fills, err := f.beginFills(fd, holes, least)
	for _, fill := range fills {
		if err == nil {
			_, err = pwriteFull(direct, p[fill.from-base:fill.to-base], fill.from)
		}
	}
	err = f.endFills(fd, fills, err)
	if errors.Is(err, unix.EINVAL) && !f.spoilt.Load() { // a disk of larger blocks
		return nil
	}
	return err
}

// wait returns when what is being written at this moment has been.
func (b *beside) wait() {
	b.writing.Lock()
	defer b.writing.Unlock()
}

// beginFills enters what of holes is one still, and can be written directly: least bytes at once.
func (f *file) beginFills(fd int, holes []span, least int64) (fills []*sideFill, err error) {
	if len(holes) == 0 {
		return nil, nil
	}
	f.lockBeside(span{holes[0].from, holes[len(holes)-1].to})
	defer f.content.Unlock()
	unit := max(f.block, directAlign)
	for _, h := range holes {
		still, err := appendHoles(nil, fd, h.from, min(h.to, f.limit))
		if err != nil {
			return nil, err
		}
		for _, s := range still {
			if s = (span{roundUp(s.from, unit), roundDown(s.to, unit)}); s.to-s.from >= least {
				fills = append(fills, &sideFill{s, make(chan struct{})})
			}
		}
	}
	if len(f.beside.fills) == 0 && len(fills) > 0 {
		if err := f.noteTime(fd); err != nil {
			return nil, err
		}
	}
	f.beside.fills = append(f.beside.fills, fills...)
	f.beside.busy.Store(len(f.beside.fills) > 0)
	return fills, nil
}

// noteTime remembers the modification time. Caller holds content exclusively.
func (f *file) noteTime(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	f.beside.modified = st.Mtim
	f.beside.changed.Store(false)
	return nil
}

// endFills takes out what beginFills entered. If not all was written, all of it is made holes: what a write that failed has
// left there is not known.
func (f *file) endFills(fd int, fills []*sideFill, err error) error {
	if len(fills) == 0 {
		return err
	}
	f.content.Lock()
	defer f.content.Unlock()
	for _, fill := range fills {
		if err != nil {
			err = errors.Join(err, f.undo(fd, fill.span))
		}
		f.beside.remove(fill)
		close(fill.done)
	}
	f.beside.busy.Store(len(f.beside.fills) > 0)
	if !f.beside.busy.Load() && !f.beside.changed.Load() {
		err = errors.Join(err, setModified(fd, f.beside.modified))
	}
	return err
}

// undo makes a hole of a fill. Caller holds content exclusively.
func (f *file) undo(fd int, s span) error {
	err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, s.from, s.to-s.from)
	if err != nil {
		f.spoilt.Store(true)
		return fmt.Errorf("make a hole again at %d: %w", s.from, err)
	}
	return nil
}

// remove takes a fill out. Caller holds content exclusively.
func (b *beside) remove(fill *sideFill) {
	for i, other := range b.fills {
		if other == fill {
			b.fills = append(b.fills[:i], b.fills[i+1:]...)
			return
		}
	}
}

// correctTime gives st the modification time that the file has without what is being filled beside. fd is any descriptor of it.
func (f *file) correctTime(fd int, st *unix.Stat_t) {
	f.content.RLock()
	defer f.content.RUnlock()
	var now unix.Stat_t
	if f.limit == 0 || unix.Fstat(fd, &now) != nil {
		return
	}
	st.Mtim = now.Mtim
	if len(f.beside.fills) > 0 && !f.beside.changed.Load() {
		st.Mtim = f.beside.modified
	}
}

// setTimes is utimensat(2), also while the file is filled beside. fd is any descriptor of the file.
func (f *file) setTimes(fd int, ts []unix.Timespec) error {
	f.content.Lock()
	defer f.content.Unlock()
	if err := setTimesOf(fd, ts); err != nil {
		return err
	}
	if len(f.beside.fills) > 0 && ts[1].Nsec != unix.UTIME_OMIT {
		return f.noteTime(fd)
	}
	return nil
}
