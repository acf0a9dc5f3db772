package recovery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// root is a directory to be made: the data directory, or a tablespace outside of it.
type root struct {
	Path string `json:"path"` // in the backup: "pgdata", "tablespaces/16385"
	Dir  string `json:"dir"`  // absolute
	Made bool   `json:"made"` // by us: it was not there before
}

// roots are the directories that a copy consists of, the data directory first. Nothing is checked yet.
func (o Options) roots(m *repo.Manifest) ([]root, error) {
	dir, err := canonical(o.Dir)
	if err != nil {
		return nil, err
	}
	all := []root{{Path: "pgdata", Dir: dir}}
	unused := make(map[string]bool)
	for old := range o.TablespaceMapping {
		unused[old] = true
	}
	for _, t := range m.Tablespaces {
		if t.InPlace {
			continue
		}
		place := t.Path
		if mapped, ok := o.TablespaceMapping[t.Path]; ok {
			place = mapped
			delete(unused, t.Path)
		}
		r := root{Path: fmt.Sprintf("tablespaces/%d", t.OID)}
		if r.Dir, err = canonical(place); err != nil {
			return nil, tablespaceHint(err, r, m)
		}
		all = append(all, r)
	}
	for old := range unused {
		return nil, fmt.Errorf("%w: the backup has no tablespace at %s", ErrUsage, old)
	}
	return all, nil
}

// canonical makes a path absolute and resolves the symbolic links before its last element. The last may be a mount that
// does not answer; a link there is resolved if it can be.
func canonical(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if resolved, err := filepath.EvalSymlinks(abs); err == nil {
		return resolved, nil
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrTargetDir, err)
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// checkRoots refuses what must not be written to, and notes which roots have to be made.
func checkRoots(roots []root, m *repo.Manifest) error {
	for i := range roots {
		for _, other := range roots[:i] {
			if within(roots[i].Dir, other.Dir) || within(other.Dir, roots[i].Dir) {
				return fmt.Errorf("%w: %s and %s lie within each other", ErrTargetDir, other.Dir, roots[i].Dir)
			}
		}
		absent, err := checkEmpty(roots[i].Dir, m)
		if err != nil {
			return tablespaceHint(err, roots[i], m)
		}
		roots[i].Made = absent
	}
	return nil
}

// within tells whether dir is parent or lies below it.
func within(dir, parent string) bool {
	rel, err := filepath.Rel(parent, dir)
	return err == nil && filepath.IsLocal(rel)
}

// tablespaceHint says how to put a tablespace elsewhere.
func tablespaceHint(err error, r root, m *repo.Manifest) error {
	for _, t := range m.Tablespaces {
		if r.Path == fmt.Sprintf("tablespaces/%d", t.OID) {
			err = fmt.Errorf("tablespace %d: %w", t.OID, err)
			return withHint(err, fmt.Sprintf("Give it another place: --tablespace-mapping=%s=DIRECTORY.", t.Path))
		}
	}
	return err
}

// checkEmpty makes sure that dir is absent, with a parent in which it can be made, or an empty directory.
func checkEmpty(dir string, m *repo.Manifest) (absent bool, err error) {
	names, err := firstNames(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		parent, err := os.Stat(filepath.Dir(dir))
		if err == nil && !parent.IsDir() {
			err = fmt.Errorf("%s is not a directory", filepath.Dir(dir))
		}
		if err != nil {
			return true, fmt.Errorf("%w: %w", ErrTargetDir, err)
		}
		return true, nil
	case errors.Is(err, syscall.ENOTCONN):
		err = fmt.Errorf("%w: the mount at %s does not answer", ErrTargetDir, dir)
		return false, withHint(err, "If pgthaw thawed it, see `pgthaw overlay status`, `resume` and `discard`.")
	case err != nil:
		return false, fmt.Errorf("%w: %w", ErrTargetDir, err)
	case len(names) > 0:
		return false, notEmpty(dir, names, m)
	}
	return false, nil
}

// firstNames returns some of the names in dir.
func firstNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(100)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

// notEmpty says what it is that a directory holds.
func notEmpty(dir string, names []string, m *repo.Manifest) error {
	if pid := postmasterPID(filepath.Join(dir, "postmaster.pid")); pid != 0 {
		return fmt.Errorf("%w: a PostgreSQL server is running in %s (PID %d)", ErrTargetDir, dir, pid)
	}
	if slices.Contains(names, privateDir) {
		return withHint(fmt.Errorf("%w: %s was thawed by pgthaw and is not whole yet", ErrTargetDir, dir),
			"See `pgthaw overlay status`; `resume` takes it up again, `discard` removes it.")
	}
	control, err := os.ReadFile(filepath.Join(dir, "global", "pg_control"))
	if err == nil {
		return holdsCluster(dir, control, m)
	}
	if _, err := os.Stat(filepath.Join(dir, "PG_VERSION")); err == nil {
		return withHint(fmt.Errorf("%w: %s holds a data directory without pg_control, as an interrupted restore leaves it", ErrTargetDir, dir),
			"If that is what it is, remove what is in it and restore again.")
	}
	return withHint(fmt.Errorf("%w: %s is not empty: it holds %s", ErrTargetDir, dir, names[0]),
		"Name a directory that is empty or does not exist yet.")
}

func holdsCluster(dir string, control []byte, m *repo.Manifest) error {
	c, err := pg.ParseControlFile(control)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %s holds a data directory that cannot be told: %w", ErrTargetDir, dir, err)
	case c.SystemIdentifier != m.SystemIdentifier:
		return fmt.Errorf("%w: %s holds another cluster: its system identifier is %d, that of the backup %d",
			ErrTargetDir, dir, c.SystemIdentifier, m.SystemIdentifier)
	}
	return withHint(fmt.Errorf("%w: %s holds a data directory of this cluster already (%s)", ErrTargetDir, dir, c.State),
		"Restore beside it, into a directory that does not exist yet.")
}

