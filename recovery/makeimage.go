package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// ImageOptions of MakeImages.
type ImageOptions struct {
	Cluster  string
	Backup   string // an id, or repo.Latest
	Refresh  bool   // bring what is there forward to the newest WAL
	Scratch  string // where a temporary directory is made; "": where temporary files are. It takes what a start writes
	BinDir   string // of PostgreSQL's programs; "": found by the backup's version
	KeyFiles KeyFiles
	Tool     string // recorded as what wrote the image

	RestoreCommand func(dir string) (string, error)            // for PostgreSQL in a data directory
	SpawnDaemon    func(ctx context.Context, dir string) error // see ThawOptions
	Log            *slog.Logger                                // nil: nothing is logged
	Progress       func(Progress)                              // may be nil
}

// Images tells what MakeImages made.
type Images struct {
	Made      []*repo.Manifest
	NoForward string // why none was made that replays on; "": one was made, or is there
}

// atBackupsEnd is where a promoted image was promoted.
var atBackupsEnd = Target{Immediate: true, Timeline: "current"}

// MakeImages makes the boot images that a backup lacks: it thaws the backup into a temporary directory, has PostgreSQL recover there
// and shut down, and stores the pages that this has changed. Nothing of that is left, whatever happens. An image is stored only after a
// clean shutdown, so it proves that the backup starts. A server was started from the one that was promoted, too.
func MakeImages(ctx context.Context, r *repo.Repository, o ImageOptions) (done Images, err error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	m, err := r.Manifest(ctx, o.Cluster, o.Backup)
	if err != nil {
		return done, err
	}
	have, err := r.ImagesOf(ctx, m)
	if err != nil {
		o.Log.Warn("a boot image of the backup cannot be read", "error", err)
	}
	k := imageMaker{r: r, o: o, m: m}
	k.sweep(ctx)
	if newestOf(have, repo.ImagePromoted) == nil {
		image, err := k.make(ctx, repo.ImagePromoted, atBackupsEnd)
		if err != nil {
			return done, err
		}
		done.Made = append(done.Made, image)
		if err := k.rehearse(ctx); err != nil {
			return done, err
		}
	}
	if last := newestOf(have, repo.ImageRecovery); last == nil || o.Refresh {
		err = k.forward(ctx, last, &done)
		return done, err
	}
	return done, nil
}

// forward makes the image from which recovery goes on, unless the last one has come as far.
func (k *imageMaker) forward(ctx context.Context, last *repo.Manifest, done *Images) error {
	at, why, err := k.checkpoint(ctx)
	if err == nil && why == "" && last != nil && at.LSN < last.Image.LSN {
		why = fmt.Sprintf("no checkpoint behind %s, to which the boot image has come, is in the repository", last.Image.LSN)
	}
	if err != nil || why != "" {
		done.NoForward = why
		return err
	}
	to := Target{LSN: at.LSN, Action: "shutdown"}
	image, err := k.make(ctx, repo.ImageRecovery, to)
	if errors.Is(err, repo.ErrCorrupt) && last != nil {
		k.o.Log.Warn("something is damaged; the boot image is made from the backup itself", "error", err)
		k.fromBackup = true
		image, err = k.make(ctx, repo.ImageRecovery, to)
	}
	if errors.Is(err, errTablespaceMade) {
		done.NoForward = err.Error()
		return nil
	}
	if err == nil {
		done.Made = append(done.Made, image)
	}
	return err
}

func newestOf(images []*repo.Manifest, kind repo.ImageKind) (newest *repo.Manifest) {
	for _, m := range images {
		if m.Image.Kind == kind {
			newest = m
		}
	}
	return newest
}

// imageMaker makes images of one backup.
type imageMaker struct {
	r    *repo.Repository
	o    ImageOptions
	m    *repo.Manifest
	path *walPath // from the backup to the end of its WAL

	fromBackup bool // no image is used to make another
}

