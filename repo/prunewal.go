package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// SparedWAL is a cluster whose WAL stays for now, all of it.
type SparedWAL struct {
	Cluster string
	Reason  string
}

// walPlan is what prune is about to do with a cluster's WAL.
type walPlan struct {
	*walListing
	users []*plannedUser
}

// plannedUser is a backup that is there, and how long it needs which WAL.
type plannedUser struct {
	*Manifest
	alone      bool // it needs only what makes it consistent
	aloneLater bool
	goesLater  bool
	inUse      bool // by somebody who may want all that it leads to
}

// reclaimWAL deletes WAL that no backup can use. It announces how far that goes and then looks for backups that are being made,
// which look for such an announcement, and then for their WAL: at least one of the two sees the other.
func (p *pruner) reclaimWAL(ctx context.Context) error {
	clusters, err := p.clusters(ctx)
	if err != nil {
		return err
	}
	var plans []*walPlan
	floors := walFloors{}
	for _, c := range clusters {
		plan, err := p.planWAL(ctx, c)
		if err != nil {
			return err
		}
		if plan == nil {
			continue
		}
		plans = append(plans, plan)
		floors.raise(plan.floors(p.stays(plan))...)
	}
	if p.o.Apply && len(floors) > 0 {
		if err := p.r.putFloors(ctx, p.floors, floors); err != nil {
			return err
		}
	}
	sessions, err := p.sessions(ctx)
	if err != nil {
		return err
	}
	for _, plan := range plans {
		if err := p.deleteWAL(ctx, plan, sessions); err != nil {
			return err
		}
	}
	return nil
}

