package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"reflect"
	"slices"

	"pgthaw/repo/pg"
)

// errWrongBytes is what must never happen: other bytes than were written, and no error.
var errWrongBytes = errors.New("wrong bytes")

// repoRead is one way in which somebody comes to bytes of the repository. It returns the repository's error, or errWrongBytes.
type repoRead struct {
	name  string
	do    func(ctx context.Context, r *Repository) error
	spans map[string][]span // what it fetches while nothing is damaged
}

// depends tells whether the read fetches any of the bytes.
func (r *repoRead) depends(key string, at span) bool {
	for _, s := range r.spans[key] {
		if s.overlaps(at) {
			return true
		}
	}
	return false
}

// wroteBackup is a backup and what was written into it.
type wroteBackup struct {
	m     *Manifest
	files testFiles
}

// wrote is all that was written.
type wrote struct {
	config  config
	cluster Cluster
	backups []wroteBackup
	wal     map[pg.WALName][]byte
}

// coldRepository is r with nothing in its caches. Opening it anew would cost more than most reads do.
func coldRepository(r *Repository) *Repository {
	cold := &Repository{url: r.url, store: r.store, config: r.config, log: r.log, digests: r.digests, seals: r.seals, codec: r.codec}
	cold.emptyCaches(defaultCacheBytes)
	return cold
}

// same is errWrongBytes if what was read differs from what was written.
func same(what string, got, want any) error {
	if reflect.DeepEqual(got, want) {
		return nil
	}
	return fmt.Errorf("%s: %w", what, errWrongBytes)
}

func sameBytes(what string, got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	return fmt.Errorf("%s: %w", what, errWrongBytes)
}

// openReads come by the configuration and the key slots; each opens the repository with one of the keys.
func (w *wrote) openReads(keys []Key) []repoRead {
	open := func(keys ...Key) func(context.Context, *Repository) error {
		return func(ctx context.Context, r *Repository) error {
			again, err := openStore(ctx, r.store, r.url, Options{Keys: keys})
			if err != nil {
				return err
			}
			if again.ID() != w.config.ID { // it is not damage to be another repository
				return errors.New("config: another repository's")
			}
			defer again.codec.dec.Close()
			if *again.seals.masterOrNone() != *r.seals.masterOrNone() || again.digests.pieceBlock != r.digests.pieceBlock {
				return fmt.Errorf("the repository's keys: %w", errWrongBytes)
			}
			return same("configuration", again.config, w.config)
		}
	}
	if len(keys) == 0 {
		return []repoRead{{name: "open", do: open()}}
	}
	var all []repoRead
	for i, k := range keys {
		all = append(all, repoRead{name: fmt.Sprintf("open with key %d", i), do: open(k)})
	}
	return append(all, repoRead{name: "key slots", do: func(ctx context.Context, r *Repository) error {
		_, err := r.KeySlots(ctx)
		return err
	}})
}

func (s *seals) masterOrNone() *masterKey {
	if s.master == nil {
		return &masterKey{}
	}
	return s.master
}

// listReads are what list and info ask. What they do not name any more is missed by name.
func (w *wrote) listReads() []repoRead {
	return []repoRead{
		{name: "clusters", do: func(ctx context.Context, r *Repository) error {
			got, err := r.Clusters(ctx)
			if err != nil {
				return err
			}
			if len(got) == 0 {
				return errors.New("clusters/main is not listed")
			}
			return same("clusters", got, []Cluster{w.cluster})
		}},
		{name: "backups", do: func(ctx context.Context, r *Repository) error {
			got, err := r.Backups(ctx, "main")
			if err != nil {
				return err
			}
			return w.checkListed(got)
		}},
		{name: "info", do: func(ctx context.Context, r *Repository) error {
			got, err := r.Info(ctx)
			if err != nil || len(got.Clusters) == 0 {
				return err
			}
			var listed []*Manifest
			for _, b := range got.Clusters[0].Backups {
				listed = append(listed, b.Manifest)
			}
			return w.checkListed(listed)
		}},
		{name: "WAL names", do: func(ctx context.Context, r *Repository) error {
			got, err := r.WALNames(ctx, "main")
			if err != nil {
				return err
			}
			for name := range w.wal {
				if !slices.Contains(got, name) {
					return fmt.Errorf("%s is not listed", name)
				}
			}
			return nil
		}},
	}
}

// checkListed compares a list of backups with those written.
func (w *wrote) checkListed(got []*Manifest) error {
	listed := map[string]*Manifest{}
	for _, m := range got {
		listed[m.ID] = m
	}
	for _, b := range w.backups {
		if m := listed[b.m.ID]; m == nil {
			return fmt.Errorf("%s is not listed", b.m.ID)
		} else if err := same("manifest", m, b.m); err != nil {
			return err
		}
	}
	return nil
}

