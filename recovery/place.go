package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"pgthaw/fusefs"
)

// What a copy asks of the file systems it comes to lie on is looked at before anything is made there.

// place is the directory that exists now on the file system of a root.
func (r root) place() string {
	if r.Made {
		return filepath.Dir(r.Dir)
	}
	return r.Dir
}

// checkPlaces refuses file systems on which files cannot be made that are the server's user's and nobody else's: PostgreSQL
// would not start there.
func checkPlaces(roots []root, o owner) error {
	for _, r := range roots {
		if err := checkPlace(r.place(), o); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrTargetDir, r.Dir, err)
		}
	}
	return nil
}

func checkPlace(dir string, o owner) error {
	err := fusefs.Try(dir, func(f *os.File) error { return o.checkGiven(f) })
	if errors.Is(err, fs.ErrPermission) && !o.foreign() {
		return withHint(err, "Name a directory of yours, or run this as the user it belongs to.")
	}
	return err
}

// checkGiven gives a file to the owner and looks whether that is so.
func (o owner) checkGiven(f *os.File) (err error) {
	if o.foreign() {
		err = f.Chown(o.uid, o.gid)
	}
	var st unix.Stat_t
	if err := errors.Join(err, f.Chmod(0o600), unix.Fstat(int(f.Fd()), &st)); err != nil {
		return withHint(fmt.Errorf("give a file to %s: %w", o, err), ownersHint)
	}
	if int(st.Uid) != o.uid || st.Mode&0o777 != 0o600 {
		return withHint(fmt.Errorf("a file that was given to %s alone has owner %d and mode %#o", o, st.Uid, st.Mode&0o777), ownersHint)
	}
	return nil
}

const ownersHint = "PostgreSQL starts only where its user owns the files and nobody else may write to them. Take a file system with owners and permissions, such as ext4 or xfs."

// checkThawable refuses file systems that cannot hold an overlay, and those without room for it.
func (j *job) checkThawable(ctx context.Context, mode hydration) error {
	if err := fusefs.CheckMount(); err != nil {
		return withHint(err, "Install fuse3; give a container /dev/fuse and CAP_SYS_ADMIN. `pgthaw restore` needs neither.")
	}
	if err := fusefs.CheckFileLimit(len(j.roots)); err != nil {
		return withHint(fmt.Errorf("%w: %d", err, fusefs.FileLimit()), "Raise the hard limit of this user, with `ulimit -Hn` or in /etc/security/limits.conf: two for each file of the cluster are best.")
	}
	if files := j.route.Manifest.Files; files > fusefs.KnownFiles() {
		j.Log.Warn("the limit on open files is lower than two for each file: names are looked up again and again, and a server that has very many open fails; raise ulimit -Hn",
			"files", files, "limit", fusefs.FileLimit())
	}
	for _, r := range j.roots {
		if err := fusefs.CheckPlace(r.place()); err != nil {
			return withHint(fmt.Errorf("%w: %s: %w", ErrTargetDir, r.Dir, err),
				"Thaw to ext4, xfs, btrfs or tmpfs, or use `pgthaw restore`, which asks less of a file system.")
		}
	}
	if err := j.checkRoomForLaying(ctx); err != nil || mode.off {
		return err
	}
	need, err := j.need(ctx)
	if err == nil {
		err = checkSpace(j.roots, need)
	}
	if errors.Is(err, ErrTargetDir) {
		return withHint(err, "Hydration needs that much; --hydrate off copies only what is touched.")
	}
	return err
}

// checkRoomForLaying counts what is written before the first query: a name for each file, and pg_wal.
func (j *job) checkRoomForLaying(ctx context.Context) error {
	wal, whole, err := j.walAtOnce(ctx)
	if err != nil {
		return err
	}
	need := make([]room, len(j.roots))
	need[0].files = int64(j.route.Manifest.Files)
	if whole {
		need[0].bytes = wal
	}
	return checkSpace(j.roots[:1], need[:1])
}

// need is what a whole copy takes, by root. Where all lie on one file system the manifest says it.
func (j *job) need(ctx context.Context) ([]room, error) {
	devices := make(map[uint64]bool)
	for _, r := range j.roots {
		var st unix.Stat_t
		if err := unix.Stat(r.place(), &st); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrTargetDir, &os.PathError{Op: "stat", Path: r.place(), Err: err})
		}
		devices[st.Dev] = true
	}
	if len(devices) > 1 {
		c, err := j.collect(ctx)
		if err != nil {
			return nil, err
		}
		return c.need, nil
	}
	need := make([]room, len(j.roots))
	need[0] = room{bytes: j.route.Manifest.SizeBytes, files: int64(j.route.Manifest.Files)}
	return need, nil
}

// room is what a file system has, or has to have.
type room struct{ bytes, files int64 }

// checkSpace refuses to begin what must end in "no space left on device". need is by root. What a file system does not
// tell (ramfs tells nothing, btrfs no number of files) is no reason.
func checkSpace(roots []root, need []room) error {
	total := make(map[uint64]room) // by device
	for i, r := range roots {
		dir := r.place()
		var st unix.Stat_t
		var has unix.Statfs_t
		if err := errors.Join(unix.Stat(dir, &st), unix.Statfs(dir, &has)); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrTargetDir, dir, err)
		}
		n := total[st.Dev]
		n.bytes += need[i].bytes
		n.files += need[i].files
		total[st.Dev] = n
		if free := int64(has.Bavail) * has.Bsize; has.Blocks > 0 && n.bytes > free {
			return fmt.Errorf("%w: %s has %d bytes free, but %d are needed", ErrTargetDir, dir, free, n.bytes)
		}
		if free := int64(has.Ffree); has.Files > 0 && n.files > free {
			return fmt.Errorf("%w: %s has room for %d files more, but %d are needed", ErrTargetDir, dir, free, n.files)
		}
	}
	return nil
}
