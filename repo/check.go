package repo

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"pgthaw/repo/pg"
)

// CheckOptions of Check. The zero value checks structure: documents and pack lists, that each pack is there and has its size,
// and that the WAL which backups lead to is there without a gap. It reads nothing of packs.
type CheckOptions struct {
	Maps     bool   // also each pack's table of contents, every directory and file map, each place in a pack that they name, and the heads of WAL objects
	ReadData bool   // also every byte of packs and WAL objects; includes Maps
	Sample   Sample // what ReadData reads; the zero value: everything

	Progress func(phase string, done, total int64) // in bytes; a total of 0 is not known. nil: nobody listens
}

// Finding is one thing that is wrong, and what that costs.
type Finding struct {
	Object  string      // key of what is damaged or missing
	Cluster string      // whose it is; "" for a pack
	Err     error       // what is wrong with it
	Cost    string      // what cannot be done any more, a sentence
	Backups []Affected  // that use it, oldest first
	Window  *LostWindow // that cannot be recovered to; nil: none
	Note    bool        // nothing is damaged: WAL that was never archived

	Recorded bool // that it is damaged: new backups do not refer to the pack, and the WAL file can be pushed again if it is gone
}

// Affected is a backup that something damaged is part of.
type Affected struct {
	Cluster, Backup string
	Files           []string // which cannot be read, at most maxNamed of them; a directory's name ends in "/"
	Total           int      // how many these are in all; 0: which files was not looked at
}

// maxNamed bounds the files that a finding names.
const maxNamed = 20

// LostWindow is a time to which nothing can be recovered, because WAL is missing.
type LostWindow struct {
	From    Moment   // recovery of the backups before ends here. Time is that of the last commit before, zero if not known
	To      Moment   // end of the first backup behind; zero: there is none
	Backups []string // from which recovery ends at From, oldest first
}

// Moment is a place in a cluster's WAL and its time.
type Moment struct {
	LSN  pg.LSN
	Time time.Time
}

// Checked counts what Check looked at.
type Checked struct {
	Clusters, Backups, Packs int
	Maps                     int // distinct directories and file maps
	WALFiles                 int
	PacksRead, WALRead       int   // of which every byte was verified
	Bytes                    int64 // that these have
}

// Check looks at everything in the repository and reports each thing that is wrong; it goes on after each. found is called
// by one goroutine at a time. The error it returns is that the check itself could not be done, or not to its end.
//
// What it keeps in memory: backups' manifests, the names of packs and WAL objects, the numbers of the packs of each distinct
// file map, and tables of contents up to a limit.
func (r *Repository) Check(ctx context.Context, o CheckOptions, found func(Finding)) (Checked, error) {
	o.Maps = o.Maps || o.ReadData
	c := &checker{r: r, o: o, found: found, packs: map[PackID]*checkedPack{}, damages: map[uint32]*packDamage{},
		bad: map[place]bool{}, tocs: newCache[PackID, *packTOC](checkTOCBytes)}
	session, err := c.protect(ctx)
	defer func() { _ = session.End(context.WithoutCancel(ctx)) }() // what is left of it prune takes away
	if err == nil {
		err = c.run(ctx)
	}
	if err != nil { // what was found until then is worth having
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_ = c.reportPacks(last)
		return c.done, err
	}
	return c.done, c.reportPacks(ctx)
}

// checkTOCBytes bounds the tables of contents kept, without page digests: those of some hundred gigabytes of stored chunks.
const checkTOCBytes = 64 << 20

// atOnce is how many small reads go on in parallel: each takes an object store tens of milliseconds.
const atOnce = 16

type checker struct {
	r    *Repository
	o    CheckOptions
	done Checked // changed by the goroutine that runs Check; Bytes through bytes
	tocs *cache[PackID, *packTOC]

	clusters []*checkedCluster // by name
	maps     *mapChecker
	allRead  bool // every byte of every pack

	recorded map[string]bool // keys of objects that are recorded as damaged

	bytes atomic.Int64 // of done, while packs and WAL objects are read

	unlisted map[PackID]int64 // packs that are there but in no pack list, with their size
	editions map[string]int64 // that are there, by key, with their size
	meeting  sync.Mutex       // held while a pack that is in no pack list is looked at, and entered into packs

	mu      sync.Mutex // a leaf, but for found, which is called under it
	found   func(Finding)
	packs   map[PackID]*checkedPack
	order   []*checkedPack         // packs by number
	damages map[uint32]*packDamage // by number of the pack
	bad     map[place]bool         // pieces that are damaged
}

