// Package pagehash computes SHA-256 of equally long messages two at a time, where the processor has the SHA extensions: that takes
// little more than half of the time of one after the other, and a tenth less of what it takes to read a file through a mount.
package pagehash

import (
	stdsha256 "crypto/sha256"
	"encoding"
	"encoding/binary"

	"github.com/minio/sha256-simd"
)

// BlockSize is what messages are hashed in, in bytes.
const BlockSize = 64

// Hasher hashes messages that all begin with one block. Safe for concurrent use.
type Hasher struct {
	first [BlockSize]byte
	begun state // by that block
}

// state is a hash state: the words F E B A H G D C.
type state [8]uint32

var order = [8]int{5, 4, 1, 0, 7, 6, 3, 2}

// New returns the hasher of messages that begin with a block.
func New(first [BlockSize]byte) *Hasher {
	h := &Hasher{first: first}
	s := stdsha256.New()
	s.Write(first[:])
	b, err := s.(encoding.BinaryMarshaler).MarshalBinary() // "sha\x03" and the state's words
	if err != nil {
		panic(err)
	}
	for i, word := range order {
		h.begun[i] = binary.BigEndian.Uint32(b[4+4*word:])
	}
	return h
}

// One hashes the first block with a.
func (h *Hasher) One(a []byte) (sum [sha256.Size]byte) {
	s := sha256.New()
	s.Write(h.first[:])
	s.Write(a)
	return [sha256.Size]byte(s.Sum(sum[:0]))
}

// Two hashes the first block with a, and with b. They are of one length, a multiple of BlockSize.
func (h *Hasher) Two(a, b []byte) (x, y [sha256.Size]byte) {
	if len(a) != len(b) || len(a)%BlockSize != 0 || len(a) == 0 {
		panic("messages of different lengths, or without whole blocks")
	}
	if !twoLanes {
		return h.One(a), h.One(b)
	}
	one, two := h.begun, h.begun
	blocks(&one, &two, &a[0], &b[0], len(a)/BlockSize)
	var end [BlockSize]byte
	end[0] = 0x80
	binary.BigEndian.PutUint64(end[BlockSize-8:], uint64(BlockSize+len(a))*8)
	blocks(&one, &two, &end[0], &end[0], 1)
	return one.sum(), two.sum()
}

func (s *state) sum() (sum [sha256.Size]byte) {
	for i, word := range order {
		binary.BigEndian.PutUint32(sum[4*word:], s[i])
	}
	return sum
}
