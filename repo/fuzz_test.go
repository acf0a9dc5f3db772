package repo

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// Every decoder of bytes that come from a store: no panic, memory bounded by the input, and what decodes encodes back
// to something that decodes to the same.

func FuzzFileMap(f *testing.F) {
	ref := Ref{Pack: PackID{1}, Offset: 32, Length: 100, ID: ID{2}}
	f.Add((&fileMap{size: 20 * PageSize, chunks: []Ref{ref, {Pack: PackID{1}, Offset: 132, Length: 5, ID: ID{3}}},
		extents: []extent{{0, 0, 16}, {zeros, 0, 3}, {1, 2, 1}}}).appendTo(nil))
	f.Add((&fileMap{}).appendTo(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeFileMap(b)
		if err != nil {
			return
		}
		again, err := decodeFileMap(m.appendTo(nil))
		if err != nil || !reflect.DeepEqual(m, again) {
			t.Errorf("%+v encodes to %+v, %v", m, again, err)
		}
	})
}

func encodeTree(entries []Entry) ([]byte, error) {
	var l listing
	for _, e := range entries {
		if err := l.add(&e); err != nil {
			return nil, err
		}
	}
	return l.encode()
}

func FuzzTree(f *testing.F) {
	b, err := encodeTree([]Entry{
		{Name: "PG_VERSION", Mode: 0o600, Size: 3, ModTime: time.Unix(5, 0), content: content{kind: contentInline, bytes: []byte("15\n")}},
		{Name: "pg_wal", Mode: 0o700 | 1<<31, content: content{kind: contentTree, ref: Ref{Offset: 32}}},
		{Name: "x", Mode: 0o600, Size: 1 << 24, content: content{kind: contentWAL, wal: pg.WALName{Timeline: 1, Seg: 2}}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := decodeTree(b)
		if err != nil {
			return
		}
		encoded, err := encodeTree(list)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeTree(encoded)
		if err != nil || !reflect.DeepEqual(list, again) {
			t.Errorf("%+v encodes to %+v, %v", list, again, err)
		}
		checkLookups(t, encoded, list)
	})
}

// decodeTree decodes a whole tree.
func decodeTree(b []byte) ([]Entry, error) {
	list, err := newListing(b)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, list.Len())
	for i := range entries {
		entries[i] = list.At(i)
	}
	return entries, nil
}

func checkLookups(t *testing.T, encoded []byte, list []Entry) {
	t.Helper()
	stored, err := newListing(encoded)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range list {
		if e, ok := stored.Find(want.Name); !ok || !reflect.DeepEqual(e, want) {
			t.Errorf("found %+v, %v; want %+v", e, ok, want)
		}
		if e, ok := stored.Find(want.Name + "\x01"); ok && e.Name != want.Name+"\x01" {
			t.Errorf("found %+v for another name", e)
		}
	}
}

func FuzzTOC(f *testing.F) {
	var toc packTOC
	toc.add(pieceChunk, 10, PageSize+1, ID{1}, make([]byte, 2*pageDigestSize))
	toc.add(pieceMap, 20, 30, ID{2}, nil)
	f.Add(toc.appendTo(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		toc, err := decodeTOC(b)
		if err != nil {
			return
		}
		again, err := decodeTOC(toc.appendTo(nil))
		if err != nil || !reflect.DeepEqual(toc, again) {
			t.Errorf("%+v encodes to %+v, %v", toc, again, err)
		}
	})
}

func FuzzEditionTable(f *testing.F) {
	var toc packTOC
	toc.addAt(100, pieceChunk, 10, PageSize+1, ID{1}, make([]byte, 2*pageDigestSize))
	toc.add(pieceMap, 20, 30, ID{2}, nil)
	toc.addAt(500, pieceTree, 20, 30, ID{3}, nil)
	id := PackID{5}
	f.Add(toc.appendTable(id[:], []uint32{1, 2, 3}))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, toc, sums, err := decodeTable(b)
		if err != nil {
			return
		}
		id2, again, sums2, err := decodeTable(toc.appendTable(id[:], sums))
		if err != nil || id != id2 || !reflect.DeepEqual(toc, again) || !reflect.DeepEqual(sums, sums2) {
			t.Errorf("%+v encodes to %+v, %v", toc, again, err)
		}
	})
}