// checkpoint finds the newest checkpoint behind the backup's end. Recovery that stops there leaves a server that has next to nothing to
// replay when it is started again (CreateRestartPoint). why says that there is none.
func (k *imageMaker) checkpoint(ctx context.Context) (at pg.CheckpointRecord, why string, err error) {
	a, err := openArchive(ctx, k.r, k.m.Cluster)
	if err != nil {
		return at, "", err
	}
	alone, err := k.r.Standalone(ctx, k.m)
	if err != nil {
		return at, "", err
	}
	if alone {
		return at, "the WAL behind the backup was pruned", nil
	}
	if k.path, err = a.pathOf(ctx, k.m, "", false); err != nil {
		return at, "", err
	}
	for i := len(k.path.names) - 1; i >= 0 && a.size.Start(k.path.first+uint64(i)+1) > k.m.StopLSN; i-- {
		content, err := k.r.WAL(ctx, k.m.Cluster, k.path.names[i])
		if err != nil {
			return at, "", err
		}
		at, ok, err := pg.LastCheckpoint(content, k.path.names[i], a.size)
		if err != nil {
			return at, "", err
		}
		if ok && at.LSN >= k.m.StopLSN {
			return at, "", nil
		}
	}
	return at, "no checkpoint behind the backup's end is in the repository yet", nil
}

// make makes one image: what recovery to a target leaves.
func (k *imageMaker) make(ctx context.Context, kind repo.ImageKind, t Target) (image *repo.Manifest, err error) {
	err = k.inScratch(ctx, func(s *scratch) error {
		j, err := k.recover(ctx, s, t, kind)
		if err != nil {
			return fmt.Errorf("make a boot image of backup %s: %w", k.m.ID, err)
		}
		i, err := k.describe(ctx, j, kind)
		if err == nil {
			image, err = j.writeImage(ctx, i, k.o.Tool)
		}
		return err
	})
	return image, err
}

// rehearse has a server start from the promoted image, as a thaw will. It shows that one does, and leaves the record of what that
// reads, which the start that made the image does not tell: recovery had brought most of it.
func (k *imageMaker) rehearse(ctx context.Context) error {
	return k.inScratch(ctx, func(s *scratch) error {
		if _, err := k.recover(ctx, s, atBackupsEnd, ""); err != nil {
			return fmt.Errorf("start from the boot image that was made of backup %s: %w", k.m.ID, err)
		}
		return nil
	})
}

// inScratch calls do with a temporary directory, of which nothing is left.
func (k *imageMaker) inScratch(ctx context.Context, do func(*scratch) error) error {
	runtime.LockOSThread() // the server is to end with us: prctl(2), PR_SET_PDEATHSIG is about the thread
	defer runtime.UnlockOSThread()
	s, err := newScratch(k.o.Scratch)
	if err != nil {
		return err
	}
	defer func() {
		if left := s.remove(context.WithoutCancel(ctx)); left != nil {
			k.o.Log.Warn("a temporary directory is left: the next boot image removes it", "dir", s.dir, "error", left)
		}
	}()
	return do(s)
}

// recover thaws the backup, or the image that is nearer, has the server recover and waits until it has shut down. kind is that
// of the image to be made of it, "" if none is.
func (k *imageMaker) recover(ctx context.Context, s *scratch, t Target, kind repo.ImageKind) (*job, error) {
	o := Options{
		Cluster: k.m.Cluster, Backup: k.m.ID, Dir: s.data(), Target: t, TablespaceMapping: s.tablespaces(k.m),
		Start: true, BinDir: k.o.BinDir, NoBootImage: k.fromBackup || kind == repo.ImagePromoted, Log: k.o.Log, Progress: k.o.Progress, sockets: s.sockets(),
	}
	var err error
	if o.RestoreCommand, err = k.o.RestoreCommand(o.Dir); err != nil {
		return nil, err
	}
	j, err := prepare(ctx, k.r, o)
	if err != nil {
		return nil, err
	}
	if err := k.checkTablespaces(ctx, j); err != nil {
		return nil, err
	}
	if err := s.makeSockets(j.owner); err != nil {
		return nil, err
	}
	if err := j.lay(ctx, ThawOptions{Options: j.Options, Hydrate: "off", MakesImage: kind != "", KeyFiles: k.o.KeyFiles}); err != nil {
		return nil, err
	}
	if err := k.o.SpawnDaemon(ctx, j.dir()); err != nil {
		return nil, err
	}
	defer func() { j.server.kill() }()
	var res Result
	if err := j.startServer(ctx, &res); err != nil {
		return nil, err
	}
	if err := j.server.stop(ctx); err != nil {
		return nil, err
	}
	return j, stopDaemon(ctx, j.dir())
}

// errTablespaceMade: replay would make a tablespace. It does so where the WAL says (tblspc_redo), which on the original's host is the
// directory that the original uses: the scratch server would write into its files.
var errTablespaceMade = errors.New("a tablespace was made meanwhile, and replay would use its directory")

