package ingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// BackupOptions of Backup.
type BackupOptions struct {
	Cluster           string         // its name in the repository
	ConnString        string         // URI, or keywords and values; what it does not say comes from libpq's environment
	Label             string         // default: DefaultLabel
	SlowCheckpoint    bool           // wait for the server's next checkpoint rather than force one
	NoVerifyChecksums bool           // back up pages whose checksum is wrong
	MaxRate           int            // kB/s that the server sends at most, 32 to 1048576; 0: no limit
	Full              bool           // do not compare with the newest backup
	Workers           int            // that hash and compress; 0: one for each processor
	Log               *slog.Logger   // nil: nothing is logged
	Progress          func(Progress) // nil: none; called by one goroutine at a time, at most ten times a second
	Tool              string         // recorded as what wrote the backup
}

// DefaultLabel is the label of a backup that was given none.
const DefaultLabel = "pgthaw base backup"

// Progress of a backup.
type Progress struct {
	Done, Total int64 // bytes of the cluster; Total is the server's estimate
	Stored      int64 // bytes put into the repository
}

func (o *BackupOptions) setDefaults() {
	if o.Label == "" {
		o.Label = DefaultLabel
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
}

// Backup makes a base backup over the replication protocol, with the WAL that makes it consistent. An error leaves no
// backup, and no data of one, in the repository; WAL that was received stays.
func Backup(ctx context.Context, r *repo.Repository, o BackupOptions) (*repo.Manifest, error) {
	o.setDefaults()
	s, err := connect(ctx, o.ConnString, o.Log)
	if err != nil {
		return nil, err
	}
	defer s.close(ctx)
	if err := s.checkSenders(); err != nil {
		return nil, err
	}
	if _, err := r.BindCluster(ctx, o.Cluster, s.systemID, s.segmentSize); err != nil {
		return nil, err
	}
	prior, err := choosePrior(ctx, r, o)
	if err != nil {
		return nil, err
	}
	return r.WriteBackup(ctx, o.Cluster, repo.BackupOptions{Prior: prior, Workers: o.Workers},
		func(ctx context.Context, w *repo.BackupWriter) (repo.Manifest, error) {
			b := &backup{server: s, o: o, repo: r, w: w, tree: newTree(w, s.settings["data_directory_mode"])}
			return b.run(ctx)
		})
}

// checkSenders refuses a server that cannot have two replication connections at once.
func (s *server) checkSenders() error {
	n, err := s.number("max_wal_senders")
	if err == nil && n < 2 {
		err = refuse("Set max_wal_senders to at least 2, better 10, and restart the server.",
			"max_wal_senders is %d, and a backup needs one for the files and one for the WAL", n)
	}
	return err
}

// choosePrior is the newest backup, whose unchanged pages need not be stored again. A damaged one is none.
func choosePrior(ctx context.Context, r *repo.Repository, o BackupOptions) (*repo.Backup, error) {
	if o.Full {
		return nil, nil
	}
	m, err := r.Manifest(ctx, o.Cluster, repo.Latest)
	switch {
	case errors.Is(err, repo.ErrNoBackup):
		return nil, nil
	case errors.Is(err, repo.ErrCorrupt):
		o.Log.Warn("the newest backup is damaged; all pages are stored again", "error", err)
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read the newest backup: %w", err)
	}
	return r.OpenBackup(m), nil
}

// backup is one backup that is being made.
type backup struct {
	server *server
	o      BackupOptions
	repo   *repo.Repository
	w      *repo.BackupWriter
	tree   *tree

	manifest     pg.BackupManifest
	manifestFile *repo.FileWriter // closed when the backup's end is known
	stop         position
	wal          capturedWAL
	done         int64 // bytes of archives
	total        int64
	told         time.Time // when Progress was called last
}

// run receives files and WAL side by side, and tells what the manifest needs.
func (b *backup) run(ctx context.Context) (m repo.Manifest, err error) {
	wal, err := b.server.openCapture(ctx, b.repo, b.o.Cluster)
	if err != nil {
		return m, err
	}
	defer closeConn(ctx, wal.conn)
	base, err := b.server.startBaseBackup(ctx, b.o)
	if err != nil {
		return m, err
	}
	defer base.close()
	b.o.Log.Info("base backup starts", "lsn", base.start.lsn, "timeline", base.start.timeline)

	if err := b.receive(ctx, base, wal); err != nil {
		return m, err
	}
	if err := b.finishTree(base); err != nil {
		return m, err
	}
	return b.describe(base), nil
}

// receive runs files and WAL side by side. The first that fails ends the other.
func (b *backup) receive(ctx context.Context, base *baseBackup, wal *capture) error {
	g, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, base.close)()
	untilStop, stopKnown := context.WithCancel(ctx)
	defer stopKnown()
	g.Go(func() (err error) {
		b.wal, err = wal.run(ctx, untilStop, base.start, b.server.segmentSize)
		return err
	})
	g.Go(func() (err error) {
		b.total = base.totalBytes
		if b.stop, err = base.receive(b.received, b.tree.archive, b.readManifest); err != nil {
			return base.explain(ctx, "receive the base backup", err)
		}
		wal.stopLSN.Store(uint64(b.stop.lsn))
		stopKnown()
		return nil
	})
	return g.Wait()
}

