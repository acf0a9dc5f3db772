package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"pgthaw/repo/pg"
)

// CheckOptions of Check. The zero value checks structure: every manifest, directory and file map, and that every pack
// and WAL object they need is there.
type CheckOptions struct {
	ReadData bool // read and verify every byte of every file and WAL object, too
}

// Finding is one thing that is wrong.
type Finding struct {
	Cluster string
	Backup  string // which cannot be relied on; "": none in particular
	Path    string // file of the backup, or the WAL file
	Err     error
}

// Checked counts what Check looked at.
type Checked struct {
	Backups, Files, WALFiles int
	Bytes                    int64 // read and verified
}

// Check looks at everything in the repository and reports each thing that is wrong; it goes on after each. The error
// it returns is that the check itself could not be done.
func (r *Repository) Check(ctx context.Context, o CheckOptions, found func(Finding)) (Checked, error) {
	c := checker{r: r, o: o, found: found}
	if err := c.keySlots(ctx); err != nil {
		return c.done, err
	}
	owners, err := c.owners(ctx)
	if err != nil {
		return c.done, err
	}
	clusters, err := r.Clusters(ctx)
	if err != nil {
		return c.done, err
	}
	for _, cluster := range clusters {
		delete(owners, cluster.Name)
	}
	for _, name := range slices.Sorted(maps.Keys(owners)) {
		found(Finding{Cluster: name, Err: corrupt(clusterKey(name), "it is missing")})
	}
	for _, cluster := range clusters {
		if err := c.cluster(ctx, cluster.Name); err != nil {
			return c.done, err
		}
	}
	return c.done, nil
}

type checker struct {
	r     *Repository
	o     CheckOptions
	found func(Finding)
	done  Checked
}

// keySlots reads those of an encrypted repository. One that is damaged is somebody's only way in.
func (c *checker) keySlots(ctx context.Context) error {
	_, err := c.r.KeySlots(ctx)
	if errors.Is(err, ErrCorrupt) {
		c.found(Finding{Err: err})
		return nil
	}
	return err
}

// owners names all clusters that have backups or WAL. A cluster's document is there before anything else of it, so that
// whoever is listed here has one afterwards.
func (c *checker) owners(ctx context.Context) (map[string]bool, error) {
	names := make(map[string]bool)
	for _, prefix := range []string{backupsRoot, walRoot} {
		for o, err := range c.r.store.List(ctx, prefix) {
			if err != nil {
				return nil, fmt.Errorf("list %s: %w", prefix, err)
			}
			name, _, _ := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
			names[name] = true
		}
	}
	return names, nil
}

func (c *checker) cluster(ctx context.Context, name string) error {
	ids, err := c.r.BackupIDs(ctx, name)
	if err != nil {
		return err
	}
	for _, id := range ids {
		c.done.Backups++
		if err := c.backup(ctx, name, id); err != nil {
			return err
		}
	}
	wal, err := c.r.WALNames(ctx, name)
	if errors.Is(err, ErrCorrupt) {
		c.found(Finding{Cluster: name, Err: err})
		return nil
	}
	if err != nil {
		return err
	}
	for _, w := range wal {
		c.done.WALFiles++
		if err := c.walFile(ctx, name, w); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			c.found(Finding{Cluster: name, Path: w.String(), Err: err})
		}
	}
	return nil
}

func (c *checker) walFile(ctx context.Context, cluster string, name pg.WALName) error {
	if !c.o.ReadData {
		_, err := c.r.walHead(ctx, cluster, name)
		return err
	}
	b, err := c.r.WAL(ctx, cluster, name)
	c.done.Bytes += int64(len(b))
	return err
}

// backup reports all that is wrong with one backup.
func (c *checker) backup(ctx context.Context, cluster, id string) error {
	m, err := c.r.readManifest(ctx, cluster, id)
	if err != nil {
		c.found(Finding{Cluster: cluster, Backup: id, Err: err})
		return ctx.Err()
	}
	report := func(path string, err error) {
		if ctx.Err() == nil {
			c.found(Finding{cluster, id, path, err})
		}
	}
	if err := c.packs(ctx, m); err != nil {
		report("", err)
	}
	b := c.r.OpenBackup(m)
	c.directory(ctx, b, ".", b.root(), report)
	return ctx.Err()
}

// packs compares the pack list with the packs: each is there with its size and table of contents.
func (c *checker) packs(ctx context.Context, m *Manifest) error {
	uses, err := c.r.packList(ctx, m)
	if err != nil {
		return err
	}
	var bad []error
	for _, u := range uses {
		if _, err := c.r.readTOC(ctx, u.pack, u.size); err != nil {
			bad = append(bad, err)
		}
	}
	return errors.Join(bad...)
}

// directory checks what lies below a directory, going on after what cannot be read.
func (c *checker) directory(ctx context.Context, b *Backup, name string, e Entry, report func(string, error)) {
	list, err := b.list(ctx, e)
	if err != nil {
		report(name, err)
		return
	}
	for _, child := range list {
		path := name + "/" + child.Name
		switch {
		case child.IsDir():
			c.directory(ctx, b, path, child, report)
		case child.Mode.IsRegular():
			c.done.Files++
			if err := c.file(ctx, b, child); err != nil {
				report(path, err)
			}
		}
	}
}

func (c *checker) file(ctx context.Context, b *Backup, e Entry) error {
	f, err := b.Open(ctx, e)
	if err != nil || !c.o.ReadData {
		return err
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.NewSectionReader(f, 0, f.Size()), make([]byte, min(maxFetch, f.Size()+1)))
	c.done.Bytes += n
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	return nil
}
