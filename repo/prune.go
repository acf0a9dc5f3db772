package repo

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"pgthaw/repo/store"
)

// PruneOptions of Prune.
type PruneOptions struct {
	Policy   Policy
	Clusters []string      // whose backups the policy is about; none: all clusters'
	Grace    time.Duration // between a backup's deletion and the loss of its bytes
	Apply    bool          // false: nothing is changed, and the report tells what would be

	// RepackLimit bounds the bytes of packs that repacking reads and writes. 0: nothing is repacked.
	RepackLimit int64

	Progress func(phase string, done, total int64) // in objects; nil: nobody listens
}

// DefaultGrace is how long a deleted backup can be read on by who opened it before, and how stale a store's listings may be.
const DefaultGrace = 24 * time.Hour

// PruneReport tells what Prune did, or would do.
type PruneReport struct {
	Decisions []Decision   // on the listed backups, by cluster and oldest first
	Collected []BackupName // deleted at least the grace period ago: their bytes go now
	Waiting   []BackupName // deleted, whose bytes stay for now: the grace period is not over, or something uses them
	GivenUp   []SessionInfo
	// Backups whose manifest is gone, and nobody deleted it: damage. No pack is deleted while there are any.
	Unexplained []BackupName
	Packs       PackCount // that go now
	Dead        PackCount // that nothing refers to any more but that stay for the grace period
	Later       PackCount // that only deleted backups refer to: they go with these
	WAL         []WALRange
	WALSpared   []SparedWAL
	Repacked    Repacked
	Unrepacked  error // damage, because of which nothing was repacked
}

const pruneOperation = "prune"

// Prune marks the backups as deleted that the policy does not keep, gives up sessions that show no sign of life, and
// deletes what nothing can refer to any more. Whatever else goes on in the repository meanwhile, and wherever it is
// interrupted, no listed backup loses anything.
//
// The protocol, and why it is safe: docs/format.md, "Sessions and deletion".
func (r *Repository) Prune(ctx context.Context, o PruneOptions) (*PruneReport, error) {
	p := &pruner{r: r, o: o, report: &PruneReport{}, now: time.Now(), marked: map[BackupName]bool{}, deleted: map[BackupName]bool{},
		standalone: map[BackupName]bool{}, ended: map[SessionID]bool{}}
	if p.o.Progress == nil {
		p.o.Progress = func(string, int64, int64) {}
	}
	if o.Apply {
		s, err := r.begin(ctx, SessionInfo{Operation: pruneOperation})
		if err != nil {
			return nil, err
		}
		p.own = s.Info.ID
		defer func() { _ = s.End(context.WithoutCancel(ctx)) }() // what is left of it the next prune takes away
	}
	for _, step := range []func(context.Context) error{p.readClock, p.retain, p.giveUp, p.reclaim, p.reclaimWAL, p.repack} {
		if err := step(ctx); err != nil {
			return p.report, err
		}
	}
	return p.report, nil
}

type pruner struct {
	r      *Repository
	o      PruneOptions
	own    SessionID
	report *PruneReport
	now    time.Time           // by the store's clock, if anything is changed
	marked map[BackupName]bool // that would be marked, if anything were changed

	floors     []*listedSession    // that say which WAL was pruned
	deleted    map[BackupName]bool // that were marked by this prune, or before
	ended      map[SessionID]bool  // that would be ended, if anything were changed
	standalone map[BackupName]bool // that are to be restorable to their own end only

	inventory *inventory // nil: it is not known what is needed
}

// clusters are those that the prune is about.
func (p *pruner) clusters(ctx context.Context) ([]Cluster, error) {
	all, err := p.r.Clusters(ctx)
	if err != nil || len(p.o.Clusters) == 0 {
		return all, err
	}
	return slices.DeleteFunc(all, func(c Cluster) bool { return !slices.Contains(p.o.Clusters, c.Name) }), nil
}

// readClock takes the store's time, if anything is changed: that of the session which was just put. This host's own clock says
// nothing of the age of what others put.
func (p *pruner) readClock(ctx context.Context) error {
	if !p.o.Apply {
		return nil
	}
	for o, err := range p.r.store.List(ctx, p.own.key(begunSuffix)) {
		if err != nil {
			return fmt.Errorf("read the store's clock: %w", err)
		}
		p.now = o.Modified
		return nil
	}
	return errors.New("read the store's clock: it does not list yet what this prune has just put; try again later")
}

