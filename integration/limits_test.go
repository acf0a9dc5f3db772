package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// limited is a backup with a tablespace, and where a copy of it is put.
type limited struct {
	archived
	rows string // in each table
}

// TestLimits has pgthaw meet what a host or a file system lacks: each lack is named, with what to do, before anything is
// made; or pgthaw does without.
func TestLimits(t *testing.T) {
	t.Parallel()
	a := newArchived(t, postgresql(t, 15), clusterOptions{checksums: true, tablespaces: []string{"side"}, conf: []string{"fsync = off"}})
	a.SQL("CREATE TABLE here AS SELECT i, md5(i::text) AS x FROM generate_series(1, 50000) i")
	a.backup(t)
	a.Stop()
	l := limited{a, "50000|1000"}
	t.Run("file systems", l.testFileSystems)
	t.Run("rights", l.testRights)
	t.Run("mounting", l.testMounting)
	t.Run("no room", l.testNoRoom)
	t.Run("descriptors", l.testDescriptors)
	t.Run("stacked", l.testStacked)
}

// refused runs what must be refused with a code and a reason, and leave nothing.
func (l limited) refused(t *testing.T, v invocation, path, data, side string, code int, reason, hint string, args ...string) {
	t.Helper()
	r := l.copyTo(t, v, path, "latest", data, append(args, l.mapping(side)...)...).exits(t, code)
	_, next, _ := strings.Cut(r.stderr, "HINT: ")
	if !strings.Contains(r.stderr, reason) || !strings.Contains(next, hint) {
		t.Errorf("%s to %s and %s: it does not say %q and %q:\n%s", path, data, side, reason, hint, r.stderr)
	}
	absent(t, data)
	absent(t, side)
}

func (l limited) mapping(side string) []string {
	return []string{"--tablespace-mapping", filepath.Join(l.dir, "tablespace side") + "=" + side}
}

// works thaws and starts, reads what there is, and makes an ordinary directory of it.
func (l limited) works(t *testing.T, v invocation, dir string) {
	t.Helper()
	data, side := filepath.Join(dir, "data"), filepath.Join(dir, "side")
	l.copyTo(t, v, "thaw", "latest", data, append(l.mapping(side), "--hydrate", "off")...).ok(t)
	l.used(t, v, data, side)
}

// used starts a server in what was thawed, and finishes it.
func (l limited) used(t *testing.T, v invocation, data, side string) {
	t.Helper()
	c := adopt(t, l.installation, data)
	c.waitRecovered()
	if got := c.SQL("SELECT (SELECT count(*) FROM here), (SELECT count(*) FROM in_side)"); got != l.rows {
		t.Errorf("there are %s rows, want %s", got, l.rows)
	}
	c.SQL("CREATE TABLE late AS SELECT * FROM here; UPDATE here SET x = 'late' WHERE i % 7 = 0; CHECKPOINT")
	c.amcheck()
	c.Stop()
	v.run(t, "overlay", "finish", data).ok(t)
	checkNothingOfOurs(t, data)
	checkNothingOfOurs(t, side)
	l.checksums(t, data)
}

// mountAt gives a directory on a new file system of the kernel's.
func mountAt(t *testing.T, kind, options string) string {
	t.Helper()
	return directoryOn(t, mountTemp(t, kind, options))
}

