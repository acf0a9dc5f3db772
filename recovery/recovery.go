package recovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// Options are what Restore and Thaw have in common.
type Options struct {
	Cluster string
	Backup  string // an id, or repo.Latest
	Dir     string // the data directory to make: absent, or empty
	Target  Target

	TablespaceMapping map[string]string // from a tablespace's directory on the server to one here
	RestoreCommand    string            // for PostgreSQL: ready for a shell, with %f and %p

	NoBootImage bool // recover from the backup itself

	Start  bool   // start PostgreSQL and wait until recovery has ended
	Port   int    // 0: the cluster's own if it is free, else any that is
	BinDir string // of PostgreSQL's programs; "": found by the backup's version

	Workers  int // that write files; 0: as the processors go
	Log      *slog.Logger
	Progress func(Progress) // called from several goroutines; may be nil

	sockets string // directory of a server's socket that nobody else shall meet; "": it is for everybody
}

func (o *Options) progress(phase string, done, total int64) {
	if o.Progress != nil {
		o.Progress(Progress{phase, done, total})
	}
}

// Progress tells how far one phase is: "restore", "sync", "recover" (WAL replayed), "hydrate".
type Progress struct {
	Phase       string
	Done, Total int64 // bytes
}

// Result is what a restore or a thaw made.
type Result struct {
	Cluster   string   `json:"cluster"`
	Backup    string   `json:"backup"`
	Target    string   `json:"target"`     // the data directory, absolute
	SizeBytes int64    `json:"size_bytes"` // of all files
	ReadBytes int64    `json:"repository_bytes_read"`
	Changed   []string `json:"changed_files"` // that differ from the backup's, for pg_verifybackup --ignore

	BootImage  *repo.Image `json:"boot_image,omitempty"` // from which it starts; nil: from the backup itself
	Standalone bool        `json:"standalone"`           // the WAL behind the backup was pruned: its end is all that can be recovered to

	RestoredMS int64        `json:"restored_ms,omitempty"` // since the beginning, as the next two
	MountedMS  int64        `json:"mounted_ms,omitempty"`
	ReadyMS    int64        `json:"ready_ms,omitempty"` // the first query was answered
	Port       int          `json:"port,omitempty"`
	SocketDir  string       `json:"socket_dir,omitempty"`
	PID        int          `json:"pid,omitempty"` // postmaster's
	ServerLog  string       `json:"server_log,omitempty"`
	NoLogin    string       `json:"no_login,omitempty"` // why nobody could log in to the server, which answered
	Recovery   *RecoveryEnd `json:"recovery,omitempty"` // nil where nobody could log in to see it
}

// RecoveryEnd is where recovery came to its end.
type RecoveryEnd struct {
	State    string      `json:"state"`          // promoted, paused or shutdown
	LSN      pg.LSN      `json:"lsn"`            // replayed up to here
	Timeline pg.Timeline `json:"timeline"`       // of the server now
	Time     *time.Time  `json:"time,omitempty"` // of the last commit that was replayed; nil if none was
}

// job is a restore or a thaw of which everything is known and checked, and nothing done yet.
type job struct {
	Options
	r      *repo.Repository
	begun  time.Time
	route  Route
	backup *repo.Backup
	roots  []root
	owner  owner
	conf   configuration
	start  *startPlan // nil: the server is not started
	server *server    // nil: it was not started

	recovered func(ctx context.Context) // called once recovery has ended; may be nil
}

// prepare does all that can be refused.
func prepare(ctx context.Context, r *repo.Repository, o Options) (*job, error) {
	j := &job{Options: o, r: r, begun: time.Now()}
	if j.Log == nil {
		j.Log = slog.New(slog.DiscardHandler)
	}
	var err error
	if j.route, err = Plan(ctx, r, o.Cluster, o.Backup, o.Target); err != nil {
		return nil, err
	}
	o.Target = j.route.target(o.Target)
	j.Target = o.Target
	if !o.NoBootImage {
		j.useImage(ctx)
	}
	m := j.route.Manifest
	if j.roots, err = o.roots(m); err != nil {
		return nil, err
	}
	if err := checkRoots(j.roots, m); err != nil {
		return nil, err
	}
	j.backup = r.OpenBackup(j.route.lower())
	if j.owner, err = serverOwner(ctx, j.dir(), j.backup); err != nil {
		return nil, err
	}
	if err := checkPlaces(j.roots, j.owner); err != nil {
		return nil, err
	}
	files, err := readConfFiles(ctx, j.backup, j.owner)
	if err != nil {
		return nil, fmt.Errorf("read configuration files of the backup: %w", err)
	}
	if lost := files.lostTLS; lost.name != "" {
		j.Log.Warn("ssl is off in the copy: its user cannot read here what the setting names", "setting", lost.name, "value", lost.value, "user", j.owner.name)
	}
	if o.Start {
		if j.start, err = planStart(ctx, o, m, files, j.owner); err != nil {
			return nil, err
		}
	}
	j.conf = newConfiguration(o, j.route, files, j.start)
	return j, nil
}

func (j *job) dir() string { return j.roots[0].Dir }

func (j *job) result() Result {
	m := j.route.Manifest
	return Result{Cluster: m.Cluster, Backup: m.ID, Target: j.dir(), SizeBytes: m.SizeBytes, Changed: j.conf.changedFiles(),
		BootImage: j.route.lower().Image, Standalone: j.route.alone}
}

func (j *job) since() int64 { return max(1, time.Since(j.begun).Milliseconds()) }

// writeConfiguration puts the files that differ from the backup's into the data directory, each in one step.
func (j *job) writeConfiguration() error {
	for name, content := range j.conf {
		if content == nil {
			continue
		}
		if err := writeOwned(filepath.Join(j.dir(), name), content, j.owner); err != nil {
			return err
		}
	}
	return nil
}

// writeOwned makes a file of mode 0600, or takes one's place. It is synced with the whole directory.
func writeOwned(path string, content []byte, o owner) error {
	tmp := path + ".pgthaw"
	err := os.WriteFile(tmp, content, 0o600)
	if err == nil && o.foreign() {
		err = os.Lchown(tmp, o.uid, o.gid)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), removeIfThere(tmp))
	}
	return nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// syncFileSystem writes back the whole file system that dir lies on.
func syncFileSystem(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync file system of %s: %w", dir, err)
	}
	return nil
}