// planWAL finds out who needs WAL of a cluster, and marks the backups that are to be restorable to their own end only. It is nil
// where nobody can know.
func (p *pruner) planWAL(ctx context.Context, c Cluster) (*walPlan, error) {
	if i := slices.IndexFunc(p.report.Unexplained, func(b BackupName) bool { return b.Cluster == c.Name }); i >= 0 {
		p.spareWAL(c.Name, fmt.Sprintf("the manifest of backup %s is missing, so what it needs is not known", p.report.Unexplained[i].Backup))
		return nil, nil
	}
	w, err := p.r.listWAL(ctx, c)
	if errors.Is(err, ErrCorrupt) {
		p.spareWAL(c.Name, err.Error())
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	stored, err := p.r.storedBackups(ctx, backupsPrefix(c.Name))
	if err != nil {
		return nil, err
	}
	plan := &walPlan{walListing: w}
	for _, b := range stored {
		if !b.manifest || isImage(b.Backup) || slices.Contains(p.report.Collected, b.BackupName) {
			continue // an image needs no more WAL than its backup
		}
		u, err := p.planUser(ctx, b)
		if err != nil {
			return nil, err
		}
		if u != nil {
			plan.users = append(plan.users, u)
		}
	}
	return plan, nil
}

func (p *pruner) planUser(ctx context.Context, b *storedBackup) (*plannedUser, error) {
	m, err := p.r.readManifest(ctx, b.Cluster, b.Backup)
	if errors.Is(err, ErrNoBackup) && p.isDeleted(ctx, b) {
		return nil, nil // another prune collected it meanwhile
	}
	if err != nil {
		return nil, err
	}
	marked := !b.standalone.IsZero()
	u := &plannedUser{Manifest: m, aloneLater: marked || p.standalone[b.BackupName], goesLater: p.marked[b.BackupName] || !b.deleted.IsZero()}
	// Who recovers it to a point behind its end may have begun before it was marked: that takes the grace period, too.
	u.alone = u.aloneLater && p.o.Grace <= 0 || marked && p.now.Sub(b.standalone) >= p.o.Grace
	if p.o.Apply && u.aloneLater && !marked {
		err = p.r.markStandalone(ctx, b.Cluster, b.Backup)
	}
	return u, err
}

func (p *pruner) spareWAL(cluster, reason string) {
	p.report.WALSpared = append(p.report.WALSpared, SparedWAL{cluster, reason})
}

// now are the users as they count now, later as they count when nobody waits for anything any more.
func (plan *walPlan) now() (users []walUser) {
	for _, u := range plan.users {
		users = append(users, walUser{u.Manifest, u.alone && !u.inUse})
	}
	return users
}

func (plan *walPlan) later() (users []walUser) {
	for _, u := range plan.users {
		if !u.goesLater {
			users = append(users, walUser{u.Manifest, u.aloneLater})
		}
	}
	return users
}

// stays says why each of the WAL objects stays for now, or "". What was put within the grace period does: whoever makes a backup on
// a primary announced that before its WAL was put, and a listing that shows the one may not show the other yet.
func (p *pruner) stays(plan *walPlan) []string {
	stays := plan.needs(plan.now())
	for i, o := range plan.objects {
		if stays[i] == "" && p.now.Sub(o.put) < p.o.Grace {
			stays[i] = reasonYoung
		}
	}
	return stays
}

// floors are the LSNs before which all that goes of each timeline lies.
func (plan *walPlan) floors(stays []string) (all []WALFloor) {
	for i, o := range plan.objects {
		if stays[i] == "" {
			no, _ := o.name.SegmentNo(plan.size) // what has none stays
			all = append(all, WALFloor{plan.cluster, o.name.Timeline, plan.size.Start(no + 1)})
		}
	}
	return all
}

// deleteWAL deletes what can go, oldest first, unless a backup is being made that may need it.
func (p *pruner) deleteWAL(ctx context.Context, plan *walPlan, sessions []*listedSession) error {
	reason, err := p.heedSessions(ctx, plan, sessions)
	if err != nil {
		return err
	}
	if reason != "" {
		p.spareWAL(plan.cluster, reason)
		return nil
	}
	stays := p.stays(plan)
	p.report.WAL = append(p.report.WAL, plan.ranges(stays, plan.needs(plan.later()))...)
	if !p.o.Apply {
		return nil
	}
	for i, o := range plan.objects {
		if stays[i] != "" {
			continue
		}
		p.o.Progress("deleting WAL of "+plan.cluster, int64(i), int64(len(plan.objects)))
		if err := p.r.store.Delete(ctx, walKey(plan.cluster, o.name)); err != nil {
			return fmt.Errorf("delete WAL file %s: %w", o.name, err)
		}
	}
	return nil
}

// heedSessions takes in what sessions use, and says why the WAL has to be spared: a session makes a backup that is not among
// those that were looked at, and not deleted; or one is there by now, whose session may be gone.
func (p *pruner) heedSessions(ctx context.Context, plan *walPlan, sessions []*listedSession) (reason string, err error) {
	for _, s := range sessions {
		if s.info == nil {
			continue
		}
		for _, b := range s.info.Uses {
			if u := plan.user(b); u != nil {
				u.inUse = true
			}
		}
		for _, b := range s.info.Makes {
			if b.Cluster != plan.cluster || plan.user(b) != nil || isImage(b.Backup) {
				continue
			}
			deleted, err := p.r.exists(ctx, deletedKey(b.Cluster, b.Backup))
			if err != nil {
				return "", err
			}
			if !deleted {
				return fmt.Sprintf("a backup is being made, by process %d on %s since %s", s.info.PID, s.info.Host,
					s.info.StartedAt.Local().Format(time.DateTime)), nil
			}
		}
	}
	return p.heedNew(ctx, plan)
}

func (p *pruner) heedNew(ctx context.Context, plan *walPlan) (reason string, err error) {
	stored, err := p.r.storedBackups(ctx, backupsPrefix(plan.cluster))
	for _, b := range stored {
		if b.manifest && !isImage(b.Backup) && plan.user(b.BackupName) == nil && !slices.Contains(p.report.Collected, b.BackupName) {
			return fmt.Sprintf("backup %s was made meanwhile", b.Backup), err
		}
	}
	return "", err
}

func (plan *walPlan) user(b BackupName) *plannedUser {
	i := slices.IndexFunc(plan.users, func(u *plannedUser) bool { return u.Name() == b })
	if i < 0 {
		return nil
	}
	return plan.users[i]
}