// postmasterPID reads a postmaster.pid; it is 0 unless that process lives.
func postmasterPID(path string) int {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	return livingPID(text)
}

// livingPID is the process in the first line of a lock file, or 0 if it is no more.
func livingPID(text []byte) int {
	first, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || pid <= 0 || errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
		return 0
	}
	return pid
}

// owner is whose the files shall be, and who runs the server.
type owner struct {
	uid, gid int
	name     string // "" if the host knows none
}

// serverOwner decides for whom files are made. An ordinary user makes them for itself. Root does not run PostgreSQL, so
// it makes them for the user that owns the target directory already, the one that had the files on the server if this
// host knows it, or postgres.
func serverOwner(ctx context.Context, dir string, b *repo.Backup) (owner, error) {
	if uid := os.Geteuid(); uid != 0 {
		return lookupOwner(uid, os.Getegid()), nil
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err == nil && st.Uid != 0 {
		return lookupOwner(int(st.Uid), int(st.Gid)), nil
	}
	e, err := b.Stat(ctx, "pgdata")
	if err != nil {
		return owner{}, err
	}
	if u, err := user.LookupId(strconv.FormatUint(uint64(e.UID), 10)); err == nil && e.UID != 0 {
		return fromPasswd(u)
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return owner{}, withHint(fmt.Errorf("%w: no user to own it: %w", ErrTargetDir, err),
			"Make the directory beforehand and give it to the user that shall run PostgreSQL.")
	}
	return fromPasswd(u)
}

func lookupOwner(uid, gid int) owner {
	o := owner{uid: uid, gid: gid}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		o.name = u.Username
	}
	return o
}

func fromPasswd(u *user.User) (owner, error) {
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	return owner{uid, gid, u.Username}, errors.Join(err1, err2)
}

// String is the user's name, or number.
func (o owner) String() string {
	if o.name == "" {
		return strconv.Itoa(o.uid)
	}
	return o.name
}

// foreign tells whether files have to be given away.
func (o owner) foreign() bool { return o.uid != os.Geteuid() }

// makeRoots makes the directories that are absent, and gives all of them their owner and mode.
func makeRoots(ctx context.Context, roots []root, b *repo.Backup, o owner) error {
	for _, r := range roots {
		e, err := b.Stat(ctx, r.Path)
		if err != nil {
			return fmt.Errorf("look up %s in the backup: %w", r.Path, err)
		}
		if r.Made {
			if err := os.Mkdir(r.Dir, 0o700); err != nil {
				return fmt.Errorf("%w: %w", ErrTargetDir, err)
			}
		}
		if err := os.Chmod(r.Dir, rootMode(e)); err != nil {
			return fmt.Errorf("%w: %w", ErrTargetDir, err)
		}
		if o.foreign() {
			if err := os.Lchown(r.Dir, o.uid, o.gid); err != nil {
				return err
			}
		}
	}
	return nil
}

// rootMode is 0700, or 0750 for a cluster with group access; PostgreSQL accepts no other (checkDataDir).
func rootMode(e repo.Entry) fs.FileMode {
	if e.Mode.Perm() == 0o750 {
		return 0o750
	}
	return 0o700
}

// relink is where a symbolic link of the data directory leads in the copy: those of tablespaces to their new places.
func relink(roots []root, path, target string) string {
	oid, ok := strings.CutPrefix(path, "pgdata/pg_tblspc/")
	if !ok {
		return target
	}
	for _, r := range roots {
		if r.Path == "tablespaces/"+oid {
			return r.Dir
		}
	}
	return target
}
