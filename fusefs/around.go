package fusefs

import (
	"fmt"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

// A page that somebody waits for is cut out of a chunk, which was decompressed and verified as a whole: most of what such a read
// costs. While hydration goes on, which would bring the chunk later, its other pages are kept, too, so that a server that reads here and
// there pays for each chunk once. They are written beside, by direct I/O, when the reader has its answer.

const (
	arounds     = 32       // chunks on their way to the disk at once
	aroundLeast = 64 << 10 // is written directly, bytes
	aroundMost  = repo.ChunkSize
)

// extended is a lower file that knows what comes with a byte.
type extended interface {
	// Extent tells which bytes [from, to) around off come from the same chunk; from == to: not known.
	Extent(off int64) (from, to int64)
}

// rooms are the buffers for what is kept of a chunk. Whoever takes one out puts it back when it is written.
type rooms struct {
	memory []byte
	free   chan []byte
}

func newRooms() (*rooms, error) {
	// Whole memory pages, as direct I/O wants them.
	memory, err := unix.Mmap(-1, 0, arounds*aroundMost, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("get %d bytes of memory: %w", arounds*aroundMost, err)
	}
	r := &rooms{memory, make(chan []byte, arounds)}
	for i := range arounds {
		r.free <- memory[i*aroundMost:][:aroundMost:aroundMost]
	}
	return r, nil
}

// close waits until all has been written.
func (r *rooms) close() {
	for range arounds {
		<-r.free
	}
	unix.Munmap(r.memory)
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

// fromLower reads holes of p, which begins at off.
func (v *Overlay) fromLower(n *node, fd int, p []byte, off int64, holes []span) error {
	if v.rooms != nil && v.eager.Load() {
		if done, err := v.readAround(n, p, off, holes); done {
			return err
		}
	}
	return n.file.fromLower(fd, p, off, holes, v.o.FillOnRead)
}

// readAround reads holes of p, which begins at off, if they come from one chunk, and has all that comes with them written.
func (v *Overlay) readAround(n *node, p []byte, off int64, holes []span) (done bool, err error) {
	s, err := n.file.around(holes)
	if err != nil || s.from == s.to {
		return false, nil // whoever reads the lower itself says what is wrong
	}
	room := v.rooms.take()
	if room == nil {
		return false, nil
	}
	room = room[:s.to-s.from]
	if err := n.file.readLower(room, s.from); err != nil {
		v.rooms.free <- room[:aroundMost]
		return true, err
	}
	for _, hole := range holes {
		copy(p[hole.from-off:hole.to-off], room[hole.from-s.from:])
	}
	v.nodes.ref(n)
	go func() { // Overlay.end waits for its room
		v.keep(n, s, room)
		v.nodes.drop(n, 1)
		v.rooms.free <- room[:aroundMost]
	}()
	return true, nil
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

// keep writes what is a hole still of s. What fails is left to hydration itself, which says so.
func (v *Overlay) keep(n *node, s span, content []byte) {
	f := filling{n: n, fd: -1, direct: -1}
	defer f.close()
	if f.open(true) != nil || n.file.shortOfSpace(f.fd) {
		return
	}
	holes, err := n.file.holes(f.fd, s)
	if err == nil && len(holes) > 0 && f.write(holes, content, s.from, aroundLeast) == nil {
		v.hydrated.Add(total(holes))
	}
}
