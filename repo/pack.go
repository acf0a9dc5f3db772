package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/store"
)

// PackID names a pack: 8 random bytes, chosen before the pack is written, and the ID of the session that writes it.
type PackID [16]byte

func newPackID(by SessionID) (id PackID) {
	rand.Read(id[:8])
	copy(id[8:], by[:])
	return id
}

func (id PackID) compare(other PackID) int { return bytes.Compare(id[:], other[:]) }

// by is the session that wrote the pack.
func (id PackID) by() SessionID { return SessionID(id[8:]) }

func (id PackID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText gives 32 hexadecimal digits.
func (id PackID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, id[:]), nil }

// UnmarshalText reads what MarshalText wrote.
func (id *PackID) UnmarshalText(b []byte) error { return decodeHex(id[:], b) }

func (id PackID) key() string {
	s := id.String()
	return "packs/" + s[:2] + "/" + s
}

// Ref places one piece: Length stored bytes at Offset of a pack, whose content has the ID.
type Ref struct {
	Pack   PackID `json:"pack"`
	Offset uint32 `json:"offset"`
	Length uint32 `json:"length"`
	ID     ID     `json:"id"`
}

func (r Ref) end() uint32 { return r.Offset + r.Length }

// Pieces that packs hold.
const (
	pieceChunk = 'C'
	pieceMap   = 'M'
	pieceTree  = 'T'
)

// Classes of packs: what lies in one pack is read together.
const (
	classData = 'D' // chunks
	classHot  = 'H' // chunks of small files and system catalogs: what every start reads
	classMeta = 'M' // file maps and trees
)

// Layout of a pack.
//
//	0   32  object header, kind P: class at 8, pack ID as salt
//	32      pieces, back to back, each sealed
//	        table of contents, a zstd frame, sealed
//	end-32  trailer: 4 offset and 4 length of the table of contents, 16 its ID, 8 "pgthend1"
const (
	packHeaderSize  = objectHeaderSize
	packTrailerSize = 32
	packTrailerEnd  = "pgthend1"

	dataPackSize = 32 << 20
	metaPackSize = 8 << 20
	// maxPackSize bounds what a reader believes of a pack's size.
	maxPackSize = 1 << 31
)

// packTOC is a pack's table of contents, or an edition's: its pieces in the order they lie.
type packTOC struct {
	offsets []uint32 // of each piece, in the pack
	lengths []uint32
	kinds   []byte
	sizes   []uint32 // content bytes
	ids     []ID
	digests [][]byte // of a chunk's pages, pageDigestSize each

	edition bool // it is an edition's: there may be gaps
}

// add appends a piece that lies behind the last one.
func (t *packTOC) add(kind byte, length, size uint32, id ID, digests []byte) {
	t.addAt(t.end(), kind, length, size, id, digests)
}

func (t *packTOC) addAt(offset uint32, kind byte, length, size uint32, id ID, digests []byte) {
	t.offsets = append(t.offsets, offset)
	t.lengths = append(t.lengths, length)
	t.kinds = append(t.kinds, kind)
	t.sizes = append(t.sizes, size)
	t.ids = append(t.ids, id)
	t.digests = append(t.digests, digests)
}

// end is where the last piece ends.
func (t *packTOC) end() uint32 {
	if n := len(t.offsets); n > 0 {
		return t.offsets[n-1] + t.lengths[n-1]
	}
	return packHeaderSize
}

// find returns the index of the piece at an offset.
func (t *packTOC) find(offset uint32) (i int, ok bool) {
	return slices.BinarySearch(t.offsets, offset)
}

// ref is the place of piece i of a pack.
func (t *packTOC) ref(pack PackID, i int) Ref {
	return Ref{Pack: pack, Offset: t.offsets[i], Length: t.lengths[i], ID: t.ids[i]}
}

// cost is about what the table takes in memory, in bytes.
func (t *packTOC) cost() int64 {
	n := int64(1024)
	for _, d := range t.digests {
		n += 80 + int64(len(d))
	}
	return n
}

// appendTo encodes the table: each piece's kind, stored length and content length, then all IDs, then all digests, so
// that what compresses lies together.
func (t *packTOC) appendTo(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(t.kinds)))
	for i := range t.kinds {
		b = t.appendPiece(b, i)
	}
	return t.appendDigests(b)
}