// readManifest stores backup_manifest as it comes and compares the files that it lists with those that came. Nothing may
// be in one and not in the other.
func (b *backup) readManifest(r io.Reader) (err error) {
	e := b.tree.owner
	e.Mode, e.Size = 0o600, repo.UnknownSize
	if b.manifestFile, err = b.w.Create(dataDir+"/backup_manifest", e, false); err != nil {
		return err
	}
	b.manifest, err = pg.ReadBackupManifest(io.TeeReader(r, b.manifestFile), b.tree.arrived.verify)
	if err != nil {
		return err
	}
	return b.tree.arrived.verifyAll()
}

const progressInterval = 100 * time.Millisecond

func (b *backup) received(n int) {
	b.done += int64(n)
	if now := time.Now(); now.Sub(b.told) >= progressInterval {
		b.told = now
		b.o.Progress(Progress{Done: b.done, Total: max(b.total, b.done), Stored: b.w.Stored()})
	}
}

// finishTree verifies where the backup begins and ends, and adds what the archives do not have: backup_manifest and the WAL.
func (b *backup) finishTree(base *baseBackup) error {
	b.tree.arrived.files = nil // room for writing the tree
	if err := verifyManifest(b.manifest, b.server.systemID, base.start, b.stop); err != nil {
		return err
	}
	if err := verifyLabel(b.tree.label, base.start); err != nil {
		return err
	}
	b.tree.owner.ModTime = b.wal.stoppedAt
	b.manifestFile.SetModTime(b.wal.stoppedAt)
	if err := b.manifestFile.Close(); err != nil {
		return err
	}
	return b.addWAL(base.start.timeline)
}

// addWAL puts the captured WAL into pg_wal. Like pg_basebackup, it marks what is whole as archived, for a copy with
// archiving on would archive it again.
func (b *backup) addWAL(timeline pg.Timeline) error {
	if b.wal.history != nil {
		name := pg.WALName{Kind: pg.WALHistory, Timeline: timeline}
		if err := b.addWALFile(name, int64(len(b.wal.history))); err != nil {
			return err
		}
	}
	size := b.server.segmentSize
	for segno := b.wal.first; segno <= b.wal.last; segno++ {
		name := pg.SegmentName(timeline, segno, size)
		if segno == b.wal.last && b.wal.partial != nil {
			return b.tree.add(walDir+"/"+name.String(), b.wal.partial)
		}
		if err := b.addWALFile(name, int64(size)); err != nil {
			return err
		}
	}
	return nil
}

func (b *backup) addWALFile(name pg.WALName, size int64) error {
	e := b.tree.owner
	e.Mode, e.Size = 0o600, size
	if err := b.tree.makeDirs(statusDir); err != nil {
		return err
	}
	if err := b.w.AddWAL(walDir+"/"+name.String(), e, name); err != nil {
		return err
	}
	return b.tree.add(statusDir+"/"+name.String()+".done", nil)
}

// describe tells what the repository's manifest says of the backup.
func (b *backup) describe(base *baseBackup) repo.Manifest {
	s := b.server
	version, _, _ := strings.Cut(s.settings["server_version"], " ") // without the packager's words
	m := repo.Manifest{
		Tool:             b.o.Tool,
		Label:            b.o.Label,
		SystemIdentifier: s.systemID,
		PGVersion:        version,
		PGVersionNum:     s.versionNum,
		PageSize:         s.pageSize,
		SegmentSize:      s.segmentSize,
		DataChecksums:    s.settings["data_checksums"] == "on",
		FromStandby:      s.inRecovery,
		Timeline:         base.start.timeline,
		StartLSN:         base.start.lsn,
		StopLSN:          b.stop.lsn,
		StartedAt:        b.wal.startedAt,
		StoppedAt:        b.wal.stoppedAt,
		WALFirst:         pg.SegmentName(base.start.timeline, b.wal.first, s.segmentSize).String(),
		WALLast:          pg.SegmentName(base.start.timeline, b.wal.last, s.segmentSize).String(),
		DataDirectory:    s.settings["data_directory"],
		ConfigFile:       s.settings["config_file"],
		HBAFile:          s.settings["hba_file"],
		IdentFile:        s.settings["ident_file"],
		Settings:         s.settings,
	}
	for _, row := range base.archives {
		if row.oid != 0 {
			m.Tablespaces = append(m.Tablespaces, repo.Tablespace{OID: row.oid, Path: row.path, InPlace: row.inPlace()})
		}
	}
	return m
}
