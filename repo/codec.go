package repo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"

	"pgthaw/repo/pg"
)

// maxPieceSize bounds what one piece that is not a chunk may decompress to: a directory of a million files takes
// about 80 MB, so this is room enough, and a damaged length cannot ask for all memory.
const maxPieceSize = 1 << 30

// codec compresses and decompresses: one zstd frame for each piece. Safe for concurrent use.
type codec struct {
	enc   *zstd.Encoder
	dec   *zstd.Decoder
	rooms sync.Pool // *[]byte with room for a stored chunk, or its filtered pages
}

func newCodec() (*codec, error) {
	// Said before the level, the window makes a chunk one zstd block instead of two: an eighth less time, 0.3 % more bytes.
	enc, err := zstd.NewWriter(nil, zstd.WithWindowSize(ChunkSize), zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), zstd.WithEncoderConcurrency(runtime.GOMAXPROCS(0)))
	if err != nil {
		return nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(maxPieceSize),
		zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	c := &codec{enc: enc, dec: dec}
	c.rooms.New = func() any { b := make([]byte, 0, ChunkSize+ChunkSize/64); return &b }
	return c, nil
}

func (c *codec) room() *[]byte      { return c.rooms.Get().(*[]byte) }
func (c *codec) giveBack(b *[]byte) { c.rooms.Put(b) }

// storeChunk appends a chunk to dst as it is stored: a byte that counts those that follow with the pages' filters, two
// bits for each page, and a frame with the pages so filtered.
//
// Format: docs/format.md, "Chunk".
func (c *codec) storeChunk(dst, content []byte) []byte {
	room := c.room()
	defer c.giveBack(room)
	filtered := append((*room)[:0], content...)
	var filters [ChunkPages / 4]byte
	n := 0
	for i := range len(filtered) / PageSize {
		if f := pg.FilterPage(filtered[i*PageSize:][:PageSize]); f != pg.FilterNone {
			filters[i/4] |= byte(f) << (i % 4 * 2)
			n = i/4 + 1
		}
	}
	dst = append(append(dst, byte(n)), filters[:n]...)
	return c.compress(dst, filtered)
}

// slack is how many bytes behind the content zstd may write to: where they are free it copies 16 bytes at a time, and
// decompresses rows in 3 to 25 % less time.
const slack = 16

// chunkContent returns a stored chunk's content in dst, at most cap(dst) bytes, and may overwrite all of those; dst nil: in as much room
// as it takes. Where dst has no slack the content is copied, which takes 6 µs.
func (c *codec) chunkContent(dst, stored []byte) ([]byte, error) {
	if len(stored) == 0 || int(stored[0]) > ChunkPages/4 || len(stored) < 1+int(stored[0]) {
		return nil, errors.New("a chunk without its filters")
	}
	filters, frame := stored[1:1+stored[0]], stored[1+stored[0]:]
	if cap(dst) >= ChunkSize+slack {
		return c.unpack(dst, filters, frame)
	}
	room := c.room()
	defer c.giveBack(room)
	content, err := c.unpack(*room, filters, frame)
	if err != nil {
		return nil, err
	}
	switch {
	case dst == nil && len(content) <= ChunkSize:
		return append([]byte(nil), content...), nil // which is not filled with zeros before
	case len(content) > cap(dst):
		return nil, fmt.Errorf("a chunk of %d bytes", len(content))
	}
	return append(dst[:0], content...), nil
}

// unpack decompresses a frame into dst and undoes what the filters, two bits for each page, did to its pages.
func (c *codec) unpack(dst, filters, frame []byte) ([]byte, error) {
	content, err := c.decompressInto(dst, frame)
	if err != nil {
		return nil, err
	}
	return content, unfilter(content, filters)
}

func unfilter(content, filters []byte) error {
	for i := range 4 * len(filters) {
		f := pg.PageFilter(filters[i/4] >> (i % 4 * 2) & 3)
		if f == pg.FilterNone {
			continue
		}
		if (i+1)*PageSize > len(content) {
			return fmt.Errorf("a filter for page %d of %d bytes", i, len(content))
		}
		if err := pg.UnfilterPage(content[i*PageSize:][:PageSize], f); err != nil {
			return err
		}
	}
	return nil
}

