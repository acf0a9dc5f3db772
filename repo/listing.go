package repo

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"slices"
	"sort"
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

// Listing is what a directory of a backup holds, sorted by name. It keeps the tree as it lies in the repository, some 80 bytes
// for a file, and decodes an entry when it is asked for: a million Entries take 300 MB. Safe for concurrent use.
type Listing struct {
	tree []byte
	at   []uint32 // where in tree each entry begins
}

// newListing refuses a tree that breaks a rule of the format.
func newListing(tree []byte) (*Listing, error) {
	t, err := newTreeDecoder(tree)
	if err != nil {
		return nil, err
	}
	l := &Listing{tree: tree, at: make([]uint32, t.left)}
	for i := range l.at {
		l.at[i] = uint32(len(tree) - len(t.d.b))
		if _, err := t.next(); err != nil {
			return nil, err
		}
	}
	return l, t.d.end()
}

// Len is the number of entries.
func (l *Listing) Len() int { return len(l.at) }

// At returns the entry with an index from 0 to Len()-1.
func (l *Listing) At(i int) (e Entry) {
	e.decode(&decoder{b: l.tree[l.at[i]:]})
	return e
}

// Find returns the entry with a name.
func (l *Listing) Find(name string) (e Entry, ok bool) {
	i := sort.Search(len(l.at), func(i int) bool { return string(l.name(i)) >= name })
	if i == len(l.at) || string(l.name(i)) != name {
		return e, false
	}
	return l.At(i), true
}

func (l *Listing) name(i int) []byte { return encodedName(l.tree[l.at[i]:]) }

// cost is about what the listing takes in memory, in bytes.
func (l *Listing) cost() int64 { return int64(len(l.tree)) + 4*int64(len(l.at)) + 128 }
