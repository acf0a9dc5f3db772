package repo

import (
	"runtime"
	"testing"
)

// TestDamagedContentSize asks a short frame for a gigabyte. A damaged length gives an error, and costs no such memory.
func TestDamagedContentSize(t *testing.T) {
	c, err := newCodec()
	if err != nil {
		t.Fatal(err)
	}
	defer c.dec.Close()
	frame := append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0, 0, 0, 0x40}, "a block that is none"...)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if b, err := c.decompress(frame, maxPieceSize); err == nil {
		t.Errorf("%d bytes", len(b))
	}
	if runtime.ReadMemStats(&after); after.TotalAlloc-before.TotalAlloc > 8<<20 {
		t.Errorf("%d bytes allocated for a frame of %d", after.TotalAlloc-before.TotalAlloc, len(frame))
	}
	content := make([]byte, 100<<20) // what compresses best
	if b, err := c.decompress(c.compress(nil, content), maxPieceSize); err != nil || len(b) != len(content) {
		t.Errorf("%d bytes of zeros: %v", len(b), err)
	}
}
