package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

// OverlayOptions of MountOverlay. The zero value works.
type OverlayOptions struct {
	Log         *slog.Logger      // nil: nothing is logged
	AllowOther  bool              // other users than the one who mounts may use it, by the files' own permissions
	Hidden      []string          // names in the root directory that the mount does not show
	Moved       map[string]string // names in the mount's root -> where they lie, relative to the bare directory
	SyncBefore  []string          // creating one of these in the root first syncs the backing file system
	Passthrough bool              // let the kernel serve whole files by itself, where it can
	FillOnRead  bool              // what is read from the repository is written into the hole it was read for
	Leave       Leaving           // what Leave takes out of the mount; it takes root
	KnownFiles  int               // that the kernel may know of, each for two descriptors; 0: KnownFiles()
	First       []string          // directories of the root that Hydrate makes whole before all else, in this order

	// Busy tells whether somebody who makes no requests, as all is in memory or native, wants the processors: Hydrate gives way
	// to them, too. It is called often. nil: nobody.
	Busy func() bool `json:"-"`

	// Touched is called when a file with a lower is opened, then n is 0, and when somebody waits for n bytes of it, as the
	// file at path in the backup has them. It must not block. nil: nobody listens.
	Touched func(path string, off, n int64) `json:"-"`
}

// Overlay is a mounted, writable backup. Its methods may be called from any goroutine.
type Overlay struct {
	fuse.RawFileSystem // answers ENOSYS to what is not written here

	dir       string
	o         OverlayOptions
	hidden    map[string]bool
	syncFirst map[string]bool
	openLower func(path string) (io.ReaderAt, error)
	faults    *faults
	root      int   // the bare directory
	block     int64 // its file system's block size, bytes
	asRoot    bool  // new files can be given to whoever makes them

	leaves bool        // branches can be taken out of the mount
	dev    uint64      // of the mount, as stat(2) has it
	mount  sync.Mutex  // held while mounts are made or taken off; taken before life
	barred bool        // guarded by mount: nothing can be bound here
	off    atomic.Bool // taken off the directory, while somebody had a file open: those are served
	top    *branch     // the files in the root directory; of what leaves as one, all
	others branches    // by the names of their directories

	server *fuse.Server
	ctx    context.Context // ends with the mount
	cancel context.CancelFunc
	served <-chan struct{} // closed when the kernel has nothing more to ask
	users  sync.WaitGroup  // runs of Hydrate and Status
	gone   chan struct{}   // closed when all descriptors are closed
	life   sync.RWMutex    // guards ended, against users
	ended  bool

	nodes       *nodes
	crowded     chan struct{} // they are to become fewer
	dirs        dirHandles
	passthrough atomic.Bool // false once the kernel refused
	openFiles   atomic.Int64
	traffic     traffic
	rooms       *rooms       // nil: what is read is not kept
	eager       atomic.Bool  // Hydrate is running, without a bound: what it brings later may as well come now
	hydrated    atomic.Int64 // bytes that Hydrate brought, of all runs
}

// ErrUnmounted: the overlay's mount is gone.
var ErrUnmounted = errors.New("the overlay is not mounted any more")

// validity is how long the kernel may believe what it was told of names and attributes: nobody but the mount changes
// them, and the kernel knows what it changes itself. (New names below the root may appear beneath it: what is absent there
// is not remembered.)
const validity = time.Hour

// overlayReadAheadKB makes lazy sequential scans 1.4 to 1.7 times as fast as the kernel's 128 KiB. It takes root.
const overlayReadAheadKB = 1024

// MountOverlay mounts the overlay over dir, in which Lay made the bare tree of the backup. It answers when MountOverlay
// returns. ctx bounds the reading of the repository and must outlive the mount.
func MountOverlay(ctx context.Context, dir string, b *repo.Backup, o OverlayOptions) (*Overlay, error) {
	ctx, cancel := context.WithCancel(ctx)
	open := func(path string) (io.ReaderAt, error) {
		e, err := b.Stat(ctx, path)
		if err != nil {
			return nil, err
		}
		return b.Open(ctx, e)
	}
	overlay, err := mountOverlay(ctx, cancel, dir, open, o)
	if err != nil {
		cancel()
	}
	return overlay, err
}

