package ingest

import (
	"fmt"

	"pgthaw/repo/pg"
)

// assembler makes whole segments of streamed WAL. It holds one at most.
type assembler struct {
	size pg.SegmentSize
	next pg.LSN // the byte that comes next
	buf  []byte // what has come of its segment
}

// newAssembler begins at the start of segment segno.
func newAssembler(size pg.SegmentSize, segno uint64) assembler {
	return assembler{size: size, next: size.Start(segno)}
}

// add takes the bytes at lsn and calls whole for each segment that they complete. content is the assembler's again
// when whole returns. After an error of whole the assembler must not be used.
func (a *assembler) add(lsn pg.LSN, p []byte, whole func(segno uint64, content []byte) error) error {
	if lsn != a.next {
		return fmt.Errorf("WAL of %s was sent where that of %s belongs", lsn, a.next)
	}
	for len(p) > 0 {
		if a.buf == nil {
			a.buf = make([]byte, 0, a.size)
		}
		segno := a.size.Segment(a.next)
		n := min(len(p), cap(a.buf)-len(a.buf))
		a.buf = append(a.buf, p[:n]...)
		a.next += pg.LSN(n)
		p = p[n:]
		if len(a.buf) < cap(a.buf) {
			return nil
		}
		if err := whole(segno, a.buf); err != nil {
			return err
		}
		a.buf = a.buf[:0]
	}
	return nil
}

// partial is the segment that is not whole yet, padded with zeros. ok is false if nothing has come of it.
func (a *assembler) partial() (segno uint64, content []byte, ok bool) {
	if len(a.buf) == 0 {
		return 0, nil, false
	}
	content = a.buf[:cap(a.buf)]
	clear(content[len(a.buf):])
	return a.size.Segment(a.next - 1), content, true
}
