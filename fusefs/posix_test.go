package fusefs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
)

// notOurs are go-fuse's tests of what an overlay does not do, with the reason.
var notOurs = map[string]string{
	"FcntlFlockLocksFile": "wants locks of one process to conflict, which fcntl(2) has not; the kernel keeps the locks, as it does natively",
	"Tmpfile":             "O_TMPFILE is not supported; PostgreSQL does not use it",
	"XAttr":               "extended attributes are off",
	"XAttrLarge":          "extended attributes are off",
}

// longest races names against each other, which all modes serve alike: one mode does.
const longest = "OpenSymlinkRace"

func TestOverlayPosix(t *testing.T) {
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	modes(t, func(t *testing.T, o OverlayOptions) {
		v := thaw(t, tree, o)
		for name, test := range posixtest.All {
			t.Run(name, func(t *testing.T) {
				if reason := notOurs[name]; reason != "" {
					t.Skip(reason)
				}
				if name == longest && (testing.Short() || !o.Passthrough || !o.FillOnRead) {
					t.Skip("in one mode, and not in a short run")
				}
				dir := filepath.Join(v.dir, name)
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				test(t, dir)
			})
		}
		expectQuiet(t, v.c)
	})
}