// checkedCluster is a cluster's backups and WAL, as far as they can be read.
type checkedCluster struct {
	name    string
	size    pg.SegmentSize  // 0: neither the cluster's document nor a manifest says
	ids     []string        // of the manifests that are listed
	alone   map[string]bool // the ids of those that are restorable to their own end only
	orphans []string        // of pack lists without a manifest
	holds   []string        // keys
	backups []*Manifest     // that can be read, oldest first
	images  []*Manifest     // of them, likewise: they need no WAL of their own
	wal     *clusterWAL
}

// run goes through the phases. Manifests come first: what they need was there before them, so what is listed later and lacks
// something they need is damaged, whatever is written meanwhile.
func (c *checker) run(ctx context.Context) error {
	phases := []func(context.Context) error{c.checkKeySlots, c.checkSessions, c.checkBackups, c.checkHolds, c.checkStarts, c.checkWAL, c.checkPacks}
	if c.o.Maps {
		phases = append(phases, c.checkMaps, c.checkWALObjects)
	}
	if c.o.ReadData {
		phases = append(phases, c.readData)
	}
	if c.o.Maps {
		phases = append(phases, c.blame)
	}
	for _, phase := range phases {
		if err := phase(ctx); err != nil {
			return err
		}
	}
	return nil
}

// report hands on a finding.
func (c *checker) report(f Finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.Recorded = c.recorded[f.Object]
	c.found(f)
}

// unanswered returns err if it says nothing about the object that was asked for: ctx ended, or the store is out of reach.
// What is damaged, and a file that the file system cannot read, is no such error but a finding.
func unanswered(ctx context.Context, err error) error {
	var format *FormatError
	var path *fs.PathError
	if err == nil || ctx.Err() == nil && (errors.Is(err, ErrCorrupt) || errors.As(err, &format) || errors.As(err, &path)) {
		return nil
	}
	return err
}

func (c *checker) progress(phase string, done, total int64) {
	if c.o.Progress != nil {
		c.o.Progress(phase, done, total)
	}
}

// checkKeySlots reads those of an encrypted repository. One that is damaged is somebody's only way in.
func (c *checker) checkKeySlots(ctx context.Context) error {
	slots, err := c.r.KeySlots(ctx)
	for _, slot := range slots {
		if slot.Foreign {
			c.report(Finding{Object: slot.key(), Err: foreign(slot), Cost: "Its label and recipient may be wrong; nothing opens with it."})
		}
	}
	return c.reportEach(ctx, err, "Whoever holds this key cannot open the repository with it.")
}

// checkSessions reads what is announced. Prune deletes nothing while it does not know what somebody uses.
func (c *checker) checkSessions(ctx context.Context) error {
	_, err := c.r.sessions(ctx)
	return c.reportEach(ctx, err, "Prune cannot reclaim anything until it is deleted.")
}

// reportEach reports each object of those that an error names, and returns what is left of it.
func (c *checker) reportEach(ctx context.Context, err error, cost string) (unexplained error) {
	all := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		all = joined.Unwrap()
	}
	for _, err := range all {
		if object := objectOf(err); object != "" {
			c.report(Finding{Object: object, Err: err, Cost: cost})
		}
		unexplained = errors.Join(unexplained, unanswered(ctx, err))
	}
	return unexplained
}

// checkBackups reads every manifest and pack list.
func (c *checker) checkBackups(ctx context.Context) error {
	for _, cl := range c.clusters {
		for _, id := range cl.ids {
			if err := c.checkManifest(ctx, cl, id); err != nil {
				return err
			}
		}
		for _, id := range cl.orphans {
			if err := c.checkOrphan(ctx, cl, id); err != nil {
				return err
			}
		}
	}
	return nil
}

// listBackups finds the clusters that have backups, and the backups' ids.
func (c *checker) listBackups(ctx context.Context) error {
	all, err := c.r.storedBackups(ctx, backupsRoot)
	for _, b := range all {
		cl := c.cluster(b.Cluster)
		cl.alone[b.Backup] = !b.standalone.IsZero()
		cl.holds = append(cl.holds, b.holds...)
		switch {
		case !b.deleted.IsZero():
		case b.manifest:
			cl.ids = append(cl.ids, b.Backup)
		default:
			cl.orphans = append(cl.orphans, b.Backup)
		}
	}
	return err
}

