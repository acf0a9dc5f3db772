package recovery

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// loadEvery is the least time between looks at a server's processes.
	loadEvery = 200 * time.Millisecond
	// loadShare is which part of a processor, 1/loadShare, makes a server a busy one.
	loadShare = 10
	// clockTick is proc_pid_stat(5)'s unit of time.
	clockTick = 10 * time.Millisecond
)

// serverLoad is whether the server in a directory is at work, also if it asks the mount for nothing.
type serverLoad struct {
	mu   sync.Mutex
	pid  int
	at   time.Time
	used time.Duration
	busy bool
}

// look is cheap: what it says may be loadEvery old.
func (l *serverLoad) look(postmaster func() int) (busy bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if now.Sub(l.at) < loadEvery {
		return l.busy
	}
	pid := postmaster()
	if pid == 0 {
		l.pid, l.at, l.busy = 0, now, false
		return false
	}
	return l.note(now, pid, processorTime(pid))
}

// note takes in how much processor time a server has used up to now. Caller holds mu.
func (l *serverLoad) note(now time.Time, pid int, used time.Duration) (busy bool) {
	busy = l.pid == pid && used-l.used >= now.Sub(l.at)/loadShare
	l.pid, l.at, l.used, l.busy = pid, now, used, busy
	return busy
}

// processorTime is what a process, its children of now and those that it has waited for have used. Where /proc does not tell (children
// needs CONFIG_PROC_CHILDREN), it is less.
func processorTime(pid int) (used time.Duration) {
	used = statTime(pid, 4)
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	for field := range strings.FieldsSeq(string(children)) {
		if child, err := strconv.Atoi(field); err == nil {
			used += statTime(child, 2)
		}
	}
	return used
}

// statTime adds up the first n of utime, stime, cutime and cstime: fields 14 to 17.
func statTime(pid, n int) (used time.Duration) {
	fields := statFields(pid)
	for i := 11; i < 11+n && i < len(fields); i++ {
		ticks, _ := strconv.ParseInt(fields[i], 10, 64)
		used += time.Duration(ticks) * clockTick
	}
	return used
}
