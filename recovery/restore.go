package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

const (
	// rangeSize is what one worker takes of a file, so that a relation segment of 1 GiB keeps all of them busy.
	rangeSize = 64 << 20
	// controlPath is written last: without it the server does not start.
	controlPath = "global/pg_control"
)

// Restore writes a backup to disk, with what PostgreSQL needs to recover to the target, and starts it if asked to.
// Interrupted, it leaves a directory that cannot start.
func Restore(ctx context.Context, r *repo.Repository, o Options) (Result, error) {
	j, err := prepare(ctx, r, o)
	if err == nil {
		err = j.tryRestoreCommand(ctx)
	}
	if err != nil {
		return Result{}, err
	}
	before := r.ReadBytes()
	c, err := j.collect(ctx)
	if err != nil {
		return Result{}, err
	}
	if err := checkSpace(j.roots, c.need); err != nil {
		return Result{}, err
	}
	if err := j.writeAll(ctx, c); err != nil {
		return Result{}, withHint(fmt.Errorf("%w; %s is incomplete and cannot be started", err, j.dir()),
			"Remove what is in it before you restore again.")
	}
	res := j.result()
	res.RestoredMS = j.since()
	res.ReadBytes = r.ReadBytes() - before
	err = j.startServer(ctx, &res)
	return res, err
}

// copier is what has to be written.
type copier struct {
	job     *job
	dirs    []placed // parents first
	links   []placed
	files   []*restoredFile
	control *restoredFile
	need    []int64 // bytes, by root
	total   int64
	done    atomic.Int64
}

// placed is an entry of the backup and where it goes.
type placed struct {
	entry repo.Entry
	from  string // path in the backup
	to    string
}

// collect walks through the backup; nothing is written.
func (j *job) collect(ctx context.Context) (*copier, error) {
	c := &copier{job: j, need: make([]int64, len(j.roots))}
	for i, r := range j.roots {
		err := j.backup.Walk(ctx, r.Path, func(path string, e repo.Entry) error {
			c.add(i, r, path, e)
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list files of backup %s: %w", j.route.Manifest.ID, err)
		}
		c.total += c.need[i]
	}
	if c.control == nil {
		return nil, fmt.Errorf("%w: backup %s has no %s", repo.ErrCorrupt, j.route.Manifest.ID, controlPath)
	}
	return c, nil
}

func (c *copier) add(i int, r root, path string, e repo.Entry) {
	name := strings.TrimPrefix(strings.TrimPrefix(path, r.Path), "/")
	p := placed{e, path, filepath.Join(r.Dir, name)}
	switch {
	case e.IsDir():
		if name != "" {
			c.dirs = append(c.dirs, p)
		}
	case e.Mode.Type() == fs.ModeSymlink:
		c.links = append(c.links, p)
	case i == 0 && name == controlPath:
		c.control = &restoredFile{placed: p}
		c.need[i] += e.Size
	default:
		if i == 0 && c.job.conf.replaces(name) {
			return
		}
		c.files = append(c.files, &restoredFile{placed: p})
		c.need[i] += e.Size
	}
}

func (j *job) writeAll(ctx context.Context, c *copier) error {
	if err := makeRoots(ctx, j.roots, j.backup, j.owner); err != nil {
		return err
	}
	if err := c.makeDirs(); err != nil {
		return err
	}
	if err := c.writeFiles(ctx); err != nil {
		return err
	}
	if err := j.writeConfiguration(); err != nil {
		return err
	}
	return c.seal(ctx)
}

func (c *copier) makeDirs() error {
	o := c.job.owner
	for _, d := range c.dirs {
		err := os.Mkdir(d.to, 0o700)
		if perm := d.entry.Mode.Perm(); err == nil && perm != 0o700 {
			err = os.Chmod(d.to, perm)
		}
		if err == nil && o.foreign() {
			err = os.Lchown(d.to, o.uid, o.gid)
		}
		if err != nil {
			return err
		}
	}
	for _, l := range c.links {
		err := os.Symlink(relink(c.job.roots, l.from, l.entry.Link), l.to)
		if err == nil && o.foreign() {
			err = os.Lchown(l.to, o.uid, o.gid)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writeFiles writes all files but pg_control.
func (c *copier) writeFiles(ctx context.Context) error {
	parts := c.parts()
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range c.job.workers() {
		g.Go(func() error {
			buf, err := newBuffer()
			if err != nil {
				return err
			}
			defer unix.Munmap(buf)
			for i := next.Add(1) - 1; i < int64(len(parts)); i = next.Add(1) - 1 {
				if err := c.write(ctx, parts[i], buf); err != nil {
					return fmt.Errorf("restore %s: %w", parts[i].file.to, err)
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// workers are two more than there are processors, for some wait for the disk. Each takes 8 MiB.
func (o Options) workers() int {
	if o.Workers > 0 {
		return o.Workers
	}
	return min(runtime.NumCPU(), 16) + 2
}

// parts splits the files into ranges, in the order of the tree, which is that of the packs of a full backup.
func (c *copier) parts() []part {
	var parts []part
	for _, f := range c.files {
		n := max(1, (f.entry.Size+rangeSize-1)/rangeSize)
		f.left.Store(int32(n))
		for i := range n {
			off := i * rangeSize
			parts = append(parts, part{f, off, min(rangeSize, f.entry.Size-off)})
		}
	}
	return parts
}

// seal makes all of it durable, and then complete: pg_control comes last.
func (c *copier) seal(ctx context.Context) error {
	c.job.progress("sync", 0, c.total)
	for _, r := range c.job.roots {
		if err := errors.Join(syncFileSystem(r.Dir), syncDir(filepath.Dir(r.Dir))); err != nil {
			return err
		}
	}
	c.control.left.Store(1)
	if err := c.write(ctx, part{c.control, 0, c.control.entry.Size}, make([]byte, c.control.entry.Size)); err != nil {
		return errors.Join(err, removeIfThere(c.control.to))
	}
	for _, d := range slices.Backward(c.dirs) {
		if err := setTime(d.to, d.entry.ModTime); err != nil {
			return err
		}
	}
	c.job.progress("sync", c.total, c.total)
	return syncFileSystem(c.job.dir())
}
