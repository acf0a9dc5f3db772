package fusefs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// overlayType is the subtype of an overlay's mount: mount(8) shows "fuse.pgthaw-overlay".
const overlayType = "pgthaw-overlay"

// IsMount tells whether an overlay is mounted at dir, and whether somebody still serves it. A dead mount answers
// ENOTCONN to everything until ForceUnmount takes it off.
func IsMount(dir string) (ours, alive bool, err error) {
	at, err := mountPoint(dir)
	if err != nil {
		return false, false, fmt.Errorf("find the mount at %s: %w", dir, err)
	}
	kind, err := mountedAt(at)
	if err != nil {
		return false, false, fmt.Errorf("find the mount at %s: %w", dir, err)
	}
	if kind != "fuse."+overlayType {
		return false, false, nil
	}
	// Not stat(2): the kernel may still know the attributes.
	var st unix.Statfs_t
	err = unix.Statfs(at, &st)
	if err != nil && !errors.Is(err, unix.ENOTCONN) {
		return true, false, fmt.Errorf("statfs %s: %w", at, err)
	}
	return true, err == nil, nil
}

// mountPoint is dir as mountinfo spells it. Only the parent is looked into: dir itself may be a dead mount.
func mountPoint(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if target, err := os.Readlink(dir); err == nil {
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(dir), target)
		}
		return mountPoint(target)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(dir))
	return filepath.Join(parent, filepath.Base(dir)), err
}

// mountedAt returns the type of the topmost file system mounted at a path, "" if there is none.
func mountedAt(at string) (kind string, err error) {
	all, err := mounts()
	return all[at], err
}

// mounts lists the types of the topmost file systems by mount point.
//
// proc_pid_mountinfo(5): field 5 is the mount point; after a field "-" come type, source and options.
func mounts() (kinds map[string]string, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	kinds = make(map[string]string)
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		before, after, _ := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(before)
		if len(fields) > 4 {
			kinds[unescapeMount(fields[4])], _, _ = strings.Cut(after, " ")
		}
	}
	return kinds, s.Err()
}

// unescapeMount undoes the escapes \040, \011, \012 and \134 of mountinfo.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// ForceUnmount takes a mount off even if it is in use or nobody serves it any more: whoever has files open there keeps
// them, and gets errors.
func ForceUnmount(dir string) error { return unmount(dir, unix.MNT_DETACH) }

// unmount takes a mount off, with umount(2), or as an ordinary user with fusermount3. EBUSY: it is in use.
func unmount(dir string, flags int) error {
	err := unix.Unmount(dir, flags)
	if errors.Is(err, unix.EPERM) {
		err = fusermount(dir, flags)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

func fusermount(dir string, flags int) error {
	option := "-u"
	if flags&unix.MNT_DETACH != 0 {
		option = "-uz"
	}
	program, err := fusermountProgram()
	if err != nil {
		return err
	}
	cmd := exec.Command(program, option, "--", dir)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil && bytes.Contains(out, []byte("busy")) {
		return unix.EBUSY
	}
	if err != nil {
		return fmt.Errorf("fusermount3: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// serve mounts fs at dir and answers from now on. The channel is closed when the mount is gone.
func serve(fs fuse.RawFileSystem, dir string, o fuse.MountOptions) (<-chan struct{}, error) {
	o.DirectMount = os.Geteuid() == 0
	o.DirectMountStrict = o.DirectMount
	server, err := fuse.NewServer(fs, dir, &o)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve()
	}()
	return done, nil
}
