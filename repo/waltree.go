package repo

import (
	"context"
	"fmt"
	"io/fs"

	"pgthaw/repo/pg"
)

// WALTree shows a cluster's WAL as directories of files, one directory for each timeline, named by its eight hex digits.
// Nothing is kept: each call sees what is in the repository. Safe for concurrent use.
type WALTree struct {
	r *Repository
	c Cluster
}

// OpenWALTree reads nothing.
func (r *Repository) OpenWALTree(c Cluster) *WALTree { return &WALTree{r, c} }

// Timelines lists the directories, ascending. It is one listing of all the cluster's WAL.
func (t *WALTree) Timelines(ctx context.Context) ([]string, error) {
	var all []string
	names, err := t.r.WALNames(ctx, t.c.Name)
	for _, n := range names {
		if dir := n.Timeline.Hex(); len(all) == 0 || all[len(all)-1] != dir {
			all = append(all, dir)
		}
	}
	return all, err
}

// ReadDir lists a timeline's files, sorted by name; there may be none. It is one listing and reads no object, so the size
// of a file that is not a segment is not known: it is -1.
func (t *WALTree) ReadDir(ctx context.Context, timeline string) ([]Entry, error) {
	var all []Entry
	for o, err := range t.r.walObjects(ctx, walPrefix(t.c.Name)+timeline+"/") {
		if err != nil {
			return nil, err
		}
		all = append(all, t.entry(o.name, -1))
	}
	return all, nil
}

// Stat reads the head of a WAL file's object. fs.ErrNotExist: there is no such file.
func (t *WALTree) Stat(ctx context.Context, timeline, file string) (Entry, error) {
	_, name, err := parseWALKey(walPrefix(t.c.Name) + timeline + "/" + file)
	if err != nil {
		return Entry{}, fmt.Errorf("%s/%s: %w", timeline, file, fs.ErrNotExist)
	}
	head, err := t.r.WALHead(ctx, t.c.Name, name)
	if err != nil {
		return Entry{}, err
	}
	return t.entry(name, head.Size), nil
}

// entry describes a WAL file as it would lie in pg_wal. The repository does not keep when it was written.
func (t *WALTree) entry(name pg.WALName, size int64) Entry {
	if name.Kind == pg.WALSegment || name.Kind == pg.WALPartial {
		size = int64(t.c.SegmentSize) // PutWAL sees to it
	}
	return Entry{Name: name.String(), Mode: 0o600, Size: size, ModTime: t.c.CreatedAt, content: content{kind: contentWAL, wal: name}}
}

// Open opens a file that ReadDir or Stat described, reading its object's head. The context bounds all later reads.
// ErrNoWAL: it is not there any more.
func (t *WALTree) Open(ctx context.Context, e Entry) (*File, error) {
	return t.r.openWAL(ctx, t.c.Name, e.content.wal)
}
