package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"sort"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// WALHead is what a WAL object tells of itself without its bytes.
type WALHead struct {
	Name             pg.WALName
	Size             int64 // bytes of the file
	SystemIdentifier uint64
	Summary          pg.WALSummary // of segments and partial segments; else zero
	StoredBytes      int64         // in the repository
}

// Layout of a WAL object.
//
//	0   32  object header, kind W: stored length of the head at 8
//	32  16  ID of the head
//	48      head, JSON, sealed
//	        blocks, back to back, each a zstd frame, sealed
const (
	walHeaderSize = objectHeaderSize + 16
	walBlockSize  = 1 << 20 // content of a block, bytes; the last may be shorter
	maxWALHead    = 16 << 20
	maxWALSize    = 1 << 30 // PostgreSQL's largest segment
)

// walHead is a WAL object's head.
type walHead struct {
	Cluster          string        `json:"cluster"`
	Name             string        `json:"name"`
	SystemIdentifier uint64        `json:"system_identifier,string"`
	Size             int64         `json:"size"`
	Summary          pg.WALSummary `json:"summary,omitzero"`
	Blocks           []walBlock    `json:"blocks"`

	salt    salt
	offsets []int64 // of each block in the object; one more at the end
}

type walBlock struct {
	Length int `json:"length"` // stored bytes; 0: a block of zeros
	ID     ID  `json:"id"`
}

// walRoot begins the keys of all WAL objects.
const walRoot = "wal/"

func walPrefix(cluster string) string { return walRoot + cluster + "/" }

func walKey(cluster string, name pg.WALName) string {
	return walPrefix(cluster) + name.Timeline.Hex() + "/" + name.String()
}

// PutWAL stores a WAL file, durably when it returns. The same bytes again are fine; other bytes under the same name are
// ErrWALConflict. The cluster has to be bound.
func (r *Repository) PutWAL(ctx context.Context, cluster string, name pg.WALName, content []byte) error {
	c, err := r.Cluster(ctx, cluster)
	if err != nil {
		return err
	}
	head, body, err := r.encodeWAL(ctx, c, name, content)
	if err != nil {
		return fmt.Errorf("encode WAL file %s: %w", name, err)
	}
	err = r.store.Put(ctx, walKey(cluster, name), body)
	if errors.Is(err, store.ErrExist) {
		return r.sameWAL(ctx, cluster, name, head)
	}
	if err != nil {
		return fmt.Errorf("write WAL file %s: %w", name, err)
	}
	return nil
}

// sameWAL compares what was to be put with what is there. The head tells what that is; where the object is known to have been
// damaged, all of it has to be whole: it may be on the point of being removed.
func (r *Repository) sameWAL(ctx context.Context, cluster string, name pg.WALName, want *walHead) error {
	got, err := r.walHead(ctx, cluster, name)
	if err == nil {
		var recorded bool
		if recorded, err = r.exists(ctx, damagedKey(walKey(cluster, name))); recorded {
			_, err = r.WAL(ctx, cluster, name)
		}
	}
	if err != nil {
		return fmt.Errorf("compare with WAL file %s in the repository: %w", name, err)
	}
	same := got.Size == want.Size && len(got.Blocks) == len(want.Blocks)
	for i := 0; same && i < len(got.Blocks); i++ {
		same = got.Blocks[i].ID == want.Blocks[i].ID
	}
	if !same {
		return fmt.Errorf("%s of %s: %w", name, cluster, ErrWALConflict)
	}
	return nil
}

func (r *Repository) encodeWAL(ctx context.Context, c Cluster, name pg.WALName, content []byte) (*walHead, []byte, error) {
	head := &walHead{Cluster: c.Name, Name: name.String(), SystemIdentifier: c.SystemIdentifier, Size: int64(len(content))}
	if name.Kind == pg.WALSegment || name.Kind == pg.WALPartial {
		if int64(len(content)) != int64(c.SegmentSize) {
			return nil, nil, fmt.Errorf("%d bytes, but segments of this cluster have %d", len(content), c.SegmentSize)
		}
		var err error
		if head.Summary, err = pg.ScanWAL(content, name, c.SegmentSize); err != nil {
			return nil, nil, err
		}
	}
	salt := newSalt()
	sealer := r.seals.object(kindWAL, walKey(c.Name, name), salt)
	frames, err := r.encodeBlocks(ctx, head, content, sealer.overhead())
	if err != nil {
		return nil, nil, err
	}
	text, err := json.Marshal(head)
	if err != nil {
		return nil, nil, err
	}
	var use [8]byte
	binary.LittleEndian.PutUint32(use[:], uint32(len(text)+sealer.overhead()))
	id, _ := r.digests.sum(text, nil)
	body := append(make([]byte, 0, head.storedSize(len(text)+sealer.overhead())), r.seals.header(kindWAL, use, salt)...)
	body = append(body, id[:]...)
	for _, part := range append([][]byte{text}, frames...) {
		if len(part) > 0 {
			body = sealer.seal(append(body, part...), len(body))
		}
	}
	return head, body, nil
}

