package repo

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// Hold keeps a backup from being deleted.
//
// Format: docs/format.md, "Sessions and deletion".
type Hold struct {
	document
	ID        string    `json:"id"` // 8 hexadecimal digits
	Cluster   string    `json:"cluster"`
	Backup    string    `json:"backup"`
	Reason    string    `json:"reason"`
	CreatedAt time.Time `json:"created_at"`
	Until     time.Time `json:"until,omitzero"` // zero: until it is removed
}

const holdKind = "pgthaw hold"

var holdSuffix = regexp.MustCompile(`^\.hold-([0-9a-f]{8})$`)

func holdKey(cluster, backup, id string) string {
	return backupsPrefix(cluster) + backup + ".hold-" + id
}

// holdLeniency is how long a hold still holds after its end: clocks differ.
const holdLeniency = 24 * time.Hour

// holds tells whether the hold is in force.
func (h *Hold) holds(now time.Time) bool {
	return h.Until.IsZero() || now.Before(h.Until.Add(holdLeniency))
}

func (h *Hold) String() string {
	if h.Until.IsZero() {
		return h.Reason
	}
	return fmt.Sprintf("%s, until %s", h.Reason, h.Until.Local().Format("2006-01-02 15:04"))
}

// AddHold holds a backup, by id or Latest, until a time; zero: until the hold is removed. ErrDeleted: the backup was deleted
// already. ErrPruning: a prune that began before may still delete it; the hold is there, and keeps the backup's bytes.
func (r *Repository) AddHold(ctx context.Context, cluster, backup, reason string, until time.Time) (Hold, error) {
	backup, err := r.resolveBackup(ctx, cluster, backup)
	if err == nil {
		_, err = r.readManifest(ctx, cluster, backup)
	}
	if err != nil {
		return Hold{}, err
	}
	h := Hold{document: document{holdKind, formatVersion}, ID: eightDigits(), Cluster: cluster, Backup: backup, Reason: reason,
		CreatedAt: time.Now().UTC().Truncate(time.Second), Until: until.UTC()}
	if err := r.putDocument(ctx, holdKey(cluster, backup, h.ID), h); err != nil {
		return Hold{}, fmt.Errorf("hold %s %s: %w", cluster, backup, err)
	}
	return h, r.settleHold(ctx, h)
}

// prunePatience is how long a new hold waits for prunes under way to end.
const prunePatience = 10 * time.Second

// settleHold makes sure that a hold was in time. A prune that begins from now on sees it; one that began before announced
// itself before it looked for holds.
func (r *Repository) settleHold(ctx context.Context, h Hold) error {
	for deadline := time.Now().Add(prunePatience); ; {
		prune, err := r.pruneUnderWay(ctx)
		if err != nil {
			return err
		}
		if err := r.undeleted(ctx, BackupName{h.Cluster, h.Backup}); err != nil {
			return errors.Join(err, r.store.Delete(context.WithoutCancel(ctx), holdKey(h.Cluster, h.Backup, h.ID)))
		}
		if prune == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: process %d on %s, since %s", ErrPruning, prune.PID, prune.Host, prune.StartedAt.Format(time.RFC3339))
		}
		if err := sleep(ctx, prunePatience/50); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, pause time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pause):
		return nil
	}
}

// pruneUnderWay is the session of a prune, nil if there is none.
func (r *Repository) pruneUnderWay(ctx context.Context) (*SessionInfo, error) {
	sessions, err := r.sessions(ctx)
	for _, s := range sessions {
		if s.info != nil && s.info.Operation == pruneOperation {
			return s.info, err
		}
	}
	return nil, err
}

// Holds lists the holds on backups that are there, of one cluster or of all (""), by backup; also those that are over. Where
// one cannot be read, the others come with an error.
func (r *Repository) Holds(ctx context.Context, cluster string) ([]Hold, error) {
	prefix := backupsRoot
	if cluster != "" {
		prefix = backupsPrefix(cluster)
	}
	backups, err := r.storedBackups(ctx, prefix)
	if err != nil {
		return nil, err
	}
	var all []Hold
	var bad []error
	for _, b := range backups {
		for _, key := range b.holds {
			h, err := r.readHold(ctx, key)
			if err != nil {
				bad = append(bad, err)
				continue
			}
			all = append(all, *h)
		}
	}
	return all, errors.Join(bad...)
}

func (r *Repository) readHold(ctx context.Context, key string) (*Hold, error) {
	h := &Hold{}
	if _, err := r.getDocument(ctx, key, holdKind, h); err != nil {
		return nil, fmt.Errorf("read hold %s: %w", key, err)
	}
	if key != holdKey(h.Cluster, h.Backup, h.ID) {
		return nil, corrupt(key, "it is hold %s on %s of %s", h.ID, h.Backup, h.Cluster)
	}
	return h, nil
}

// RemoveHold ends a hold, by its id. ErrNoHold: there is none.
func (r *Repository) RemoveHold(ctx context.Context, id string) error {
	backups, err := r.storedBackups(ctx, backupsRoot)
	if err != nil {
		return err
	}
	for _, b := range backups {
		for _, key := range b.holds {
			if strings.HasSuffix(key, ".hold-"+id) {
				return r.store.Delete(ctx, key)
			}
		}
	}
	return fmt.Errorf("%s: %w", id, ErrNoHold)
}

// held gives the reason of a hold on a backup that is in force, if there is one. One that cannot be read is in force: what
// it says is not known.
func (r *Repository) held(ctx context.Context, b *storedBackup, now time.Time) (reason string, held bool, err error) {
	for _, key := range b.holds {
		h, err := r.readHold(ctx, key)
		switch {
		case errors.Is(err, ErrCorrupt):
			return "by a hold that cannot be read, " + key, true, nil
		case err != nil:
			return "", true, err
		case h.holds(now):
			return h.String(), true, nil
		}
	}
	return "", false, nil
}
