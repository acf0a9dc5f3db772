package repo

import (
	"bytes"
	"context"
	"io"
	"path"
	"slices"

	"golang.org/x/sync/errgroup"
)

// backupCopier copies one backup.
//
// What an earlier copy has brought is told by place: a directory, a file or a page that lies in the source where the prior
// backup has it, at the same path, lies in the destination where the prior backup has it there.
//
// Errors that come with reading the backup are marked by inSource. All others, those of the prior backup among them, end
// the copy of this backup for another reason.
type backupCopier struct {
	*clusterCopier
	b     *Backup // in the source
	prior was     // its root; not ok: there is none
	w     *BackupWriter
	ctx   context.Context
	files *errgroup.Group // that are being copied

	chunks copiedChunks
}

// writeBackup copies a backup with all that it says of itself.
func (c *clusterCopier) writeBackup(ctx context.Context, m *Manifest, prior *pair) (*Manifest, error) {
	b := &backupCopier{clusterCopier: c, b: c.from.OpenBackup(m)}
	o := BackupOptions{CopyOf: m.ID, Workers: c.o.Workers}
	if prior != nil {
		o.Prior = c.to.OpenBackup(prior.to)
		b.prior = was{from: c.from.OpenBackup(prior.from).root(), to: o.Prior.root(), ok: true}
	}
	made := *m
	if m.Image != nil {
		image := *m.Image
		image.Of = prior.to.ID
		made.Image, o.ImageOf, o.CopyOf = &image, prior.to, ""
	}
	return c.to.WriteBackup(ctx, m.Cluster, o, func(ctx context.Context, w *BackupWriter) (Manifest, error) {
		b.w = w
		return made, b.tree(ctx)
	})
}

// tree copies all directories and files.
func (b *backupCopier) tree(ctx context.Context) error {
	b.files, b.ctx = errgroup.WithContext(ctx)
	b.files.SetLimit(b.o.Workers)
	err := b.directory(".", b.b.root(), b.prior)
	if fileErr := b.files.Wait(); fileErr != nil {
		return fileErr // which has ended the walk
	}
	m := b.b.Manifest
	if err == nil && (b.w.files != m.Files || b.w.bytes != m.SizeBytes) {
		err = leftOut{corrupt(manifestKey(m.Cluster, m.ID), "%d files with %d bytes instead of %d with %d", b.w.files, b.w.bytes, m.Files, m.SizeBytes)}
	}
	return err
}

// was is what the prior backup has at a path, in both repositories.
type was struct {
	from, to Entry
	ok       bool // else there is nothing
}

// same tells whether the source has the entry's content where it was.
func (w was) same(e Entry) bool {
	a, b := w.from.content, e.content
	return w.ok && a.kind == b.kind && a.ref == b.ref && bytes.Equal(a.bytes, b.bytes) && w.from.Size == e.Size && w.to.Size == e.Size
}

// trusted is what the prior backup has at a path, unless that lies in a pack of the destination that is known to be damaged.
func (b *backupCopier) trusted(w was) was {
	if b.w.prior == nil || b.w.prior.unusable.has(w.to.content.ref.Pack) {
		return was{}
	}
	return w
}

// directory copies what is in a directory. One that is as it was is not read from the source, nor anything below, unless part of the prior
// backup is damaged in the destination.
func (b *backupCopier) directory(name string, dir Entry, prior was) error {
	prior = b.trusted(prior)
	tree, list, err := b.listing(dir, prior)
	if err != nil {
		return err
	}
	t, err := newTreeDecoder(tree)
	for err == nil {
		var e Entry
		if e, err = t.next(); err == nil {
			if err := b.entry(path.Join(name, e.Name), e, list.was(e)); err != nil {
				return err
			}
		}
	}
	if err != io.EOF {
		return leftOut{dir.content.ref.corrupt(err.Error())}
	}
	return b.w.CloseDir(name)
}