// compress appends content to dst as one frame that carries its content's size and no checksum: digests verify.
func (c *codec) compress(dst, content []byte) []byte { return c.enc.EncodeAll(content, dst) }

// decompress returns the content of a frame, whose size the frame tells, at most limit bytes.
func (c *codec) decompress(frame []byte, limit uint64) ([]byte, error) {
	size, err := contentSize(frame, limit)
	if err != nil {
		return nil, err
	}
	return c.dec.DecodeAll(frame, make([]byte, 0, size))
}

// contentSize is what a frame says of the size of its content.
func contentSize(frame []byte, limit uint64) (uint64, error) {
	var h zstd.Header
	if err := h.Decode(frame); err != nil {
		return 0, err
	}
	if !h.HasFCS || h.FrameContentSize > min(limit, mostContent(len(frame))) {
		return 0, fmt.Errorf("a frame of %d bytes", h.FrameContentSize)
	}
	return h.FrameContentSize, nil
}

// mostContent is more than a frame of so many bytes can hold: a block of zstd takes 4 bytes at least and has 128 KiB of content
// at most. So what a damaged length makes us allocate is in proportion to what was read.
func mostContent(frame int) uint64 { return uint64(frame/4+1) << 17 }

// decompressInto decompresses a frame into dst, at most cap(dst) bytes, and returns the content.
func (c *codec) decompressInto(dst, frame []byte) ([]byte, error) {
	return c.dec.DecodeAll(frame, dst[:0])
}

// decoder reads the integers and strings of a piece. The first failure sticks, so that a caller checks once.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format, args...)
	}
	d.b = nil
}

func (d *decoder) uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail("an integer is cut off")
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) varint() int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 {
		d.fail("an integer is cut off")
		return 0
	}
	d.b = d.b[n:]
	return v
}

// uint32 reads an integer that has to fit 32 bits.
func (d *decoder) uint32() uint32 {
	v := d.uvarint()
	if v > math.MaxUint32 {
		d.fail("%d is too large", v)
		return 0
	}
	return uint32(v)
}

// count reads a number of items of which each takes at least size bytes more.
func (d *decoder) count(size int) int {
	n := d.uvarint()
	if n > uint64(len(d.b)/size) {
		d.fail("%d items in %d bytes", n, len(d.b))
		return 0
	}
	return int(n)
}

func (d *decoder) byte() byte {
	b := d.bytes(1)
	if b == nil {
		return 0
	}
	return b[0]
}

// bytes returns the next n bytes, a slice of the input.
func (d *decoder) bytes(n int) []byte {
	if n < 0 || n > len(d.b) {
		d.fail("%d bytes of %d are missing", n-len(d.b), n)
		return nil
	}
	b := d.b[:n:n]
	d.b = d.b[n:]
	return b
}

// string reads a length and so many bytes.
func (d *decoder) string() string { return string(d.bytes(d.count(1))) }

func (d *decoder) ref() (r Ref) {
	copy(r.Pack[:], d.bytes(len(r.Pack)))
	r.Offset, r.Length = d.uint32(), d.uint32()
	copy(r.ID[:], d.bytes(len(r.ID)))
	if uint64(r.Offset)+uint64(r.Length) > maxPackSize {
		d.fail("a piece at %d+%d", r.Offset, r.Length)
	}
	return r
}

// end says whether all was read, and well.
func (d *decoder) end() error {
	if d.err == nil && len(d.b) > 0 {
		d.err = errors.New("bytes are left over")
	}
	return d.err
}

func appendRef(b []byte, r Ref) []byte {
	b = append(b, r.Pack[:]...)
	b = binary.AppendUvarint(b, uint64(r.Offset))
	b = binary.AppendUvarint(b, uint64(r.Length))
	return append(b, r.ID[:]...)
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}
