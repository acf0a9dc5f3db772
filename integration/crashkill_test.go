package integration

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"
)

// strike has some work done, kills somebody in the midst of it, and brings the copy back.
func (k *life) strike(w *work) {
	k.t.Helper()
	monitor, err := pgconn.Connect(context.Background(), k.c.dsn("postgres"))
	if err != nil {
		k.t.Fatal(err)
	}
	defer monitor.Close(context.Background())
	k.l.write(1)
	k.crashes, k.readies = k.logged(beginsAnew), k.logged(isReady)
	var s *session
	var underWay func() (string, bool)
	if w.watch != nil {
		underWay = w.watch(k)
	} else {
		s = k.startSession(w)
		underWay = s.aimed(monitor)
	}
	victim := k.victim(w)
	seen := k.await(underWay, s != nil)
	if s != nil {
		s.expectDeath()
	}
	number := s.number()
	k.kill(victim, s)
	if s != nil && s.number() != number {
		seen = "" // it was answered in the very moment
	}
	k.strikes(w.name, victim, seen)
	if victim == "daemon" && k.r.IntN(2) == 0 {
		k.seesNoWrongBytes()
	}
	k.recover(victim)
	k.l.Stop()
	if s != nil {
		if err := s.end(); err != nil {
			k.t.Errorf("%s: %v", w.name, err)
		}
	}
	k.check(w)
}

func (k *life) strikes(work, victim, seen string) {
	k.note(kill{major: k.major, work: work, victim: victim, seen: seen, commits: k.l.acknowledged()})
}

