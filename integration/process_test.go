package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// alive reports whether a process runs. One that has ended and waits for its parent is not alive.
func alive(pid int) bool {
	fields := statFields(pid)
	return len(fields) > 0 && fields[0] != "Z" && fields[0] != "X"
}

// statFields is what follows the name in /proc/PID/stat, from field 3 of proc_pid_stat(5) on, the state; nothing if there is no such process.
func statFields(pid int) []string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, afterName, _ := strings.Cut(string(stat), ") ")
	return strings.Fields(afterName)
}

// statTimes adds up the first n of utime, stime, cutime and cstime, fields 14 to 17; 0 for a process that is gone.
func statTimes(pid, n int) (used time.Duration) {
	fields := statFields(pid)
	for i := 11; i < 11+n && i < len(fields); i++ {
		ticks, _ := strconv.Atoi(fields[i])
		used += time.Duration(ticks) * 10 * time.Millisecond
	}
	return used
}

// childrenOf lists a process's children.
func childrenOf(pid int) []int {
	list, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	var children []int
	for _, field := range strings.Fields(string(list)) {
		child, _ := strconv.Atoi(field)
		children = append(children, child)
	}
	return children
}

// sharedMemoryOf lists the POSIX shared memory files that a postmaster has mapped. One that is killed leaves them.
func sharedMemoryOf(pid int) []string {
	maps, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	var files []string
	for line := range strings.Lines(string(maps)) {
		if _, name, found := strings.Cut(strings.TrimSpace(line), "/dev/shm/PostgreSQL."); found {
			files = append(files, "/dev/shm/PostgreSQL."+name)
		}
	}
	return files
}

// removeSystemV removes the System V segment whose key and id stand in the seventh line of postmaster.pid.
func removeSystemV(data string) {
	content, _ := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	lines := strings.Split(string(content), "\n")
	if len(lines) < 7 {
		return
	}
	if fields := strings.Fields(lines[6]); len(fields) == 2 {
		id, _ := strconv.Atoi(fields[1])
		_, _ = unix.SysvShmCtl(id, unix.IPC_RMID, nil)
	}
}