// protect keeps prune from the backups while they are checked, and lists them again as long as one is deleted before that.
func (c *checker) protect(ctx context.Context) (*Session, error) {
	for {
		c.clusters = nil
		if err := c.listBackups(ctx); err != nil {
			return nil, err
		}
		var names []BackupName
		for _, cl := range c.clusters {
			for _, id := range cl.ids {
				names = append(names, BackupName{cl.name, id})
			}
		}
		s, err := c.r.Use(ctx, "check", names...)
		if !errors.Is(err, ErrDeleted) {
			return s, err
		}
	}
}

// cluster returns the cluster of a name, which may be new.
func (c *checker) cluster(name string) *checkedCluster {
	i, ok := slices.BinarySearchFunc(c.clusters, name, func(cl *checkedCluster, name string) int { return strings.Compare(cl.name, name) })
	if !ok {
		c.clusters = slices.Insert(c.clusters, i, &checkedCluster{name: name, alone: map[string]bool{}})
	}
	return c.clusters[i]
}

// checkManifest reads a manifest and its pack list, and enters the packs that are to be there.
func (c *checker) checkManifest(ctx context.Context, cl *checkedCluster, id string) error {
	m, err := c.r.readManifest(ctx, cl.name, id)
	if errors.Is(err, ErrNoBackup) {
		return nil // deleted since it was listed
	}
	if !isImage(id) {
		c.done.Backups++
	}
	if err != nil {
		c.report(Finding{Object: manifestKey(cl.name, id), Cluster: cl.name, Err: err, Backups: []Affected{{Cluster: cl.name, Backup: id}},
			Cost: costOf(id)})
		return unanswered(ctx, err)
	}
	if isImage(id) {
		cl.images = append(cl.images, m)
	} else {
		cl.backups = append(cl.backups, m)
	}
	uses, err := c.r.packList(ctx, m)
	if err != nil {
		c.report(Finding{Object: packListKey(cl.name, id), Cluster: cl.name, Err: err, Backups: []Affected{{Cluster: cl.name, Backup: id}},
			Cost: "The backup can still be restored, but which packs it needs is not known: the next backup stores everything anew, and prune reclaims nothing."})
		return unanswered(ctx, err)
	}
	for _, u := range uses {
		c.enter(u, m)
	}
	return nil
}

// enter takes in a pack that a pack list names. All lists have to agree on its size.
func (c *checker) enter(u packUse, m *Manifest) {
	p, known := c.packs[u.pack]
	if !known {
		c.add(&checkedPack{id: u.pack, no: uint32(len(c.order)), size: u.size, stored: -1})
		return
	}
	if p.size != u.size {
		key := packListKey(m.Cluster, m.ID)
		c.report(Finding{Object: key, Cluster: m.Cluster, Backups: []Affected{{Cluster: m.Cluster, Backup: m.ID}},
			Err:  corrupt(key, "pack %s has %d bytes there, but %d in the list of another backup", u.pack, u.size.size, p.size.size),
			Cost: "One of the two is wrong: what lies in that pack, the next backup may store anew."})
	}
}

// checkOrphan reports a pack list without a manifest, unless a backup is being made, or the prune to come knows of it.
func (c *checker) checkOrphan(ctx context.Context, cl *checkedCluster, id string) error {
	making, err := c.r.making(ctx)
	if err := unanswered(ctx, err); err != nil || making[BackupName{cl.name, id}] {
		return err
	}
	key := manifestKey(cl.name, id)
	if found, err := c.r.exists(ctx, key); err != nil {
		return err
	} else if found {
		return c.checkManifest(ctx, cl, id)
	}
	if found, err := c.r.exists(ctx, packListKey(cl.name, id)); err != nil || !found {
		return err // its writer failed, and has taken it away
	}
	if err := c.r.undeleted(ctx, BackupName{cl.name, id}); err != nil {
		return errorIf(!errors.Is(err, ErrDeleted), err) // its writer was given up meanwhile
	}
	c.report(Finding{Object: key, Cluster: cl.name, Err: corrupt(key, "it is missing, but the backup's pack list is there"),
		Backups: []Affected{{Cluster: cl.name, Backup: id}},
		Cost:    costOf(id)})
	return nil
}

// costOf is what the loss of a manifest costs.
func costOf(id string) string {
	if isImage(id) {
		return "The backup's boot image cannot be used: a thaw recovers the backup itself, and \"pgthaw boot-image\" makes another."
	}
	return "The backup cannot be listed, mounted or restored."
}

// withImages are all whose files are looked at.
func (cl *checkedCluster) withImages() []*Manifest { return slices.Concat(cl.backups, cl.images) }
