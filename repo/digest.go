package repo

import (
	"encoding/hex"
	"fmt"
	"hash"
	"sync"

	sha256 "github.com/minio/sha256-simd"

	"pgthaw/repo/pagehash"
)

// PageSize is the unit of digests, extents and comparison, in bytes: PostgreSQL's default block size. A cluster
// built with another one is stored all the same, only compared in units of 8 KiB.
const PageSize = 8192

// ChunkPages is how many pages a chunk holds at most.
const ChunkPages = 16

// ChunkSize is the most content a chunk holds, in bytes.
const ChunkSize = ChunkPages * PageSize

const (
	keySize        = 32 // the repository's digest key
	pageDigestSize = 8  // what a pack's table of contents keeps of each page's digest
	sha256Size     = 32
)

// ID names content: the first 16 bytes of its keyed digest.
//
// Format: docs/format.md, "Digests".
type ID [16]byte

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText gives 32 hexadecimal digits.
func (id ID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, id[:]), nil }

// UnmarshalText reads what MarshalText wrote.
func (id *ID) UnmarshalText(b []byte) error { return decodeHex(id[:], b) }

func decodeHex(dst, src []byte) error {
	if hex.DecodedLen(len(src)) != len(dst) || len(src)%2 != 0 {
		return fmt.Errorf("%q is not %d hexadecimal digits", src, 2*len(dst))
	}
	_, err := hex.Decode(dst, src)
	return err
}

// digester computes the digests of one repository. Every hash begins with one whole block of key and label, so that
// nobody without the repository's configuration can look for two contents of the same digest.
type digester struct {
	pages      *pagehash.Hasher
	zeroPage   pageSum // digest of a page of zeros: never worth computing twice
	pieceBlock [pagehash.BlockSize]byte
	states     sync.Pool // *hashState
}

type pageSum = [sha256Size]byte

type hashState struct {
	piece hash.Hash
	sums  [ChunkPages]pageSum
	sum   [sha256Size]byte
}

func newDigester(key [keySize]byte) *digester {
	d := &digester{}
	d.states.New = func() any { return &hashState{piece: sha256.New()} }
	var pageBlock [pagehash.BlockSize]byte
	copy(pageBlock[:], "pgthaw page 1")
	copy(d.pieceBlock[:], "pgthaw piece 1")
	copy(pageBlock[keySize:], key[:])
	copy(d.pieceBlock[keySize:], key[:])
	d.pages = pagehash.New(pageBlock)
	d.zeroPage = d.pages.One(zeroPage[:])
	return d
}

// sum returns the ID of content and appends to digests, 8 bytes for each, the digests of its pages. The content is
// hashed once: the ID is a digest of the pages' digests.
func (d *digester) sum(content, digests []byte) (ID, []byte) {
	s := d.states.Get().(*hashState)
	defer d.states.Put(s)
	s.piece.Reset()
	s.piece.Write(d.pieceBlock[:])
	for len(content) > 0 {
		n := min(ChunkSize, len(content))
		for _, sum := range d.sumPages(content[:n], s.sums[:0]) {
			s.piece.Write(sum[:])
			digests = append(digests, sum[:pageDigestSize]...)
		}
		content = content[n:]
	}
	return ID(s.piece.Sum(s.sum[:0])[:16]), digests
}

// sumPages appends the digests of content's pages, of which the last may be shorter.
func (d *digester) sumPages(content []byte, sums []pageSum) []pageSum {
	first := -1 // of two pages that are hashed together
	for off := 0; off < len(content); off += PageSize {
		page := content[off:min(off+PageSize, len(content))]
		i := len(sums)
		sums = append(sums, d.zeroPage)
		switch {
		case isZeroPage(page):
		case len(page) < PageSize:
			sums[i] = d.pages.One(page)
		case first < 0:
			first = i
		default:
			sums[first], sums[i] = d.pages.Two(content[first*PageSize:][:PageSize], page)
			first = -1
		}
	}
	if first >= 0 {
		sums[first] = d.pages.One(content[first*PageSize:][:PageSize])
	}
	return sums
}

// verify tells whether content has the ID.
func (d *digester) verify(content []byte, id ID) bool {
	var room [ChunkPages * pageDigestSize]byte
	got, _ := d.sum(content, room[:0])
	return got == id
}

var zeroPage [PageSize]byte

// isZeroPage tells whether b is a whole page of zeros. A shorter last page never counts.
func isZeroPage(b []byte) bool { return len(b) == PageSize && [PageSize]byte(b) == zeroPage }
