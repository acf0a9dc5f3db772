package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"

	"golang.org/x/sync/errgroup"
)

// packList makes a backup's pack list anew. Which packs it names and how much of each is live follows from the backup's trees and
// maps; the packs' sizes stand in other pack lists, or in the packs. The manifest has the digest of all that: it is right, or it is not.
func (k *repairer) packList(ctx context.Context, m *Remedy, name BackupName) error {
	manifest, err := k.r.readManifest(ctx, name.Cluster, name.Backup)
	if err != nil {
		m.Next = nextAgain // it could be read a moment ago
		return unanswered(ctx, errorIf(!errors.Is(err, ErrNoBackup), err))
	}
	if _, err := k.r.packList(ctx, manifest); err == nil {
		m.Next = nextMade
		return nil
	} else if !errors.Is(err, ErrCorrupt) {
		m.Next = nextMedium
		return unanswered(ctx, err)
	}
	uses, err := k.derivePackList(ctx, manifest)
	if err == nil {
		object, id := k.r.encodePackList(m.Object, uses)
		if id != manifest.Packs.ID {
			err = corrupt(m.Object, "what the backup's files use does not have its digest")
		} else {
			err = k.replace(ctx, m.Object, object, func() error { _, err := k.r.packList(ctx, manifest); return err })
		}
	}
	switch {
	case err == nil:
		m.Outcome = Repaired
	case errors.Is(err, ErrCorrupt):
		k.r.log.Info("a pack list cannot be made anew", "error", err)
		m.Next = nextList
		return nil
	}
	return err
}

func (k *repairer) derivePackList(ctx context.Context, m *Manifest) ([]packUse, error) {
	live, err := k.liveBytes(ctx, m)
	if err != nil {
		return nil, err
	}
	sizes, err := k.listedSizes(ctx, m)
	if err != nil {
		return nil, err
	}
	var uses []packUse
	for id, n := range live {
		size, ok := sizes[id]
		if !ok {
			if size, err = k.measure(ctx, id); err != nil {
				return nil, err
			}
		}
		uses = append(uses, packUse{pack: id, size: size, live: min(n, uint64(size.size))})
	}
	slices.SortFunc(uses, func(a, b packUse) int { return bytes.Compare(a.pack[:], b.pack[:]) })
	return uses, nil
}

// liveBytes counts what the backup's files and directories refer to, as its writer did.
func (k *repairer) liveBytes(ctx context.Context, m *Manifest) (map[PackID]uint64, error) {
	var live liveBytes
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	err := k.r.OpenBackup(m).Walk(gctx, ".", func(_ string, e Entry) error {
		switch e.content.kind {
		case contentTree:
			live.add(e.content.ref)
		case contentMap:
			live.add(e.content.ref)
			fallthrough
		case contentInlineMap:
			g.Go(func() error {
				fm, err := k.r.fileMap(gctx, e)
				if err == nil {
					live.add(fm.chunks...)
				}
				return err
			})
		}
		return nil
	})
	if failed := g.Wait(); failed != nil {
		err = failed // it has ended the walk
	}
	return live.packs(), err
}

// listedSizes are the sizes of packs, as the pack lists of other backups have them that can be read.
func (k *repairer) listedSizes(ctx context.Context, m *Manifest) (map[PackID]packSize, error) {
	sizes := map[PackID]packSize{}
	stored, err := k.r.storedBackups(ctx, backupsRoot)
	if err != nil {
		return nil, err
	}
	for _, b := range stored {
		if b.BackupName == m.Name() || !b.listed() || !b.packs {
			continue
		}
		other, err := k.r.readManifest(ctx, b.Cluster, b.Backup)
		var uses []packUse
		if err == nil {
			uses, err = k.r.packList(ctx, other)
		}
		if err := unanswered(ctx, err); err != nil && !errors.Is(err, ErrNoBackup) {
			return nil, err
		}
		for _, u := range uses {
			sizes[u.pack] = u.size
		}
	}
	return sizes, nil
}

// measure takes the sizes of a pack from itself.
func (k *repairer) measure(ctx context.Context, id PackID) (packSize, error) {
	for o, err := range k.r.store.List(ctx, id.key()) {
		if err != nil {
			return packSize{}, err
		}
		if o.Key != id.key() { // an edition: what the pack's own size was is in pack lists only
			break
		}
		if o.Size < packHeaderSize+packTrailerSize || o.Size > maxPackSize {
			return packSize{}, corrupt(o.Key, "a size of %d", o.Size)
		}
		trailer, err := k.r.getPack(ctx, id, o.Size-packTrailerSize, packTrailerSize)
		if err != nil {
			return packSize{}, err
		}
		return packSize{uint32(o.Size), binary.LittleEndian.Uint32(trailer[4:])}, nil
	}
	return packSize{}, corrupt(id.key(), "it is missing")
}
