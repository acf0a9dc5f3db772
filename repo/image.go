package repo

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"regexp"
	"slices"
	"time"

	"pgthaw/repo/pg"
)

// Image says what a boot image is: the cluster of a backup after PostgreSQL has replayed WAL from it and was shut down. It
// lies in the repository as a backup does, under a name of its own, but is never listed as one: it comes and goes with
// its backup.
//
// Format: docs/format.md, "Boot images".
type Image struct {
	Of       string      `json:"of"` // id of the backup
	Kind     ImageKind   `json:"kind"`
	LSN      pg.LSN      `json:"lsn"`      // all before it was replayed, and nothing behind
	Redo     pg.LSN      `json:"redo"`     // where a server that starts from it begins to replay
	Timeline pg.Timeline `json:"timeline"` // of the server now
	// Recovery to a target that lies behind LSN ends at the same place from the image as from the backup.
	LastCommit time.Time `json:"last_commit"` // no transaction that ended before LSN did so later
	NextXid    uint32    `json:"next_xid"`    // every transaction that ended before LSN precedes this one
	PGVersion  string    `json:"started_by"`  // of the server that replayed the WAL
	MadeAt     time.Time `json:"made_at"`     // by the clock of the host that made it
}

// ImageKind is how the server was when it was shut down.
type ImageKind string

const (
	// ImagePromoted was recovered to the backup's end, promoted and shut down: it starts with no replay, on a timeline of its own.
	ImagePromoted ImageKind = "promoted"
	// ImageRecovery was shut down in recovery: it is consistent at once, and replays on.
	ImageRecovery ImageKind = "recovery"
)

var imageID = regexp.MustCompile(`-i[0-9a-f]{8}$`)

func isImage(id string) bool { return imageID.MatchString(id) }

// newImageID makes the name of an image. Each attempt has its own, as each backup has.
func newImageID(of string) string { return of + "-i" + eightDigits() }

// Images lists a cluster's images by the ids of their backups, those that reach farther behind others. It is one listing.
// Where a manifest cannot be read, the good ones come with an error.
func (r *Repository) Images(ctx context.Context, cluster string) (map[string][]*Manifest, error) {
	return r.images(ctx, backupsPrefix(cluster))
}

// ImagesOf is Images for one backup.
func (r *Repository) ImagesOf(ctx context.Context, m *Manifest) ([]*Manifest, error) {
	all, err := r.images(ctx, backupsPrefix(m.Cluster)+m.ID+"-i")
	return all[m.ID], err
}

func (r *Repository) images(ctx context.Context, prefix string) (map[string][]*Manifest, error) {
	stored, err := r.storedBackups(ctx, prefix)
	stored = slices.DeleteFunc(stored, func(b *storedBackup) bool { return !isImage(b.Backup) || !b.manifest || !b.deleted.IsZero() })
	found, bad := readManifests(stored, func(b *storedBackup) (*Manifest, error) { return r.ImageManifest(ctx, b.Cluster, b.Backup) })
	all := map[string][]*Manifest{}
	for _, m := range found {
		all[m.Image.Of] = append(all[m.Image.Of], m)
	}
	for of := range maps.Values(all) {
		slices.SortFunc(of, byReach)
	}
	return all, errors.Join(err, bad)
}

// byReach orders images of one backup.
func byReach(a, b *Manifest) int {
	return cmp.Or(cmp.Compare(a.Image.LSN, b.Image.LSN), a.Image.MadeAt.Compare(b.Image.MadeAt), cmp.Compare(a.ID, b.ID))
}

// ImageManifest returns the manifest of an image, also of one that is deleted, as long as it is there. ErrNoBackup.
func (r *Repository) ImageManifest(ctx context.Context, cluster, id string) (*Manifest, error) {
	m, err := r.readManifest(ctx, cluster, id)
	if err == nil && (m.Image == nil || imageID.ReplaceAllString(id, "") != m.Image.Of) {
		return nil, corrupt(manifestKey(cluster, id), "it does not describe an image")
	}
	return m, err
}

// makeImage has the new backup need all packs that its original needs. So what it has from there needs no counting: of
// a large cluster that would be reading every file map. Both go at the same time.
func (w *BackupWriter) makeImage(ctx context.Context, of *Manifest) error {
	uses, err := w.r.packList(ctx, of)
	if err != nil {
		return err
	}
	w.imageOf = w.r.OpenBackup(of)
	for _, u := range uses {
		w.prior.sizes[u.pack] = u.size
		w.live.addUse(u)
	}
	return nil
}

func (l *liveBytes) addUse(u packUse) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.plus(u.pack, u.live)
}

// newestOfKinds are those that prune leaves, of images of one backup in the order of their reach.
func newestOfKinds(images []*Manifest) (newest []*Manifest) {
	for i, m := range images {
		if !slices.ContainsFunc(images[i+1:], func(o *Manifest) bool { return o.Image.Kind == m.Image.Kind }) {
			newest = append(newest, m)
		}
	}
	return newest
}

// retainImages marks images of a cluster whose backup goes or went, those that a newer one of their kind replaces, and those that
// lead to WAL that goes.
func (p *pruner) retainImages(ctx context.Context, cluster string) error {
	all, err := p.r.Images(ctx, cluster)
	if err != nil {
		return err
	}
	for of, images := range all {
		b := BackupName{cluster, of}
		gone, err := p.backupGoes(ctx, b)
		if err != nil {
			return err
		}
		newest := newestOfKinds(images)
		for _, m := range slices.Backward(images) {
			reason := ""
			switch {
			case gone:
				reason = "its backup is deleted"
			case !slices.Contains(newest, m):
				reason = "a newer boot image replaces it"
			case m.Image.Kind == ImageRecovery && p.standalone[b]:
				reason = "the WAL behind its backup goes"
			}
			if reason == "" {
				continue
			}
			if err := p.mark(ctx, m.Name(), reason); err != nil {
				return err
			}
		}
	}
	return nil
}

// backupGoes tells whether a backup is deleted by now, or would be.
func (p *pruner) backupGoes(ctx context.Context, b BackupName) (bool, error) {
	if p.marked[b] {
		return true, nil
	}
	err := p.r.undeleted(ctx, b)
	if errors.Is(err, ErrDeleted) {
		return true, nil
	}
	return false, err
}

// addImages takes in the packs that the next backup's images have for themselves: they are the backup's.
func (c *infoCounter) addImages(ctx context.Context, ci *ClusterInfo, b *BackupInfo, images []*Manifest) error {
	var bad []error
	for _, m := range images {
		uses, err := c.r.packList(ctx, m)
		bad = append(bad, err)
		for _, u := range uses {
			if c.packs[u.pack] == nil {
				c.addPack(ci, b, u)
			}
		}
	}
	return errors.Join(bad...)
}