func (t *packTOC) appendPiece(b []byte, i int) []byte {
	b = append(b, t.kinds[i])
	b = binary.AppendUvarint(b, uint64(t.lengths[i]))
	return binary.AppendUvarint(b, uint64(t.sizes[i]))
}

func (t *packTOC) appendDigests(b []byte) []byte {
	for _, id := range t.ids {
		b = append(b, id[:]...)
	}
	for _, d := range t.digests {
		b = append(b, d...)
	}
	return b
}

func decodeTOC(b []byte) (*packTOC, error) {
	d := decoder{b: b}
	n := d.count(3 + len(ID{}))
	t := newTOC(n)
	for range n {
		t.decodePiece(&d, 0)
	}
	t.decodeDigests(&d)
	return t, d.end()
}

// newTOC has room for n pieces.
func newTOC(n int) *packTOC {
	return &packTOC{offsets: make([]uint32, 0, n), lengths: make([]uint32, 0, n), kinds: make([]byte, 0, n), sizes: make([]uint32, 0, n),
		ids: make([]ID, 0, n), digests: make([][]byte, 0, n)}
}

// decodePiece reads what the table says of the next piece, which lies so many bytes behind the last one.
func (t *packTOC) decodePiece(d *decoder, gap uint64) {
	kind, length, size := d.byte(), d.uvarint(), d.uvarint()
	if gap > maxPackSize || length > maxPackSize {
		d.fail("a piece of %d bytes, %d behind the last", length, gap)
	}
	offset := uint64(t.end()) + gap
	if kind == pieceChunk && (size == 0 || size > ChunkSize) || size > maxPieceSize || offset+length > maxPackSize {
		d.fail("piece of %d content bytes, ending at %d", size, offset+length)
	}
	if d.err == nil {
		t.addAt(uint32(offset), kind, uint32(length), uint32(size), ID{}, nil)
	}
}

func (t *packTOC) decodeDigests(d *decoder) {
	for i := range t.ids {
		copy(t.ids[i][:], d.bytes(len(ID{})))
	}
	for i, kind := range t.kinds {
		if kind == pieceChunk {
			t.digests[i] = d.bytes(pages(int64(t.sizes[i])) * pageDigestSize)
		}
	}
}

// pages is how many pages size bytes take.
func pages(size int64) int { return int((size + PageSize - 1) / PageSize) }

// packer collects pieces of one class into packs and puts each full one into the store.
type packer struct {
	w     *packWriters
	class byte
	size  int // bytes at which a pack is full

	mu     sync.Mutex
	id     PackID
	buf    []byte // the pack so far; nil: none begun
	sealer sealer // of this pack
	toc    packTOC
}

// packWriters are the packers of one writer. Uploads of full packs run beside the packing, a few at a time.
type packWriters struct {
	r       *Repository
	session SessionID
	ctx     context.Context
	uploads *errgroup.Group
	stored  atomic.Int64 // bytes put
	hot     packer
	data    packer
	meta    packer

	mu   sync.Mutex
	done map[PackID]packSize // packs put
}

type packSize struct{ size, toc uint32 }

func newPackWriters(ctx context.Context, r *Repository, session SessionID) *packWriters {
	w := &packWriters{r: r, session: session, done: map[PackID]packSize{}}
	w.uploads, w.ctx = errgroup.WithContext(ctx)
	w.uploads.SetLimit(2)
	w.data = packer{w: w, class: classData, size: dataPackSize}
	w.hot = packer{w: w, class: classHot, size: dataPackSize}
	w.meta = packer{w: w, class: classMeta, size: metaPackSize}
	return w
}

// add compresses and seals content, puts it into a pack and returns its place. digests are those of a chunk's pages and are kept.
func (p *packer) add(kind byte, content []byte, id ID, digests []byte) (Ref, error) {
	room := p.w.r.codec.room()
	defer p.w.r.codec.giveBack(room)
	encode := p.w.r.codec.compress
	if kind == pieceChunk {
		encode = p.w.r.codec.storeChunk
	}
	frame := (*room)[:0]
	if len(content) > ChunkSize { // the listing of very many files, which becomes some two fifths: growing into it takes a multiple
		frame = make([]byte, 0, len(content)/2)
	}
	frame = encode(frame, content)

	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.buf) > packHeaderSize && len(p.buf)+len(frame)+p.sealer.overhead() > p.size {
		if err := p.flush(); err != nil {
			return Ref{}, err
		}
	}
	if p.buf == nil {
		p.begin()
	}
	at := len(p.buf)
	p.buf = p.sealer.seal(append(p.buf, frame...), at)
	ref := Ref{Pack: p.id, Offset: uint32(at), Length: uint32(len(p.buf) - at), ID: id}
	p.toc.add(kind, ref.Length, uint32(len(content)), id, digests)
	return ref, nil
}

