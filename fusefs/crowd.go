package fusefs

import (
	"os"
	"runtime"
	"strconv"
	"strings"
)

// crowded tells whether more threads of the machine want a processor at this moment than there are.
//
// proc_loadavg(5): the fourth field is "<runnable>/<all>". Who asks is one of them.
func crowded() bool {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return false
	}
	fields := strings.Fields(string(text))
	if len(fields) < 4 {
		return false
	}
	runnable, _, _ := strings.Cut(fields[3], "/")
	n, err := strconv.Atoi(runnable)
	return err == nil && n > runtime.NumCPU()
}
