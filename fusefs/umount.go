package fusefs

import (
	"errors"
	"fmt"
)

// What Unmount finds instead of a browser.
var (
	ErrNoMount = errors.New("no backups are mounted there")
	ErrOverlay = errors.New("a thawed data directory is mounted there")
)

// Unmount takes off the browser that is mounted at dir, by whatever process; its process then ends. EBUSY
// (errors.Is): it is in use. A browser whose process is gone is taken off, too.
func Unmount(dir string) error {
	at, err := mountPoint(dir)
	if err != nil {
		return fmt.Errorf("find the mount at %s: %w", dir, err)
	}
	switch kind, err := mountedAt(at); {
	case err != nil:
		return fmt.Errorf("find the mount at %s: %w", dir, err)
	case kind == "fuse.pgthaw":
		return unmount(at, 0)
	case kind == "fuse."+overlayType:
		return fmt.Errorf("%s: %w", dir, ErrOverlay)
	default:
		return fmt.Errorf("%s: %w", dir, ErrNoMount)
	}
}
