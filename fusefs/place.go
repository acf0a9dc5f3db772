package fusefs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// CheckPlace refuses a directory on a file system that cannot hold an overlay. It leaves no trace.
func CheckPlace(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return checkHoles(int(d.Fd()))
}

// Unnamed makes a file in a directory that ends with its descriptor.
func Unnamed(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	fd, err := unnamed(int(d.Fd()))
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// unnamed makes a file without a name; where the file system cannot (NFS; overlayfs before Linux 6.3), one whose name goes
// at once.
func unnamed(dirfd int) (int, error) {
	fd, err := unix.Openat(dirfd, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return fd, wrapUnnamed(err)
	}
	name := fmt.Sprintf(".pgthaw-probe.%d", os.Getpid())
	fd, err = unix.Openat(dirfd, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return -1, wrapUnnamed(err)
	}
	if err := unix.Unlinkat(dirfd, name, 0); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("remove a file: %w", err)
	}
	return fd, nil
}

func wrapUnnamed(err error) error {
	if err != nil {
		err = fmt.Errorf("make a file: %w", err)
	}
	return err
}

// ErrNoFUSE: nothing can be mounted here.
var ErrNoFUSE = errors.New("this host cannot mount FUSE file systems")

// fuseDevice is what the kernel is spoken to by.
const fuseDevice = "/dev/fuse"

// CheckMount finds out beforehand that nobody can mount anything here. That somebody can, only mounting shows.
func CheckMount() error {
	if os.Geteuid() == 0 {
		fd, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%w: open %s: %w", ErrNoFUSE, fuseDevice, err)
		}
		return unix.Close(fd)
	}
	_, err := os.Stat(fuseDevice)
	if err == nil {
		_, err = fusermountProgram()
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoFUSE, err)
	}
	return nil
}

// fusermountProgram is where fuse3 has put fusermount3, whatever PATH says.
func fusermountProgram() (string, error) {
	path, err := exec.LookPath("fusermount3")
	if err != nil {
		path, err = exec.LookPath("/bin/fusermount3")
	}
	return path, err
}