// checkTablespaces looks through the WAL that is to be replayed for what must not be replayed here.
func (k *imageMaker) checkTablespaces(ctx context.Context, j *job) error {
	from, until := k.m.StartLSN, k.m.StopLSN
	if base := j.route.lower().Image; base != nil {
		from = base.Redo
	}
	if kind, _ := j.Target.kind(); kind == targetLSN {
		until = j.Target.LSN
	}
	a, err := openArchive(ctx, k.r, k.m.Cluster)
	if err != nil {
		return err
	}
	p := a.path(j.route.line, k.m)
	for no := a.size.Segment(from); a.size.Start(no) < until; no++ {
		name, content, err := k.segment(ctx, p, no)
		if err != nil {
			return err
		}
		made, err := pg.TablespacesMade(content, name, a.size)
		if err != nil {
			return err
		}
		if len(made) > 0 {
			return withHint(fmt.Errorf("%w: %s", errTablespaceMade, made[0]), "Make a new backup: it has the tablespace.")
		}
	}
	return nil
}

// segment reads one segment of the path, or the one that the backup has in its tree as far as it went.
func (k *imageMaker) segment(ctx context.Context, p *walPath, no uint64) (name pg.WALName, content []byte, err error) {
	if no < p.end() {
		name = p.names[no-p.first]
		content, err = k.r.WAL(ctx, k.m.Cluster, name)
		return name, content, err
	}
	if name, err = pg.ParseWALName(k.m.WALLast); err == nil {
		content, err = readSmall(ctx, k.r.OpenBackup(k.m), "pgdata/pg_wal/"+k.m.WALLast)
	}
	return name, content, err
}

// describe says what the image is that the server left. Clean shutdown in the state that was meant is what makes it one.
func (k *imageMaker) describe(ctx context.Context, j *job, kind repo.ImageKind) (repo.Image, error) {
	b, err := os.ReadFile(filepath.Join(j.dir(), controlPath)) // whole: the server has written it
	if err != nil {
		return repo.Image{}, err
	}
	c, err := pg.ParseControlFile(b)
	if err != nil {
		return repo.Image{}, err
	}
	want := map[repo.ImageKind]pg.DBState{repo.ImagePromoted: pg.DBShutdowned, repo.ImageRecovery: pg.DBShutdownedInRecovery}[kind]
	if c.State != want || c.SystemIdentifier != k.m.SystemIdentifier {
		return repo.Image{}, fmt.Errorf("%w: it was to be %q, but is %q", ErrServer, want, c.State)
	}
	version, _, err := postgresVersion(ctx, j.start.postgres)
	if err != nil {
		return repo.Image{}, fmt.Errorf("%w: %w", ErrServer, err)
	}
	i := repo.Image{
		Of: k.m.ID, Kind: kind, LSN: k.m.StopLSN, Redo: c.Redo, Timeline: c.Timeline,
		LastCommit: k.m.StoppedAt.UTC(), NextXid: uint32(c.NextXid), PGVersion: version, MadeAt: time.Now().UTC().Truncate(time.Second),
	}
	if kind == repo.ImageRecovery {
		i.LSN, i.Timeline = c.MinRecoveryPoint, max(c.Timeline, c.MinRecoveryTimeline)
		err = k.ended(ctx, j, &i)
	}
	return i, err
}

// ended takes in the transactions that ended up to the image's LSN, behind those of the backup or image from which it was made.
func (k *imageMaker) ended(ctx context.Context, j *job, i *repo.Image) error {
	from := k.m.StopLSN
	if base := j.route.lower().Image; base != nil {
		from, i.LastCommit, i.NextXid = base.LSN, base.LastCommit, later(base.NextXid, i.NextXid)
	}
	p := k.path
	for n := max(p.a.size.Segment(from), p.first) - p.first; n < uint64(len(p.names)) && p.a.size.Start(p.first+n) < i.LSN; n++ {
		head, err := k.r.WALHead(ctx, k.m.Cluster, p.names[n])
		s := head.Summary
		if err == nil && p.a.size.Start(p.first+n+1) > i.LSN {
			s, err = p.prefix(ctx, int(n), i.LSN)
		}
		if err != nil {
			return err
		}
		if s.LastCommit.After(i.LastCommit) {
			i.LastCommit = s.LastCommit.UTC()
		}
		if s.Xids > 0 {
			i.NextXid = later(i.NextXid, s.MaxXid+1)
		}
	}
	return nil
}

// later is the transaction ID that does not precede the other (TransactionIdPrecedes).
func later(a, b uint32) uint32 {
	if int32(a-b) < 0 {
		return b
	}
	return a
}
