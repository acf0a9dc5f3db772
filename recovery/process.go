package recovery

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is a server that somebody else started, as /proc shows it: all that it takes to start it again.
type process struct {
	pid     int
	fd      *os.File // a pidfd: it means this process alone
	program string
	args    []string // with the program
	env     []string
	cred    *syscall.Credential // nil: ours
	output  [2]output           // standard output, standard error
}

// output is where a process writes to: an open file, or a path where holding it open would keep the mount on.
type output struct {
	file *os.File
	path string
}

// lookAt finds out how the server in dir was started. mount is the device of what covers dir.
func lookAt(pid int, own owner, mount uint64) (p *process, err error) {
	p = &process{pid: pid}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("look at process %d: %w", pid, err)
	}
	p.fd = os.NewFile(uintptr(fd), "pidfd")
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	var st unix.Stat_t
	if err := unix.Stat(p.proc(""), &st); err != nil {
		return nil, fmt.Errorf("look at process %d: %w", pid, err)
	}
	// postmaster.pid may name any process.
	if int(st.Uid) != own.uid {
		return nil, fmt.Errorf("process %d, which postmaster.pid names, does not belong to %s", pid, own.name)
	}
	if own.foreign() {
		p.cred = own.credential()
	}
	exe, err := os.Readlink(p.proc("exe"))
	if err != nil {
		return nil, err
	}
	p.program = strings.TrimSuffix(exe, " (deleted)") // the package was upgraded
	if name := filepath.Base(p.program); name != "postgres" {
		return nil, fmt.Errorf("process %d, which postmaster.pid names, is %s and not postgres", pid, name)
	}
	if p.args, err = p.list("cmdline"); err != nil {
		return nil, err
	}
	if p.env, err = p.list("environ"); err != nil {
		return nil, err
	}
	p.env = slices.DeleteFunc(p.env, func(v string) bool { // of the pg_ctl and the service manager of that time
		return strings.HasPrefix(v, "PG_GRANDPARENT_PID=") || strings.HasPrefix(v, "NOTIFY_SOCKET=")
	})
	for i := range p.output {
		if p.output[i], err = p.outputAt(i+1, mount); err != nil {
			return nil, fmt.Errorf("find where the server writes to: %w", err)
		}
	}
	return p, nil
}

func (p *process) close() {
	p.fd.Close()
	for _, o := range p.output {
		if o.file != nil {
			o.file.Close()
		}
	}
}

func (p *process) proc(name string) string { return filepath.Join("/proc", strconv.Itoa(p.pid), name) }

// list reads a file of /proc that holds strings ended by zero bytes.
func (p *process) list(name string) ([]string, error) {
	text, err := os.ReadFile(p.proc(name))
	if err != nil || len(text) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00"), nil
}

// outputAt opens again what the process has open for writing. What it can only read, root must not open for it.
func (p *process) outputAt(number int, mount uint64) (output, error) {
	link := p.proc("fd/" + strconv.Itoa(number))
	path, err := os.Readlink(link)
	if errors.Is(err, os.ErrNotExist) { // closed
		return output{path: os.DevNull}, nil
	}
	if err != nil {
		return output{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return output{}, err
	}
	if st.Dev == mount {
		return output{path: path}, nil
	}
	info, err := os.ReadFile(p.proc("fdinfo/" + strconv.Itoa(number)))
	if err != nil {
		return output{}, err
	}
	var position int64
	var flags int
	if _, err := fmt.Sscanf(string(info), "pos:\t%d\nflags:\t%o", &position, &flags); err != nil {
		return output{}, fmt.Errorf("read fdinfo: %w", err)
	}
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		return output{}, fmt.Errorf("it cannot write to %s", path)
	}
	f, err := os.OpenFile(link, os.O_WRONLY|os.O_APPEND|unix.O_NOCTTY, 0)
	return output{file: f, path: path}, err
}

// open is the file to write to, from now on. A path is opened with the rights of the server's user.
func (o output) open(own owner) (f *os.File, err error) {
	if o.file != nil {
		return o.file, nil
	}
	err = asUser(own, func() error {
		f, err = os.OpenFile(o.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		return err
	})
	return f, err
}

// manager says who would have to restart the process, because it may do so by itself or would miss it: "" is nobody.
func (p *process) manager() (who, hint string) {
	if service := serviceOf(p.proc("cgroup")); service != "" && service != serviceOf("/proc/self/cgroup") {
		return "service " + service, "Restart it there: `systemctl restart " + service + "`. The mount goes by itself while the server is stopped."
	}
	again := "Restart it as it was started. The mount goes by itself while the server is stopped."
	if parent := parentOf(p.pid); parent > 1 {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", parent))
		return fmt.Sprintf("process %d (%s), which started it", parent, strings.TrimSpace(string(name))), again
	}
	own, err := unix.Getsid(p.pid)
	if first, firstErr := unix.Getsid(1); err == nil && firstErr == nil && own == first {
		return "process 1, which started it", again
	}
	return "", ""
}

// parentOf is the parent of a process; 0 if that is not known.
func parentOf(pid int) (parent int) {
	if fields := statFields(pid); len(fields) > 1 {
		parent, _ = strconv.Atoi(fields[1])
	}
	return parent
}

// statFields is what follows the command in /proc/PID/stat, from field 3 of proc_pid_stat(5) on: the state, the parent and so on.
// Only the command, in parentheses, may hold blanks.
func statFields(pid int) []string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
}

// serviceOf is the service of systemd's that a cgroup file of /proc tells of. cgroups(7): a line is id:controllers:path.
func serviceOf(path string) string {
	text, _ := os.ReadFile(path)
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) == 3 && strings.HasSuffix(parts[2], ".service") {
			return filepath.Base(parts[2])
		}
	}
	return ""
}

// awaitExit waits until the process of a pidfd is gone, for some time. It tells whether it is.
func awaitExit(pidfd int, limitMS int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, limitMS)
	return err == nil && n > 0
}

// startAgain starts the program as it was started, for the data directory dir.
func (p *process) startAgain(dir string, own owner) (pid int, err error) {
	attr := &os.ProcAttr{Dir: "/", Env: p.env, Files: []*os.File{nil, nil, nil}, Sys: &syscall.SysProcAttr{Setsid: true, Credential: p.cred}}
	for i, o := range p.output {
		if attr.Files[i+1], err = o.open(own); err != nil {
			return 0, fmt.Errorf("open the server's log: %w", err)
		}
	}
	again, err := os.StartProcess(p.program, p.argsFor(dir), attr)
	if err != nil {
		return 0, err
	}
	return again.Pid, nil
}

// argsFor says where the data directory is, for the working directory that -D may have been relative to is not known.
func (p *process) argsFor(dir string) []string {
	if slices.Contains(p.args, dir) {
		return p.args
	}
	return append(slices.Clone(p.args), "-D", dir)
}
