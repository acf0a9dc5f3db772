package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"pgthaw/fusefs"
	"pgthaw/repo"
)

// ThawOptions are those of Thaw.
type ThawOptions struct {
	Options
	Hydrate    string   // "", "auto", "off", or a rate: "50MB" a second
	MakesImage bool     // see record
	KeyFiles   KeyFiles // for those who take the overlay up later; the overlay keeps their names, never what is in them

	// SpawnDaemon starts a process that calls Serve for dir, and returns when that is ready.
	SpawnDaemon func(ctx context.Context, dir string) error
}

// Thaw makes a backup a writable data directory that is read from the repository as it is needed, and starts PostgreSQL
// in it if asked to. Until its daemon runs, a failure removes again what was made.
//
// It starts from a boot image of the backup if that leads to the target. One that is damaged is left alone.
func Thaw(ctx context.Context, r *repo.Repository, o ThawOptions) (Result, error) {
	res, err := thaw(ctx, r, o)
	if res.MountedMS == 0 && o.withoutImage(err) {
		o.NoBootImage = true
		if o.Log != nil {
			o.Log.Warn("something is damaged; the backup is thawed without its boot image", "error", err)
		}
		return thaw(ctx, r, o)
	}
	return res, err
}

func thaw(ctx context.Context, r *repo.Repository, o ThawOptions) (Result, error) {
	mode, err := parseHydration(o.Hydrate)
	if err != nil {
		return Result{}, err
	}
	j, err := prepare(ctx, r, o.Options)
	if err == nil {
		err = j.tryOverlayRestoreCommand(ctx)
	}
	if err != nil {
		return Result{}, err
	}
	if err := j.checkThawable(ctx, mode); err != nil {
		return Result{}, err
	}
	before := r.ReadBytes()
	err = j.lay(ctx, o)
	if err == nil {
		err = o.SpawnDaemon(ctx, j.dir())
	}
	if err != nil {
		return Result{}, errors.Join(err, j.unlay())
	}
	res := j.result()
	res.MountedMS = j.since()
	res.ReadBytes = r.ReadBytes() - before
	j.recovered = func(ctx context.Context) { j.releaseHydration(ctx) }
	return res, j.startServer(ctx, &res)
}

// lay makes the bare directories with all that is ours in them. Lay syncs the file system when it is done.
func (j *job) lay(ctx context.Context, o ThawOptions) error {
	if err := makeRoots(ctx, j.roots, j.backup, j.owner); err != nil {
		return err
	}
	m := j.route.Manifest
	err := writeRecord(j.dir(), record{
		Version: recordVersion, Target: j.dir(), Repository: j.r.URL(),
		Cluster: m.Cluster, Backup: m.ID, Image: j.imageID(), Hydrate: o.Hydrate, MakesImage: o.MakesImage, Roots: j.roots, KeyFiles: o.KeyFiles,
	})
	if err == nil && j.start != nil {
		err = os.WriteFile(filepath.Join(j.dir(), holdName), nil, 0o600)
	}
	if err == nil {
		err = j.writeConfiguration()
	}
	if err != nil {
		return err
	}
	how, err := j.layOptions(ctx)
	if err != nil {
		return err
	}
	for _, r := range j.roots {
		if _, err := fusefs.Lay(ctx, j.backup, r.Path, r.Dir, how); err != nil {
			return err
		}
	}
	return nil
}

// atOnce is how many bytes of pg_wal are laid whole, for replay wants them and a directory without holes leaves the mount
// at once. More than that is hydrated, before all else.
const atOnce = 64 << 20

const walDir = "pgdata/pg_wal"

// walAtOnce is how many bytes pg_wal has, and whether it is laid whole.
func (j *job) walAtOnce(ctx context.Context) (size int64, whole bool, err error) {
	size, err = j.sizeBelow(ctx, walDir)
	return size, size <= atOnce, err
}

func (j *job) layOptions(ctx context.Context) (fusefs.LayOptions, error) {
	_, walWhole, err := j.walAtOnce(ctx)
	if err != nil {
		return fusefs.LayOptions{}, err
	}
	o := fusefs.LayOptions{
		Whole: func(path string) bool { return walWhole && strings.HasPrefix(path, walDir+"/") },
		Link:  func(path, target string) string { return relink(j.roots, path, target) },
		Rename: func(path string) string {
			if path == "pgdata/"+versionFile {
				return movedVersion
			}
			return ""
		},
		Skip: func(path string) bool {
			dir, name := filepath.Split(path)
			return dir == "pgdata/" && j.conf.replaces(name)
		},
	}
	if j.owner.foreign() {
		o.Owner = &fusefs.Owner{UID: uint32(j.owner.uid), GID: uint32(j.owner.gid)}
	}
	return o, nil
}

// sizeBelow adds up the files in a directory of the backup, without those in directories below.
func (j *job) sizeBelow(ctx context.Context, dir string) (size int64, err error) {
	list, err := j.backup.ReadDir(ctx, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	for i := range list.Len() {
		size += list.At(i).Size
	}
	return size, nil
}

// unlay takes back what lay made. A daemon that failed has taken its mount off; if it has not, nothing is removed
// through it.
func (j *job) unlay() error {
	for _, r := range j.roots {
		ours, _, err := fusefs.IsMount(r.Dir)
		if err == nil && ours {
			err = fusefs.ForceUnmount(r.Dir)
		}
		if err != nil {
			return fmt.Errorf("remove %s: %w", r.Dir, err)
		}
	}
	return removeRoots(j.roots, j.owner)
}

// releaseHydration lets the daemon fill the directory, now that recovery has ended without its competition for the disk. It
// begins by itself after holdLimit: a recovery that takes hours goes on beside it.
func (j *job) releaseHydration(ctx context.Context) {
	if _, err := ask(ctx, j.dir(), commandHydrate); err != nil {
		j.Log.Warn("could not tell the overlay's daemon to hydrate", "target", j.dir(), "error", err)
	}
}
