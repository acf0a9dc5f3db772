package repo

import (
	"math/rand/v2"
	"path"
	"slices"

	"pgthaw/repo/store"
)

// forgetting is a disk with a volatile cache. What was not synced when the power goes, each page of a file and each name
// in a directory for itself, is there afterwards or not.
//
// It promises what POSIX does and nothing else: fsync(2) of a file keeps its bytes, but no name of it; fsync of a directory
// keeps the names in it and that what they name exists, but no bytes. A link is a name like any other, a rename two
// changes of names, each of which can survive without the other.
type forgetting struct {
	inodes map[uint64]*forgettingInode
	deaf   string // what it promises and does not do: "file", "file names", "directory names"; "": nothing
}

type forgettingInode struct {
	dir            bool
	mode, uid, gid uint32
	links          uint32

	// A file: its bytes now, those at the last fsync, and the writes since.
	data, synced []byte
	writes       []DiskOp

	// A directory: its names now, and of each name that changed since the last fsync all that it stood for, first what
	// was synced. 0 is nothing.
	names map[string]uint64
	past  map[string][]uint64
}

// DiskOp is a change to the disk, or an fsync. Exported for net/rpc.
type DiskOp struct {
	Kind           string // "create", "mkdir", "link", "unlink", "rename", "write", "setattr", "fsync", "fsyncdir"
	Ino            uint64 // of the file, or of the directory that Name is in
	Name           string
	Other          uint64 // create, mkdir, link: what is named; rename: the new directory
	NewName        string // rename
	Off            int64
	Data           []byte
	Mode, UID, GID uint32
}

const rootIno = 1

func newForgetting(deaf string) *forgetting {
	root := &forgettingInode{dir: true, mode: 0o755, links: 1, names: map[string]uint64{}, past: map[string][]uint64{}}
	return &forgetting{map[uint64]*forgettingInode{rootIno: root}, deaf}
}

func (d *forgetting) apply(op DiskOp) {
	n := d.inodes[op.Ino]
	switch op.Kind {
	case "create", "mkdir":
		made := &forgettingInode{dir: op.Kind == "mkdir", mode: op.Mode, uid: op.UID, gid: op.GID}
		if made.dir {
			made.names, made.past = map[string]uint64{}, map[string][]uint64{}
		}
		d.inodes[op.Other] = made
		d.name(n, op.Name, op.Other)
	case "link":
		d.name(n, op.Name, op.Other)
	case "unlink":
		d.name(n, op.Name, 0)
	case "rename":
		ino := n.names[op.Name]
		d.name(n, op.Name, 0)
		d.name(d.inodes[op.Other], op.NewName, ino)
	case "write":
		n.data = written(n.data, op.Off, op.Data)
		n.writes = append(n.writes, op)
	case "setattr":
		n.mode, n.uid, n.gid = op.Mode, op.UID, op.GID
	case "fsync":
		if d.deaf != "file" {
			n.synced, n.writes = slices.Clone(n.data), nil
		}
	case "fsyncdir":
		for name := range n.past {
			if !d.forgets(n.past[name]) {
				delete(n.past, name)
			}
		}
	}
}

// name lets a name stand for ino from now on.
func (d *forgetting) name(dir *forgettingInode, name string, ino uint64) {
	was := dir.names[name]
	if was != 0 {
		d.inodes[was].links--
	}
	if len(dir.past[name]) == 0 {
		dir.past[name] = []uint64{was}
	}
	dir.past[name] = append(dir.past[name], ino)
	if delete(dir.names, name); ino != 0 {
		dir.names[name] = ino
		d.inodes[ino].links++
	}
}

// forgets tells whether the disk is deaf to an fsync of a name that stood for these.
func (d *forgetting) forgets(past []uint64) bool {
	i := slices.IndexFunc(past, func(ino uint64) bool { return ino != 0 })
	return i >= 0 && d.deaf == map[bool]string{true: "directory names", false: "file names"}[d.inodes[past[i]].dir]
}

func written(b []byte, off int64, data []byte) []byte {
	if end := int(off) + len(data); end > len(b) {
		b = append(b, make([]byte, end-len(b))...)
	}
	copy(b[off:], data)
	return b
}

// image is what is found when the power is back: files by path, and directories, which have nil.
type image map[string][]byte

// cut takes the power away. Of what was not synced, a share of keep stays.
func (d *forgetting) cut(rng *rand.Rand, keep float64) image {
	found, left := image{}, map[uint64][]byte{}
	var walk func(dir *forgettingInode, at string)
	walk = func(dir *forgettingInode, at string) {
		for _, name := range dir.everNamed() {
			ino := dir.names[name]
			if past := dir.past[name]; len(past) > 0 && rng.Float64() >= keep {
				ino = past[rng.IntN(len(past)-1)]
			}
			n, p := d.inodes[ino], path.Join(at, name)
			switch {
			case ino == 0:
			case n.dir:
				found[p] = nil
				walk(n, p)
			default:
				if left[ino] == nil {
					left[ino] = n.survives(rng, keep)
				}
				found[p] = left[ino]
			}
		}
	}
	walk(d.inodes[rootIno], "")
	return found
}

// everNamed lists the names in a directory that may survive.
func (n *forgettingInode) everNamed() []string {
	var all []string
	for name := range n.names {
		all = append(all, name)
	}
	for name := range n.past {
		if n.names[name] == 0 {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// survives is what is left of a file. It can be as long as it was with zeros for bytes: the size may reach the disk first.
func (n *forgettingInode) survives(rng *rand.Rand, keep float64) []byte {
	const page = 4096
	b := append([]byte{}, n.synced...)
	for _, w := range n.writes {
		for i := 0; i < len(w.Data); i += page {
			if rng.Float64() < keep {
				b = written(b, w.Off+int64(i), w.Data[i:min(i+page, len(w.Data))])
			}
		}
	}
	if len(n.writes) > 0 && rng.Float64() < keep/2 {
		b = written(b, int64(len(n.data)), nil)
	}
	return b
}

// below returns the objects of the store in a directory of the image, by key.
func (m image) below(dir string) map[string][]byte {
	objects := map[string][]byte{}
	for p, b := range m {
		if key, ok := cutPrefix(p, dir+"/"); ok && b != nil {
			objects[key] = b
		}
	}
	return objects
}

// cutPrefix leaves out what is in tmp.
func cutPrefix(p, prefix string) (key string, ok bool) {
	if len(p) <= len(prefix) || p[:len(prefix)] != prefix || len(p) > len(prefix)+4 && p[len(prefix):len(prefix)+4] == "tmp/" {
		return "", false
	}
	return p[len(prefix):], true
}

// storeOf is a store with these objects.
func storeOf(objects map[string][]byte) (*store.Mem, error) {
	m := store.NewMem()
	for key, b := range objects {
		if err := m.Put(noContext, key, b); err != nil {
			return nil, err
		}
	}
	return m, nil
}
