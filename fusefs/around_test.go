package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// chunked is a lower file of whole chunks.
type chunked struct{ *bytes.Reader }

func (c chunked) Extent(off int64) (from, to int64) {
	from = roundDown(off, aroundMost)
	return from, min(from+aroundMost, c.Size())
}

// aroundOf makes a placeholder, its node, and what of an overlay it takes to read around.
func aroundOf(t *testing.T, lower []byte) (*Overlay, *node, int) {
	t.Helper()
	f, fd := layFile(t, lower)
	f.openLower = func(string) (io.ReaderAt, error) { return chunked{bytes.NewReader(lower)}, nil }
	pin, err := unix.Open(f.name(), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(pin) })
	v := &Overlay{nodes: new(nodes), rooms: newRooms()}
	v.eager.Store(true)
	return v, &node{id: 2, fd: pin, file: f, refs: 1}, fd
}

// readPage reads a page, and tells whether what is around it came along.
func readPage(t *testing.T, v *Overlay, n *node, fd int, off int64, want []byte) (around bool) {
	t.Helper()
	p := make([]byte, 8192)
	got, err := n.file.read(fd, p, off, func(holes []span) (err error) {
		k, err := v.readAround(n, fd, p, off, holes)
		if around = k != nil; around {
			k.Done()
			return err
		}
		return errors.Join(err, n.file.fromLower(fd, p, off, holes, !v.eager.Load()))
	})
	if err != nil || !bytes.Equal(p[:got], want[off:min(off+8192, int64(len(want)))]) {
		t.Errorf("read at %d: %d bytes, %v", off, got, err)
	}
	return around
}

// TestAround: with a page comes its chunk, but for what is data already, and no other.
func TestAround(t *testing.T) {
	const chunk, tail = aroundMost, 21000
	want := random(rand.New(rand.NewPCG(1, 2)), 3*chunk+tail)
	v, n, fd := aroundOf(t, want)
	page := bytes.Repeat([]byte("w"), 8192)
	copy(want[chunk+16384:], page)
	if _, err := n.file.writeAt(fd, page, chunk+16384); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{chunk + 65536, 3 * chunk} {
		if !readPage(t, v, n, fd, off, want) {
			t.Errorf("at %d its chunk did not come along", off)
		}
	}
	v.rooms.close()
	if readPage(t, v, n, fd, 0, want) {
		t.Error("something came along without room")
	}
	holes, err := n.file.holes(fd, span{0, int64(len(want))})
	if err != nil || fmt.Sprint(holes) != fmt.Sprint([]span{{0, chunk}, {2 * chunk, 3 * chunk}}) {
		t.Errorf("holes %v, %v", holes, err)
	}
	if got := v.Hydrated(); got != chunk-8192+tail {
		t.Errorf("%d bytes hydrated", got)
	}
	checkContent(t, n.file, fd, want)
	if n.refs != 1 {
		t.Errorf("%d references are left", n.refs)
	}
}

// TestAroundTwice: without hydration a page brings its chunk if another page of it was wanted before.
func TestAroundTwice(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), 2*aroundMost)
	v, n, fd := aroundOf(t, lower)
	v.eager.Store(false)
	for _, c := range []struct {
		off  int64
		want bool
	}{{16384, false}, {aroundMost, false}, {65536, true}} {
		if got := readPage(t, v, n, fd, c.off, lower); got != c.want {
			t.Errorf("at %d its chunk came along: %v", c.off, got)
		}
	}
	v.rooms.close()
	holes, err := n.file.holes(fd, span{0, int64(len(lower))})
	if err != nil || fmt.Sprint(holes) != fmt.Sprint([]span{{aroundMost + 8192, 2 * aroundMost}}) {
		t.Errorf("holes %v, %v", holes, err)
	}
}
