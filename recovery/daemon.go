package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"pgthaw/fusefs"
	"pgthaw/repo"
)

const (
	// holdLimit is how long hydration waits, at most, for the recovery of the server that Thaw starts.
	holdLimit = 30 * time.Second
	// retryAfter is the time between attempts to hydrate what could not be hydrated.
	retryAfter = 10 * time.Second
	// unmountEvery is the time between attempts to take the mounts off a whole directory.
	unmountEvery = 500 * time.Millisecond
	// stopPatience is how long a daemon that is told to stop waits for a mount in use: a server that has just ended, or
	// somebody who looks at a path, keeps it busy for a moment.
	stopPatience = 2 * time.Second
	// leaveEvery is the time between attempts to take more of a directory out of its mount.
	leaveEvery = time.Second
	// endingSession is how long a daemon tries to tell the repository that it needs nothing of it any more.
	endingSession = 10 * time.Second
	// farewell is how long a daemon that was told to end waits for those who use its mount.
	farewell = 90 * time.Second
)

// daemon serves the mounts of one overlay.
type daemon struct {
	log      *slog.Logger
	dir      string
	bare     bareDir // the data directory beneath its mount
	record   record
	repo     *repo.Repository
	overlays []*mounted // the data directory first
	pace     pace
	starting starting
	load     serverLoad
	ahead    *walAhead

	unmounting sync.Mutex // held while mounts are taken off, so that only one does it; taken before mu

	mu       sync.Mutex
	mode     hydration
	endEra   context.CancelFunc // of the hydration under way in this mode; may be nil
	sealed   bool
	finish   bool // somebody asked for an ordinary directory
	stopping bool // told to stop: the directory is about to be discarded, so it is not cleaned
	lastErr  error
	errAt    time.Time
}

// mounted is one of the daemon's mounts; gone is closed when it has been taken off.
type mounted struct {
	root root
	*fusefs.Overlay
	gone chan struct{}
	said string // the last error of Leave
}

// Serve is the body of an overlay's daemon: it mounts what Thaw laid at dir, calls ready, fills the directories, and
// returns when they are whole and the mounts are off. It answers on the control socket meanwhile. When ctx ends it takes
// the mounts off as soon as nobody uses them, and what is not whole yet can be taken up again.
func Serve(ctx context.Context, dir string, open func(ctx context.Context, repoURL string, keys KeyFiles) (*repo.Repository, error), ready func() error, log *slog.Logger) error {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	dir, err := canonical(dir)
	if err != nil {
		return err
	}
	bare, err := openBare(dir)
	if err != nil {
		return err
	}
	defer bare.Close()
	d := &daemon{log: log, dir: dir, bare: bare}
	if d.record, err = bare.record(); err != nil {
		return err
	}
	if d.record.Target != dir {
		return fmt.Errorf("%w: %s was thawed as %s", ErrNoOverlay, dir, d.record.Target)
	}
	if err := d.record.checkTrust(); err != nil {
		return err
	}
	lock, err := bare.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if d.repo, err = open(ctx, d.record.Repository, d.record.KeyFiles); err != nil {
		return err
	}
	defer d.repo.Close()
	return d.serve(ctx, ready)
}

func (d *daemon) serve(ctx context.Context, ready func() error) error {
	var err error
	if d.mode, err = parseHydration(d.record.Hydrate); err != nil {
		return err
	}
	d.mode.held = d.bare.Remove(holdName) == nil
	m, uses, err := d.lower(ctx)
	if err != nil {
		return err
	}
	session, err := d.repo.UseStill(ctx, "thaw", uses...)
	if err != nil {
		return err
	}
	defer d.endSession(context.WithoutCancel(ctx), session)
	owner, err := d.bare.owner()
	if err != nil {
		return err
	}
	control, err := listen(d.dir)
	if err != nil {
		return err
	}
	defer control.Close()
	b := d.repo.OpenBackup(m)
	if err := d.mountAll(ctx, b); err != nil {
		return err
	}
	d.leaveMounts() // what is whole already, before anybody can have a file open
	if err := ready(); err != nil {
		return errors.Join(err, d.unmountAll())
	}
	d.log.Info("overlay is mounted", "target", d.dir, "cluster", m.Cluster, "backup", m.ID)
	// Those who still use the mount when ctx has ended may ask for WAL, too.
	answering, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	var g errgroup.Group
	g.Go(func() error { d.prefetchStart(answering, b); return nil })
	if !d.record.MakesImage {
		g.Go(func() error { d.recordStart(answering, m); return nil })
	}
	d.ahead = newWALAhead(d, b)
	starting := d.mode.held
	g.Go(func() error { d.ahead.run(answering, starting); return nil })
	g.Go(func() error {
		return serveControl(control, owner, func(q request) reply { return d.answer(answering, q) })
	})
	g.Go(func() error {
		for answering.Err() == nil {
			wait(answering, leaveEvery)
			d.leaveMounts()
			d.notePace()
		}
		return nil
	})
	err = d.run(ctx)
	control.Close()
	end()
	return errors.Join(err, g.Wait())
}

