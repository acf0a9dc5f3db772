package fusefs

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// span is the bytes [from, to) of a file.
type span struct{ from, to int64 }

// overlaps tells whether two spans have a byte in common.
func (s span) overlaps(o span) bool { return s.from < o.to && o.from < s.to }

// total is how many bytes spans have.
func total(spans []span) (n int64) {
	for _, s := range spans {
		n += s.to - s.from
	}
	return n
}

// runAt tells whether pos lies in a hole, and where the run of its kind ends, at most at end.
//
// lseek(2): SEEK_DATA gives ENXIO when there is only a hole up to the end of the file.
func runAt(fd int, pos, end int64) (hole bool, to int64, err error) {
	data, err := unix.Seek(fd, pos, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return true, end, nil
	case err != nil:
		return false, 0, fmt.Errorf("seek data at %d: %w", pos, err)
	case data > pos:
		return true, min(data, end), nil
	}
	to, err = unix.Seek(fd, pos, unix.SEEK_HOLE)
	if err != nil {
		return false, 0, fmt.Errorf("seek hole at %d: %w", pos, err)
	}
	return false, min(to, end), nil
}

// appendHoles appends the holes of [from, to) to spans.
func appendHoles(spans []span, fd int, from, to int64) ([]span, error) {
	for pos := from; pos < to; {
		hole, end, err := runAt(fd, pos, to)
		if err != nil {
			return nil, err
		}
		if hole {
			spans = append(spans, span{pos, end})
		}
		pos = end
	}
	return spans, nil
}

// holeBelow tells whether there is a hole in [0, limit).
func holeBelow(fd int, limit int64) (bool, error) {
	if limit == 0 {
		return false, nil
	}
	hole, err := unix.Seek(fd, 0, unix.SEEK_HOLE)
	if err != nil {
		return false, fmt.Errorf("seek hole: %w", err)
	}
	return hole < limit, nil
}

// preadFull reads until p is full or the file ends.
func preadFull(fd int, p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := unix.Pread(fd, p[n:], off+int64(n))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return n, fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
		}
		if m == 0 {
			break
		}
		n += m
	}
	return n, nil
}

// pwriteFull writes all of p. Where that fails it tells how much it wrote.
func pwriteFull(fd int, p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := unix.Pwrite(fd, p[n:], off+int64(n))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return n, fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
		}
		if m == 0 {
			return n, io.ErrShortWrite
		}
		n += m
	}
	return n, nil
}

// probeSize is large enough to find out a file system that answers in units of 2 MiB (tmpfs with huge pages).
const probeSize = 8 << 20

// checkHoles refuses a file system whose holes cannot be relied on as the record of what was written: each block that
// is written must be data from then on, zeros among them, and nothing around it. ZFS turns zeros into holes, tmpfs with
// huge pages makes 2 MiB of one block, ext4 with inline_data cannot seek in a file of which only the start is written.
func checkHoles(dirfd int) error {
	return try(dirfd, func(f *os.File) error {
		fd := int(f.Fd())
		block, err := blockSize(fd)
		if err == nil {
			err = checkAttribute(fd)
		}
		if err == nil {
			err = checkUnwritten(fd, block)
		}
		if err == nil {
			err = checkWrittenZeros(fd, block)
		}
		if err != nil {
			return fmt.Errorf("this file system cannot hold an overlay: %w", err)
		}
		return nil
	})
}

func checkAttribute(fd int) error {
	if err := unix.Fsetxattr(fd, lowerAttr, []byte("1 probe"), 0); err != nil {
		return fmt.Errorf("set a user extended attribute: %w", err)
	}
	return nil
}

func checkWrittenZeros(fd int, block int64) error {
	if err := errors.Join(unix.Ftruncate(fd, 0), unix.Ftruncate(fd, 1)); err != nil {
		return fmt.Errorf("lengthen a file: %w", err)
	}
	if err := expectHoles(fd, 1, span{0, 1}); err != nil {
		return err
	}
	if err := errors.Join(unix.Ftruncate(fd, 0), unix.Ftruncate(fd, probeSize)); err != nil {
		return fmt.Errorf("lengthen a file: %w", err)
	}
	at := int64(probeSize/2) + block
	for _, s := range []span{{0, 1}, {at, at + block}} {
		if _, err := pwriteFull(fd, make([]byte, s.to-s.from), s.from); err != nil {
			return err
		}
	}
	want := []span{{block, at}, {at + block, probeSize}}
	if err := expectHoles(fd, probeSize, want...); err != nil {
		return err
	}
	if err := unix.Fsync(fd); err != nil {
		return fmt.Errorf("sync a file: %w", err)
	}
	return expectHoles(fd, probeSize, want...)
}

func expectHoles(fd int, size int64, want ...span) error {
	got, err := appendHoles(nil, fd, 0, size)
	if err != nil {
		return err
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		return fmt.Errorf("it reports the holes %v where %v were left", got, want)
	}
	return nil
}

// blockSize is the unit in which the file system of fd allocates, in bytes.
func blockSize(fd int) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return 0, fmt.Errorf("statfs: %w", err)
	}
	return int64(st.Bsize), nil
}

func roundDown(n, unit int64) int64 { return n - n%unit }
func roundUp(n, unit int64) int64   { return roundDown(n+unit-1, unit) }
