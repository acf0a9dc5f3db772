package repo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"pgthaw/repo/pg"
)

// Info is what a repository holds and costs. It comes from documents, manifests, pack lists and listings: what lies where
// within a pack is not looked at, so bytes are told apart by whole packs where they are told apart at all.
type Info struct {
	ID         string
	URL        string
	CreatedAt  time.Time
	Encryption string

	Clusters []ClusterInfo

	SizeBytes  int64 // of all backups, as their servers had them
	Packs      PackCount
	WALBytes   int64 // of all WAL objects
	OtherBytes int64 // documents and pack lists

	// Packs that no listed backup needs: prune deletes them, when the grace period is over. Nil where a manifest, pack list or
	// session cannot be read: nobody knows then.
	Reclaimable *PackCount
	// Packs of backups that are being made, or whose writers were killed: prune looks after those when a day is over.
	Unfinished PackCount
}

// PackCount is a number of packs.
type PackCount struct {
	Packs int
	Bytes int64
}

// ClusterInfo is one cluster's part.
type ClusterInfo struct {
	Name             string
	SystemIdentifier uint64
	Backups          []BackupInfo // oldest first
	SizeBytes        int64        // of the backups
	Packs            PackCount    // that its backups use
	WALSegments      int          // whole ones
	WALSegmentBytes  int64        // of their objects
	SegmentSize      pg.SegmentSize
	WALBytes         int64 // of all WAL objects, also histories and partial segments
}

// BackupInfo is one backup's part. A pack list tells the live bytes of each pack: stored bytes that the backup's files refer
// to, as often as they do, but not more than the pack has.
type BackupInfo struct {
	*Manifest
	LiveBytes   int64     // live bytes of all packs: what the backup needs, at most
	Unique      PackCount // packs that no other backup uses, in whole: what goes when the backup does
	SharedBytes int64     // live bytes of all other packs
}

// usedPack is a pack that backups use.
type usedPack struct {
	size    uint32
	live    uint64 // by the first backup
	owner   int    // index of the first backup, counted over all clusters
	shared  bool   // others use it, too
	cluster int    // index of the cluster in which it was met last
}

// Info reads every manifest and pack list, and lists all objects. What can be read comes with an error that says what cannot.
func (r *Repository) Info(ctx context.Context) (*Info, error) {
	i := &Info{ID: r.ID(), URL: r.URL(), CreatedAt: r.config.CreatedAt, Encryption: r.config.Encryption}
	clusters, err := r.Clusters(ctx)
	if clusters == nil && err != nil {
		return i, err
	}
	c := infoCounter{r: r, info: i, packs: map[PackID]*usedPack{}, unlisted: map[SessionID]*PackCount{}}
	bad := []error{err}
	for _, cluster := range clusters {
		bad = append(bad, c.addCluster(ctx, cluster))
	}
	c.share()
	err = errors.Join(bad...)
	err = errors.Join(err, c.list(ctx))
	reclaimable, sessionErr := c.tellApart(ctx)
	if err = errors.Join(err, sessionErr); err == nil {
		i.Reclaimable = &reclaimable
	}
	return i, err
}

type infoCounter struct {
	r       *Repository
	info    *Info
	packs   map[PackID]*usedPack
	backups []*BackupInfo

	unlisted map[SessionID]*PackCount // packs that no listed backup needs, by who wrote them
}

// addCluster takes in a cluster's backups.
func (c *infoCounter) addCluster(ctx context.Context, cluster Cluster) error {
	manifests, err := c.r.Backups(ctx, cluster.Name)
	bad := []error{err}
	images, err := c.r.Images(ctx, cluster.Name)
	bad = append(bad, err)
	ci := ClusterInfo{Name: cluster.Name, SystemIdentifier: cluster.SystemIdentifier, SegmentSize: cluster.SegmentSize,
		Backups: make([]BackupInfo, len(manifests))}
	for i, m := range manifests {
		b := &ci.Backups[i]
		b.Manifest = m
		ci.SizeBytes += m.SizeBytes
		uses, err := c.r.packList(ctx, m)
		bad = append(bad, err)
		for _, u := range uses {
			c.addPack(&ci, b, u)
		}
		bad = append(bad, c.addImages(ctx, &ci, b, images[m.ID]))
		c.backups = append(c.backups, b)
	}
	c.info.SizeBytes += ci.SizeBytes
	c.info.Clusters = append(c.info.Clusters, ci)
	return errors.Join(bad...)
}