// listing returns a directory's tree, and what the prior backup has there.
func (b *backupCopier) listing(dir Entry, prior was) (tree []byte, list priorListing, err error) {
	if prior.same(dir) && b.w.prior.sound() {
		tree, err = b.to.tree(b.ctx, prior.to)
		return tree, priorListing{unchanged: true}, err
	}
	if tree, err = b.from.tree(b.ctx, dir); err != nil {
		return nil, list, inSource(b.ctx, err)
	}
	if !prior.ok || !prior.from.IsDir() || !prior.to.IsDir() {
		return tree, priorListing{from: &Listing{}, to: &Listing{}}, nil
	}
	if list.from, err = b.from.listing(b.ctx, prior.from); err == nil {
		list.to, err = b.to.listing(b.ctx, prior.to)
	}
	return tree, list, err
}

// priorListing is what the prior backup has in a directory.
type priorListing struct {
	unchanged bool // what is there now, and the entries come from the destination
	from, to  *Listing
}

func (l priorListing) was(e Entry) (w was) {
	if l.unchanged {
		return was{from: e, to: e, ok: true}
	}
	var there bool
	w.from, w.ok = l.from.Find(e.Name)
	w.to, there = l.to.Find(e.Name)
	w.ok = w.ok && there
	return w
}

// entry copies what a name in a directory leads to.
func (b *backupCopier) entry(name string, e Entry, prior was) error {
	switch e.content.kind {
	case contentTree:
		if err := b.w.Mkdir(name, e); err != nil {
			return err
		}
		return b.directory(name, e, prior)
	case contentMap, contentInlineMap:
		return b.file(name, e, prior)
	case contentWAL:
		if err := b.wal.ensure(b.ctx, e.content.wal); err != nil {
			return err
		}
		b.progress(e.Size)
		return b.w.AddWAL(name, e, e.content.wal)
	}
	parent, err := b.w.parent(name, &e) // the tree holds all of it
	if err != nil {
		return err
	}
	if e.Mode.IsRegular() {
		b.w.count(e.Size)
		b.progress(e.Size)
	}
	return parent.add(e)
}

// file has a file copied whose content lies in chunks, beside others.
func (b *backupCopier) file(name string, e Entry, prior was) error {
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	parent, err := b.w.parent(name, &e)
	if err != nil {
		return err
	}
	b.w.count(e.Size)
	parent.hold()
	b.files.Go(func() error {
		content, err := b.content(e, prior)
		if err != nil {
			return err
		}
		b.progress(e.Size)
		e.content = content
		return parent.finish(e)
	})
	return nil
}

// content makes sure that a file's content is in the destination, and tells where.
func (b *backupCopier) content(e Entry, prior was) (content, error) {
	prior = b.trusted(prior)
	if prior.same(e) && prior.to.content.mapped() {
		c, ok, err := b.unchanged(prior.to)
		if ok || err != nil {
			return c, err
		}
	}
	m, err := b.from.fileMap(b.ctx, e)
	if err != nil {
		return content{}, inSource(b.ctx, err)
	}
	f := fileCopier{backupCopier: b, m: m}
	if prior.ok && prior.from.content.mapped() && prior.to.content.mapped() && prior.from.Size == prior.to.Size {
		if f.wasFrom, err = b.from.fileMap(b.ctx, prior.from); err == nil {
			f.wasTo, err = b.to.fileMap(b.ctx, prior.to)
		}
		if err != nil {
			return content{}, err
		}
	}
	if err := f.copy(); err != nil {
		return content{}, err
	}
	return b.w.mapContent(e.Size, f.runs, prior.to.content.ref)
}

// mapped tells whether it is a file's whose bytes lie in chunks.
func (c content) mapped() bool { return c.kind == contentMap || c.kind == contentInlineMap }

// unchanged takes over the content of a file in the destination, unless part of it lies in a pack that is known to be damaged.
func (b *backupCopier) unchanged(e Entry) (c content, ok bool, err error) {
	m, err := b.to.fileMap(b.ctx, e)
	if err != nil {
		return content{}, false, err
	}
	if slices.ContainsFunc(m.chunks, func(ref Ref) bool { return b.w.prior.unusable.has(ref.Pack) }) {
		return content{}, false, nil
	}
	b.w.live.add(m.chunks...)
	if e.content.kind == contentMap {
		b.w.live.add(e.content.ref)
	}
	return e.content, true, nil
}