// retain marks what the policy does not keep.
func (p *pruner) retain(ctx context.Context) error {
	clusters, err := p.clusters(ctx)
	if err != nil {
		return err
	}
	for _, c := range clusters {
		decisions, err := p.decide(ctx, c)
		if err != nil {
			return err
		}
		for _, d := range decisions {
			name := d.Backup.Name()
			p.report.Decisions = append(p.report.Decisions, d)
			p.standalone[name] = d.Standalone
			if d.Keep {
				continue
			}
			if err := p.mark(ctx, name, "not kept by the retention policy"); err != nil {
				return err
			}
		}
		if err := p.retainImages(ctx, c.Name); err != nil {
			return err
		}
	}
	return nil
}

// decide asks the policy. Of two clocks the one that is behind counts: it makes backups younger.
func (p *pruner) decide(ctx context.Context, c Cluster) ([]Decision, error) {
	backups, err := p.r.Backups(ctx, c.Name)
	if err != nil {
		return nil, err
	}
	held, alone, err := p.marks(ctx, c.Name)
	if err != nil {
		return nil, err
	}
	var times *walTimes
	if p.o.Policy.Window > 0 {
		w, err := p.r.listWAL(ctx, c)
		if err == nil {
			err = p.r.readLast(ctx, w)
		}
		if err != nil {
			return nil, err
		}
		times = &w.walTimes
	}
	now := time.Now()
	if p.now.Before(now) {
		now = p.now.Local()
	}
	all := p.o.Policy.Decide(backups, times, func(id string) (string, bool) { reason, ok := held[id]; return reason, ok }, now)
	for i, d := range all {
		all[i].Standalone = d.Standalone || d.Keep && alone[d.Backup.ID]
	}
	return all, nil
}

// marks are the ids of a cluster's backups that are held, and why, and of those that stand alone already.
func (p *pruner) marks(ctx context.Context, cluster string) (held map[string]string, alone map[string]bool, err error) {
	stored, err := p.r.storedBackups(ctx, backupsPrefix(cluster))
	held, alone = map[string]string{}, map[string]bool{}
	for _, b := range stored {
		alone[b.Backup] = !b.standalone.IsZero()
		reason, is, err := p.r.held(ctx, b, p.now)
		if err != nil {
			return nil, nil, err
		}
		if is {
			held[b.Backup] = reason
		}
	}
	return held, alone, err
}

func (p *pruner) mark(ctx context.Context, b BackupName, reason string) error {
	if !p.o.Apply {
		p.marked[b] = true
		return nil
	}
	// One that stood still may have been given up, and somebody relies on a hold that it has not seen.
	if under, err := p.r.exists(ctx, p.own.key(begunSuffix)); err != nil || !under {
		return errors.Join(err, errorIf(err == nil, fmt.Errorf("delete backup %s: this prune: %w", b, ErrGivenUp)))
	}
	p.deleted[b] = true
	return p.r.markDeleted(ctx, b, reason)
}