// FuzzEdition reads an edition of any bytes: an error, or pieces that have their checksums, whatever its table says.
func FuzzEdition(f *testing.F) {
	codec, err := newCodec()
	if err != nil {
		f.Fatal(err)
	}
	r := &Repository{codec: codec, digests: newDigester([keySize]byte{1})}
	r.emptyCaches(1)
	id := PackID{5}
	var toc packTOC
	toc.addAt(100, pieceTree, 3, 30, ID{2}, nil)
	toc.add(pieceTree, 4, 30, ID{2}, nil)
	f.Add(toc.appendTable(id[:], checksums(&toc, []byte("abcdefg"))), []byte("abcdefg"), uint16(100), uint16(7))
	f.Fuzz(func(t *testing.T, table, pieces []byte, off, n uint16) {
		tableID, _ := r.digests.sum(table, nil)
		frame := codec.compress(nil, table)
		use := [8]byte{byte(len(frame)), byte(len(frame) >> 8), byte(len(frame) >> 16), 0, classMeta}
		object := append(append(r.seals.header(kindEdition, use, salt{}), tableID[:]...), append(frame, pieces...)...)
		r.store = store.NewMem()
		r.editions.forget(id)
		if err := r.store.Put(t.Context(), id.editionKey(1), object); err != nil {
			t.Fatal(err)
		}
		b, err := r.getPack(t.Context(), id, int64(off), int64(n))
		if err == nil && (len(b) != int(n) || n > 0 && !bytes.Contains(pieces, b)) {
			t.Errorf("%d+%d is %q", off, n, b)
		}
	})
}

func FuzzPackList(f *testing.F) {
	f.Add([]byte{0})
	f.Add(append(append([]byte{1}, make([]byte, 16)...), 100, 10, 50))
	f.Fuzz(func(t *testing.T, b []byte) {
		if uses, err := decodePackList(b); err == nil && len(uses) > len(b) {
			t.Errorf("%d packs in %d bytes", len(uses), len(b))
		}
	})
}

func FuzzManifest(f *testing.F) {
	m := testManifest()
	m.document = document{manifestKind, formatVersion}
	b, err := marshalDocument(&m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m Manifest
		if unmarshalDocument("x", b, manifestKind, &m) != nil {
			return
		}
		again, err := marshalDocument(&m)
		if err != nil {
			t.Fatal(err)
		}
		var m2 Manifest
		if err := unmarshalDocument("x", again, manifestKind, &m2); err != nil || !reflect.DeepEqual(m, m2) {
			t.Errorf("%+v encodes to %+v, %v", m, m2, err)
		}
	})
}

// FuzzPack opens the end of a pack and each of its pieces: whatever the bytes, an error or verified content.
func FuzzPack(f *testing.F) {
	codec, err := newCodec()
	if err != nil {
		f.Fatal(err)
	}
	r := &Repository{codec: codec, digests: newDigester([keySize]byte{1})}
	var toc packTOC
	toc.add(pieceMap, 20, 30, ID{2}, nil)
	content := toc.appendTo(nil)
	id, _ := r.digests.sum(content, nil)
	frame := codec.compress(nil, content)
	tail := append(bytes.Clone(frame), 32, 0, 0, 0, byte(len(frame)), 0, 0, 0)
	f.Add(append(append(tail, id[:]...), packTrailerEnd...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < packTrailerSize {
			return
		}
		if toc, err := r.parseTOC(PackID{1}, b, 32); err == nil && len(toc.kinds) > len(b) && len(b) < 100 {
			t.Errorf("%d pieces in %d bytes", len(toc.kinds), len(b))
		}
		chunk := make([]byte, 0, ChunkSize)
		if _, err := r.decodeChunk(Ref{}, b, chunk); err == nil {
			t.Error("a chunk without its digest was believed")
		}
	})
}

func FuzzWALHead(f *testing.F) {
	codec, err := newCodec()
	if err != nil {
		f.Fatal(err)
	}
	r := &Repository{codec: codec, digests: newDigester([keySize]byte{1})}
	name := pg.WALName{Kind: pg.WALHistory, Timeline: 2}
	text, _ := json.Marshal(walHead{Cluster: "main", Name: name.String(), Size: 5, Blocks: []walBlock{{Length: 20}}})
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		id, _ := r.digests.sum(text, nil)
		start := append(make([]byte, objectHeaderSize), id[:]...)
		h, err := r.parseWALHead("x", "main", name, start, text)
		if err == nil && len(h.offsets) != len(h.Blocks)+1 {
			t.Errorf("%+v", h)
		}
	})
}
