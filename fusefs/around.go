package fusefs

import (
	"github.com/hanwen/go-fuse/v2/fuse"

	"pgthaw/repo"
)

// A page that somebody waits for is cut out of a chunk, which was decompressed and verified as a whole: most of what such a read
// costs. So that a server that reads here and there does not pay for a chunk time and again, its other pages are kept, too: at once while
// hydration goes on, which would bring them later; else when another page of it was wanted before. They are written when the reader
// has its answer.

const (
	arounds    = 32 // chunks on their way to the disk at once
	aroundMost = repo.ChunkSize
)

// extended is a lower file that knows what comes with a byte.
type extended interface {
	// Extent tells which bytes [from, to) around off come from the same chunk; from == to: not known.
	Extent(off int64) (from, to int64)
}

// rooms are the buffers for what is kept of a chunk. Whoever takes one out puts it back when it is written.
type rooms struct{ free chan []byte }

func newRooms() *rooms {
	r := &rooms{make(chan []byte, arounds)}
	memory := make([]byte, arounds*aroundMost)
	for i := range arounds {
		r.free <- memory[i*aroundMost:][:aroundMost:aroundMost]
	}
	return r
}

// close waits until all has been written.
func (r *rooms) close() {
	for range arounds {
		<-r.free
	}
}

// take returns nil if all are in use.
func (r *rooms) take() []byte {
	select {
	case room := <-r.free:
		return room
	default:
		return nil
	}
}

// kept is the answer to a read, with what is written of its chunk afterwards.
type kept struct {
	answer [1][]byte
	v      *Overlay
	n      *node // with a reference
	s      span
	room   []byte // holds s
}

func (k *kept) Size() int                          { return len(k.answer[0]) }
func (k *kept) Bytes([]byte) ([]byte, fuse.Status) { return k.answer[0], fuse.OK }

// Slices has go-fuse write the answer before it calls Done.
func (k *kept) Slices() ([][]byte, fuse.Status) { return k.answer[:], fuse.OK }

// Done writes, on the thread that has answered: another one would have to be woken up.
func (k *kept) Done() {
	k.v.keep(k.n, k.s, k.room)
	k.v.nodes.drop(k.n, 1)
	k.v.rooms.free <- k.room[:aroundMost]
}

// fromLower reads holes of p, which begins at off. If something of them is to be kept, Done must be called.
func (v *Overlay) fromLower(n *node, fd int, p []byte, off int64, holes []span) (*kept, error) {
	if v.rooms != nil {
		if k, err := v.readAround(n, fd, p, off, holes); k != nil || err != nil {
			return k, err
		}
	}
	return nil, n.file.fromLower(fd, p, off, holes, v.o.FillOnRead)
}

// readAround reads holes of p, which begins at off, if they come from one chunk that is to be kept; else it returns nil.
func (v *Overlay) readAround(n *node, fd int, p []byte, off int64, holes []span) (*kept, error) {
	s, err := n.file.around(holes)
	if err != nil || s.from == s.to || !v.eager.Load() && n.file.untouched(fd, s) {
		return nil, nil // whoever reads the lower itself says what is wrong
	}
	room := v.rooms.take()
	if room == nil {
		return nil, nil
	}
	room = room[:s.to-s.from]
	if err := n.file.readLower(room, s.from); err != nil {
		v.rooms.free <- room[:aroundMost]
		return nil, err
	}
	for _, hole := range holes {
		copy(p[hole.from-off:hole.to-off], room[hole.from-s.from:])
	}
	v.nodes.ref(n)
	return &kept{v: v, n: n, s: s, room: room}, nil
}

// around is what comes with holes, if that is more and all of one chunk; else it is empty.
func (f *file) around(holes []span) (span, error) {
	r, err := f.lowerFile()
	if err != nil {
		return span{}, err
	}
	e, ok := r.(extended)
	if !ok {
		return span{}, nil
	}
	first, last := holes[0].from, holes[len(holes)-1].to
	from, to := e.Extent(first)
	if to < last || to-from > aroundMost || to-from <= last-first {
		return span{}, nil
	}
	return span{from, to}, nil
}

// untouched tells whether nothing of s is there yet.
func (f *file) untouched(fd int, s span) bool {
	holes, err := f.holes(fd, s)
	return err != nil || total(holes) == s.to-s.from
}

// keep writes what is a hole still of s. What fails is left to hydration itself, which says so.
func (v *Overlay) keep(n *node, s span, content []byte) {
	fd, err := n.file.open.acquire(n.path())
	if err != nil {
		return
	}
	defer n.file.open.release()
	if n.file.shortOfSpace(fd) {
		return
	}
	holes, err := n.file.holes(fd, s)
	if err == nil && len(holes) > 0 && n.file.fillFrom(fd, holes, content, s.from) == nil {
		v.hydrated.Add(total(holes))
	}
}
