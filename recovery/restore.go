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
	o.NoBootImage = true // what is restored is the backup, bit for bit
	j, err := prepare(ctx, r, o)
	if err == nil {
		err = j.tryRestoreCommand(ctx)
	}
	if err != nil {
		return Result{}, err
	}
	session, err := r.Use(ctx, "restore", j.backup.Manifest.Name())
	if err != nil {
		return Result{}, err
	}
	defer func() { _ = session.End(context.WithoutCancel(ctx)) }() // what is left of it prune takes away
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

// copier is what has to be written. Files, of which there may be millions, are not kept: the backup is walked through
// once to know how much they are, and once more to write them.
type copier struct {
	job     *job
	dirs    []placed // parents first
	links   []placed
	control *restoredFile
	need    []room // by root
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
	c := &copier{job: j, need: make([]room, len(j.roots))}
	err := j.walk(ctx, func(root int, name string, p placed) error {
		c.add(root, name, p)
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, n := range c.need {
		c.total += n.bytes
	}
	if c.control == nil {
		return nil, fmt.Errorf("%w: backup %s has no %s", repo.ErrCorrupt, j.route.Manifest.ID, controlPath)
	}
	return c, nil
}

// walk calls fn for all that is in the backup; name is relative to the root.
func (j *job) walk(ctx context.Context, fn func(root int, name string, p placed) error) error {
	for i, r := range j.roots {
		err := j.backup.Walk(ctx, r.Path, func(path string, e repo.Entry) error {
			name := strings.TrimPrefix(strings.TrimPrefix(path, r.Path), "/")
			return fn(i, name, placed{e, path, filepath.Join(r.Dir, name)})
		})
		if err != nil {
			return fmt.Errorf("list files of backup %s: %w", j.route.Manifest.ID, err)
		}
	}
	return nil
}

func (c *copier) add(root int, name string, p placed) {
	c.need[root].files++
	switch {
	case p.entry.IsDir():
		if name != "" {
			c.dirs = append(c.dirs, p)
		}
	case p.entry.Mode.Type() == fs.ModeSymlink:
		c.links = append(c.links, p)
	case isControl(root, name):
		c.control = &restoredFile{placed: p}
		c.need[root].bytes += p.entry.Size
	case c.isFile(root, name, p.entry):
		c.need[root].bytes += p.entry.Size
	}
}

func isControl(root int, name string) bool { return root == 0 && name == controlPath }

// isFile tells what writeFiles has to write.
func (c *copier) isFile(root int, name string, e repo.Entry) bool {
	return e.Mode.IsRegular() && !isControl(root, name) && (root != 0 || !c.job.conf.replaces(name))
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
	parts := make(chan part, 64)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(parts)
		return c.sendParts(ctx, parts)
	})
	for range c.job.workers() {
		g.Go(func() error { return c.writeParts(ctx, parts) })
	}
	return g.Wait()
}

// writeParts is the body of one worker.
func (c *copier) writeParts(ctx context.Context, parts <-chan part) error {
	buf, err := newBuffer()
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for p := range parts {
		if err := c.write(ctx, p, buf); err != nil {
			return fmt.Errorf("restore %s: %w", p.file.to, err)
		}
	}
	return nil
}

// workers are two more than there are processors, for some wait for the disk. Each takes 8 MiB.
func (o Options) workers() int {
	if o.Workers > 0 {
		return o.Workers
	}
	return min(runtime.NumCPU(), 16) + 2
}

// sendParts splits the files into ranges, in the order of the tree.
func (c *copier) sendParts(ctx context.Context, parts chan<- part) error {
	return c.job.walk(ctx, func(root int, name string, p placed) error {
		if !c.isFile(root, name, p.entry) {
			return nil
		}
		f := &restoredFile{placed: p}
		n := max(1, (p.entry.Size+rangeSize-1)/rangeSize)
		f.left.Store(int32(n))
		for i := range n {
			off := i * rangeSize
			select {
			case parts <- part{f, off, min(rangeSize, p.entry.Size-off)}:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
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
