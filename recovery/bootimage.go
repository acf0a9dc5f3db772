package recovery

import (
	"context"
	"errors"
	"slices"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// lower is what the copy is made of: the route's boot image, or the backup itself.
func (r Route) lower() *repo.Manifest {
	if r.image != nil {
		return r.image
	}
	return r.Manifest
}

// promoted tells whether the copy starts as a server that was promoted already.
func (r Route) promoted() bool { return r.image != nil && r.image.Image.Kind == repo.ImagePromoted }

// startTimeline is that of the checkpoint from which the server starts.
func (r Route) startTimeline() pg.Timeline {
	if r.image != nil {
		return r.image.Image.Timeline
	}
	return r.Manifest.Timeline
}

// useImage has the route begin at the boot image that comes nearest to the target, if the backup has one from which recovery ends
// where it would end from the backup. What cannot be read is none.
func (j *job) useImage(ctx context.Context) {
	images, err := j.r.ImagesOf(ctx, j.route.Manifest)
	if err != nil {
		j.Log.Warn("a boot image of the backup cannot be read", "error", err)
	}
	t := j.Target
	if kind, _ := t.kind(); kind == targetEnd && newestOf(images, repo.ImagePromoted) != nil {
		if t.Immediate, err = j.route.endsWithBackup(ctx); err != nil {
			j.Log.Warn("the last WAL of the backup cannot be read", "error", err)
		}
	}
	for _, m := range slices.Backward(images) {
		if j.route.leadsFrom(m.Image, t) {
			j.route.image = m
			return
		}
	}
}

// endsWithBackup tells whether the end of WAL is the end of the backup as far as anybody sees: behind that there is no more than the
// rest of its last segment, and in it no transaction. So it is where nobody archives.
func (r Route) endsWithBackup(ctx context.Context) (bool, error) {
	p, stop := r.path, r.Manifest.StopLSN
	last := len(p.names) - 1
	if p.gap != nil || len(r.line) > 1 || last < 0 || p.end() != p.a.size.Segment(stop-1)+1 {
		return false, nil
	}
	content, err := p.a.r.WAL(ctx, p.a.cluster, p.names[last])
	if err != nil {
		return false, err
	}
	more, err := pg.TransactionsFrom(content, p.names[last], p.a.size, stop)
	return !more && err == nil, err
}

// leadsFrom tells whether recovery from an image ends where it ends from the backup. If in doubt it does not.
func (r Route) leadsFrom(i *repo.Image, t Target) bool {
	kind, _ := t.kind()
	if i.Kind == repo.ImagePromoted {
		return kind == targetImmediate && t.action() == "promote"
	}
	if i.Kind != repo.ImageRecovery || r.alone || !r.line.has(i.Timeline, i.LSN) {
		return false
	}
	switch kind {
	case targetEnd:
		return true
	case targetTime:
		return t.Time.After(i.LastCommit) || !t.Exclusive && t.Time.Equal(i.LastCommit)
	case targetLSN:
		return t.LSN >= i.LSN
	case targetXid:
		return int32(t.Xid-i.NextXid) >= 0
	case targetName:
		return r.namedAt > i.LSN
	}
	return false
}

// has tells whether a place lies on the line.
func (l line) has(tli pg.Timeline, lsn pg.LSN) bool {
	return slices.ContainsFunc(l, func(s stretch) bool { return s.timeline == tli && s.begin <= lsn && lsn <= s.end })
}

// lower is what the overlay lies over, and what it therefore uses of the repository.
func (d *daemon) lower(ctx context.Context) (*repo.Manifest, []repo.BackupName, error) {
	m, err := d.manifest(ctx)
	if err != nil || d.record.Image == "" {
		return m, backupNames(m), err
	}
	image, err := d.repo.ImageManifest(ctx, d.record.Cluster, d.record.Image)
	return image, backupNames(m, image), err
}

func backupNames(all ...*repo.Manifest) (names []repo.BackupName) {
	for _, m := range all {
		if m != nil {
			names = append(names, m.Name())
		}
	}
	return names
}

// withoutImage tells whether a thaw should be tried again from the backup itself: something in the repository is damaged, and it
// may be the image.
func (o *ThawOptions) withoutImage(err error) bool {
	return !o.NoBootImage && errors.Is(err, repo.ErrCorrupt)
}

// imageID names the image that the copy lies over; "" is none.
func (j *job) imageID() string {
	if j.route.image == nil {
		return ""
	}
	return j.route.image.ID
}
