package repo

import (
	"encoding/binary"
	"errors"
	"iter"
	"sort"
)

// fileMap says where the content of one file lies: extents of pages, in the file's order, each of one chunk or of zeros.
//
// Format: docs/format.md, "File map".
type fileMap struct {
	size    int64 // bytes
	chunks  []Ref
	extents []extent
	first   []uint32 // page of the file at which each extent begins
}

// extent places n consecutive pages of a file.
type extent struct {
	chunk int32  // index into chunks; zeros: pages of zeros, which lie nowhere
	page  uint32 // first page, counted within the chunk
	n     uint32 // pages; only a file's last page may be shorter than PageSize
}

const zeros = -1

// appendTo encodes the map: size, packs, chunks, extents, and the chunks' IDs last, which do not compress.
func (m *fileMap) appendTo(b []byte) []byte {
	b = append(b, pieceMap, formatVersion)
	b = binary.AppendUvarint(b, uint64(m.size))
	b = m.appendChunks(b)
	b = binary.AppendUvarint(b, uint64(len(m.extents)))
	next := int64(0) // the chunk after the one before
	for _, e := range m.extents {
		if e.chunk == zeros {
			b = append(b, 0)
		} else {
			b = binary.AppendUvarint(b, zigzag(int64(e.chunk)-next)+1)
			b = binary.AppendUvarint(b, uint64(e.page))
			next = int64(e.chunk) + 1
		}
		b = binary.AppendUvarint(b, uint64(e.n))
	}
	for _, c := range m.chunks {
		b = append(b, c.ID[:]...)
	}
	return b
}

func (m *fileMap) appendChunks(b []byte) []byte {
	index := map[PackID]int{}
	var ids []PackID
	for _, c := range m.chunks {
		if _, ok := index[c.Pack]; !ok {
			index[c.Pack] = len(ids)
			ids = append(ids, c.Pack)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(ids)))
	for _, id := range ids {
		b = append(b, id[:]...)
	}
	b = binary.AppendUvarint(b, uint64(len(m.chunks)))
	ends := make([]int64, len(ids)) // where the chunk before ended, in each pack
	for _, c := range m.chunks {
		i := index[c.Pack]
		b = binary.AppendUvarint(b, uint64(i))
		b = binary.AppendVarint(b, int64(c.Offset)-ends[i])
		b = binary.AppendUvarint(b, uint64(c.Length))
		ends[i] = int64(c.end())
	}
	return b
}

func zigzag(v int64) uint64   { return uint64(v)<<1 ^ uint64(v>>63) }
func unzigzag(u uint64) int64 { return int64(u>>1) ^ -int64(u&1) }

func decodeFileMap(b []byte) (*fileMap, error) {
	d := decoder{b: b}
	if d.byte() != pieceMap || d.byte() != formatVersion {
		return nil, errors.New("not a file map of version 1")
	}
	m := &fileMap{size: int64(d.uvarint())}
	if m.size < 0 || m.size > maxFileSize {
		d.fail("a file of %d bytes", uint64(m.size))
	}
	m.decodeChunks(&d)
	m.decodeExtents(&d)
	for i := range m.chunks {
		copy(m.chunks[i].ID[:], d.bytes(len(ID{})))
	}
	return m, d.end()
}

// maxFileSize bounds a file: 32 TiB, PostgreSQL's limit for a whole table, so that page numbers fit 32 bits.
const maxFileSize = 1 << 45

func (m *fileMap) decodeChunks(d *decoder) {
	ids := make([]PackID, d.count(len(PackID{})))
	for i := range ids {
		copy(ids[i][:], d.bytes(len(PackID{})))
	}
	ends := make([]int64, len(ids))
	m.chunks = make([]Ref, d.count(3))
	for i := range m.chunks {
		pack, delta, length := d.uvarint(), d.varint(), d.uint32()
		if d.err != nil || pack >= uint64(len(ids)) {
			d.fail("chunk %d in pack %d of %d", i, pack, len(ids))
			return
		}
		offset := ends[pack] + delta
		if offset < packHeaderSize || offset+int64(length) > maxPackSize {
			d.fail("chunk %d at %d+%d", i, offset, length)
			return
		}
		ends[pack] = offset + int64(length)
		m.chunks[i] = Ref{Pack: ids[pack], Offset: uint32(offset), Length: length}
	}
}

func (m *fileMap) decodeExtents(d *decoder) {
	m.extents = make([]extent, d.count(2))
	m.first = make([]uint32, len(m.extents))
	var next, page int64
	total := int64(pages64(m.size))
	for i := range m.extents {
		e := extent{chunk: zeros}
		if code := d.uvarint(); code != 0 {
			chunk := next + unzigzag(code-1)
			if chunk < 0 || chunk >= int64(len(m.chunks)) {
				d.fail("extent %d in chunk %d of %d", i, chunk, len(m.chunks))
				return
			}
			e.chunk, e.page = int32(chunk), d.uint32()
			next = chunk + 1
		}
		e.n = d.uint32()
		if e.n == 0 || int64(e.n) > total-page || e.chunk != zeros && uint64(e.page)+uint64(e.n) > ChunkPages {
			d.fail("extent %d of %d pages from %d", i, e.n, e.page)
			return
		}
		m.extents[i], m.first[i] = e, uint32(page)
		page += int64(e.n)
	}
	if page != total {
		d.fail("extents of %d pages for %d", page, total)
	}
}

func pages64(size int64) int64 { return (size + PageSize - 1) / PageSize }

// at returns the index of the extent that holds a page of the file.
func (m *fileMap) at(page uint32) int {
	return sort.Search(len(m.first), func(i int) bool { return m.first[i] > page }) - 1
}

// data gives the runs of bytes that are not known to be zeros, ascending, neighbours joined.
func (m *fileMap) data() iter.Seq2[int64, int64] {
	return func(yield func(off, n int64) bool) {
		var from, to int64
		for i, e := range m.extents {
			if e.chunk == zeros {
				continue
			}
			off := int64(m.first[i]) * PageSize
			if off != to {
				if to > from && !yield(from, to-from) {
					return
				}
				from = off
			}
			to = min(off+int64(e.n)*PageSize, m.size)
		}
		if to > from {
			yield(from, to-from)
		}
	}
}
