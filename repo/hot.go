package repo

import (
	"path"
	"strconv"
	"strings"
)

const (
	hotFile         = 64 << 10 // bytes
	firstNormalOID  = 16384    // FirstNormalObjectId: relations below are system catalogs, until they are rewritten
	largeHotCatalog = 64 << 20 // bytes; pg_largeobject may have any size, and no start reads all of it
)

// Hot says whether a start of the cluster is likely to read a file of a backup, so that it lies in the packs of those: small
// files, system catalogs, and the maps of free space and visibility.
func Hot(name string, size int64) bool {
	if size <= hotFile {
		return true
	}
	dir, base := path.Split(name)
	node, fork, _ := strings.Cut(base, "_")
	if fork == "fsm" || fork == "vm" {
		return true
	}
	node, _, _ = strings.Cut(node, ".")
	oid, err := strconv.ParseUint(node, 10, 32)
	return err == nil && oid < firstNormalOID && size <= largeHotCatalog &&
		(strings.HasPrefix(dir, "pgdata/base/") || dir == "pgdata/global/")
}