func mountOverlay(ctx context.Context, cancel context.CancelFunc, dir string, open func(string) (io.ReaderAt, error), o OverlayOptions) (*Overlay, error) {
	v := &Overlay{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		dir:           dir, o: o, openLower: open,
		hidden: set(o.Hidden), syncFirst: set(o.SyncBefore),
		faults: newFaults(o.Log),
		asRoot: os.Geteuid() == 0,
		leaves: os.Geteuid() == 0 && o.Leave != Never,
		top:    new(branch),
		ctx:    ctx, cancel: cancel,
		gone: make(chan struct{}), crowded: make(chan struct{}, 1),
	}
	v.passthrough.Store(o.Passthrough)
	if err := v.openBare(); err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	raiseFileLimit()
	if v.nodes.limit = o.KnownFiles; v.nodes.limit == 0 {
		v.nodes.limit = KnownFiles()
	}
	served, err := v.serve()
	if err != nil {
		unix.Close(v.root)
		return nil, err
	}
	v.served = served
	go v.end()
	go v.shedWhenCrowded()
	if v.dev, _, err = devIno(dir, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("look at the mount at %s: %w", dir, err), v.Unmount())
	}
	if err := raiseReadAhead(dir, overlayReadAheadKB); err != nil {
		v.faults.log.Debug("read-ahead stays as it is", "dir", dir, "err", err)
	}
	return v, nil
}

// serve gets what answering takes, and begins to answer.
func (v *Overlay) serve() (served <-chan struct{}, err error) {
	if v.o.FillOnRead {
		v.rooms = newRooms()
	}
	served, err = serve(v, v.dir, v.mountOptions())
	if err != nil && v.rooms != nil {
		v.rooms.close()
	}
	return served, err
}

func set(names []string) map[string]bool {
	m := make(map[string]bool)
	for _, name := range names {
		m[name] = true
	}
	return m
}

// openBare opens the directory while it can still be reached by its path.
func (v *Overlay) openBare() error {
	fd, err := unix.Open(v.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil {
		v.block, err = blockSize(fd)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	v.root = fd
	v.nodes = newNodes(fd, &st, v.top)
	return nil
}

func (v *Overlay) mountOptions() fuse.MountOptions {
	o := fuse.MountOptions{
		AllowOther: v.o.AllowOther,
		Options:    []string{"default_permissions"},
		FsName:     "pgthaw",
		Name:       overlayType,
		// Read-ahead of many sequential scans at once; the kernel's default is 12.
		MaxBackground: 64,
		MaxWrite:      1 << 20,
		// The kernel shall drop no pages because a modification time changed: all changes go through it.
		ExplicitDataCacheControl: true,
		// An answer of ENOSYS ends the kernel's asking for security.capability before each write.
		DisableXAttrs:      true,
		DisableReadDirPlus: true,
		DisableSplice:      true,
		// A backing file may itself lie on overlayfs.
		MaxStackDepth: 2,
		Logger:        slog.NewLogLogger(v.faults.log.Handler(), slog.LevelDebug),
	}
	if !v.o.Passthrough {
		o.DisabledCapabilities = fuse.CAP_PASSTHROUGH
	}
	return o
}

// end cleans up when the mount is gone.
func (v *Overlay) end() {
	<-v.served
	v.cancel()
	v.life.Lock()
	v.ended = true
	v.life.Unlock()
	v.users.Wait()
	if v.rooms != nil {
		v.rooms.close()
	}
	v.nodes.closeAll()
	close(v.gone)
}

// use keeps the descriptors open until the returned function is called. ErrUnmounted: there is nothing to use any more.
func (v *Overlay) use() (done func(), err error) {
	v.life.RLock()
	defer v.life.RUnlock()
	if v.ended {
		return nil, ErrUnmounted
	}
	v.users.Add(1)
	return v.users.Done, nil
}

// useUntilEnd is use for what goes on until ctx ends, or the mount does: then the context that it returns ends.
func (v *Overlay) useUntilEnd(ctx context.Context) (until context.Context, done func(), err error) {
	release, err := v.use()
	if err != nil {
		return nil, nil, err
	}
	until, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(v.ctx, cancel)
	return until, func() { stop(); cancel(); release() }, nil
}

// Init gets the server before the first request.
func (v *Overlay) Init(server *fuse.Server) { v.server = server }

// String names the file system for go-fuse.
func (v *Overlay) String() string { return overlayType }

// Beneath is a path to the bare directory, good in this process until Wait returns. What is changed there behind the
// mount's back, the mount may show late or never: names that it has already looked up should be changed through it.
func (v *Overlay) Beneath() string { return procPath(v.root) }

// Unmount takes the mount off. EBUSY (errors.Is): it is in use.
func (v *Overlay) Unmount() error {
	v.mount.Lock()
	defer v.mount.Unlock()
	select {
	case <-v.served: // by somebody else already
		return v.Wait()
	default:
	}
	if v.off.Load() {
		return v.forsake()
	}
	if err := v.unmountAll(); err != nil {
		return err
	}
	return v.Wait()
}

// Wait returns when the mount has been taken off, by whomever.
func (v *Overlay) Wait() error {
	<-v.gone
	return nil
}
