package repo

import (
	"context"
	"errors"
	"slices"
	"sync"

	"pgthaw/repo/store"
)

const (
	// aheadPiece is how many bytes are read ahead at once: eight chunks, mostly one request to the store.
	aheadPiece = 1 << 20
	// aheadWindow is how many bytes of a file are read ahead at most. The kernel asks for 2 MiB at a time.
	aheadWindow = 4 << 20
	// aheadRoom is how many pieces all files together have in hand at most: 16 MiB.
	aheadRoom = 16
	// aheadRun is how many bytes somebody has to read before more is read for them.
	aheadRun = 1 << 20
	// aheadIdle is how many reads of others let a file lose its pieces to them.
	aheadIdle = 64
)

// ReadAhead reads files ahead of those who read them from front to back: pieces of 1 MiB, several at once, each read,
// verified and decompressed as any read is. What all its files have in hand is bounded. Safe for concurrent use.
type ReadAhead struct {
	ctx     context.Context // of what is read ahead
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu     sync.Mutex // guards all below, and all of its files and their pieces but what says otherwise
	closed bool
	reads  int64    // so many were asked for
	inHand []*piece // oldest first; those that were dropped stay until nobody touches them
	free   [][]byte
}

// NewReadAhead returns one without files. Close ends what it reads, and so does ctx.
func NewReadAhead(ctx context.Context) *ReadAhead {
	ctx, cancel := context.WithCancel(ctx)
	return &ReadAhead{ctx: ctx, cancel: cancel}
}

// Close returns when nothing is read ahead any more. Its files can be read as before.
func (a *ReadAhead) Close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.cancel()
	a.running.Wait()
}

// AheadFile is a File that is read ahead while reads go on from front to back. Safe for concurrent use.
type AheadFile struct {
	*File
	a *ReadAhead

	read   stretch
	next   int64 // where the next piece begins
	pieces []*piece
	last   int64 // read, as ReadAhead counts them
}

// Open opens a file once more. It has to be closed.
func (a *ReadAhead) Open(f *File) *AheadFile { return &AheadFile{File: f, a: a} }

// Close gives up what was read ahead.
func (f *AheadFile) Close() {
	f.a.mu.Lock()
	defer f.a.mu.Unlock()
	f.dropTo(f.size)
}

// piece is a part of a file that is, or was, read ahead.
type piece struct {
	off    int64
	buf    []byte        // its bytes, when done is closed and err is nil
	done   chan struct{} // closed when it was read
	err    error         // then whoever wants these bytes reads them anew
	cancel context.CancelFunc

	file    *AheadFile
	left    int  // bytes that nobody has taken yet
	users   int  // who wait for it, copy from it, or read it
	dropped bool // nobody will find it any more
}

func (p *piece) end() int64 { return p.off + int64(len(p.buf)) }

// Read reads as ReadAt does, but for io.EOF: at the end of the file there are fewer bytes. They lie where they were read ahead, and
// in p what was not. An error met while reading ahead is forgotten: only what is asked for here can fail.
func (f *AheadFile) Read(p []byte, off int64) (*AheadBytes, error) {
	f.wanted(off, len(p))
	b := &AheadBytes{}
	end := min(off+int64(len(p)), f.size)
	for off < end {
		ahead, to := f.take(off, end)
		part, err := b.of(ahead, off, int(to-off))
		if part == nil && err == nil {
			part = p[:to-off]
			_, err = f.ReadAt(part, off)
		}
		if err != nil {
			b.Release()
			return nil, err
		}
		b.Parts = append(b.Parts, part)
		p, off = p[to-off:], to
	}
	return b, nil
}

// AheadBytes are bytes of a file. They have to be released once nobody looks at them any more.
type AheadBytes struct {
	Parts [][]byte // one after the other
	taken []taken
}

type taken struct {
	p *piece
	n int // bytes
}

// of waits for a piece and takes n bytes of it, none if it could not be read, or is nil. Whoever waited in vain for a store that
// does not answer need not ask it again: that is an error.
func (b *AheadBytes) of(p *piece, off int64, n int) ([]byte, error) {
	if p == nil {
		return nil, nil
	}
	waited := !p.isDone()
	<-p.done
	if p.err == nil {
		b.taken = append(b.taken, taken{p, n})
		return p.buf[off-p.off:][:n], nil
	}
	defer p.leave(n)
	if waited && errors.Is(p.err, store.ErrNoAnswer) {
		return nil, p.err
	}
	return nil, nil
}

func (p *piece) isDone() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Release is called once.
func (b *AheadBytes) Release() {
	for _, t := range b.taken {
		t.p.leave(t.n)
	}
}

