package fusefs

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Process is one that uses a mount.
type Process struct {
	PID     int
	Command string
}

func (p Process) String() string { return fmt.Sprintf("process %d (%s)", p.PID, p.Command) }

// Users are the processes that keep the mount at dir busy: they work in it or have something of it open. Of other users'
// processes only root learns that.
func Users(dir string) ([]Process, error) {
	dev, _, err := devIno(dir, 0)
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", dir, err)
	}
	return processes(func(proc string) bool { return worksIn(proc, dev) || opens(proc, dev, nil) }), nil
}

// workingIn returns the processes whose working or root directory lies on the file system dev. Of other users' processes
// only root learns that.
func workingIn(dev uint64) []Process {
	return processes(func(proc string) bool { return worksIn(proc, dev) })
}

func worksIn(proc string, dev uint64) bool {
	for _, link := range []string{"cwd", "root"} {
		if d, _, err := devIno(filepath.Join(proc, link), 0); err == nil && d == dev {
			return true
		}
	}
	return false
}

// opening returns the processes that have one of the inodes of the file system dev open.
func opening(dev uint64, inodes map[uint64]bool) []Process {
	return processes(func(proc string) bool { return opens(proc, dev, inodes) })
}

// opens tells whether a process has one of the inodes open; nil: any.
func opens(proc string, dev uint64, inodes map[uint64]bool) bool {
	fds, _ := filepath.Glob(filepath.Join(proc, "fd", "*")) // none: the process is gone, or not ours to see
	for _, fd := range fds {
		if d, ino, err := devIno(fd, 0); err == nil && d == dev && (inodes == nil || inodes[ino]) {
			return true
		}
	}
	return false
}

// processes returns those for whose directory in /proc uses holds.
func processes(uses func(proc string) bool) (found []Process) {
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range all {
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil || !uses(proc) {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join(proc, "comm"))
		found = append(found, Process{pid, strings.TrimSpace(string(comm))})
	}
	return found
}