// giveUp ends the sessions that showed no sign of life for a day: those that died, those that stand still, and those of
// published backups, which need no protection any more. One that stands still learns of it when it goes on.
func (p *pruner) giveUp(ctx context.Context) error {
	sessions, err := p.r.sessions(ctx)
	if err != nil {
		return err
	}
	old := slices.DeleteFunc(slices.Clone(sessions), func(s *listedSession) bool { // the newest sign need not be listed yet
		return p.now.Sub(s.last) < p.o.Grace+sessionLife || s.id == p.own
	})
	p.floors = slices.DeleteFunc(sessions, func(s *listedSession) bool { return len(s.info.floors()) == 0 })
	for _, s := range old {
		if len(s.info.floors()) > 0 && !s.superseded(old) {
			continue
		}
		if err := p.giveUpSession(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// giveUpSession first says that it does, then sees whether the session's backup was published, and if not, marks it as
// deleted, whether or not it comes later. Only then the session may be forgotten.
func (p *pruner) giveUpSession(ctx context.Context, s *listedSession) error {
	if s.info != nil && !s.done && s.info.Operation != floorsOperation && s.info.Operation != giveUpOperation {
		p.report.GivenUp = append(p.report.GivenUp, *s.info)
	}
	if s.info != nil {
		if p.o.Apply {
			if err := p.r.putGivenUp(ctx, s.info); err != nil {
				return err
			}
		}
		for _, b := range s.info.Makes {
			if settled, err := p.settle(ctx, b, s); err != nil || !settled {
				return err
			}
		}
	}
	if !p.o.Apply {
		p.ended[s.id] = true
		return nil
	}
	return p.r.endSession(ctx, s.id, s.signs)
}

// sessions lists those that count: a preview leaves out what would have been ended by then.
func (p *pruner) sessions(ctx context.Context) ([]*listedSession, error) {
	all, err := p.r.sessions(ctx)
	return slices.DeleteFunc(all, func(s *listedSession) bool { return p.ended[s.id] }), err
}

// settle makes sure that a backup whose session was given up is either deleted, or in everybody's listings: then nothing
// depends on the session any more.
func (p *pruner) settle(ctx context.Context, b BackupName, by *listedSession) (settled bool, err error) {
	found, err := p.r.exists(ctx, manifestKey(b.Cluster, b.Backup))
	if err != nil {
		return false, err
	}
	if !found && by.done { // deleted and collected since, or lost
		deleted, err := p.r.exists(ctx, deletedKey(b.Cluster, b.Backup))
		return deleted, err
	}
	if !found {
		reason := fmt.Sprintf("its writer, process %d on %s, showed no sign of life for a day", by.info.PID, by.info.Host)
		if !p.o.Apply {
			p.marked[b] = true
			return true, nil
		}
		return true, p.r.markUnmade(ctx, b, reason)
	}
	for o, err := range p.r.store.List(ctx, manifestKey(b.Cluster, b.Backup)) {
		return err == nil && p.now.Sub(o.Modified) >= p.o.Grace, err
	}
	return false, nil
}

// inventory is what there was in the repository. The order in which it is taken matters: what is listed first can be
// referred to only by what is listed later, or was there before.
type inventory struct {
	packs    map[PackID]*packState
	sessions map[SessionID]bool
	backups  []*storedBackup
	used     map[BackupName]bool // by sessions
	making   map[BackupName]bool // by sessions that have not published it, as far as they say
	kept     []*keptBackup
	named    map[PackID]bool // packs, by pack lists, whether or not they are there
}

// keptBackup is one whose packs stay.
type keptBackup struct {
	*storedBackup
	manifest *Manifest
}

// packState is a pack with its editions.
type packState struct {
	editions uint16    // bit n: edition n is there; bit 0: the pack itself
	used     bool      // by listed backups
	waits    bool      // deleted ones use it
	stated   packSize  // of the pack itself, by pack lists
	live     uint64    // the most that one backup refers to, by pack lists
	size     int64     // of the newest edition
	older    int64     // bytes of the others
	modified time.Time // of the newest
}

// newest is the number of the newest edition.
func (s *packState) newest() int { return bits.Len16(s.editions) - 1 }

// keys are those of the pack and its editions.
func (s *packState) keys(id PackID) (keys []string) {
	for no := 0; no <= maxEditions; no++ {
		if s.editions>>no&1 == 1 {
			keys = append(keys, id.editionKey(no))
		}
	}
	return keys
}

func (i *inventory) addPack(id PackID, no int, o store.Object) {
	s := i.packs[id]
	if s == nil {
		s = &packState{}
		i.packs[id] = s
	}
	s.editions |= 1 << no
	s.older += s.size // keys come in ascending order
	s.size = o.Size
	if o.Modified.After(s.modified) {
		s.modified = o.Modified
	}
}

func (p *pruner) takeInventory(ctx context.Context) (*inventory, error) {
	i := &inventory{packs: map[PackID]*packState{}, sessions: map[SessionID]bool{}, used: map[BackupName]bool{}, making: map[BackupName]bool{},
		named: map[PackID]bool{}}
	for o, err := range p.r.store.List(ctx, packsRoot) {
		if err != nil {
			return nil, fmt.Errorf("list packs: %w", err)
		}
		if id, no, ok := editionOfKey(o.Key); ok {
			i.addPack(id, no, o)
			p.o.Progress("listing packs", int64(len(i.packs)), 0)
		}
	}
	sessions, err := p.sessions(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range sessions {
		i.sessions[s.id] = true
		if s.info != nil {
			addAll(i.used, s.info.Uses)
		}
		if s.info != nil && !s.done {
			addAll(i.making, s.info.Makes)
		}
	}
	i.backups, err = p.r.storedBackups(ctx, backupsRoot)
	return i, err
}

func addAll(set map[BackupName]bool, names []BackupName) {
	for _, n := range names {
		set[n] = true
	}
}

// reclaim deletes what nothing refers to any more: backups that were deleted at least the grace period ago, and then packs.
func (p *pruner) reclaim(ctx context.Context) error {
	i, err := p.takeInventory(ctx)
	if err != nil {
		return err
	}
	var kept []*storedBackup
	for n, b := range i.backups {
		p.o.Progress("reading backups", int64(n), int64(len(i.backups)))
		if keep, err := p.collect(ctx, i, b); err != nil {
			return err
		} else if keep {
			kept = append(kept, b)
		}
	}
	for n, b := range kept {
		p.o.Progress("reading pack lists", int64(n), int64(len(kept)))
		if err := p.markPacks(ctx, i, b); err != nil {
			return err
		}
	}
	if len(p.report.Unexplained) > 0 {
		return nil
	}
	p.inventory = i
	if err := p.sweep(ctx, i); err != nil {
		return err
	}
	if err := p.forgetStarts(ctx, i); err != nil {
		return err
	}
	return p.forgetDamage(ctx, i.named)
}

// collect deletes manifest and pack list of a backup whose time has come, or tells that its packs are needed.
func (p *pruner) collect(ctx context.Context, i *inventory, b *storedBackup) (keep bool, err error) {
	_, held, err := p.r.held(ctx, b, p.now)
	if err != nil {
		return false, err
	}
	switch fate := p.fate(i, b, held); fate {
	case nothing:
		return false, p.dropWord(ctx, b)
	case waits:
		p.report.Waiting = append(p.report.Waiting, b.BackupName)
		return b.manifest, nil
	case unexplained:
		if lost, err := p.lost(ctx, b); err != nil || !lost {
			return false, err
		}
		p.report.Unexplained = append(p.report.Unexplained, b.BackupName)
		return false, nil
	case goes:
		p.report.Collected = append(p.report.Collected, b.BackupName)
	default:
		return fate == stays, nil
	}
	if !p.o.Apply {
		return false, nil
	}
	keys := append([]string{manifestKey(b.Cluster, b.Backup), packListKey(b.Cluster, b.Backup), standaloneKey(b.Cluster, b.Backup)}, b.holds...)
	for _, key := range keys {
		if err := p.r.store.Delete(ctx, key); err != nil {
			return false, fmt.Errorf("delete backup %s: %w", b.BackupName, err)
		}
	}
	return false, nil
}

// dropWord deletes what another prune said of a backup when that had gone.
func (p *pruner) dropWord(ctx context.Context, b *storedBackup) error {
	if !p.o.Apply || b.deleted.IsZero() || b.standalone.IsZero() {
		return nil
	}
	if err := p.r.store.Delete(ctx, standaloneKey(b.Cluster, b.Backup)); err != nil {
		return fmt.Errorf("delete a word about backup %s, which is gone: %w", b.BackupName, err)
	}
	return nil
}

// fate is what becomes of a backup's objects.
type fate int

const (
	nothing     fate = iota // there are none, or a backup is being made
	stays                   // a listed backup
	waits                   // it is deleted, but somebody may still read it
	goes                    // now
	unexplained             // a pack list without a manifest, and neither a session nor a deletion tells why
)

func (p *pruner) fate(i *inventory, b *storedBackup, held bool) fate {
	marked := p.marked[b.BackupName] // and would be only now
	deleted := marked || !b.deleted.IsZero()
	switch {
	case b.manifest && !deleted:
		return stays
	case !b.manifest && !b.packs, !deleted && i.making[b.BackupName]:
		return nothing
	case !deleted && !b.manifest:
		return unexplained
	case i.used[b.BackupName] || held:
		return waits
	case b.manifest && p.young(b):
		return waits
	}
	return goes
}

// young tells whether a deletion may be too young to act on. Without a grace period that is one which somebody else put after
// this prune began: who put a session before that, and saw no deletion, is perhaps not among the sessions that were listed.
func (p *pruner) young(b *storedBackup) bool {
	switch {
	case p.o.Grace > 0:
		return p.marked[b.BackupName] || p.now.Sub(b.deleted) < p.o.Grace
	case p.o.Apply:
		return !b.deleted.Before(p.now) && !p.deleted[b.BackupName]
	}
	return false
}

// lost makes sure that what explains a pack list without manifest did not come after the listing, and is not only missing in
// listings that are stale.
func (p *pruner) lost(ctx context.Context, b *storedBackup) (bool, error) {
	making, err := p.r.making(ctx)
	if err != nil || making[b.BackupName] {
		return false, err
	}
	for _, key := range []string{manifestKey(b.Cluster, b.Backup), deletedKey(b.Cluster, b.Backup)} {
		if found, err := p.r.exists(ctx, key); err != nil || found {
			return false, err
		}
	}
	return p.now.Sub(b.packsPut) >= p.o.Grace, nil // or its session need not be listed yet
}

// markPacks marks the packs that a backup needs. One that cannot be read needs nobody knows what: nothing is deleted then.
func (p *pruner) markPacks(ctx context.Context, i *inventory, b *storedBackup) error {
	m, err := p.r.readManifest(ctx, b.Cluster, b.Backup)
	if errors.Is(err, ErrNoBackup) && p.isDeleted(ctx, b) && !i.used[b.BackupName] {
		return nil // another prune collected it meanwhile
	}
	var uses []packUse
	if err == nil {
		uses, err = p.r.packList(ctx, m)
	}
	if err != nil && p.isDeleted(ctx, b) && p.collected(ctx, b, i.used[b.BackupName]) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("nothing was reclaimed, for what backup %s needs is not known: %w", b.BackupName, err)
	}
	waits := !b.deleted.IsZero() || p.marked[b.BackupName]
	for _, u := range uses {
		i.named[u.pack] = true
		if s := i.packs[u.pack]; s != nil {
			s.used, s.waits = s.used || !waits, s.waits || waits
			s.stated, s.live = u.size, max(s.live, u.live)
		}
	}
	i.kept = append(i.kept, &keptBackup{b, m})
	return nil
}

// isDeleted tells whether a backup is marked, by now: it was not when it was listed, if this prune stood still since.
func (p *pruner) isDeleted(ctx context.Context, b *storedBackup) bool {
	return !b.deleted.IsZero() || errors.Is(p.r.undeleted(ctx, b.BackupName), ErrDeleted)
}

// collected tells whether a deleted backup is gone, or was before its manifest came late.
func (p *pruner) collected(ctx context.Context, b *storedBackup, used bool) bool {
	list, listErr := p.r.exists(ctx, packListKey(b.Cluster, b.Backup))
	manifest, manifestErr := p.r.exists(ctx, manifestKey(b.Cluster, b.Backup))
	return listErr == nil && manifestErr == nil && !list && (!used || !manifest)
}

// sweep deletes the packs that no backup needs, that no session may be about to refer to, and that are older than a
// listing may be stale.
func (p *pruner) sweep(ctx context.Context, i *inventory) error {
	var dead []PackID
	for id, s := range i.packs {
		if s.used || s.waits || i.sessions[id.by()] {
			if s.waits && !s.used {
				p.report.Later.add(s.size + s.older)
			}
			continue
		}
		if p.now.Sub(s.modified) < p.o.Grace {
			p.report.Dead.add(s.size + s.older)
			continue
		}
		dead = append(dead, id)
	}
	slices.SortFunc(dead, PackID.compare)
	for n, id := range dead {
		s := i.packs[id]
		if err := p.deletePack(ctx, id, s.keys(id)); err != nil {
			return err
		}
		p.report.Packs.add(s.size + s.older)
		delete(i.packs, id)
		p.o.Progress("deleting packs", int64(n), int64(len(dead)))
	}
	return nil
}

// deletePack deletes a pack, or editions of it.
func (p *pruner) deletePack(ctx context.Context, id PackID, keys []string) error {
	for _, key := range keys {
		if !p.o.Apply {
			continue
		}
		if err := p.r.store.Delete(ctx, key); err != nil {
			return fmt.Errorf("delete pack %s: %w", id, err)
		}
	}
	return nil
}
