package fusefs

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A file system that gives blocks to a file before it writes them (ext4, xfs) marks them unwritten meanwhile. A power cut
// can leave such extents, which nothing was ever written to. They are no dependable holes: lseek(2) calls them data as
// soon as a page of them is in the page cache, be it by read-ahead, and ext4 may write zeros to them beside a write
// (extent_max_zeroout_kb). Blocks that were never given are holes whatever happens. So what a power cut left is made a
// hole again before a placeholder is used.

// fiemap is the head of FS_IOC_FIEMAP's argument, with room for some extents.
//
// Linux: Documentation/filesystems/fiemap.rst.
type fiemap struct {
	start, length uint64
	flags         uint32
	mapped, count uint32
	_             uint32
	extents       [64]fiemapExtent
}

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

const (
	fsIocFiemap           = 0xc020660b
	fiemapFlagSync        = 1      // write dirty pages first: what is unwritten after that has none
	fiemapExtentLast      = 1      // of the file
	fiemapExtentUnwritten = 0x0800 // given to the file, and not written to
)

// unwritten returns the unwritten extents that begin below end. A file system without such a list, as tmpfs is, has none.
func unwritten(fd int, end int64) ([]span, error) {
	var spans []span
	m := new(fiemap)
	for pos := uint64(0); pos < uint64(end); {
		*m = fiemap{start: pos, length: uint64(end) - pos, flags: fiemapFlagSync, count: uint32(len(m.extents))}
		_, _, number := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFiemap, uintptr(unsafe.Pointer(m)))
		if number == unix.EOPNOTSUPP || number == unix.ENOTTY {
			return nil, nil
		}
		if number != 0 {
			return nil, fmt.Errorf("list extents: %w", number)
		}
		if m.mapped == 0 {
			break
		}
		for _, e := range m.extents[:m.mapped] {
			if e.flags&fiemapExtentUnwritten != 0 {
				spans = append(spans, span{int64(e.logical), int64(e.logical + e.length)})
			}
			pos = e.logical + e.length
		}
		if m.extents[m.mapped-1].flags&fiemapExtentLast != 0 {
			break
		}
	}
	return spans, nil
}

// discardUnwritten makes holes of the unwritten extents that begin below end. A file without blocks has none.
func discardUnwritten(fd int, end int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if st.Blocks == 0 {
		return nil
	}
	spans, err := unwritten(fd, end)
	if err != nil {
		return err
	}
	for _, s := range spans {
		err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, s.from, s.to-s.from)
		if err != nil {
			return fmt.Errorf("make a hole at %d: %w", s.from, err)
		}
	}
	return nil
}

// checkUnwritten refuses a file system that can hold unwritten extents and does not tell of them. fd is an empty file.
func checkUnwritten(fd int, block int64) error {
	err := unix.Fallocate(fd, 0, 0, 4*block)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("fallocate: %w", err)
	}
	if _, err := pwriteFull(fd, make([]byte, block), block); err != nil {
		return err
	}
	if _, err := preadFull(fd, make([]byte, 4*block), 0); err != nil { // now its pages are in the page cache
		return err
	}
	if err := discardUnwritten(fd, 4*block); err != nil {
		return err
	}
	return expectHoles(fd, 4*block, span{0, block}, span{2 * block, 4 * block})
}
