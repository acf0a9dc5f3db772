package fusefs

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// lowerAttr is the extended attribute of a placeholder. It is small enough to lie in the inode of ext4.
const lowerAttr = "user.pgthaw.lower"

// placeholder is what lowerAttr says: below limit, a hole of this file is served from the file at path in the backup.
// Its text is "<limit> <path>".
type placeholder struct {
	limit int64 // bytes; never more than the file's size, and it only ever falls
	path  string
}

func (p placeholder) String() string {
	return strconv.FormatInt(p.limit, 10) + " " + p.path
}

func parsePlaceholder(s string) (placeholder, error) {
	digits, path, _ := strings.Cut(s, " ")
	limit, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || limit <= 0 || path == "" {
		return placeholder{}, fmt.Errorf("attribute %s is %q, not a limit and a path", lowerAttr, s)
	}
	return placeholder{limit, path}, nil
}

// readPlaceholder reads the attribute of the file that name leads to. The zero placeholder: it has none.
func readPlaceholder(name string) (placeholder, error) {
	var b [4352]byte // a path of 4096 bytes and a limit
	n, err := unix.Getxattr(name, lowerAttr, b[:])
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
		return placeholder{}, nil
	case err != nil:
		return placeholder{}, fmt.Errorf("read attribute %s: %w", lowerAttr, err)
	}
	return parsePlaceholder(string(b[:n]))
}

// write makes p the attribute of the file that name leads to; a limit of 0 takes the attribute away.
func (p placeholder) write(name string) error {
	var err error
	if p.limit > 0 {
		err = unix.Setxattr(name, lowerAttr, []byte(p.String()), 0)
	} else {
		err = unix.Removexattr(name, lowerAttr)
	}
	if err != nil {
		return fmt.Errorf("set attribute %s to limit %d: %w", lowerAttr, p.limit, err)
	}
	return nil
}

// procPath names the file behind a descriptor, an O_PATH one among them, for system calls that want a path.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }
