package repo

import (
	"context"
	"errors"
	"fmt"

	"pgthaw/repo/store"
)

// standalone marks a backup that is restorable to its own end only: prune keeps the WAL that makes it consistent, and not
// what lies behind. The mark stays as long as the backup.
//
// Format: docs/format.md, "Sessions and deletion".
type standalone struct {
	document
	ID      string `json:"id"`
	Cluster string `json:"cluster"`
}

const (
	standaloneKind   = "pgthaw standalone"
	standaloneSuffix = ".standalone"
)

func standaloneKey(cluster, id string) string { return backupsPrefix(cluster) + id + standaloneSuffix }

// markStandalone comes before the WAL goes. Marked already is as good.
func (r *Repository) markStandalone(ctx context.Context, cluster, id string) error {
	key := standaloneKey(cluster, id)
	err := r.putDocument(ctx, key, standalone{document{standaloneKind, formatVersion}, id, cluster})
	if err != nil && !errors.Is(err, store.ErrExist) {
		return fmt.Errorf("mark %s: %w", key, err)
	}
	return nil
}

// Standalone tells whether a backup is restorable to its own end only, because the WAL behind it was pruned or is about to be.
func (r *Repository) Standalone(ctx context.Context, m *Manifest) (bool, error) {
	return r.exists(ctx, standaloneKey(m.Cluster, m.ID))
}

// StandaloneIDs are the ids of a cluster's backups that are restorable to their own end only. It is one listing.
func (r *Repository) StandaloneIDs(ctx context.Context, cluster string) (map[string]bool, error) {
	all, err := r.storedBackups(ctx, backupsPrefix(cluster))
	ids := map[string]bool{}
	for _, b := range all {
		if !b.standalone.IsZero() {
			ids[b.Backup] = true
		}
	}
	return ids, err
}