// wanted notes a read, and begins to read ahead where the file is read from front to back.
func (f *AheadFile) wanted(off int64, n int) {
	f.a.mu.Lock()
	defer f.a.mu.Unlock()
	f.a.reads++
	f.last = f.a.reads
	if !f.read.add(off, n) {
		f.dropTo(f.size)
		f.next = 0
		return
	}
	f.dropTo(f.read.end - aheadDisorder)
	if !f.read.sequential() {
		return
	}
	f.next = max(f.next, (f.read.end+ChunkSize-1)/ChunkSize*ChunkSize)
	for f.next < min(f.read.end+aheadWindow, f.size) && f.a.begin(f) {
	}
}

// begin reads the file's next piece, if there is room for it. Caller holds mu.
func (a *ReadAhead) begin(f *AheadFile) bool {
	if a.closed || len(a.inHand) == aheadRoom && !a.takeBack() {
		return false
	}
	p := &piece{off: f.next, done: make(chan struct{}), file: f, users: 1}
	p.buf = a.buffer()[:min(aheadPiece, f.size-f.next)]
	p.left = len(p.buf)
	f.next = p.end()
	f.pieces = append(f.pieces, p)
	a.inHand = append(a.inHand, p)
	var ctx context.Context
	ctx, p.cancel = context.WithCancel(a.ctx)
	a.running.Go(func() {
		defer p.cancel()
		_, p.err = f.within(ctx).ReadAt(p.buf, p.off)
		close(p.done)
		p.leave(0)
	})
	return true
}

// takeBack takes a piece from a file that nobody has read for long. Caller holds mu.
func (a *ReadAhead) takeBack() bool {
	i := slices.IndexFunc(a.inHand, func(p *piece) bool { return a.reads-p.file.last > aheadIdle })
	if i < 0 {
		return false
	}
	f := a.inHand[i].file
	f.dropTo(f.size)
	return len(a.inHand) < aheadRoom
}

// buffer returns room for a piece. Caller holds mu.
func (a *ReadAhead) buffer() []byte {
	n := len(a.free)
	if n == 0 {
		return make([]byte, aheadPiece)
	}
	b := a.free[n-1]
	a.free = a.free[:n-1]
	return b
}

// take returns the piece that has the byte at off, for the caller to leave, and where that ends; or nil, and where the next one
// begins; either at end at the latest.
func (f *AheadFile) take(off, end int64) (*piece, int64) {
	f.a.mu.Lock()
	defer f.a.mu.Unlock()
	for _, p := range f.pieces {
		if off < p.off {
			return nil, min(end, p.off)
		}
		if off < p.end() {
			p.users++
			return p, min(end, p.end())
		}
	}
	return nil, end
}

// leave ends the use of a piece, from which n bytes were taken.
func (p *piece) leave(n int) {
	f := p.file
	f.a.mu.Lock()
	defer f.a.mu.Unlock()
	p.users--
	p.left -= n
	if p.left <= 0 && !p.dropped {
		p.dropped = true
		f.pieces = slices.DeleteFunc(f.pieces, func(q *piece) bool { return q == p })
	}
	f.a.release(p)
}

// dropTo gives up the pieces that end at off or before. Caller holds mu.
func (f *AheadFile) dropTo(off int64) {
	f.pieces = slices.DeleteFunc(f.pieces, func(p *piece) bool {
		if p.end() > off {
			return false
		}
		p.dropped = true
		p.cancel()
		f.a.release(p)
		return true
	})
}

// release makes room of a piece that was dropped, once nobody touches it. Caller holds mu.
func (a *ReadAhead) release(p *piece) {
	if !p.dropped || p.users > 0 {
		return
	}
	a.inHand = slices.DeleteFunc(a.inHand, func(q *piece) bool { return q == p })
	a.free = append(a.free, p.buf[:aheadPiece])
	if len(a.inHand) == 0 {
		a.free = nil
	}
}

// aheadDisorder is how far from where a run has come to the next read may lie: the kernel has several under way, which arrive in any order.
const aheadDisorder = 4 << 20

// stretch is the part of a file that somebody is reading.
type stretch struct {
	begin, end int64
	bytes      int64 // that were read of it
	onwards    bool  // the last read went beyond all before
}

// add adds a read. One that lies elsewhere begins another run, and the answer is false.
func (r *stretch) add(off int64, n int) bool {
	end := off + int64(n)
	if r.bytes == 0 || off > r.end+aheadDisorder || end < r.end-aheadDisorder {
		*r = stretch{begin: off, end: end, bytes: int64(n)}
		return false
	}
	r.onwards = end > r.end
	r.begin, r.end, r.bytes = min(r.begin, off), max(r.end, end), r.bytes+int64(n)
	return true
}

// sequential tells whether the run goes from front to back: reads that leave out a quarter of where they are do not.
func (r *stretch) sequential() bool {
	return r.onwards && r.bytes >= aheadRun && r.bytes >= (r.end-r.begin)/4*3
}
