package repo

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// syntheticSpec is a cluster that nobody has the disks for, and its backups.
type syntheticSpec struct {
	segments  int // relation segments of 1 GiB: 8192 chunks in 32 packs each
	small     int // files of one page
	databases int // directories, which have an equal share of all files
	backups   int
	changed   int // relation segments that change between a backup and the next, all in one database: the same at each of its turns
	wal       int // WAL segments, of 1 MiB, between a backup and the next

	content bool // small files have content, and can be read
}

// tenTiB is what the repository is made for: 80 million chunks, a million files, 100 backups.
var tenTiB = syntheticSpec{segments: 10_240, small: 990_000, databases: 20, backups: 100, changed: 50, wal: 100}

// of gives a cluster of a share of the size, with as many backups and databases.
func (s syntheticSpec) of(share float64) syntheticSpec {
	for _, n := range []*int{&s.segments, &s.small, &s.changed, &s.wal} {
		*n = max(1, int(float64(*n)*share))
	}
	s.segments, s.small = max(s.segments, s.databases), max(s.small, s.databases)
	return s
}

const (
	syntheticPerPack    = 256                                    // chunks of a data pack
	syntheticPacks      = 1 << 30 / ChunkSize / syntheticPerPack // of a relation segment
	syntheticChunks     = syntheticPacks * syntheticPerPack      // of a relation segment
	syntheticPerHotPack = 12_000                                 // chunks of a pack of small files
	syntheticTime       = 1_700_000_000                          // stop of the first backup; the others follow day by day
)

// synthetic is a repository with all the metadata of such a cluster, in a file store: documents, pack lists, trees, file maps, WAL,
// and packs with their headers and tables of contents. The chunks themselves are holes, so that check --read-data fails,
// but for those of the first pack: the first 32 MiB of pgdata/base/1/5000000 can be read.
type synthetic struct {
	r    *Repository
	dir  string
	spec syntheticSpec

	small []Ref            // chunks of the small files
	first []Ref            // chunks of the first pack
	trees []Ref            // of the databases
	maps  []Ref            // of the relation segments
	later []*syntheticPack // of the relation segments: the pack with what changed last; nil: nothing yet

	mu   sync.Mutex
	live map[PackID]uint64 // by the databases' files and trees

	sizes map[PackID]packSize // packWriters.mu of the current backup guards it
	rooms chan []byte         // each holds a pack
}

// newSynthetic makes the repository in dir.
func newSynthetic(t testing.TB, dir string, spec syntheticSpec, keys ...Key) *synthetic {
	t.Helper()
	ctx := t.Context()
	file, err := store.OpenFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := &synthetic{dir: dir, spec: spec, trees: make([]Ref, spec.databases), maps: make([]Ref, spec.segments),
		later: make([]*syntheticPack, spec.segments), live: map[PackID]uint64{}, sizes: map[PackID]packSize{}, rooms: make(chan []byte, runtime.GOMAXPROCS(0))}
	for range cap(s.rooms) {
		s.rooms <- make([]byte, 0, dataPackSize+4<<20)
	}
	if s.r, err = initStore(ctx, unsynced{file, dir}, "file://"+dir, Options{Keys: keys}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.r.Close() })
	if _, err := s.r.BindCluster(ctx, "main", testSystemID, testSegmentSize); err != nil {
		t.Fatal(err)
	}
	for no := range spec.backups {
		time.Sleep(time.Millisecond) // backups' ids tell milliseconds apart
		if err := s.backup(ctx, no); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// unsynced is a file store that does not wait for the disk.
type unsynced struct {
	*store.File
	dir string
}

func (s unsynced) Put(_ context.Context, key string, body []byte) error {
	return writeSparse(filepath.Join(s.dir, key), body, 0)
}

// writeSparse writes a file whose bytes behind the object header are a hole up to offset at.
func writeSparse(path string, body []byte, at int) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if os.IsNotExist(err) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		f, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if at > 0 {
		if _, err := f.WriteAt(body[:objectHeaderSize], 0); err != nil {
			return err
		}
	}
	_, err = f.WriteAt(body[at:], int64(at))
	return err
}

