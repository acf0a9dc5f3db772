package recovery

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/fusefs"
)

// What lies in privateDir of an overlay's data directory; the mount hides it.
const (
	privateDir   = ".pgthaw"
	recordName   = privateDir + "/overlay.json"
	lockName     = privateDir + "/lock"
	holdName     = privateDir + "/hold" // the daemon shall not hydrate before it is told to
	versionFile  = "PG_VERSION"
	movedVersion = privateDir + "/" + versionFile // until all is whole
)

// record is what a daemon needs to take an overlay up.
type record struct {
	Version    int    `json:"version"`
	Target     string `json:"target"` // the data directory, to notice a copy of it
	Repository string `json:"repository"`
	Cluster    string `json:"cluster"`
	Backup     string `json:"backup"`
	Image      string `json:"image,omitempty"` // id of the boot image that it lies over, instead of the backup
	Hydrate    string `json:"hydrate"`
	MakesImage bool   `json:"makes_image,omitempty"` // the server starts here as no later one does: what it reads is not recorded
	Roots      []root `json:"roots"`                 // the data directory first
	KeyFiles

	by int // the user who owns the file
}

const recordVersion = 1

// KeyFiles are the files that hold keys of an encrypted repository, as absolute paths; "" is none.
type KeyFiles struct {
	KeyFile        string `json:"key_file,omitempty"`
	PassphraseFile string `json:"passphrase_file,omitempty"`
}

// bareDir is a thawed directory beneath its mount, or without one.
type bareDir struct{ *os.Root }

// openBare opens a directory at which nothing is mounted now.
func openBare(dir string) (bareDir, error) {
	root, err := os.OpenRoot(dir)
	return bareDir{root}, err
}

func (b bareDir) record() (r record, err error) {
	f, err := b.Open(recordName)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return record{}, fmt.Errorf("%s: %w", b.Name(), ErrNoOverlay)
	}
	if err != nil {
		return record{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return record{}, err
	}
	r.by = int(info.Sys().(*syscall.Stat_t).Uid)
	if err := json.NewDecoder(f).Decode(&r); err != nil {
		return r, fmt.Errorf("read %s: %w", recordName, err)
	}
	if r.Version != recordVersion {
		return r, fmt.Errorf("%s has version %d; this pgthaw reads version %d", recordName, r.Version, recordVersion)
	}
	if !r.valid() {
		return r, fmt.Errorf("%s of %s: %w: its directories do not begin with the data directory", recordName, b.Name(), ErrNoOverlay)
	}
	return r, nil
}

// checkTrust refuses to serve as root what another user says: it would read any repository for that user, and mount over
// any directory.
func (r record) checkTrust() error {
	if os.Geteuid() != 0 || r.by == 0 {
		return nil
	}
	return withHint(fmt.Errorf("%w: %s was thawed by another user (%d %s)", ErrTargetDir, r.Target, r.by, lookupOwner(r.by, 0).name),
		"Run this as that user.")
}

func (r record) valid() bool { return len(r.Roots) > 0 && r.Roots[0].Dir == r.Target }

// writeRecord makes the private directory with the record in it; Lay syncs them.
func writeRecord(dir string, r record) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, privateDir), 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, recordName), append(text, '\n'), 0o600)
}

// owner is the user that the server runs as.
func (b bareDir) owner() (uid int, err error) {
	info, err := b.Stat(".")
	if err != nil {
		return 0, err
	}
	return int(info.Sys().(*syscall.Stat_t).Uid), nil
}

// whole tells whether the directory has been sealed: it is a data directory like any other.
func (b bareDir) whole() bool {
	_, err := b.Lstat(versionFile)
	return err == nil
}

// seal puts PG_VERSION in its place, in which the mount does not show it; PostgreSQL could start without the mount from now on.
func (b bareDir) seal() error {
	if err := b.Link(movedVersion, versionFile); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return b.sync()
}

// markAttr is an extended attribute of a data directory that became whole without anybody having asked for it: the
// record by which Discard still knows what Thaw made. Finish takes it away.
const markAttr = "user.pgthaw.thawed"

// mark remembers the record in the directory's attribute.
func (b bareDir) mark(r record) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return b.onDir(func(fd int) error { return unix.Fsetxattr(fd, markAttr, text, 0) })
}

// marked is the record that mark left. A copy that took the attribute along lies elsewhere than the record says.
func (b bareDir) marked(dir string) (r record, err error) {
	text := make([]byte, 64<<10) // XATTR_SIZE_MAX
	err = b.onDir(func(fd int) error {
		n, err := unix.Fgetxattr(fd, markAttr, text)
		text = text[:max(n, 0)]
		return err
	})
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil || r.Target != dir || !r.valid() {
		return r, fmt.Errorf("%s: %w", dir, ErrNoOverlay)
	}
	return r, nil
}

// onDir calls fn with a descriptor of the directory.
func (b bareDir) onDir(fn func(fd int) error) error {
	d, err := b.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return fn(int(d.Fd()))
}

