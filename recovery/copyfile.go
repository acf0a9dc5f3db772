package recovery

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

const (
	// readSize is how many bytes are read from the repository at once: neighbouring chunks come in one request.
	readSize = 4 << 20
	// directSize is the least size of a file that is written around the page cache. Smaller ones are better gathered in
	// the cache: each would wait for the disk.
	directSize = 1 << 20
	// directAlign is what direct I/O asks of addresses, offsets and lengths: the largest logical block of disks.
	directAlign = 4096
)

// restoredFile is written by as many workers as it has ranges; the first opens it, the last closes it.
type restoredFile struct {
	placed
	open   sync.Once
	err    error // of open
	source *repo.File
	out    *os.File
	direct bool         // out does not go through the page cache
	left   atomic.Int32 // ranges not yet written
}

// part is a range of a file, in bytes.
type part struct {
	file *restoredFile
	off  int64
	n    int64
}

// newBuffer is what copyRange reads into: whole memory pages, as direct I/O wants them. It must be given back.
func newBuffer() ([]byte, error) {
	b, err := unix.Mmap(-1, 0, readSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("get %d bytes of memory: %w", readSize, err)
	}
	return b, nil
}

// write writes one range. ctx is that of all workers: what one of them opens, all of them read.
func (c *copier) write(ctx context.Context, p part, buf []byte) error {
	f := p.file
	f.open.Do(func() { f.err = c.openFile(ctx, f) })
	if f.err != nil {
		return f.err
	}
	err := c.copyRange(ctx, p, buf)
	if f.left.Add(-1) == 0 {
		err = errors.Join(err, f.finish())
	}
	return err
}

// openFile makes the file, in its length, all hole.
func (c *copier) openFile(ctx context.Context, f *restoredFile) (err error) {
	if f.source, err = c.job.backup.Open(ctx, f.entry); err != nil {
		return err
	}
	if err := f.create(); err != nil {
		return err
	}
	if o := c.job.owner; o.foreign() {
		err = f.out.Chown(o.uid, o.gid)
	}
	if perm := f.entry.Mode.Perm(); err == nil && perm != 0o600 {
		err = f.out.Chmod(perm)
	}
	if err == nil && f.source.Size() > 0 {
		err = f.out.Truncate(f.source.Size())
	}
	return err
}

// create makes the file, for direct I/O if that is of use: copying into the page cache takes half of a restore's
// processor time, and nobody reads a file there before the disk has it.
func (f *restoredFile) create() (err error) {
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	if size := f.source.Size(); size >= directSize && size%directAlign == 0 {
		f.out, err = os.OpenFile(f.to, flags|unix.O_DIRECT, 0o600)
		f.direct = err == nil
		if !errors.Is(err, unix.EINVAL) {
			return err
		}
		// The file system knows no direct I/O. Some have made the file before they say so.
		if err := removeIfThere(f.to); err != nil {
			return err
		}
	}
	f.out, err = os.OpenFile(f.to, flags, 0o600)
	return err
}

// finish gives the file its time and closes it.
func (f *restoredFile) finish() error {
	return errors.Join(setTime(f.to, f.entry.ModTime), f.out.Close())
}

func setTime(path string, t time.Time) error {
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(t.UnixNano())}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}

// copyRange writes what is data within a range.
func (c *copier) copyRange(ctx context.Context, p part, buf []byte) error {
	for off, n := range p.file.source.Data() {
		if off >= p.off+p.n {
			break
		}
		end := min(off+n, p.off+p.n)
		for off = max(off, p.off); off < end; {
			n := min(end-off, int64(len(buf)))
			if err := c.copyOnce(ctx, p.file, buf[:n], off); err != nil {
				return err
			}
			off += n
		}
	}
	c.job.progress("restore", c.done.Add(p.n), c.total)
	return nil
}

func (c *copier) copyOnce(ctx context.Context, f *restoredFile, buf []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := f.source.ReadAt(buf, off); err != nil {
		return err
	}
	if _, err := f.out.WriteAt(buf, off); err != nil {
		return err
	}
	if !f.direct {
		startWriteback(f.out, off, int64(len(buf)))
	}
	return nil
}

// startWriteback has the kernel begin to bring a range to disk, so that the disk works while the next range is
// decompressed and seal has little left to wait for. Whether it does makes no difference to what seal promises.
func startWriteback(f *os.File, off, n int64) {
	_ = unix.SyncFileRange(int(f.Fd()), off, n, unix.SYNC_FILE_RANGE_WRITE)
}