// reads are those of one backup, each from its manifest on.
func (b wroteBackup) reads(ctx context.Context, r *Repository) ([]repoRead, error) {
	uses, err := r.packList(ctx, b.m)
	if err != nil {
		return nil, err
	}
	all := []repoRead{
		{name: "manifest", do: func(ctx context.Context, r *Repository) error {
			got, err := r.Manifest(ctx, "main", b.m.ID)
			if err != nil {
				return err
			}
			return same("manifest", got, b.m)
		}},
		{name: "pack list", do: func(ctx context.Context, r *Repository) error {
			got, err := r.packList(ctx, b.m)
			if err != nil {
				return err
			}
			return same("pack list", got, uses)
		}},
		{name: "tree", do: func(ctx context.Context, r *Repository) error { return b.checkTree(ctx, r) }},
	}
	for _, name := range slices.Sorted(maps.Keys(b.files)) {
		size := int64(len(b.files[name]))
		all = append(all, repoRead{name: name, do: func(ctx context.Context, r *Repository) error { return b.checkRange(ctx, r, name, 0, size) }})
		for off := int64(3 * PageSize); off+PageSize <= size; off += ChunkSize - PageSize {
			all = append(all, repoRead{name: fmt.Sprintf("%s from %d", name, off), do: func(ctx context.Context, r *Repository) error {
				return b.checkRange(ctx, r, name, off-100, min(2*PageSize, size-off+100))
			}})
		}
	}
	for _, u := range uses {
		toc, err := r.readTOC(ctx, u.pack, u.size)
		if err != nil {
			return nil, err
		}
		all = append(all, tocRead(u, toc))
	}
	return all, nil
}

// tocRead reads a table of contents as the next backup does.
func tocRead(u packUse, want *packTOC) repoRead {
	return repoRead{name: "table of contents of " + u.pack.String(), do: func(ctx context.Context, r *Repository) error {
		got, err := r.readTOC(ctx, u.pack, u.size)
		if err != nil {
			return err
		}
		return same("table of contents", got, want)
	}}
}

// open returns the backup by way of its manifest.
func (b wroteBackup) open(ctx context.Context, r *Repository) (*Backup, error) {
	m, err := r.Manifest(ctx, "main", b.m.ID)
	if err != nil {
		return nil, err
	}
	return r.OpenBackup(m), nil
}

// checkTree compares the files' names and sizes.
func (b wroteBackup) checkTree(ctx context.Context, r *Repository) error {
	backup, err := b.open(ctx, r)
	if err != nil {
		return err
	}
	seen := 0
	err = backup.Walk(ctx, ".", func(name string, e Entry) error {
		if !e.Mode.IsRegular() || e.content.kind == contentWAL {
			return nil
		}
		seen++
		want, ok := b.files[name]
		if entry := testEntry(want); !ok || e.Size != entry.Size || e.Mode != entry.Mode || e.UID != entry.UID || !e.ModTime.Equal(entry.ModTime) {
			return fmt.Errorf("entry %s: %w", name, errWrongBytes)
		}
		return nil
	})
	if err == nil && seen != len(b.files) {
		err = fmt.Errorf("%d files instead of %d: %w", seen, len(b.files), errWrongBytes)
	}
	return err
}

// checkRange reads n bytes of a file from off.
func (b wroteBackup) checkRange(ctx context.Context, r *Repository, name string, off, n int64) error {
	backup, err := b.open(ctx, r)
	if err != nil {
		return err
	}
	e, err := backup.Stat(ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errWrongBytes)
	}
	if err != nil {
		return err
	}
	f, err := backup.Open(ctx, e)
	if err != nil {
		return err
	}
	p := make([]byte, n)
	if got, err := f.ReadAt(p, off); err != nil && err != io.EOF {
		return err
	} else if int64(got) != n || f.Size() != int64(len(b.files[name])) {
		return fmt.Errorf("%s: %d bytes: %w", name, got, errWrongBytes)
	}
	return sameBytes(name, p, b.files[name][off:off+n])
}

// walReads read a WAL object whole, its head, and as a file of a tree.
func walReads(name pg.WALName, content []byte) []repoRead {
	all := []repoRead{
		{name: name.String(), do: func(ctx context.Context, r *Repository) error {
			got, err := r.WAL(ctx, "main", name)
			if err != nil {
				return err
			}
			return sameBytes(name.String(), got, content)
		}},
		{name: "head of " + name.String(), do: func(ctx context.Context, r *Repository) error {
			got, err := r.WALHead(ctx, "main", name)
			if err == nil && (got.Size != int64(len(content)) || got.SystemIdentifier != testSystemID) {
				err = fmt.Errorf("head: %w", errWrongBytes)
			}
			return err
		}},
	}
	for off := int64(0); off < int64(len(content)); off += walBlockSize {
		all = append(all, repoRead{name: fmt.Sprintf("%s from %d", name, off), do: func(ctx context.Context, r *Repository) error {
			f, err := r.openWAL(ctx, "main", name)
			if err != nil {
				return err
			}
			p := make([]byte, min(PageSize, int64(len(content))-off))
			if _, err := f.ReadAt(p, off); err != nil && err != io.EOF {
				return err
			}
			return sameBytes(name.String(), p, content[off:][:len(p)])
		}})
	}
	return all
}

// allReads are all of them, with what each fetches.
func (w *wrote) allReads(ctx context.Context, s *damagedStore, r *Repository, keys []Key) ([]repoRead, error) {
	all := append(w.openReads(keys), w.listReads()...)
	for _, b := range w.backups {
		reads, err := b.reads(ctx, r)
		if err != nil {
			return nil, err
		}
		all = append(all, reads...)
	}
	for _, name := range slices.SortedFunc(maps.Keys(w.wal), compareWAL) {
		all = append(all, walReads(name, w.wal[name])...)
	}
	for i := range all {
		s.spans = map[string][]span{}
		if err := all[i].do(ctx, coldRepository(r)); err != nil {
			return nil, fmt.Errorf("%s: %w", all[i].name, err)
		}
		all[i].spans = s.spans
	}
	s.spans = nil
	return all, nil
}