// manifest is that of the backup, also of one that was deleted since it was thawed: its bytes stay for a while, and all the
// longer as the repository knows of the overlay.
func (d *daemon) manifest(ctx context.Context) (*repo.Manifest, error) {
	m, err := d.repo.Manifest(ctx, d.record.Cluster, d.record.Backup)
	if !errors.Is(err, repo.ErrDeleted) {
		return m, err
	}
	d.log.Warn("the backup was deleted: prune may reclaim what is not copied yet", "cluster", d.record.Cluster, "backup", d.record.Backup)
	return d.repo.DeletedManifest(ctx, d.record.Cluster, d.record.Backup)
}

// endSession tells the repository that the backup is not needed any more, unless the overlay is to be taken up again.
func (d *daemon) endSession(ctx context.Context, s *repo.Session) {
	d.mu.Lock()
	needed := !d.sealed && !d.stopping
	d.mu.Unlock()
	if needed {
		s.Leave()
		return
	}
	ctx, cancel := context.WithTimeout(ctx, endingSession)
	defer cancel()
	if err := s.End(ctx); err != nil {
		d.log.Warn("what prune is not to delete is still announced", "error", err)
	}
}

// mountAll mounts every root, or none.
func (d *daemon) mountAll(ctx context.Context, b *repo.Backup) error {
	for i, r := range d.record.Roots {
		o := fusefs.OverlayOptions{
			Log: d.log, AllowOther: os.Geteuid() == 0, Passthrough: true, FillOnRead: true, Touched: d.starting.touched,
			KnownFiles: fusefs.KnownFiles() / len(d.record.Roots),
			Busy:       func() bool { return d.load.look(d.bare.postmaster) },
			Leave:      fusefs.Whole, // a tablespace: the server reaches it by its absolute path
		}
		if i == 0 {
			o.Hidden = []string{privateDir}
			o.Moved = map[string]string{versionFile: movedVersion}
			o.SyncBefore = []string{"postmaster.pid"} // stands for PostgreSQL's syncfs, which FUSE does not pass on
			o.Leave, o.First = fusefs.Directories, smallDirs
		}
		v, err := fusefs.MountOverlay(context.WithoutCancel(ctx), r.Dir, b, o)
		if err != nil {
			return errors.Join(err, d.unmountAll())
		}
		m := &mounted{root: r, Overlay: v, gone: make(chan struct{})}
		go func() {
			defer close(m.gone)
			if err := v.Wait(); err != nil {
				d.log.Error("overlay mount ended", "dir", r.Dir, "error", err)
			}
		}()
		d.overlays = append(d.overlays, m)
	}
	return nil
}

func (m *mounted) on() bool {
	select {
	case <-m.gone:
		return false
	default:
		return true
	}
}

// unmountAll takes the mounts off. EBUSY: one is in use, and stays. The data directory goes first: a server has it as its
// working directory, so that no server can be left with tablespaces that have holes.
func (d *daemon) unmountAll() error {
	d.unmounting.Lock()
	defer d.unmounting.Unlock()
	for _, m := range d.overlays {
		if !m.on() {
			continue
		}
		if err := m.Unmount(); err != nil {
			return err
		}
		if !m.Left() {
			<-m.gone
		}
	}
	return nil
}

// smallDirs are hydrated first, so that they leave the mount soon.
var smallDirs = []string{"pg_wal", "global", "pg_xact", "pg_multixact", "pg_subtrans", "pg_commit_ts", "pg_logical", "pg_replslot", "pg_stat", "pg_twophase"}

// leaveMounts takes out of the mounts what can do without.
func (d *daemon) leaveMounts() {
	for _, m := range d.overlays {
		err := m.Leave()
		if err == nil || errors.Is(err, fusefs.ErrUnmounted) || err.Error() == m.said {
			continue
		}
		m.said = err.Error()
		d.log.Warn("directories stay in the mount", "dir", m.root.Dir, "error", err)
	}
}

// notePace takes in how much was hydrated up to now.
func (d *daemon) notePace() {
	var done int64
	for _, m := range d.overlays {
		done += m.Hydrated()
	}
	d.pace.note(time.Now(), done)
}

