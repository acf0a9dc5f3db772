package repo

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"slices"
	"sort"
	"strings"
)

// listing gathers the entries of a directory that is being written, in any order and encoded: a file takes some 75 bytes
// here, a seventh of what its Entry and a map of them take, and nothing that the garbage collector has to look into.
type listing struct {
	blocks [][]byte // entries, back to back
	count  int
	size   int // bytes of all entries
}

// A directory's first block has room for some fifty entries. Each further one is as large as all before it, within bounds.
const (
	firstListingBlock = 4 << 10
	maxListingBlock   = 1 << 20
)

func (l *listing) add(e *Entry) error {
	var room [1 << 10]byte
	encoded, err := e.appendTo(room[:0])
	if err != nil {
		return err
	}
	last := len(l.blocks) - 1
	if last < 0 || cap(l.blocks[last])-len(l.blocks[last]) < len(encoded) {
		block := max(min(l.size, maxListingBlock), firstListingBlock, len(encoded))
		l.blocks = append(l.blocks, make([]byte, 0, block))
		last++
	}
	l.blocks[last] = append(l.blocks[last], encoded...)
	l.count++
	l.size += len(encoded)
	return nil
}

// encode makes the tree of what was gathered. fs.ErrExist: a name came twice.
//
// Format: docs/format.md, "Tree".
func (l *listing) encode() ([]byte, error) {
	entries, err := l.sorted()
	if err != nil {
		return nil, err
	}
	b := make([]byte, 0, l.size+2+binary.MaxVarintLen64)
	b = append(b, pieceTree, formatVersion)
	b = binary.AppendUvarint(b, uint64(len(entries)))
	for i, e := range entries {
		if i > 0 && bytes.Equal(encodedName(e), encodedName(entries[i-1])) {
			return nil, fmt.Errorf("%s: %w", encodedName(e), fs.ErrExist)
		}
		b = append(b, e...)
	}
	return b, nil
}

// sorted finds where entries begin and end, and orders them by name.
func (l *listing) sorted() ([][]byte, error) {
	entries := make([][]byte, 0, l.count)
	for _, block := range l.blocks {
		for d := (decoder{b: block}); len(d.b) > 0; {
			var e Entry
			begin := d.b
			if e.decode(&d); d.err != nil {
				return nil, d.err
			}
			entries = append(entries, begin[:len(begin)-len(d.b)])
		}
	}
	slices.SortFunc(entries, func(a, b []byte) int { return bytes.Compare(encodedName(a), encodedName(b)) })
	return entries, nil
}

// encodedName is the name of an encoded entry.
func encodedName(e []byte) []byte {
	n, skip := binary.Uvarint(e)
	return e[skip:][:n]
}

// storedListing is a directory's tree as it lies in the repository, to look names up in.
type storedListing struct {
	tree []byte
	at   []uint32 // where in tree each entry begins
}

func newStoredListing(tree []byte) (*storedListing, error) {
	t, err := newTreeDecoder(tree)
	if err != nil {
		return nil, err
	}
	l := &storedListing{tree: tree, at: make([]uint32, t.left)}
	for i := range l.at {
		l.at[i] = uint32(len(tree) - len(t.d.b))
		if _, err := t.next(); err != nil {
			return nil, err
		}
	}
	return l, t.d.end()
}

func (l *storedListing) find(name string) (e Entry, ok bool) {
	i, ok := sort.Find(len(l.at), func(i int) int { return strings.Compare(name, string(encodedName(l.tree[l.at[i]:]))) })
	if ok {
		e.decode(&decoder{b: l.tree[l.at[i]:]})
	}
	return e, ok
}