// begin starts a pack. Caller holds mu.
func (p *packer) begin() {
	p.id = newPackID(p.w.session)
	p.sealer = p.w.r.packSealer(p.id)
	p.buf = make([]byte, 0, p.size+p.size/16)
	p.buf = append(p.buf, p.w.r.seals.header(kindPack, [8]byte{p.class}, salt(p.id))...)
	p.toc = packTOC{}
}

// flush ends the pack that is being filled and hands it to an upload, waiting for one of the earlier uploads if all
// are busy: that holds back everybody who fills this packer, which is the bound on memory. Caller holds mu.
func (p *packer) flush() error {
	if p.buf == nil {
		return nil
	}
	if err := p.w.ctx.Err(); err != nil {
		return context.Cause(p.w.ctx)
	}
	var size packSize
	p.buf, size = p.w.r.endPack(p.buf, p.sealer, &p.toc)

	body, pack := p.buf, p.id
	p.buf = nil
	p.w.uploads.Go(func() error { return p.w.put(pack, body, size) })
	return nil
}

// endPack appends to a pack's pieces its table of contents and the trailer.
func (r *Repository) endPack(pack []byte, s sealer, t *packTOC) ([]byte, packSize) {
	toc := t.appendTo(nil)
	id, _ := r.digests.sum(toc, nil)
	at := len(pack)
	// Not into pack itself: the encoder keeps hold of what it has written to, a whole pack then.
	pack = s.seal(append(pack, r.codec.compress(nil, toc)...), at)
	size := packSize{toc: uint32(len(pack) - at)}
	pack = binary.LittleEndian.AppendUint32(pack, uint32(at))
	pack = binary.LittleEndian.AppendUint32(pack, size.toc)
	pack = append(append(pack, id[:]...), packTrailerEnd...)
	size.size = uint32(len(pack))
	return pack, size
}

func (w *packWriters) put(id PackID, body []byte, size packSize) error {
	// Entered before the put: a put that reports an error may have been done all the same.
	w.mu.Lock()
	w.done[id] = size
	w.mu.Unlock()
	if err := w.r.store.Put(w.ctx, id.key(), body); err != nil {
		return fmt.Errorf("write pack %s: %w", id, err)
	}
	w.stored.Add(int64(len(body)))
	return nil
}

// finish puts what is left and waits for all uploads.
func (w *packWriters) finish() error {
	for _, p := range []*packer{&w.data, &w.hot, &w.meta} {
		p.mu.Lock()
		err := p.flush()
		p.mu.Unlock()
		if err != nil {
			w.uploads.Wait()
			return err
		}
	}
	return w.uploads.Wait()
}

// abandon deletes the packs that were put. Nothing refers to them, for no manifest was written.
func (w *packWriters) abandon(ctx context.Context) error {
	w.uploads.Wait()
	var first error
	for _, id := range slices.SortedFunc(maps.Keys(w.done), PackID.compare) {
		if err := w.r.store.Delete(ctx, id.key()); err != nil && first == nil {
			first = fmt.Errorf("delete unfinished pack %s: %w", id, err)
		}
	}
	return first
}

// readTOC reads the table of contents of a pack of known size, in one ranged read, or what is left of it in an edition.
func (r *Repository) readTOC(ctx context.Context, id PackID, size packSize) (*packTOC, error) {
	n := int64(size.toc) + packTrailerSize
	at := int64(size.size) - n
	if at < packHeaderSize {
		return nil, corrupt(id.key(), "a size of %d with a table of contents of %d", size.size, size.toc)
	}
	b, err := r.get(ctx, id.key(), at, n)
	if errors.Is(err, store.ErrNotExist) {
		e, err := r.newest(ctx, id)
		if err != nil {
			return nil, readPackError(id, err)
		}
		return e.toc, nil
	}
	if err != nil {
		return nil, readPackError(id, err)
	}
	return r.parseTOC(id, b, at)
}