// takeOff unmounts, and removes what is ours from a directory that is whole. That goes last: a crash before leaves a data
// directory that works, and that Finish cleans.
func (d *daemon) takeOff() error {
	if err := d.unmountAll(); err != nil {
		return err
	}
	d.mu.Lock()
	clean, finish := d.sealed && !d.stopping, d.finish
	d.mu.Unlock()
	if !clean {
		d.log.Info("overlay is unmounted", "target", d.dir)
		return nil
	}
	d.log.Info("overlay is an ordinary directory now", "target", d.dir)
	if !finish {
		if err := d.bare.mark(d.record); err != nil {
			d.log.Warn("the directory can be removed, but not by overlay discard", "target", d.dir, "error", err)
		}
	}
	return d.bare.clean()
}

// run hydrates until all is whole, and then waits for a moment to take the mounts off.
func (d *daemon) run(ctx context.Context) error {
	err := d.hydrateWhileMounted(ctx)
	if err == nil {
		err = d.settle(ctx)
	}
	if errors.Is(err, context.Canceled) {
		return d.leave()
	}
	return err
}

// hydrateWhileMounted also ends, as if ctx had, when somebody takes the mount off.
func (d *daemon) hydrateWhileMounted(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error {
		select {
		case <-d.overlays[0].gone:
			cancel()
		case <-ctx.Done():
		}
		return nil
	})
	err := d.hydrate(ctx)
	cancel()
	return errors.Join(err, g.Wait())
}

// hydrate fills all roots, as the mode of the moment says, and seals the directory. It returns an error only when ctx ends.
func (d *daemon) hydrate(ctx context.Context) error {
	limit := time.AfterFunc(holdLimit, func() { d.change(func(m *hydration) { m.held = false }) })
	defer limit.Stop()
	for ctx.Err() == nil {
		mode, era, end := d.era(ctx)
		if mode.off || mode.held {
			<-era.Done()
			continue
		}
		err := d.hydrateOnce(era, mode)
		if err == nil {
			end()
			return nil
		}
		if era.Err() == nil {
			d.fail("hydrate", err)
			wait(era, retryAfter)
		}
		end()
	}
	return ctx.Err()
}

// wait returns after a time, or when ctx ends.
func wait(ctx context.Context, pause time.Duration) {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// era returns the mode of the moment and a context that ends when it changes.
func (d *daemon) era(ctx context.Context) (hydration, context.Context, context.CancelFunc) {
	d.mu.Lock()
	defer d.mu.Unlock()
	era, end := context.WithCancel(ctx)
	d.endEra = end
	return d.mode, era, end
}

// change changes the mode and ends its era.
func (d *daemon) change(fn func(*hydration)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	before := d.mode
	if fn(&d.mode); d.mode != before && d.endEra != nil {
		d.endEra()
	}
}

// hydrateOnce fills one root after the other and seals the directory.
func (d *daemon) hydrateOnce(ctx context.Context, mode hydration) error {
	for _, m := range d.overlays {
		if m.Left() { // only a whole one does
			continue
		}
		if err := m.Hydrate(ctx, mode.bytesPerSecond); err != nil && !m.Left() {
			return err
		}
	}
	if err := d.bare.seal(); err != nil {
		return fmt.Errorf("put %s in its place: %w", versionFile, err)
	}
	d.mu.Lock()
	d.sealed, d.lastErr = true, nil
	d.mu.Unlock()
	d.log.Info("overlay is hydrated", "target", d.dir)
	return nil
}

// settle takes the mounts off the whole directory as soon as no server runs in it and nobody else uses it.
func (d *daemon) settle(ctx context.Context) error {
	var ended time.Time // of the server
	for ctx.Err() == nil {
		if pid := d.bare.postmaster(); pid != 0 {
			awaitPID(ctx, pid, unmountEvery)
			ended = time.Now()
			continue
		}
		err := d.takeOff()
		if err == nil {
			return nil
		}
		d.fail("take the mount off", err)
		if time.Since(ended) < stopPatience { // its logger ends after it
			wait(ctx, stopPatience/100)
		} else {
			wait(ctx, unmountEvery)
		}
	}
	return ctx.Err()
}

// awaitPID returns as soon as a process has ended, or after a time.
func awaitPID(ctx context.Context, pid int, limit time.Duration) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		wait(ctx, limit)
		return
	}
	defer unix.Close(fd)
	awaitExit(fd, int(limit.Milliseconds()))
}

// leave ends the daemon before its work is done: it goes on serving those who use the mount for a while.
func (d *daemon) leave() error {
	deadline := time.Now().Add(farewell)
	for {
		err := d.takeOff()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("leave %s while it is in use: %w", d.dir, err)
		}
		d.fail("take the mount off", err)
		time.Sleep(unmountEvery)
	}
}