// unmark is fine if there is no mark.
func (b bareDir) unmark() error {
	err := b.onDir(func(fd int) error { return unix.Fremovexattr(fd, markAttr) })
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// clean removes what is ours from a whole directory that is not mounted any more.
func (b bareDir) clean() error {
	if err := b.RemoveAll(privateDir); err != nil {
		return err
	}
	return b.sync()
}

func (b bareDir) sync() error {
	d, err := b.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lock keeps a second daemon away until the file is closed.
func (b bareDir) lock() (*os.File, error) {
	f, err := b.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: another daemon serves this overlay: %w", b.Name(), err)
	}
	return f, nil
}

// postmaster is the PID of the server that runs in the directory, or 0.
func (b bareDir) postmaster() int {
	text, err := b.ReadFile("postmaster.pid")
	if err != nil {
		return 0
	}
	return livingPID(text)
}

// takeOffDead takes off the mounts of an overlay that nobody serves any more; those that are served are an error.
func takeOffDead(dirs ...string) error {
	for _, dir := range dirs {
		ours, alive, err := fusefs.IsMount(dir)
		if err == nil && ours && alive {
			err = fmt.Errorf("the mount at %s is served by a daemon that does not answer", dir)
		}
		if err == nil && ours {
			err = fusefs.ForceUnmount(dir)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// hydration is how an overlay is to be filled.
type hydration struct {
	off            bool
	held           bool  // it waits for a word
	bytesPerSecond int64 // 0: no limit
}

var rateUnits = []struct {
	suffix string
	bytes  int64
}{{"kB", 1 << 10}, {"MB", 1 << 20}, {"GB", 1 << 30}, {"TB", 1 << 40}, {"B", 1}}

// parseHydration reads "auto", "off" or a rate in bytes a second, with PostgreSQL's units: "50MB".
func parseHydration(s string) (hydration, error) {
	switch s {
	case "", "auto":
		return hydration{}, nil
	case "off":
		return hydration{off: true}, nil
	}
	number, unit := strings.TrimSuffix(s, "/s"), int64(1)
	for _, u := range rateUnits {
		if n, ok := strings.CutSuffix(number, u.suffix); ok {
			number, unit = n, u.bytes
			break
		}
	}
	n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
	if err != nil || n <= 0 || n > 1<<50/unit {
		return hydration{}, fmt.Errorf("%w: hydration %q is neither auto, off nor a rate such as 50MB", ErrUsage, s)
	}
	return hydration{bytesPerSecond: n * unit}, nil
}

// String is what parseHydration reads, or "held" while it waits for a word.
func (h hydration) String() string {
	switch {
	case h.off:
		return "off"
	case h.held:
		return "held"
	case h.bytesPerSecond == 0:
		return "auto"
	}
	for _, u := range slices.Backward(rateUnits[:len(rateUnits)-1]) {
		if h.bytesPerSecond%u.bytes == 0 {
			return strconv.FormatInt(h.bytesPerSecond/u.bytes, 10) + u.suffix
		}
	}
	return strconv.FormatInt(h.bytesPerSecond, 10) + "B"
}

// OverlayStatus is how a thawed directory does.
type OverlayStatus struct {
	State               string `json:"state"` // hydrating, hydrated or lost
	Mounted             bool   `json:"mounted"`
	Target              string `json:"target"`
	Cluster             string `json:"cluster,omitempty"`
	Backup              string `json:"backup,omitempty"`
	BytesTotal          int64  `json:"bytes_total"`
	BytesHydrated       int64  `json:"bytes_hydrated"`
	FilesTotal          int    `json:"files_total"`
	FilesWhole          int    `json:"files_whole"`
	Hydrate             string `json:"hydrate,omitempty"`          // auto, off, held until recovery has ended, or the most a second: 50MB
	BytesPerSecond      int64  `json:"bytes_per_second,omitempty"` // hydrated of late
	SecondsLeft         int64  `json:"seconds_left,omitempty"`     // at that pace
	RepositoryBytesRead int64  `json:"repository_bytes_read"`      // by the daemon that runs now
	PID                 int    `json:"pid,omitempty"`              // of the daemon
	ServerPID           int    `json:"server_pid,omitempty"`       // of the postmaster in it
	LastError           string `json:"last_error,omitempty"`       // why hydration, or taking the mount off, did not go on

	LastErrorAt *time.Time `json:"last_error_at,omitempty"`

	Waiting *Waiting `json:"waiting,omitempty"` // nil: the repository answers

	Native []string `json:"native,omitempty"` // directories that are reached without the mount
	Held   []Held   `json:"held,omitempty"`
}

// Waiting is a read of the repository that is not answered.
type Waiting struct {
	Since time.Time `json:"since"`
	For   string    `json:"for"` // the object, and what came instead of it
}

// Held is a directory that is whole, and is still reached through the mount.
type Held struct {
	Dir       string   `json:"dir"`
	Processes []HeldBy `json:"processes"` // have had files open there since before the directory was whole
}

// HeldBy is a process.
type HeldBy struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
}

// The states of an overlay.
const (
	stateHydrating = "hydrating"
	stateHydrated  = "hydrated"
	stateLost      = "lost" // it has no mount, and cannot do without
)
