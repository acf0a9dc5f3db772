package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// alive reports whether a process runs. One that has ended and waits for its parent is not alive.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, afterName, _ := strings.Cut(string(stat), ") ") // the name is in parentheses, the state follows
	return afterName != "" && afterName[0] != 'Z' && afterName[0] != 'X'
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
