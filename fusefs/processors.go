package fusefs

import (
	"os"
	"runtime"
	"strconv"
	"strings"
)

// scarce tells whether more threads of the machine want a processor at this moment than there are. Where that cannot be known, none do.
func scarce() bool {
	text, err := os.ReadFile("/proc/loadavg")
	return err == nil && scarceBy(string(text), runtime.NumCPU())
}

// scarceBy reads what proc_loadavg(5) says: the fourth field is "<runnable>/<all>". Who asks is one of them.
func scarceBy(loadavg string, processors int) bool {
	fields := strings.Fields(loadavg)
	if len(fields) < 4 {
		return false
	}
	runnable, _, _ := strings.Cut(fields[3], "/")
	n, err := strconv.Atoi(runnable)
	return err == nil && n > processors
}