// number is that of the last statement that was answered.
func (s *session) number() int {
	if s == nil {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answered
}

// await waits for the moment, and for one that comes again a random time more, as long as it lasts.
func (k *life) await(underWay func() (string, bool), again bool) string {
	for deadline := time.Now().Add(hitLimit); time.Now().Before(deadline); {
		seen, over := underWay()
		if over {
			break
		}
		if seen == "" {
			time.Sleep(200 * time.Microsecond)
			continue
		}
		if !again || k.r.IntN(4) == 0 {
			return seen
		}
		time.Sleep(k.within(time.Millisecond, 10*time.Millisecond, 100*time.Millisecond))
		if later, _ := underWay(); later != "" {
			return later
		}
	}
	return ""
}

// victim chooses who is killed.
func (k *life) victim(w *work) string {
	if w.watch != nil {
		return []string{"daemon", "both"}[k.r.IntN(2)]
	}
	return []string{"daemon", "both", "postmaster", "backend"}[k.r.IntN(4)]
}

// kill kills the victim, and what cannot live without it.
func (k *life) kill(victim string, s *session) {
	k.t.Helper()
	server := k.serverPID()
	switch victim {
	case "daemon":
		k.killDaemon()
	case "both":
		first, then := k.killDaemon, k.killServer
		if k.r.IntN(2) == 0 {
			first, then = then, first
		}
		first()
		then()
	case "postmaster": // its children notice
		if server != 0 {
			k.memory = sharedMemoryOf(server)
			_ = syscall.Kill(server, syscall.SIGKILL)
		}
	case "backend":
		pid := int(s.conn.PID())
		if all := childrenOf(server); len(all) > 0 && k.r.IntN(3) == 0 {
			pid = all[k.r.IntN(len(all))]
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// awaitCrash returns when the postmaster has taken note of a backend's death. Who was to be killed may have ended by itself in that very
// moment: then others are.
func (k *life) awaitCrash() {
	k.t.Helper()
	const notice = 5 * time.Second
	waitFor(k.t, startLimit, "the crash of a backend", func() bool {
		if poll(notice, func() bool { return k.logged(beginsAnew) > k.crashes }) {
			return true
		}
		for _, pid := range childrenOf(k.serverPID()) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return false
	})
}

// serverPID is the postmaster's. A dead mount hides its file, but not from beneath.
func (k *life) serverPID() int {
	if pid := k.c.pid(); pid != 0 {
		return pid
	}
	text, _ := os.ReadFile(filepath.Join(k.beneath, "data", "postmaster.pid"))
	first, _, _ := strings.Cut(string(text), "\n")
	pid, _ := strconv.Atoi(first)
	if pid != 0 && alive(pid) {
		k.c.lastPID = pid
		return pid
	}
	return 0
}

func (k *life) killDaemon() {
	k.t.Helper()
	if k.daemon != 0 {
		killDaemon(k.t, k.daemon)
		k.daemon = 0
	}
}

// killServer kills the server with all its processes.
func (k *life) killServer() {
	k.t.Helper()
	k.serverPID()
	k.c.Kill()
}

// endServer kills what is left of the server, and what only a server ends: shared memory.
func (k *life) endServer() {
	k.t.Helper()
	server := k.serverPID()
	k.killServer()
	// Also not as a zombie: PostgreSQL would take it for a server that runs.
	waitFor(k.t, stopLimit, "reaping of the server", func() bool { return server == 0 || syscall.Kill(server, 0) == syscall.ESRCH })
	works := func() bool { return len(k.workers()) > 0 }
	if !poll(time.Second, func() bool { return !works() }) { // who is busy notices late that the postmaster has gone
		for _, pid := range k.workers() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		waitFor(k.t, stopLimit, "end of the server's processes", func() bool { return !works() })
	}
	for _, file := range k.memory {
		_ = os.Remove(file)
	}
	removeSystemV(filepath.Join(k.beneath, "data"))
}

// workers are the server's processes that outlived their postmaster: they work in the data directory, and their sockets and logs
// lie in the server's.
func (k *life) workers() (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, file := range files {
		at, err := os.Readlink(file)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err == nil && strings.HasPrefix(at, k.data) && alive(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// strikeReplay starts the server and kills while it replays WAL.
func (k *life) strikeReplay() {
	k.t.Helper()
	log, _ := os.ReadFile(k.c.logFile())
	if err := k.c.launch(); err != nil {
		k.t.Fatal(err)
	}
	said := func(text string) bool {
		now, _ := os.ReadFile(k.c.logFile())
		return strings.Contains(string(now[len(log):]), text)
	}
	replaying := func() bool { return said("redo starts at") && !said("redo done at") }
	pollClosely(hitLimit, func() bool { return replaying() || said("redo done at") || said("redo is not required") || k.c.down() })
	pollClosely(k.within(3*time.Millisecond, 30*time.Millisecond, 300*time.Millisecond), func() bool { return !replaying() })
	victim, seen := []string{"daemon", "both", "postmaster"}[k.r.IntN(3)], ""
	if replaying() {
		seen = "redo has started and is not done"
	}
	k.kill(victim, nil)
	if !replaying() {
		seen = ""
	}
	k.strikes("replay", victim, seen)
	k.endServer()
	if k.daemon == 0 {
		k.resume()
	}
}

// within is a random time less than one of those given: what is aimed at may take milliseconds, or hundreds of them.
func (k *life) within(any ...time.Duration) time.Duration {
	return time.Duration(k.r.Int64N(int64(any[k.r.IntN(len(any))])))
}

// strikeLeaving kills the daemon when directories have just left the mount, before there is a server.
func (k *life) strikeLeaving() {
	k.t.Helper()
	before, seen := k.mounts(), ""
	pollClosely(hitLimit, func() bool { return k.mounts() != before })
	if k.r.IntN(2) == 0 { // between the first and the last of several
		pollClosely(time.Duration(k.r.IntN(1000))*time.Microsecond, func() bool { return false })
	}
	if now := k.mounts(); now != before {
		seen = "mounted were " + before + " just before, and are " + now
	}
	k.killDaemon()
	k.strikes("leave the mount", "daemon", seen)
	k.resume()
}

// strikeResume kills the daemon that `overlay resume` starts.
func (k *life) strikeResume() {
	k.t.Helper()
	resume := invocation{}.start(k.t, "overlay", "resume", k.data)
	poll(hitLimit, func() bool { k.findDaemon(); return k.daemon != 0 || resume.down() })
	pollClosely(time.Duration(k.r.IntN(30))*time.Millisecond, resume.down)
	seen := ""
	if k.daemon != 0 && !resume.down() {
		seen = "its daemon is there, and it has not ended"
	}
	k.killDaemon()
	k.strikes("resume", "daemon", seen)
	waitFor(k.t, stopLimit, "end of overlay resume", resume.down)
}

// strikeFinish kills while `overlay finish` makes the copy, whose server is down, an ordinary directory.
func (k *life) strikeFinish() {
	k.t.Helper()
	finish := invocation{}.start(k.t, "overlay", "finish", k.data)
	k.waitFinishing(finish)
	seen := ""
	if !finish.down() && k.daemon != 0 && alive(k.daemon) {
		seen = "it has not ended; mounted: " + k.mounts()
	}
	k.killDaemon()
	k.strikes("finish", "daemon", seen)
	waitFor(k.t, stopLimit, "end of overlay finish", finish.down)
	k.resume()
	k.start()
	k.check()
}

// waitFinishing waits a while, or until the last step: nothing is mounted, and what is ours is there still.
func (k *life) waitFinishing(finish *running) {
	if k.r.IntN(2) == 0 {
		poll(time.Duration(k.r.IntN(500))*time.Millisecond, finish.down)
		return
	}
	pollClosely(hitLimit, func() bool { return finish.down() || k.mounts() == "" })
}

// strikeRestart kills while `overlay finish --restart` does the same under a server that runs.
func (k *life) strikeRestart() {
	k.t.Helper()
	k.c.Stop()
	ownedByPostgres(k.t, k.c.logFile())
	k.c.port, k.readies = freePort(k.t), k.logged(isReady)
	// Under a parent that waits for it, a server would not be restarted.
	k.run(k.t, "pg_ctl", "start", "--wait", "--pgdata", k.data, "--log", k.c.logFile(), "--options", strings.Join([]string{
		"-p", strconv.Itoa(k.c.port), "-k", k.c.dir, "-c listen_addresses=127.0.0.1 -c archive_mode=off -c log_checkpoints=on"}, " "))
	k.awaitRecovery()
	k.findDaemon()
	server := k.serverPID()
	k.l.write(1)
	k.l.waitCommits(5)
	finish := invocation{}.start(k.t, "overlay", "finish", "--restart", k.data)
	if k.r.IntN(2) == 0 {
		poll(time.Duration(k.r.IntN(500))*time.Millisecond, finish.down)
	} else {
		poll(hitLimit, func() bool { return finish.down() || !alive(server) })
	}
	victim, seen := []string{"daemon", "finish", "both"}[k.r.IntN(3)], ""
	if !finish.down() {
		seen = "it has not ended; the server runs: " + strconv.FormatBool(alive(server))
	}
	if victim != "finish" {
		k.killDaemon()
	}
	if victim != "daemon" {
		finish.signal(syscall.SIGKILL)
	}
	k.strikes("finish --restart", victim, seen)
	waitFor(k.t, stopLimit, "end of overlay finish", finish.down)
	waitFor(k.t, startLimit, "the server that it had just begun to start", func() bool { return !k.starting() })
	k.endServer()
	k.l.Stop()
	k.resume()
	k.start()
	k.check()
}

// starting reports whether there is a pg_ctl, or a server that has not yet its postmaster.pid.
func (k *life) starting() bool {
	server := k.serverPID()
	for pid, line := range processesNaming(k.data) {
		if pid != server && alive(pid) && !strings.Contains(line, " overlay serve ") {
			return true
		}
	}
	return false
}

// local tells how many bytes of a directory are on disk, and how many of its files lack some.
func (k *life) local(name string) (bytes int64, lacking int) {
	_ = filepath.WalkDir(filepath.Join(k.beneath, name), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			return nil
		}
		bytes += st.Blocks * 512
		if _, err := unix.Lgetxattr(path, "user.pgthaw.lower", make([]byte, 4096)); err == nil && st.Blocks*512 < st.Size {
			lacking++
		} else if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOENT) {
			k.t.Errorf("%s: %v", path, err)
		}
		return nil
	})
	return bytes, lacking
}