// backup makes backup no: the first one of everything, the others of what changed.
func (s *synthetic) backup(ctx context.Context, no int) error {
	if err := s.putWAL(ctx, no); err != nil {
		return err
	}
	info := BackupOptions{}.session("main")
	binary.LittleEndian.PutUint64(info.ID[:], uint64(no)+1)
	w, err := s.r.newBackupWriter(ctx, info.ID, BackupOptions{Workers: 1})
	if err != nil {
		return err
	}
	m, list, err := w.write(info.Makes[0], func(ctx context.Context, w *BackupWriter) (Manifest, error) {
		w.packs.done = s.sizes
		if err := s.writeFiles(ctx, w, no); err != nil {
			return Manifest{}, err
		}
		return s.manifest(no), s.writeTree(w, no)
	})
	if err != nil {
		return err
	}
	if err := s.r.putPackList(ctx, m, list); err != nil {
		return err
	}
	body, err := marshalDocument(m)
	if err != nil {
		return err
	}
	key := manifestKey("main", m.ID)
	return s.r.store.Put(ctx, key, s.r.sealDocument(key, body))
}

func (s *synthetic) manifest(no int) Manifest {
	m := testManifest()
	m.Tool, m.Label, m.SegmentSize = "synthetic", fmt.Sprintf("day %d", no), testSegmentSize
	first, last := s.walOf(no)
	m.StartLSN, m.StopLSN = pg.LSN(first*testSegmentSize+0x28), pg.LSN(last*testSegmentSize+0x100)
	m.WALFirst, m.WALLast = testSegment(1, first).String(), testSegment(1, last).String()
	m.StoppedAt = syntheticDay(no)
	m.StartedAt = m.StoppedAt.Add(-time.Hour)
	m.Settings = map[string]string{"shared_buffers": "65536", "max_connections": "500", "wal_level": "replica"}
	return m
}

func syntheticDay(no int) time.Time { return time.Unix(syntheticTime+int64(no)*24*60*60, 0).UTC() }

// walOf gives the segments that a backup begins and ends in. Two is the first of all.
func (s *synthetic) walOf(no int) (first, last uint64) {
	first = 2 + uint64(no*s.spec.wal)
	return first, first + min(1, uint64(s.spec.wal)-1)
}

// putWAL stores the WAL up to the next backup.
func (s *synthetic) putWAL(ctx context.Context, no int) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	first, _ := s.walOf(no)
	for i := range uint64(s.spec.wal) {
		at := syntheticDay(no).Add(24 * time.Hour * time.Duration(i) / time.Duration(s.spec.wal))
		g.Go(func() error {
			return s.r.PutWAL(gctx, "main", testSegment(1, first+i), committing(first+i, at))
		})
	}
	return g.Wait()
}

// committing is a WAL segment with one record, a commit.
func committing(no uint64, at time.Time) []byte {
	seg := make([]byte, 0, testSegmentSize)
	seg = binary.LittleEndian.AppendUint16(seg, 0xD110) // XLOG_PAGE_MAGIC of 15
	seg = binary.LittleEndian.AppendUint16(seg, 2)      // XLP_LONG_HEADER
	seg = binary.LittleEndian.AppendUint32(seg, 1)
	seg = binary.LittleEndian.AppendUint64(seg, no*testSegmentSize)
	seg = binary.LittleEndian.AppendUint64(seg, 0)
	seg = binary.LittleEndian.AppendUint64(seg, testSystemID)
	seg = binary.LittleEndian.AppendUint32(seg, testSegmentSize)
	seg = binary.LittleEndian.AppendUint32(seg, 8192)

	const commit, rmXact, shortData = 0x00, 1, 255
	micros := uint64(at.Sub(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).Microseconds())
	body := binary.LittleEndian.AppendUint64([]byte{shortData, 8}, micros)
	rec := binary.LittleEndian.AppendUint32(nil, uint32(24+len(body)))
	rec = binary.LittleEndian.AppendUint32(rec, 700+uint32(no))
	rec = binary.LittleEndian.AppendUint64(rec, no*testSegmentSize-64)
	rec = append(rec, commit, rmXact, 0, 0)
	table := crc32.MakeTable(crc32.Castagnoli)
	rec = binary.LittleEndian.AppendUint32(rec, crc32.Update(crc32.Checksum(body, table), table, rec))
	seg = append(append(seg, rec...), body...)
	return seg[:testSegmentSize]
}

