package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"maps"
	"sync"
	"testing"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// damagedStore gives other bytes for some of a store's objects. What is put into it is put into the store.
type damagedStore struct {
	*store.Mem
	bodies map[string][]byte // instead of what was put; nil: the object is gone

	mu    sync.Mutex
	spans map[string][]span // ranges fetched, by object; nil: nobody wants to know
}

// span is a range of an object's bytes.
type span struct{ from, to int64 }

func (s span) overlaps(o span) bool { return s.from < o.to && o.from < s.to }

func (s *damagedStore) Get(ctx context.Context, key string, off, n int64) ([]byte, error) {
	body, damaged := s.bodies[key]
	if !damaged {
		b, err := s.Mem.Get(ctx, key, off, n)
		s.note(key, span{off, off + int64(len(b))})
		return b, err
	}
	size := int64(len(body))
	switch {
	case body == nil:
		return nil, fmt.Errorf("get %s: %w", key, store.ErrNotExist)
	case n < 0 && off <= size:
		n = size - off
	case off+n > size || n < 0:
		return nil, fmt.Errorf("get %s: %w", key, io.ErrUnexpectedEOF)
	}
	return bytes.Clone(body[off : off+n]), nil
}

func (s *damagedStore) note(key string, at span) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spans != nil {
		s.spans[key] = append(s.spans[key], at)
	}
}

func (s *damagedStore) List(ctx context.Context, prefix string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		for o, err := range s.Mem.List(ctx, prefix) {
			body, damaged := s.bodies[o.Key]
			if damaged && body == nil {
				continue
			}
			if damaged {
				o.Size = int64(len(body))
			}
			if !yield(o, err) {
				return
			}
		}
	}
}

// newDamagedRepository makes a repository, with a master key that may be another's.
func newDamagedRepository(t *testing.T, s store.Store, keys []Key, m *masterKey) *Repository {
	t.Helper()
	c, id := newConfig()
	seals := seals{id: id, master: m}
	if len(keys) > 0 && m == nil {
		own := newMasterKey()
		seals.master = &own
	}
	if err := seals.putRepository(t.Context(), s, c, keys); err != nil {
		t.Fatal(err)
	}
	r, err := openStore(t.Context(), s, "mem:", Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

const damagedSegmentSize = 2 << 20

// writeDamaged writes two backups, three segments, of which one has a block of zeros, and a history file. What the first backup has
// in common with one that is deleted lies in an edition.
func writeDamaged(t *testing.T, r *Repository, files testFiles) wrote {
	t.Helper()
	cluster, err := r.BindCluster(t.Context(), "main", testSystemID, damagedSegmentSize)
	if err != nil {
		t.Fatal(err)
	}
	w := wrote{config: r.config, cluster: cluster, wal: map[pg.WALName][]byte{}}
	w.wal[pg.WALName{Kind: pg.WALHistory, Timeline: 2}] = []byte("1\t0/C00000\tno recovery target specified\n")
	for no := uint64(3); no <= 5; no++ {
		w.wal[damagedSegment(no)] = damagedWAL(no)
	}
	for name, content := range w.wal {
		if err := r.PutWAL(t.Context(), "main", name, content); err != nil {
			t.Fatal(err)
		}
	}
	more := maps.Clone(files)
	more["pgdata/base/5/7"] = pagesOf(78, 300)
	deleted := damagedBackup(t, r, more, nil, 3)
	w.backups = []wroteBackup{{damagedBackup(t, r, files, r.OpenBackup(deleted), 3), maps.Clone(files)}}
	repackWithout(t, r, deleted)
	changed := bytes.Clone(files["pgdata/base/5/2"])
	copy(changed[7*PageSize:], pagesOf(77, 1))
	files["pgdata/base/5/2"] = changed
	w.backups = append(w.backups, wroteBackup{damagedBackup(t, r, files, r.OpenBackup(w.backups[0].m), 5), files})
	return w
}

func damagedSegment(no uint64) pg.WALName { return pg.SegmentName(1, no, damagedSegmentSize) }

// damagedWAL is a segment of two blocks, the second one of zeros if its number is even. No record is in it.
func damagedWAL(no uint64) []byte {
	seg := make([]byte, damagedSegmentSize)
	binary.LittleEndian.PutUint16(seg[0:], 0xD110) // XLOG_PAGE_MAGIC of 15
	binary.LittleEndian.PutUint16(seg[2:], 2)      // XLP_LONG_HEADER
	binary.LittleEndian.PutUint32(seg[4:], 1)
	binary.LittleEndian.PutUint64(seg[8:], no*damagedSegmentSize)
	binary.LittleEndian.PutUint64(seg[24:], testSystemID)
	binary.LittleEndian.PutUint32(seg[32:], damagedSegmentSize)
	binary.LittleEndian.PutUint32(seg[36:], 8192)
	copy(seg[4*PageSize:], pagesOf(no, 3))
	if no%2 == 1 {
		copy(seg[walBlockSize:], pagesOf(no+100, 3))
	}
	return seg
}

func damagedBackup(t *testing.T, r *Repository, files testFiles, prior *Backup, segment uint64) *Manifest {
	t.Helper()
	m, err := r.WriteBackup(t.Context(), "main", BackupOptions{Prior: prior}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		m := testManifest()
		m.SegmentSize = damagedSegmentSize
		m.StartLSN, m.StopLSN = pg.LSN(segment*damagedSegmentSize+0x28), pg.LSN(segment*damagedSegmentSize+0x100)
		m.WALFirst, m.WALLast = damagedSegment(segment).String(), damagedSegment(segment).String()
		m.Settings = map[string]string{"search_path": `"$user", public`}
		err := writeFiles(w, files)
		if err == nil {
			err = w.Mkdir("pgdata/pg_wal", Entry{Mode: 0o700, ModTime: m.StoppedAt})
		}
		if err == nil {
			err = w.AddWAL(walFileOf(damagedSegment(segment)), Entry{Mode: 0o600, Size: damagedSegmentSize, ModTime: m.StoppedAt}, damagedSegment(segment))
		}
		return m, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}
