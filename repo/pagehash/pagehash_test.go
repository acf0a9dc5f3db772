package pagehash

import (
	"crypto/sha256"
	"math/rand/v2"
	"testing"
)

// Both lanes are crypto/sha256, whatever the length and the bytes.
func TestTwo(t *testing.T) {
	rng := rand.NewChaCha8([32]byte{1})
	for n := BlockSize; n <= 16<<10; n += BlockSize {
		var first [BlockSize]byte
		a, b := make([]byte, n), make([]byte, n)
		for _, p := range [][]byte{first[:], a, b} {
			rng.Read(p)
		}
		h := New(first)
		x, y := h.Two(a, b)
		for _, c := range []struct{ got, want [sha256.Size]byte }{
			{x, sha256.Sum256(append(first[:], a...))}, {y, sha256.Sum256(append(first[:], b...))}, {h.One(a), x}, {h.One(b), y},
		} {
			if c.got != c.want {
				t.Fatalf("%d bytes: %x, want %x", n, c.got, c.want)
			}
		}
	}
}

func BenchmarkPages(b *testing.B) {
	h, one, two := New([BlockSize]byte{}), make([]byte, 8192), make([]byte, 8192)
	b.Run("one", func(b *testing.B) {
		b.SetBytes(2 * 8192)
		for b.Loop() {
			h.One(one)
			h.One(two)
		}
	})
	b.Run("two", func(b *testing.B) {
		b.SetBytes(2 * 8192)
		for b.Loop() {
			h.Two(one, two)
		}
	})
}