// fail notes why something did not go on, and logs it once.
func (d *daemon) fail(what string, err error) {
	err = fmt.Errorf("%s: %w", what, err)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lastErr == nil || d.lastErr.Error() != err.Error() {
		d.log.Warn("overlay", "target", d.dir, "error", err)
	}
	d.lastErr, d.errAt = err, time.Now().UTC()
}

// answer does what was asked for on the control socket. Several questions may be answered at once.
func (d *daemon) answer(ctx context.Context, q request) reply {
	var err error
	switch q.Command {
	case commandWAL:
		return d.wal(ctx, q)
	case commandStatus:
	case commandHydrate:
		d.change(func(m *hydration) { m.held = false })
	case commandFinish:
		d.mu.Lock()
		d.finish = true
		d.mu.Unlock()
		d.change(func(m *hydration) { *m = hydration{} })
	case commandStop:
		err = d.stop()
	default:
		err = fmt.Errorf("unknown command %q", q.Command)
	}
	r := reply{Status: d.status(ctx)}
	if err != nil {
		r.Error, r.Busy = err.Error(), errors.Is(err, syscall.EBUSY)
	}
	return r
}

// wal answers restore_command.
func (d *daemon) wal(ctx context.Context, q request) (r reply) {
	err := fmt.Errorf("this is a copy of cluster %s, not of %s", d.record.Cluster, q.Cluster)
	if q.Cluster == d.record.Cluster {
		r.wal, r.Put, err = d.ahead.get(ctx, q.WAL, q.Put)
	}
	if err != nil {
		return reply{Error: err.Error(), Absent: errors.Is(err, repo.ErrNoWAL)}
	}
	r.Bytes = int64(len(r.wal))
	if r.Put {
		r.wal = nil
	}
	return r
}

// stop takes the mounts off for good, which ends run.
func (d *daemon) stop() error {
	if pid := d.bare.postmaster(); pid != 0 {
		return fmt.Errorf("%w (PID %d)", ErrServerRunning, pid)
	}
	d.setStopping(true)
	err := d.unmountAll()
	for deadline := time.Now().Add(stopPatience); errors.Is(err, syscall.EBUSY) && time.Now().Before(deadline); {
		time.Sleep(stopPatience / 40)
		err = d.unmountAll()
	}
	if err != nil {
		d.setStopping(false)
	}
	return err
}

func (d *daemon) setStopping(stopping bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stopping = stopping
}

func (d *daemon) status(ctx context.Context) OverlayStatus {
	d.mu.Lock()
	sealed, lastErr, at, mode := d.sealed, d.lastErr, d.errAt, d.mode
	d.mu.Unlock()
	s := OverlayStatus{
		State: stateHydrating, Mounted: d.overlays[0].on(), Target: d.dir,
		Cluster: d.record.Cluster, Backup: d.record.Backup,
		RepositoryBytesRead: d.repo.ReadBytes(), PID: os.Getpid(), ServerPID: d.bare.postmaster(),
	}
	if sealed {
		s.State = stateHydrated
	}
	if lastErr != nil {
		s.LastError, s.LastErrorAt = lastErr.Error(), &at
	}
	if w, long := d.repo.Waiting(); long {
		s.Waiting = &Waiting{w.Since, w.String()}
	}
	for _, m := range d.overlays {
		if m.on() {
			s.add(m.Status())
			s.addBranches(m.Branches())
		} else if m.Left() {
			s.Native = append(s.Native, m.root.Dir)
			if err := s.measure(ctx, m.root.Dir); err != nil {
				d.log.Warn("look at a tablespace", "dir", m.root.Dir, "error", err)
			}
		}
	}
	if !sealed {
		s.Hydrate = mode.String()
		s.BytesPerSecond = d.pace.perSecond()
		s.SecondsLeft = int64(math.Ceil(left(s.BytesTotal-s.BytesHydrated, s.BytesPerSecond).Seconds()))
	}
	return s
}

func (s *OverlayStatus) addBranches(branches []fusefs.Branch) {
	for _, b := range branches {
		if b.Left {
			s.Native = append(s.Native, b.Dir)
			continue
		}
		held := Held{Dir: b.Dir, Processes: []HeldBy{}}
		for _, p := range b.Holders {
			held.Processes = append(held.Processes, HeldBy{p.PID, p.Command})
		}
		s.Held = append(s.Held, held)
	}
}

func (s *OverlayStatus) add(f fusefs.Status) {
	s.BytesTotal += f.BytesTotal
	s.BytesHydrated += f.BytesHydrated
	s.FilesTotal += f.FilesTotal
	s.FilesWhole += f.FilesWhole
}