// addPack takes in one pack of the next backup.
func (c *infoCounter) addPack(ci *ClusterInfo, b *BackupInfo, u packUse) {
	b.LiveBytes += int64(u.live)
	p := c.packs[u.pack]
	if p == nil {
		p = &usedPack{size: u.size.size, live: u.live, owner: len(c.backups), cluster: -1}
		c.packs[u.pack] = p
	} else {
		p.shared = true
	}
	if p.cluster != len(c.info.Clusters) {
		p.cluster = len(c.info.Clusters)
		ci.Packs.add(int64(u.size.size))
	}
}

func (p *PackCount) add(bytes int64) {
	p.Packs++
	p.Bytes += bytes
}

func (p *PackCount) plus(o PackCount) {
	p.Packs += o.Packs
	p.Bytes += o.Bytes
}

// share tells each backup's packs apart, all being known.
func (c *infoCounter) share() {
	for _, b := range c.backups {
		b.SharedBytes = b.LiveBytes
	}
	for _, p := range c.packs {
		if b := c.backups[p.owner]; !p.shared {
			b.Unique.add(int64(p.size))
			b.SharedBytes -= int64(p.live)
		}
	}
}

// list counts all objects.
func (c *infoCounter) list(ctx context.Context) error {
	clusters := map[string]*ClusterInfo{}
	for i := range c.info.Clusters {
		clusters[c.info.Clusters[i].Name] = &c.info.Clusters[i]
	}
	unknown := map[string]bool{} // clusters whose backups were not looked at
	for o, err := range c.r.store.List(ctx, "") {
		if err != nil {
			return fmt.Errorf("list the repository: %w", err)
		}
		kind, rest, _ := strings.Cut(o.Key, "/")
		name, _, _ := strings.Cut(rest, "/")
		switch kind + "/" {
		case packsRoot:
			c.info.Packs.add(o.Size)
			if id, _, ok := editionOfKey(o.Key); ok && c.packs[id] == nil {
				c.addUnlisted(id, o.Size)
			}
		case walRoot:
			c.info.WALBytes += o.Size
			clusters[name].addWAL(o.Key, o.Size)
		case backupsRoot:
			unknown[name] = clusters[name] == nil
			fallthrough
		default:
			c.info.OtherBytes += o.Size
		}
	}
	return c.unknown(ctx, unknown)
}

func (c *infoCounter) addUnlisted(id PackID, size int64) {
	if c.unlisted[id.by()] == nil {
		c.unlisted[id.by()] = &PackCount{}
	}
	c.unlisted[id.by()].add(size)
}

// tellApart tells packs of sessions, which are listed after packs, from those that nobody will ever refer to.
func (c *infoCounter) tellApart(ctx context.Context) (reclaimable PackCount, err error) {
	sessions, err := c.r.sessions(ctx)
	for _, s := range sessions {
		if n := c.unlisted[s.id]; n != nil {
			c.info.Unfinished.plus(*n)
			delete(c.unlisted, s.id)
		}
	}
	for _, n := range c.unlisted {
		reclaimable.plus(*n)
	}
	return reclaimable, err
}

// unknown says why there are backups of clusters that Clusters did not give.
func (c *infoCounter) unknown(ctx context.Context, clusters map[string]bool) error {
	var bad []error
	for name, unknown := range clusters {
		if !unknown {
			continue
		}
		if _, err := c.r.Cluster(ctx, name); errors.Is(err, ErrNoCluster) {
			bad = append(bad, corrupt(clusterKey(name), "it is missing"))
		}
	}
	return errors.Join(bad...)
}

// addWAL counts a WAL object. ci is nil for a cluster that cannot be read.
func (ci *ClusterInfo) addWAL(key string, size int64) {
	if ci == nil {
		return
	}
	ci.WALBytes += size
	name, err := pg.ParseWALName(key[strings.LastIndexByte(key, '/')+1:])
	if err == nil && name.Kind == pg.WALSegment {
		ci.WALSegments++
		ci.WALSegmentBytes += size
	}
}