// directoryOn makes a directory on what is mounted: discard waits until nothing is mounted at one or below it.
func directoryOn(t *testing.T, mount string) string {
	t.Helper()
	dir := filepath.Join(mount, "on")
	if err := errors.Join(os.Chmod(mount, 0o755), os.Mkdir(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func (l limited) testFileSystems(t *testing.T) {
	const thawHint, ownersHint = "`pgthaw restore`", "with owners and permissions"
	ramfs := mountAt(t, "ramfs", "") // no extended attributes
	l.refused(t, invocation{}, "thaw", ramfs+"/data", newTarget(t), 17, "extended attribute", thawHint)
	l.refused(t, invocation{}, "thaw", newTarget(t), ramfs+"/side", 17, "extended attribute", thawHint)
	l.copyTo(t, invocation{}, "restore", "latest", ramfs+"/data", l.mapping(ramfs+"/side")...).ok(t) // as the hint says

	noHoles := newLacking(t, lacking{holes: true})
	l.refused(t, invocation{}, "thaw", noHoles+"/data", newTarget(t), 17, "holes", thawHint)

	noOwners := newLacking(t, lacking{owners: true}) // vfat and its like
	for _, path := range []string{"thaw", "restore"} {
		l.refused(t, invocation{}, path, noOwners+"/data", newTarget(t), 17, "give a file to postgres", ownersHint)
		l.refused(t, invocation{}, path, newTarget(t), noOwners+"/side", 17, "give a file to postgres", ownersHint)
	}
	ignoresOwners := newLacking(t, lacking{ignoresOwners: true})
	l.refused(t, invocation{}, "restore", ignoresOwners+"/data", newTarget(t), 17, "has owner 0", ownersHint)

	readOnly := mountAt(t, "tmpfs", "")
	if err := syscall.Mount("none", filepath.Dir(readOnly), "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	l.refused(t, invocation{}, "thaw", readOnly+"/data", newTarget(t), 17, "read-only file system", "")
}

// lacking is what a file system does not have.
type lacking struct{ holes, owners, ignoresOwners bool }

// newLacking mounts a directory as a file system that lacks something, unnamed files anyhow.
func newLacking(t *testing.T, what lacking) string {
	t.Helper()
	beneath, dir := tempDir(t), filepath.Join(tempDir(t), "lacking")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root := &fs.LoopbackRoot{Path: beneath}
	root.RootNode = &lackingNode{fs.LoopbackNode{RootData: root}, what}
	server, err := fs.Mount(dir, root.RootNode, &fs.Options{MountOptions: fuse.MountOptions{
		AllowOther: true, FsName: dir, Name: "lacking", DirectMount: true, Options: []string{"default_permissions"},
		DisabledCapabilities: fuse.CAP_PASSTHROUGH,
	}})
	if err != nil {
		t.Fatal(err)
	}
	on := directoryOn(t, dir)
	t.Cleanup(func() {
		if left := names(t, on); len(left) > 0 {
			t.Errorf("what was refused left %q", left)
		}
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return on
}

type lackingNode struct {
	fs.LoopbackNode
	what lacking
}

func (n *lackingNode) WrapChild(_ context.Context, made fs.InodeEmbedder) fs.InodeEmbedder {
	return &lackingNode{fs.LoopbackNode{RootData: made.(*fs.LoopbackNode).RootData}, n.what}
}

func (n *lackingNode) Tmpfile(context.Context, uint32, uint32, *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, syscall.EOPNOTSUPP
}

func (n *lackingNode) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if _, given := in.GetUID(); given && n.what.owners {
		return syscall.EPERM
	} else if given && n.what.ignoresOwners {
		in.Valid &^= fuse.FATTR_UID | fuse.FATTR_GID
	}
	return n.LoopbackNode.Setattr(ctx, f, in, out)
}

func (n *lackingNode) Lseek(ctx context.Context, f fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	if n.what.holes {
		return 0, syscall.ENOSYS
	}
	return f.(fs.FileLseeker).Lseek(ctx, off, whence)
}

// testRights: the server's user may not write where it was told to.
func (l limited) testRights(t *testing.T) {
	ofRoot := tempDir(t)
	for _, path := range []string{"thaw", "restore"} {
		l.refused(t, asPostgres, path, ofRoot+"/data", newTarget(t), 17, "permission denied", "as the user it belongs to")
		l.refused(t, asPostgres, path, newTarget(t), ofRoot+"/side", 17, "permission denied", "as the user it belongs to")
	}
}

// testMounting: nothing can be mounted, for want of the device or of the right to.
func (l limited) testMounting(t *testing.T) {
	for _, v := range []string{"", "setpriv --reuid=postgres --regid=postgres --init-groups "} {
		data, side := newTarget(t), newTarget(t)
		bare := "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && " + v
		l.unshared(t, bare, data, side, 19, "/dev/fuse: no such file", "fuse3")
		l.unshared(t, bare, data, side, 19, "/dev/fuse: no such file", "fuse3", "--hydrate", "off")
	}
	data, side := newTarget(t), newTarget(t)
	l.unshared(t, "setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin ", data, side, 19, "operation not permitted", "CAP_SYS_ADMIN")
}

// unshared thaws after a shell's prefix, in a mount namespace of its own, and has it fail.
func (l limited) unshared(t *testing.T, prefix, data, side string, code int, reason, hint string, args ...string) {
	t.Helper()
	args = append([]string{filepath.Join(scratch, "bin", "pgthaw"), "--repo", l.repo, "thaw", "main", "latest", "--target", data}, args...)
	line := prefix + "'" + strings.Join(append(args, l.mapping(side)...), "' '") + "'"
	cmd := exec.Command("unshare", "--mount", "sh", "-c", line)
	cmd.Env, cmd.Dir = environment("HOME="+filepath.Join(scratch, "home"), stateHome(t, "root")), "/"
	out, _ := cmd.CombinedOutput()
	_, next, _ := strings.Cut(string(out), "HINT: ")
	if got := exitCode(cmd.ProcessState); got != code || !strings.Contains(string(out), reason) || !strings.Contains(next, hint) {
		t.Errorf("%s: exit code %d, want %d with %q and %q:\n%s", line, got, code, reason, hint, out)
	}
	absent(t, data)
	absent(t, side)
}

// testNoRoom: bytes or files are short, for all of the copy or for its beginning already.
func (l limited) testNoRoom(t *testing.T) {
	small, few := mountAt(t, "tmpfs", "size=8m"), mountAt(t, "tmpfs", "nr_inodes=200")
	for _, path := range []string{"thaw", "restore"} {
		l.refused(t, invocation{}, path, small+"/data", newTarget(t), 17, "bytes free", "")
		l.refused(t, invocation{}, path, few+"/data", newTarget(t), 17, "room for", "")
	}
	l.refused(t, invocation{}, "thaw", small+"/data", newTarget(t), 17, "bytes free", "", "--hydrate", "off")
	l.refused(t, invocation{}, "thaw", few+"/data", newTarget(t), 17, "room for", "", "--hydrate", "off")
	tiny := mountAt(t, "tmpfs", "size=16k")
	l.refused(t, invocation{}, "thaw", newTarget(t), tiny+"/side", 17, "bytes free", "--hydrate off")

	// What was counted was there; what is lacking in the middle is taken back.
	enough := mountAt(t, "tmpfs", fmt.Sprintf("size=%d", l.walBytes(t)+8<<10))
	l.refused(t, invocation{}, "thaw", enough+"/data", newTarget(t), 1, "no space left on device", "", "--hydrate", "off")
}

// walBytes is what pg_wal of the backup takes: the segment that it begins and ends in.
func (l limited) walBytes(t *testing.T) int64 {
	t.Helper()
	data := newTarget(t)
	l.copyTo(t, invocation{}, "restore", "latest", data, l.mapping(filepath.Join(filepath.Dir(data), "side"))...).ok(t)
	return fileBytes(t, filepath.Join(data, "pg_wal"))
}

// testDescriptors: a daemon that may have fewer files open than there are serves them all; with too few none is begun.
func (l limited) testDescriptors(t *testing.T) {
	dir := filepath.Dir(newTarget(t))
	data, side := filepath.Join(dir, "data"), filepath.Join(dir, "side")
	thaw := append([]string{"--repo", l.repo, "thaw", "main", "latest", "--target", data, "--hydrate", "off"}, l.mapping(side)...)
	out, err := withDescriptors(t, 900, thaw...)
	if err == nil || !strings.Contains(out, "limit on open files") || !strings.Contains(out, "HINT: Raise") {
		t.Errorf("with 900 descriptors: %v\n%s", err, out)
	}
	absent(t, data)
	absent(t, side)
	t.Cleanup(func() { discard(t, data) })
	if out, err := withDescriptors(t, 2000, thaw...); err != nil || !strings.Contains(out, "limit on open files is lower") {
		t.Fatalf("with 2000 descriptors: %v\n%s", err, out)
	}
	for range 2 {
		if seen := shellAs(t, "postgres", "ls -lR "+data+" "+side+" | wc -l"); len(seen) < 4 {
			t.Errorf("%s lines", seen)
		}
	}
	pid := overlayStatus(t, asPostgres, data).PID
	if all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err != nil || len(all) < 100 || len(all) > 2000-256 {
		t.Errorf("the daemon has %d descriptors, %v", len(all), err)
	}
	l.used(t, asPostgres, data, side)
}

// withDescriptors runs pgthaw as the server's user with a hard limit on open files.
func withDescriptors(t *testing.T, n int, args ...string) (string, error) {
	t.Helper()
	limit := fmt.Sprintf("--nofile=%d:%d", n, n)
	cmd := exec.Command("prlimit", append([]string{limit, filepath.Join(scratch, "bin", "pgthaw")}, args...)...)
	becomePostgres(t, cmd)
	cmd.SysProcAttr.Pdeathsig = 0
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// testStacked thaws to overlayfs over overlayfs, as in a container within a container: there the kernel has FUSE passthrough
// and refuses it.
func (l limited) testStacked(t *testing.T) {
	below := mountAt(t, "overlay", l.layers(t, tempDir(t)))
	l.works(t, invocation{}, mountAt(t, "overlay", l.layers(t, below)))
}

// layers are the mount options of overlayfs over a directory.
func (l limited) layers(t *testing.T, lower string) string {
	t.Helper()
	disk := mountAt(t, "tmpfs", "mode=755") // overlayfs will not have an upper that is one itself
	for _, name := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(disk, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, disk, disk)
}
