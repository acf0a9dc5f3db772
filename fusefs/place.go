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

// Try makes a file in a directory, which goes when fn returns.
func Try(dir string, fn func(*os.File) error) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return try(int(d.Fd()), fn)
}

// try makes a file without a name; where the file system cannot (NFS; overlayfs before Linux 6.3) it has one as long as fn runs.
func try(dirfd int, fn func(*os.File) error) error {
	fd, err := unix.Openat(dirfd, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		name := fmt.Sprintf(".pgthaw-probe.%d", os.Getpid())
		if fd, err = unix.Openat(dirfd, name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600); err == nil {
			defer unix.Unlinkat(dirfd, name, 0)
		}
	}
	if err != nil {
		return fmt.Errorf("make a file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "a file")
	defer f.Close()
	return fn(f)
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
