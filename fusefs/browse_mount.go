package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Mount is a mounted browser.
type Mount struct {
	dir    string          // absolute
	served <-chan struct{} // closed when the kernel has let go of the mount
	done   chan struct{}   // closed when all is over and err is set
	err    error
}

// Larger requests and windows were not faster, and took more memory: what limits a sequential read is decompressing,
// verifying and copying, on all cores. How much is decompressed ahead of these requests is repo.ReadAhead's affair.
const (
	// maxRead is the largest read request, bytes: two chunks, fetched together.
	maxRead = 256 << 10
	// readAheadKB is how far the kernel reads ahead in a file that is read from front to back. It keeps several requests
	// under way at once.
	readAheadKB = 2048
	// maxBackground is how many read-ahead requests the kernel has under way at most, of all files together.
	maxBackground = 32
)

func mountBrowser(ctx context.Context, dir string, root fs.InodeEmbedder, b *browser, o BrowseOptions) (*Mount, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	timeout := changingTimeout
	options := mountOptions(o)
	served, err := serve(fs.NewNodeFS(root, &fs.Options{
		MountOptions: options,
		EntryTimeout: &timeout, AttrTimeout: &timeout, NegativeTimeout: &timeout,
		NullPermissions: true,
		RootStableAttr:  &fs.StableAttr{Ino: fuse.FUSE_ROOT_ID},
	}), abs, options)
	if err != nil {
		return nil, err
	}
	if err := raiseReadAhead(abs, readAheadKB); err != nil && o.Log != nil {
		o.Log.Debug("read-ahead stays as it is", "dir", abs, "err", err)
	}
	m := &Mount{dir: abs, served: served, done: make(chan struct{})}
	var running sync.WaitGroup
	running.Go(func() { b.trimmer.run(ctx, abs, served) })
	running.Go(func() { m.err = m.run(ctx) })
	go func() { running.Wait(); b.ahead.Close(); close(m.done) }()
	return m, nil
}

// mountOptions asks for a read-only mount both ways: by mount(2)'s flag, which root uses, and fusermount3's option.
func mountOptions(o BrowseOptions) fuse.MountOptions {
	options := fuse.MountOptions{
		FsName: "pgthaw", Name: "pgthaw",
		AllowOther: o.AllowOther, Options: []string{"default_permissions"},
		MaxWrite: maxRead, MaxReadAhead: maxRead, MaxBackground: maxBackground,
		DisableXAttrs: true, ExplicitDataCacheControl: true, EnableSymlinkCaching: true,
		DisableSplice: true, // what we answer lies in memory: go-fuse would fill a pipe, and find that out then
		// The kernel asks for attributes beside names only where somebody wants them: a node for each of a million files that are
		// merely listed costs half a minute.
		ExtraCapabilities: fuse.CAP_READDIRPLUS_AUTO,
		Debug:             o.Debug,
	}
	if os.Geteuid() == 0 {
		options.DirectMountFlags = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_RDONLY
	} else {
		options.Options = append(options.Options, "ro")
	}
	if o.Log != nil {
		options.Logger = slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug)
	}
	return options
}

// raiseReadAhead sets the read-ahead of the mount at dir, which FUSE can only lower: the kernel begins with 128 KiB.
// It takes root.
func raiseReadAhead(dir string, kb int) error {
	var st unix.Statx_t
	// AT_STATX_DONT_SYNC: what is wanted is the kernel's own, so do not ask ourselves.
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return fmt.Errorf("statx %s: %w", dir, err)
	}
	path := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", st.Dev_major, st.Dev_minor)
	return os.WriteFile(path, fmt.Appendln(nil, kb), 0)
}

// run ends with the mount: when somebody unmounts it, or when ctx does.
func (m *Mount) run(ctx context.Context) error {
	select {
	case <-m.served:
		return nil
	case <-ctx.Done():
		return m.end()
	}
}

// end takes the mount away even from under those who use it: they get ENOTCONN once this process is gone.
func (m *Mount) end() error {
	err := m.Unmount()
	if errors.Is(err, unix.EBUSY) {
		err = ForceUnmount(m.dir)
	}
	return err
}

// Wait returns when the mount is gone, with the error of taking it away when its context ended.
func (m *Mount) Wait() error {
	<-m.done
	return m.err
}

// Unmount takes the mount away unless somebody uses it, which gives EBUSY.
func (m *Mount) Unmount() error {
	select {
	case <-m.served:
		return nil // somebody else did, and may have mounted something there since
	default:
	}
	if err := unmount(m.dir, 0); err != nil {
		return err
	}
	<-m.served
	return nil
}
