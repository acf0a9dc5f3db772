package repo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"pgthaw/repo/store"
)

// deletion marks a backup as deleted: it is not listed, and nobody begins to use it. What it consists of goes later. The
// mark stays for good, so that a manifest which comes late does not bring the backup back.
//
// Format: docs/format.md, "Sessions and deletion".
type deletion struct {
	document
	ID        string    `json:"id"`
	Cluster   string    `json:"cluster"`
	Reason    string    `json:"reason"`
	DeletedAt time.Time `json:"deleted_at"` // by the clock of the host that did it
	// Unmade says that there never was such a backup: its writer was given up. A copy may then be tried again.
	Unmade bool `json:"unmade,omitempty"`
}

const (
	deletionKind  = "pgthaw deletion"
	deletedSuffix = ".deleted"
)

func deletedKey(cluster, id string) string { return backupsPrefix(cluster) + id + deletedSuffix }

// markDeleted deletes a backup, for those who look from now on. Marked already is as good.
func (r *Repository) markDeleted(ctx context.Context, b BackupName, reason string) error {
	return r.putDeletion(ctx, deletion{ID: b.Backup, Cluster: b.Cluster, Reason: reason})
}

// markUnmade keeps a backup that was not published from ever being listed.
func (r *Repository) markUnmade(ctx context.Context, b BackupName, reason string) error {
	return r.putDeletion(ctx, deletion{ID: b.Backup, Cluster: b.Cluster, Reason: reason, Unmade: true})
}

func (r *Repository) putDeletion(ctx context.Context, d deletion) error {
	d.document = document{deletionKind, formatVersion}
	d.DeletedAt = time.Now().UTC().Truncate(time.Second)
	if err := r.putDocument(ctx, deletedKey(d.Cluster, d.ID), d); err != nil && !errors.Is(err, store.ErrExist) {
		return fmt.Errorf("delete backup %s %s: %w", d.Cluster, d.ID, err)
	}
	return nil
}

// deletion reads the mark of a backup that has one.
func (r *Repository) deletion(ctx context.Context, b BackupName) (d deletion, err error) {
	_, err = r.getDocument(ctx, deletedKey(b.Cluster, b.Backup), deletionKind, &d)
	return d, err
}

// storedBackup is what there is of one backup.
type storedBackup struct {
	BackupName
	manifest, packs bool
	packsPut        time.Time // when the pack list was put, by the store's clock
	deleted         time.Time // when it was marked, by the store's clock; zero: it is not
	standalone      time.Time // when that was marked, the same
	holds           []string  // keys
}

// listed tells whether it is a backup to those who look for backups.
func (b *storedBackup) listed() bool { return b.manifest && b.deleted.IsZero() && !isImage(b.Backup) }

// storedBackups lists what there is of the backups below a prefix, which is backupsRoot or a cluster's; by cluster and
// oldest first.
func (r *Repository) storedBackups(ctx context.Context, prefix string) ([]*storedBackup, error) {
	var all []*storedBackup
	for o, err := range r.store.List(ctx, prefix) {
		if err != nil {
			return nil, fmt.Errorf("list backups: %w", err)
		}
		name, suffix, ok := splitBackupKey(o.Key)
		if !ok {
			continue
		}
		if len(all) == 0 || all[len(all)-1].BackupName != name {
			all = append(all, &storedBackup{BackupName: name})
		}
		all[len(all)-1].add(suffix, o)
	}
	return all, nil
}

// splitBackupKey takes apart backups/<cluster>/<id><suffix>.
func splitBackupKey(key string) (name BackupName, suffix string, ok bool) {
	cluster, rest, _ := strings.Cut(strings.TrimPrefix(key, backupsRoot), "/")
	id := beginsWithID.FindString(rest)
	return BackupName{cluster, id}, rest[len(id):], id != ""
}

func (b *storedBackup) add(suffix string, o store.Object) {
	switch suffix {
	case manifestSuffix:
		b.manifest = true
	case packListSuffix:
		b.packs, b.packsPut = true, o.Modified
	case deletedSuffix:
		b.deleted = o.Modified
	case standaloneSuffix:
		b.standalone = o.Modified
	default:
		if holdSuffix.MatchString(suffix) {
			b.holds = append(b.holds, o.Key)
		}
	}
}
