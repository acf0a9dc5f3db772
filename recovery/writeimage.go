package recovery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"pgthaw/fusefs"
	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// writeImage stores what a thawed directory has become, its mount being off, as a boot image. Only what lies in the directory itself is
// read: holes are the backup's.
func (j *job) writeImage(ctx context.Context, image repo.Image, tool string) (*repo.Manifest, error) {
	m := j.route.Manifest
	o := repo.BackupOptions{Prior: j.backup, Workers: j.Workers, ImageOf: m}
	return j.r.WriteBackup(ctx, m.Cluster, o, func(ctx context.Context, w *repo.BackupWriter) (repo.Manifest, error) {
		made := *m
		made.Tool, made.Image = tool, &image
		i := imageWriter{job: j, ctx: ctx, w: w, image: &image}
		return made, i.roots()
	})
}

type imageWriter struct {
	*job
	ctx   context.Context
	w     *repo.BackupWriter
	image *repo.Image
	owner repo.Entry // an entry with the user and group that have the cluster's files
}

// leftOut are the files that a server, or recovery, leaves in the data directory and that are of no use to the next one.
var leftOut = []string{
	privateDir, "postmaster.pid", "postmaster.opts", "backup_label.old", "tablespace_map.old", "current_logfiles", "recovery.done",
}

func (i *imageWriter) roots() error {
	if _, err := os.Lstat(filepath.Join(i.dir(), "backup_label")); err == nil {
		return errors.New("the server has not taken in backup_label")
	}
	top, err := i.backup.Stat(i.ctx, "pgdata")
	if err != nil {
		return err
	}
	i.owner = repo.Entry{UID: top.UID, GID: top.GID}
	for n, r := range i.job.roots {
		if n == 1 {
			if err := i.mkdir("tablespaces", filepath.Dir(r.Dir)); err != nil {
				return err
			}
		}
		if err := i.tree(r.Path, r.Dir); err != nil {
			return err
		}
	}
	return nil
}

// mkdir makes a directory as the backup has it, or as it lies on disk.
func (i *imageWriter) mkdir(name, at string) error {
	e, err := i.backup.Stat(i.ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		e, err = i.entryOf(at)
	}
	if err != nil {
		return err
	}
	return i.w.Mkdir(name, e)
}

func (i *imageWriter) entryOf(at string) (repo.Entry, error) {
	info, err := os.Lstat(at)
	if err != nil {
		return repo.Entry{}, err
	}
	e := i.owner
	e.Mode, e.Size, e.ModTime = info.Mode(), info.Size(), info.ModTime()
	return e, nil
}

// tree stores a directory and all below it. name is its place in the backup.
func (i *imageWriter) tree(name, at string) error {
	if err := i.mkdir(name, at); err != nil {
		return err
	}
	if name == "pgdata" {
		if err := i.keepOwn(); err != nil {
			return err
		}
	}
	all, err := os.ReadDir(at)
	if err != nil {
		return err
	}
	for _, e := range all {
		if err := i.ctx.Err(); err != nil {
			return err
		}
		if i.skips(path.Join(name, e.Name()), e) {
			continue
		}
		if err := i.entry(path.Join(name, e.Name()), filepath.Join(at, e.Name()), e.Type()); err != nil {
			return fmt.Errorf("store %s: %w", path.Join(name, e.Name()), err)
		}
	}
	return i.w.CloseDir(name)
}

// keepOwn takes the files from the backup in whose place the copy has its own.
func (i *imageWriter) keepOwn() error {
	for _, file := range append(i.conf.changedFiles(), versionFile) {
		name := "pgdata/" + file
		e, err := i.backup.Stat(i.ctx, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = i.w.Keep(name, name, e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (i *imageWriter) skips(name string, e os.DirEntry) bool {
	dir, base := path.Split(name)
	switch {
	case dir == "pgdata/":
		return slices.Contains(leftOut, base) || i.conf.replaces(base)
	case strings.HasPrefix(dir, "pgdata/pg_wal/"):
		return !e.IsDir() && !i.needsWAL(dir, base)
	}
	return false
}

// needsWAL tells whether a start from the image reads a file of pg_wal. In recovery it has all WAL from the repository; a server that
// was promoted has the WAL of its own timeline from its last checkpoint on.
func (i *imageWriter) needsWAL(dir, base string) bool {
	name, err := pg.ParseWALName(base)
	if dir != "pgdata/pg_wal/" || err != nil || i.image.Kind != repo.ImagePromoted || name.Timeline != i.image.Timeline {
		return false
	}
	no, err := name.SegmentNo(i.route.Manifest.SegmentSize)
	return name.Kind == pg.WALHistory || name.Kind == pg.WALSegment && err == nil && no == i.route.Manifest.SegmentSize.Segment(i.image.Redo)
}

func (i *imageWriter) entry(name, at string, kind fs.FileMode) error {
	switch kind {
	case fs.ModeDir:
		return i.tree(name, at)
	case fs.ModeSymlink:
		return i.link(name)
	case 0:
		return i.file(name, at)
	}
	return nil // sockets: pg_basebackup leaves them out, too
}

// link keeps a symbolic link of the backup, those to tablespaces above all.
func (i *imageWriter) link(name string) error {
	e, err := i.backup.Stat(i.ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("the backup has no such link: a tablespace was made after it, and a boot image cannot hold that. Make a new backup")
	}
	if err != nil {
		return err
	}
	return i.w.Keep(name, name, e)
}

func (i *imageWriter) file(name, at string) error {
	f, err := os.OpenFile(at, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	e, err := i.entryOf(at)
	if err != nil {
		return err
	}
	base, limit, data, err := fusefs.Own(f)
	if err != nil {
		return err
	}
	hot := repo.Hot(name, e.Size)
	if base != "" {
		return i.w.AddPatched(name, e, hot, repo.Patch{Base: base, Limit: limit, Data: data, Local: f})
	}
	to, err := i.w.Create(name, e, hot)
	if err != nil {
		return err
	}
	if _, err := to.ReadFrom(io.NewSectionReader(f, 0, e.Size)); err != nil {
		return err
	}
	return to.Close()
}
