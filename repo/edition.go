package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"

	"pgthaw/repo/store"
)

// edition is what prune has left of a pack of which most was dead: the pieces that are still referred to, as they were
// stored, and a table that tells where. Places in the pack stay what they were; whoever reads looks them up in the table.
//
// Format: docs/format.md, "Edition".
type edition struct {
	key   string
	class byte
	salt  salt
	toc   *packTOC // of the pieces that it holds, by their places in the pack
	sums  []uint32 // CRC-32C of the stored bytes of each
	at    []int64  // where each lies in the edition; one more at the end
}

// Layout of an edition.
//
//	0   32  object header, kind E: at 8 the stored length of the table, at 12 the pack's class
//	32  16  ID of the table
//	48      table, a zstd frame, sealed
//	        pieces, back to back, as they were stored in the pack
const (
	editionHeaderSize = objectHeaderSize + 16
	// maxEditions bounds how often a pack is compacted: each edition has half of the bytes of the one before at most.
	maxEditions = 9
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// editionKey is the key of an edition, counted from 1; 0 is the pack itself.
func (id PackID) editionKey(no int) string {
	if no == 0 {
		return id.key()
	}
	return id.key() + "." + strconv.Itoa(no)
}

// editionOfKey takes apart the key of a pack, whose no is 0, or of an edition.
func editionOfKey(key string) (id PackID, no int, ok bool) {
	name, suffix, _ := strings.Cut(key[strings.LastIndexByte(key, '/')+1:], ".")
	if id.UnmarshalText([]byte(name)) != nil {
		return id, 0, false
	}
	if suffix != "" {
		no, _ = strconv.Atoi(suffix)
	}
	return id, no, no >= 0 && no <= maxEditions && id.editionKey(no) == key
}

// packOfKey tells of which pack an object is the key, or of an edition of which.
func packOfKey(key string) (id PackID, ok bool) {
	id, _, ok = editionOfKey(key)
	return id, ok
}

// encodeEdition makes the object. pieces are the stored bytes of all that the table names, back to back.
func (r *Repository) encodeEdition(id PackID, no int, class byte, toc *packTOC, pieces []byte) []byte {
	salt := newSalt()
	table := toc.appendTable(id[:], checksums(toc, pieces))
	tableID, _ := r.digests.sum(table, nil)
	frame := r.codec.compress(nil, table)
	sealer := r.seals.object(kindEdition, id.editionKey(no), salt)
	use := [8]byte{4: class}
	binary.LittleEndian.PutUint32(use[:], uint32(len(frame)+sealer.overhead()))
	b := make([]byte, 0, editionHeaderSize+len(frame)+sealer.overhead()+len(pieces))
	b = append(append(b, r.seals.header(kindEdition, use, salt)...), tableID[:]...)
	b = sealer.seal(append(b, frame...), editionHeaderSize)
	return append(b, pieces...)
}

func checksums(toc *packTOC, pieces []byte) []uint32 {
	sums := make([]uint32, len(toc.lengths))
	for i, n := range toc.lengths {
		sums[i] = crc32.Checksum(pieces[:n], castagnoli)
		pieces = pieces[n:]
	}
	return sums
}

// appendTable encodes an edition's table behind b, which is the pack's ID: as a table of contents, and of each piece also its
// distance from the one before in the pack, and the checksum of its stored bytes.
func (t *packTOC) appendTable(b []byte, sums []uint32) []byte {
	b = binary.AppendUvarint(b[:len(b):len(b)], uint64(len(t.kinds)))
	end := uint32(packHeaderSize)
	for i := range t.kinds {
		b = binary.AppendUvarint(b, uint64(t.offsets[i]-end))
		b = t.appendPiece(b, i)
		b = binary.LittleEndian.AppendUint32(b, sums[i])
		end = t.offsets[i] + t.lengths[i]
	}
	return t.appendDigests(b)
}

func decodeTable(b []byte) (id PackID, t *packTOC, sums []uint32, err error) {
	d := decoder{b: b}
	copy(id[:], d.bytes(len(id)))
	n := d.count(8 + len(ID{}))
	t, sums = newTOC(n), make([]uint32, n)
	t.edition = true
	for i := range n {
		t.decodePiece(&d, d.uvarint())
		if sum := d.bytes(4); sum != nil {
			sums[i] = binary.LittleEndian.Uint32(sum)
		}
	}
	t.decodeDigests(&d)
	return id, t, sums, d.end()
}

// openEdition reads an edition's table. store.ErrNotExist: there is no such edition.
func (r *Repository) openEdition(ctx context.Context, id PackID, no int) (*edition, error) {
	key := id.editionKey(no)
	for {
		start, err := r.get(ctx, key, 0, editionHeaderSize)
		if err != nil {
			return nil, err
		}
		e, err := r.readEdition(ctx, id, key, start)
		if !errors.Is(err, ErrCorrupt) {
			return e, err
		}
		if again, getErr := r.get(ctx, key, 0, editionHeaderSize); getErr != nil || bytes.Equal(start, again) {
			return nil, errors.Join(getErr, err)
		} // another one was put in its place meanwhile
	}
}

func (r *Repository) readEdition(ctx context.Context, id PackID, key string, start []byte) (*edition, error) {
	if _, err := r.seals.checkHeader(key, start, kindEdition); err != nil {
		return nil, err
	}
	if !validClass(start[12]) || [3]byte(start[13:16]) != [3]byte{} {
		return nil, corrupt(key, "its header is none of a pack's edition")
	}
	sealed, err := r.get(ctx, key, editionHeaderSize, int64(binary.LittleEndian.Uint32(start[8:])))
	if err != nil {
		return nil, err
	}
	return r.parseEdition(id, key, start, sealed)
}

func validClass(class byte) bool {
	return class == classData || class == classHot || class == classMeta
}

// parseEdition verifies and decodes an edition's table.
func (r *Repository) parseEdition(id PackID, key string, start, sealed []byte) (*edition, error) {
	e := &edition{key: key, class: start[12], salt: salt(start[16:objectHeaderSize]), at: []int64{editionHeaderSize + int64(len(sealed))}}
	frame, err := r.seals.object(kindEdition, key, e.salt).open(sealed, editionHeaderSize)
	if err != nil {
		return nil, err
	}
	content, err := r.codec.decompress(frame, maxPieceSize)
	if err != nil {
		return nil, corrupt(key, "table: %v", err)
	}
	if !r.digests.verify(content, ID(start[objectHeaderSize:])) {
		return nil, corrupt(key, "its table does not match its digest")
	}
	of, toc, sums, err := decodeTable(content)
	if err == nil && of != id {
		err = fmt.Errorf("that of pack %s", of)
	}
	if err != nil {
		return nil, corrupt(key, "table: %v", err)
	}
	e.toc, e.sums = toc, sums
	for i, n := range toc.lengths {
		e.at = append(e.at, e.at[i]+int64(n))
	}
	return e, nil
}

// size is that of the object.
func (e *edition) size() int64 { return e.at[len(e.at)-1] }

// newest reads the table of a pack's edition. An older edition is deleted when a newer one is there, so whoever asks for
// one after the other, upwards, finds one. A pack without any is damaged: nobody asks for a pack that no backup needs.
func (r *Repository) newest(ctx context.Context, id PackID) (*edition, error) {
	for no := 1; no <= maxEditions; no++ {
		e, err := r.openEdition(ctx, id, no)
		if err == nil || !errors.Is(err, store.ErrNotExist) {
			return e, err
		}
	}
	return nil, corrupt(id.key(), "it is missing")
}

// edition is newest through the cache, without what readers of files do not need.
func (r *Repository) edition(ctx context.Context, id PackID) (*edition, error) {
	return r.editions.get(id, func() (*edition, int64, error) {
		e, err := r.newest(ctx, id)
		if err != nil {
			return nil, 0, err
		}
		e.toc = &packTOC{offsets: e.toc.offsets, lengths: e.toc.lengths}
		return e, 256 + 20*int64(len(e.sums)), nil
	})
}

// getCompacted reads what lies at n bytes of a pack from offset off, whole pieces, from its edition.
func (r *Repository) getCompacted(ctx context.Context, id PackID, off, n int64) ([]byte, error) {
	e, err := r.edition(ctx, id)
	for range maxEditions {
		if err != nil {
			return nil, err
		}
		b, readErr := r.getPieces(ctx, e, off, n)
		if readErr == nil || errors.Is(readErr, errNotHeld) {
			return b, readErr
		}
		gone, other := errors.Is(readErr, store.ErrNotExist), errors.Is(readErr, ErrCorrupt)
		if !gone && !other {
			return nil, readErr
		}
		was := e // there is another edition meanwhile, or another one has this key
		r.editions.forget(id)
		if e, err = r.edition(ctx, id); err == nil && other && e.salt == was.salt {
			return nil, readErr
		}
	}
	return nil, corrupt(id.key(), "its edition changes all the time")
}

// errNotHeld says that an edition does not have a piece: it was dead, or what refers to it is damaged.
var errNotHeld = errors.New("not held")

type notHeldError struct{ *CorruptError }

func (e notHeldError) Is(target error) bool { return target == errNotHeld || target == ErrCorrupt }
func (e notHeldError) Unwrap() error        { return e.CorruptError }

// getPieces reads neighbouring pieces. The checksums tell whether it is the edition whose table e is: readers verify the pieces.
func (r *Repository) getPieces(ctx context.Context, e *edition, off, n int64) ([]byte, error) {
	first, ok := e.toc.find(uint32(off))
	end := first
	for at := off; ok && at < off+n; end++ {
		ok = end < len(e.sums) && int64(e.toc.offsets[end]) == at
		if ok {
			at += int64(e.toc.lengths[end])
			ok = at <= off+n
		}
	}
	if !ok {
		return nil, notHeldError{&CorruptError{Object: e.key, Detail: fmt.Sprintf("it does not hold what lay in the pack at %d+%d", off, n)}}
	}
	b, err := r.get(ctx, e.key, e.at[first], n)
	if err != nil {
		return nil, err
	}
	rest := b
	for i := first; i < end; i++ {
		length := e.toc.lengths[i]
		if crc32.Checksum(rest[:length], castagnoli) != e.sums[i] {
			return nil, &CorruptError{Object: e.key, Offset: e.at[i], Length: int64(length), Detail: "other bytes than were written"}
		}
		rest = rest[length:]
	}
	return b, nil
}