// storedSize is the size of the object, whose head takes headLength bytes.
func (h *walHead) storedSize(headLength int) int {
	n := walHeaderSize + headLength
	for _, b := range h.Blocks {
		n += b.Length
	}
	return n
}

// encodeBlocks compresses the content's blocks, several at a time, and enters them into the head with their lengths once
// they are sealed, each by overhead longer. A block of zeros has no frame.
func (r *Repository) encodeBlocks(ctx context.Context, head *walHead, content []byte, overhead int) (frames [][]byte, err error) {
	n := (len(content) + walBlockSize - 1) / walBlockSize
	head.Blocks, frames = make([]walBlock, n), make([][]byte, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range n {
		g.Go(func() error {
			block := content[i*walBlockSize : min((i+1)*walBlockSize, len(content))]
			id, _ := r.digests.sum(block, nil)
			head.Blocks[i].ID = id
			if !isZero(block) {
				frames[i] = r.codec.compress(nil, block)
				head.Blocks[i].Length = len(frames[i]) + overhead
			}
			return ctx.Err()
		})
	}
	return frames, g.Wait()
}

func isZero(b []byte) bool {
	for len(b) >= PageSize && isZeroPage(b[:PageSize]) {
		b = b[PageSize:]
	}
	return bytes.Count(b, []byte{0}) == len(b)
}

// WALHead reads the head of a WAL object. ErrNoWAL: there is no such object.
func (r *Repository) WALHead(ctx context.Context, cluster string, name pg.WALName) (WALHead, error) {
	h, err := r.walHead(ctx, cluster, name)
	if err != nil {
		return WALHead{}, err
	}
	return WALHead{Name: name, Size: h.Size, SystemIdentifier: h.SystemIdentifier, Summary: h.Summary,
		StoredBytes: h.offsets[len(h.offsets)-1]}, nil
}

// walHead returns the head of a WAL object, which a cache may hold.
func (r *Repository) walHead(ctx context.Context, cluster string, name pg.WALName) (*walHead, error) {
	return r.heads.get(walKey(cluster, name), func() (*walHead, int64, error) {
		h, err := r.readWALHead(ctx, cluster, name)
		if err != nil {
			return nil, 0, err
		}
		return h, 512 + h.offsets[0], nil
	})
}

func (r *Repository) readWALHead(ctx context.Context, cluster string, name pg.WALName) (*walHead, error) {
	key := walKey(cluster, name)
	start, err := r.get(ctx, key, 0, walHeaderSize)
	if err != nil {
		return nil, r.walReadError(ctx, cluster, name, err)
	}
	n, err := r.walHeadLength(key, start)
	if err != nil {
		return nil, err
	}
	sealed, err := r.get(ctx, key, walHeaderSize, n)
	if err != nil {
		return nil, r.walReadError(ctx, cluster, name, err)
	}
	return r.parseWALHead(key, cluster, name, start, sealed)
}

func (r *Repository) walReadError(ctx context.Context, cluster string, name pg.WALName, err error) error {
	if errors.Is(err, store.ErrNotExist) {
		return r.walDamage(ctx, cluster, name)
	}
	return fmt.Errorf("read WAL file %s: %w", name, err)
}

func (r *Repository) walHeadLength(key string, start []byte) (int64, error) {
	if _, err := r.seals.checkHeader(key, start, kindWAL); err != nil {
		return 0, err
	}
	if len(start) < walHeaderSize {
		return 0, corrupt(key, "it ends within its header")
	}
	n := int64(binary.LittleEndian.Uint32(start[8:]))
	if n > maxWALHead || binary.LittleEndian.Uint32(start[12:]) != 0 {
		return 0, corrupt(key, "a head of %d bytes", n)
	}
	return n, nil
}

func (r *Repository) parseWALHead(key, cluster string, name pg.WALName, start, sealed []byte) (*walHead, error) {
	h := &walHead{salt: salt(start[16:objectHeaderSize]), offsets: []int64{walHeaderSize + int64(len(sealed))}}
	text, err := r.seals.object(kindWAL, key, h.salt).open(sealed, walHeaderSize)
	if err != nil {
		return nil, err
	}
	if !r.digests.verify(text, ID(start[objectHeaderSize:walHeaderSize])) {
		return nil, corrupt(key, "its head does not match its digest")
	}
	if err := json.Unmarshal(text, h); err != nil {
		return nil, corrupt(key, "head: %v", err)
	}
	if h.Cluster != cluster || h.Name != name.String() {
		return nil, corrupt(key, "it holds %s of %s", h.Name, h.Cluster)
	}
	if h.Size < 0 || h.Size > maxWALSize || int64(len(h.Blocks)) != (h.Size+walBlockSize-1)/walBlockSize {
		return nil, corrupt(key, "%d bytes in %d blocks", h.Size, len(h.Blocks))
	}
	for _, b := range h.Blocks {
		if b.Length < 0 || b.Length > 2*walBlockSize {
			return nil, corrupt(key, "a block of %d bytes", b.Length)
		}
		h.offsets = append(h.offsets, h.offsets[len(h.offsets)-1]+int64(b.Length))
	}
	return h, nil
}

// WAL returns a whole WAL file, every byte verified. ErrNoWAL: there is no such object.
func (r *Repository) WAL(ctx context.Context, cluster string, name pg.WALName) ([]byte, error) {
	key := walKey(cluster, name)
	object, err := r.get(ctx, key, 0, -1)
	if err != nil {
		return nil, r.walReadError(ctx, cluster, name, err)
	}
	n, err := r.walHeadLength(key, object)
	if err != nil {
		return nil, err
	}
	if int64(len(object)) < walHeaderSize+n {
		return nil, corrupt(key, "it ends within its head")
	}
	h, err := r.parseWALHead(key, cluster, name, object[:walHeaderSize], object[walHeaderSize:walHeaderSize+n])
	if err != nil {
		return nil, err
	}
	if int64(len(object)) != h.offsets[len(h.Blocks)] {
		return nil, corrupt(key, "%d bytes instead of %d", len(object), h.offsets[len(h.Blocks)])
	}
	content := make([]byte, h.Size)
	var g errgroup.Group
	g.SetLimit(4)
	for i := range h.Blocks {
		g.Go(func() error {
			return r.walBlock(key, h, i, object[h.offsets[i]:h.offsets[i+1]], h.block(content, i))
		})
	}
	return content, g.Wait()
}

// block returns the part of content that block i fills.
func (h *walHead) block(content []byte, i int) []byte {
	return content[int64(i)*walBlockSize : min(int64(i+1)*walBlockSize, h.Size)]
}

// walBlock opens block i in place and decodes it into dst, whose length is the block's, and verifies it.
func (r *Repository) walBlock(key string, h *walHead, i int, sealed, dst []byte) error {
	fail := func(detail string) error {
		return &CorruptError{Object: key, Offset: h.offsets[i], Length: int64(len(sealed)), Detail: detail}
	}
	if h.Blocks[i].Length == 0 {
		clear(dst)
	} else {
		frame, err := r.seals.object(kindWAL, key, h.salt).open(sealed, h.offsets[i])
		if err != nil {
			return err
		}
		content, err := r.codec.decompressInto(dst[:0:len(dst)], frame)
		if err != nil {
			return fail(err.Error())
		}
		if len(content) != len(dst) {
			return fail(fmt.Sprintf("%d bytes instead of %d", len(content), len(dst)))
		}
	}
	if !r.digests.verify(dst, h.Blocks[i].ID) {
		return fail("its content does not match its digest")
	}
	return nil
}

// WALNames lists the WAL files of a cluster by timeline and name, those of RemovedWAL too: they are neither the end of WAL nor files that never
// were. It is two listings; no object is read.
func (r *Repository) WALNames(ctx context.Context, cluster string) ([]pg.WALName, error) {
	var names []pg.WALName
	for o, err := range r.walObjects(ctx, walPrefix(cluster)) {
		if err != nil {
			return nil, err
		}
		names = append(names, o.name)
	}
	sort.SliceStable(names, func(i, j int) bool { return names[i].Timeline < names[j].Timeline })
	return names, nil
}

// walObject is an object that holds a WAL file.
type walObject struct {
	name  pg.WALName
	bytes int64     // stored
	put   time.Time // by the store's clock; zero: it was damaged and is gone
}

// walObjects lists the WAL objects below a prefix of a cluster's. Behind a *CorruptError, for a name that no WAL file has, it
// goes on. A file that was damaged and is gone is listed, with 0 bytes: whoever reads it gets an error, and not the end of WAL.
func (r *Repository) walObjects(ctx context.Context, prefix string) iter.Seq2[walObject, error] {
	return func(yield func(walObject, error) bool) {
		gone, err := r.damagedObjects(ctx, prefix)
		if err != nil {
			yield(walObject{}, err)
			return
		}
		list := func(o store.Object) bool {
			_, name, err := parseWALKey(o.Key)
			return yield(walObject{name, o.Size, o.Modified}, err)
		}
		for o, err := range r.store.List(ctx, prefix) {
			if err != nil {
				yield(walObject{}, fmt.Errorf("list %s: %w", prefix, err))
				return
			}
			for len(gone) > 0 && gone[0].Key <= o.Key {
				if gone[0].Key < o.Key && !list(store.Object{Key: gone[0].Key}) {
					return
				}
				gone = gone[1:]
			}
			if !list(o) {
				return
			}
		}
		for _, o := range gone {
			if !list(store.Object{Key: o.Key}) {
				return
			}
		}
	}
}

// parseWALKey takes apart wal/<cluster>/<timeline>/<name>. *CorruptError: no WAL file has this name.
func parseWALKey(key string) (cluster string, name pg.WALName, err error) {
	rest, ok := strings.CutPrefix(key, walRoot)
	cluster, path, _ := strings.Cut(rest, "/")
	dir, base, _ := strings.Cut(path, "/")
	name, err = pg.ParseWALName(base)
	if !ok || err != nil || name.Timeline.Hex() != dir {
		return cluster, pg.WALName{}, corrupt(key, "no WAL file has this name")
	}
	return cluster, name, nil
}

// openWAL opens a WAL file for reading in parts; it reads the object's head, past the cache: one that was damaged may have been
// pushed again, which has another salt. The context bounds all later reads.
// ErrNoWAL: there is no such object.
func (r *Repository) openWAL(ctx context.Context, cluster string, name pg.WALName) (*File, error) {
	head, err := r.readWALHead(ctx, cluster, name)
	if err != nil {
		return nil, err
	}
	return &File{head.Size, &walFile{r, ctx, walKey(cluster, name), head}}, nil
}

// walFile is a WAL object read as a file, a block at a time.
type walFile struct {
	r    *Repository
	ctx  context.Context
	key  string
	head *walHead
}

func (w *walFile) readAt(p []byte, off int64) error {
	for len(p) > 0 {
		i := int(off / walBlockSize)
		block, err := w.block(i)
		if err != nil {
			return err
		}
		n := copy(p, block[off%walBlockSize:])
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (w *walFile) within(ctx context.Context) fileContent { return &walFile{w.r, ctx, w.key, w.head} }

func (w *walFile) block(i int) ([]byte, error) {
	h := w.head
	return w.r.chunks.get(h.Blocks[i].ID, func() ([]byte, int64, error) {
		sealed, err := w.r.get(w.ctx, w.key, h.offsets[i], int64(h.Blocks[i].Length))
		if err != nil {
			return nil, 0, fmt.Errorf("read %s: %w", w.key, err)
		}
		n := min(int64(walBlockSize), h.Size-int64(i)*walBlockSize)
		dst := make([]byte, n)
		err = w.r.walBlock(w.key, h, i, sealed, dst)
		return dst, n, err
	})
}

func (w *walFile) data(yield func(off, n int64) bool) {
	for i, b := range w.head.Blocks {
		off := int64(i) * walBlockSize
		if b.Length > 0 && !yield(off, min(walBlockSize, w.head.Size-off)) {
			return
		}
	}
}
