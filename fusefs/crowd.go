package fusefs

import (
	"os"
	"runtime"
	"strconv"
	"strings"
)

// crowded tells whether more threads of the machine want a processor at this moment than there are. Where that cannot be known, none do.
func crowded() bool {
	text, err := os.ReadFile("/proc/loadavg")
	return err == nil && crowdedBy(string(text), runtime.NumCPU())
}

// crowdedBy reads what proc_loadavg(5) says: the fourth field is "<runnable>/<all>". Who asks is one of them.
func crowdedBy(loadavg string, processors int) bool {
	fields := strings.Fields(loadavg)
	if len(fields) < 4 {
		return false
	}
	runnable, _, _ := strings.Cut(fields[3], "/")
	n, err := strconv.Atoi(runnable)
	return err == nil && n > processors
}