// packClass reads the class of a pack.
func (r *Repository) packClass(ctx context.Context, id PackID) (class byte, err error) {
	b, err := r.get(ctx, id.key(), 0, packHeaderSize)
	if errors.Is(err, store.ErrNotExist) {
		e, err := r.edition(ctx, id)
		if err != nil {
			return 0, readPackError(id, err)
		}
		return e.class, nil
	}
	if err == nil {
		err = r.checkPackHeader(id, b)
	}
	if err != nil {
		return 0, readPackError(id, err)
	}
	return b[8], nil
}

// checkPackHeader refuses what is not the header of that pack.
func (r *Repository) checkPackHeader(id PackID, b []byte) error {
	salt, err := r.seals.checkHeader(id.key(), b, kindPack)
	if err != nil {
		return err
	}
	if !validClass(b[8]) || [7]byte(b[9:16]) != [7]byte{} || PackID(salt) != id {
		return corrupt(id.key(), "its header is another pack's, or none")
	}
	return nil
}

// parseTOC verifies and decodes the end of a pack: its table of contents, which begins at offset at, and its trailer.
func (r *Repository) parseTOC(id PackID, b []byte, at int64) (*packTOC, error) {
	sealed, trailer := b[:len(b)-packTrailerSize], b[len(b)-packTrailerSize:]
	if string(trailer[24:]) != packTrailerEnd ||
		int64(binary.LittleEndian.Uint32(trailer)) != at || int(binary.LittleEndian.Uint32(trailer[4:])) != len(sealed) {
		return nil, corrupt(id.key(), "its trailer does not fit its size")
	}
	frame, err := r.packSealer(id).open(sealed, at)
	if err != nil {
		return nil, err
	}
	content, err := r.codec.decompress(frame, maxPieceSize)
	if err != nil {
		return nil, corrupt(id.key(), "table of contents: %v", err)
	}
	if !r.digests.verify(content, ID(trailer[8:24])) {
		return nil, corrupt(id.key(), "its table of contents does not match its digest")
	}
	toc, err := decodeTOC(content)
	if err != nil {
		return nil, corrupt(id.key(), "table of contents: %v", err)
	}
	return toc, nil
}

// getPack reads n bytes of a pack from offset off: neighbouring pieces. Where prune has compacted the pack, they come from an edition.
func (r *Repository) getPack(ctx context.Context, id PackID, off, n int64) ([]byte, error) {
	if !r.editions.has(id) {
		b, err := r.get(ctx, id.key(), off, n)
		if !errors.Is(err, store.ErrNotExist) {
			return b, readPackError(id, err)
		}
	}
	b, err := r.getCompacted(ctx, id, off, n)
	return b, readPackError(id, err)
}

func readPackError(id PackID, err error) error {
	if err == nil || errors.Is(err, ErrCorrupt) {
		return err
	}
	return fmt.Errorf("read pack %s: %w", id, err)
}

// piece reads, verifies and returns the content of one piece.
func (r *Repository) piece(ctx context.Context, ref Ref) ([]byte, error) {
	sealed, err := r.getPack(ctx, ref.Pack, int64(ref.Offset), int64(ref.Length))
	if err != nil {
		return nil, err
	}
	return r.pieceContent(ref, sealed)
}

// pieceContent opens a piece that is no chunk in place, and verifies it.
func (r *Repository) pieceContent(ref Ref, sealed []byte) ([]byte, error) {
	frame, err := r.openPiece(ref, sealed)
	if err != nil {
		return nil, err
	}
	content, err := r.codec.decompress(frame, maxPieceSize)
	if err != nil {
		return nil, ref.corrupt(err.Error())
	}
	if !r.digests.verify(content, ref.ID) {
		return nil, ref.corrupt("its content does not match its digest")
	}
	return content, nil
}

func (r *Repository) packSealer(id PackID) sealer {
	return r.seals.object(kindPack, id.key(), salt(id))
}

// openPiece opens in place the stored bytes of a piece.
func (r *Repository) openPiece(ref Ref, sealed []byte) ([]byte, error) {
	return r.packSealer(ref.Pack).open(sealed, int64(ref.Offset))
}

func (r Ref) corrupt(detail string) error {
	return &CorruptError{Object: r.Pack.key(), Offset: int64(r.Offset), Length: int64(r.Length), Detail: detail}
}