// writeFiles writes what is new of the databases in backup no: packs, file maps, trees.
func (s *synthetic) writeFiles(ctx context.Context, w *BackupWriter, no int) error {
	segments, databases := s.changes(no)
	if no == 0 {
		if err := s.writeFirst(w); err != nil {
			return err
		}
		write := s.writeSmall
		if s.spec.content {
			write = s.writeContent
		}
		if err := write(w); err != nil {
			return err
		}
	}
	g, _ := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, segment := range segments {
		g.Go(func() error { return s.writeSegment(w, no, segment) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, database := range databases {
		if err := s.writeDatabase(w, database); err != nil {
			return err
		}
	}
	return nil
}

// changes gives the relation segments that changed before backup no, and the databases in which they lie.
func (s *synthetic) changes(no int) (segments, databases []int) {
	for i := range s.spec.databases {
		databases = append(databases, i)
	}
	for i := range s.spec.segments {
		segments = append(segments, i)
	}
	if no == 0 {
		return segments, databases
	}
	database := no % s.spec.databases
	n := (s.spec.segments - database + s.spec.databases - 1) / s.spec.databases // segments of the database
	segments = segments[:0]
	for i := range min(n, s.spec.changed) {
		segments = append(segments, database+i*s.spec.databases)
	}
	return segments, []int{database}
}

// writeFirst makes the first pack, whose chunks have content.
func (s *synthetic) writeFirst(w *BackupWriter) error {
	if s.spec.segments == 0 {
		return nil
	}
	for i := range syntheticPerPack {
		content := pagesOf(uint64(i), ChunkPages)
		id, digests := s.r.digests.sum(content, nil)
		ref, err := w.packs.data.add(pieceChunk, content, id, digests)
		if err != nil {
			return err
		}
		s.first = append(s.first, ref)
	}
	return nil
}

// writeSmall makes the packs of the small files.
func (s *synthetic) writeSmall(w *BackupWriter) error {
	for no := uint64(0); len(s.small) < s.spec.small; no++ {
		p := newSyntheticPack(classHot, no, min(syntheticPerHotPack, s.spec.small-len(s.small)))
		if err := s.writePack(w, p); err != nil {
			return err
		}
		s.small = append(s.small, p.refs...)
		s.use(nil, p.refs)
	}
	return nil
}

// writeContent makes the small files, a quarter of a page of each being no zeros.
func (s *synthetic) writeContent(w *BackupWriter) error {
	s.small = make([]Ref, s.spec.small)
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	const together = 1000
	for first := 0; first < len(s.small); first += together {
		g.Go(func() error {
			page := make([]byte, PageSize)
			rng := rand.NewPCG(classHot, uint64(first))
			for i := first; i < min(first+together, len(s.small)); i++ {
				random(rng, page[:PageSize/4])
				id, digests := s.r.digests.sum(page, nil)
				var err error
				if s.small[i], err = w.packs.hot.add(pieceChunk, page, id, digests); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := g.Wait()
	s.use(nil, s.small)
	return err
}

// writeSegment makes the packs and the map of a relation segment, or one pack of what changed of it and the new map.
func (s *synthetic) writeSegment(w *BackupWriter, no, segment int) error {
	before := s.chunksOf(segment)
	if no == 0 {
		for i := range syntheticPacks {
			if segment > 0 || i > 0 {
				if err := s.writePack(w, s.packOf(segment, i)); err != nil {
					return err
				}
			}
		}
		s.use(nil, before)
	} else {
		p := newSyntheticPack(classData, uint64(no)<<32|uint64(segment), syntheticPerPack)
		if err := s.writePack(w, p); err != nil {
			return err
		}
		s.later[segment] = p
		s.use(before, s.chunksOf(segment))
	}
	m := fileMap{size: 1 << 30, chunks: s.chunksOf(segment)}
	for i := range m.chunks {
		m.extents = append(m.extents, extent{chunk: int32(i), n: ChunkPages})
	}
	return s.writeMeta(w, pieceMap, m.appendTo(nil), &s.maps[segment])
}

// packOf gives one of the packs that a relation segment lay in first.
func (s *synthetic) packOf(segment, i int) *syntheticPack {
	return newSyntheticPack(classData, uint64(segment*syntheticPacks+i), syntheticPerPack)
}

// chunksOf gives the chunks of a relation segment. One of 32 changes, always the same: so what a change has written dies with the backups up to the next.
func (s *synthetic) chunksOf(segment int) []Ref {
	chunks := make([]Ref, 0, syntheticChunks)
	for i := range syntheticPacks {
		if segment == 0 && i == 0 {
			chunks = append(chunks, s.first...)
		} else {
			chunks = append(chunks, s.packOf(segment, i).refs...)
		}
	}
	if p := s.later[segment]; p != nil {
		for i, ref := range p.refs {
			chunks[(i+1)*syntheticPacks-1] = ref
		}
	}
	return chunks
}

// writeDatabase makes the tree of a database.
func (s *synthetic) writeDatabase(w *BackupWriter, database int) error {
	var l listing
	for i := database; i < s.spec.small; i += s.spec.databases {
		m := fileMap{size: PageSize, chunks: s.small[i : i+1], extents: []extent{{n: 1}}}
		e := syntheticEntry(strconv.Itoa(16384+i), PageSize, content{kind: contentInlineMap, bytes: m.appendTo(nil)})
		if err := l.add(&e); err != nil {
			return err
		}
	}
	for i := database; i < s.spec.segments; i += s.spec.databases {
		e := syntheticEntry(s.segmentName(i), 1<<30, content{kind: contentMap, ref: s.maps[i]})
		if err := l.add(&e); err != nil {
			return err
		}
	}
	encoded, err := l.encode()
	if err != nil {
		return err
	}
	return s.writeMeta(w, pieceTree, encoded, &s.trees[database])
}

// segmentName is the name of a relation segment in its database's directory. Relations have 32 of them.
func (s *synthetic) segmentName(segment int) string {
	n := segment / s.spec.databases
	name := strconv.Itoa(5_000_000 + n/32)
	if n%32 > 0 {
		name += "." + strconv.Itoa(n%32)
	}
	return name
}

func syntheticEntry(name string, size int64, c content) Entry {
	return Entry{Name: name, Mode: 0o600, UID: 104, GID: 105, Size: size, ModTime: syntheticDay(0), content: c}
}

// writeTree makes the directories and small files around the databases.
func (s *synthetic) writeTree(w *BackupWriter, no int) error {
	if err := makeParents(w, "pgdata/base", map[string]bool{".": true}); err != nil {
		return err
	}
	for i, ref := range s.trees {
		e := Entry{Name: strconv.Itoa(i + 1), Mode: os.ModeDir | 0o700, UID: 104, GID: 105, ModTime: syntheticDay(no), content: content{kind: contentTree, ref: ref}}
		if err := w.dirs["pgdata/base"].add(e); err != nil {
			return err
		}
	}
	w.files, w.bytes = s.spec.segments+s.spec.small, int64(s.spec.segments)<<30+int64(s.spec.small)*PageSize
	if err := put(w, "pgdata/PG_VERSION", []byte("15\n"), 3); err != nil {
		return err
	}
	if err := w.Mkdir("pgdata/pg_wal", Entry{Mode: 0o700, ModTime: syntheticDay(no)}); err != nil {
		return err
	}
	first, last := s.walOf(no)
	for seg := first; seg <= last; seg++ {
		e := Entry{Mode: 0o600, Size: testSegmentSize, ModTime: syntheticDay(no)}
		if err := w.AddWAL("pgdata/pg_wal/"+testSegment(1, seg).String(), e, testSegment(1, seg)); err != nil {
			return err
		}
	}
	w.live.count = maps.Clone(s.live)
	return nil
}

// use counts what the databases' files refer to: no longer before, but now.
func (s *synthetic) use(before, now []Ref) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ref := range before {
		if s.live[ref.Pack] -= uint64(ref.Length); s.live[ref.Pack] == 0 {
			delete(s.live, ref.Pack)
		}
	}
	for _, ref := range now {
		s.live[ref.Pack] += uint64(ref.Length)
	}
}

// writeMeta stores a file map or tree in the place of the one at ref.
func (s *synthetic) writeMeta(w *BackupWriter, kind byte, encoded []byte, ref *Ref) error {
	id, _ := s.r.digests.sum(encoded, nil)
	now, err := w.packs.meta.add(kind, encoded, id, nil)
	if err != nil {
		return err
	}
	var before []Ref
	if *ref != (Ref{}) {
		before = append(before, *ref)
	}
	s.use(before, []Ref{now})
	*ref = now
	return nil
}

// syntheticPack is a pack of chunks without content. All of it follows from its class and number.
type syntheticPack struct {
	class byte
	id    PackID
	refs  []Ref
	rng   *rand.PCG // of the page digests
}

func newSyntheticPack(class byte, no uint64, chunks int) *syntheticPack {
	p := &syntheticPack{class: class, refs: make([]Ref, chunks), rng: rand.NewPCG(uint64(class), no)}
	p.random(p.id[:])
	at := uint32(packHeaderSize)
	for i := range p.refs {
		r := &p.refs[i]
		r.Pack, r.Offset, r.Length = p.id, at, p.shortest()+uint32(p.rng.Uint64()%512)
		p.random(r.ID[:])
		at += r.Length
	}
	return p
}

// shortest is what a chunk has at least, in bytes: 256 of 128 KiB or 12,000 of a page fill a pack.
func (p *syntheticPack) shortest() uint32 {
	if p.class == classHot {
		return 2_000
	}
	return 130_500
}

func (p *syntheticPack) random(b []byte) { random(p.rng, b) }

func random(rng *rand.PCG, b []byte) {
	for ; len(b) > 0; b = b[8:] {
		binary.LittleEndian.PutUint64(b, rng.Uint64())
	}
}

// writePack writes a pack's header, table of contents and trailer.
func (s *synthetic) writePack(w *BackupWriter, p *syntheticPack) error {
	var toc packTOC
	size := uint32(PageSize)
	if p.class == classData {
		size = ChunkSize
	}
	digests := make([]byte, len(p.refs)*pages(int64(size))*pageDigestSize)
	p.random(digests)
	n := len(digests) / len(p.refs)
	for i, ref := range p.refs {
		toc.add(pieceChunk, ref.Length, size, ref.ID, digests[i*n:][:n])
	}
	at := int(p.refs[len(p.refs)-1].end())
	room := <-s.rooms
	defer func() { s.rooms <- room }()
	copy(room[:at], s.r.seals.header(kindPack, [8]byte{p.class}, salt(p.id)))
	body, packSize := s.r.endPack(room[:at], s.r.packSealer(p.id), &toc)
	w.packs.mu.Lock()
	w.packs.done[p.id] = packSize
	w.packs.mu.Unlock()
	w.packs.stored.Add(int64(len(body)))
	return writeSparse(filepath.Join(s.dir, p.id.key()), body, at)
}

// TestMakeSynthetic makes such a repository for the benchmark: PGTHAW_SYNTHETIC is the directory, PGTHAW_SYNTHETIC_SHARE
// the share of 10 TiB, 1 by default. PGTHAW_SYNTHETIC_FLAT makes one backup of the small files only, which have content then and lie in one
// directory.
func TestMakeSynthetic(t *testing.T) {
	dir := os.Getenv("PGTHAW_SYNTHETIC")
	if dir == "" {
		t.Skip("PGTHAW_SYNTHETIC names no directory")
	}
	spec := tenTiB
	if share, err := strconv.ParseFloat(os.Getenv("PGTHAW_SYNTHETIC_SHARE"), 64); err == nil {
		spec = spec.of(share)
	}
	if os.Getenv("PGTHAW_SYNTHETIC_FLAT") != "" {
		spec.segments, spec.databases, spec.backups, spec.content = 0, 1, 1, true
	}
	newSynthetic(t, dir, spec)
}
