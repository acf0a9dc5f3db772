package fusefs

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// fillAll fills a file as the hydrator does, a piece at a time.
func fillAll(f *file, fd, direct int, size, piece int64) error {
	buf, err := unix.Mmap(-1, 0, int(piece), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	for at := int64(0); at < size; at += piece {
		holes, err := f.holes(fd, span{at, at + piece})
		if err == nil {
			err = f.readHoles(holes, buf, at)
		}
		if err == nil {
			err = f.fillDirect(fd, direct, holes, buf, at, directLeast)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// openDirect opens a file for direct I/O; where there is none the other way to write must do.
func openDirect(t *testing.T, f *file) int {
	t.Helper()
	fd, err := unix.Open(f.name(), unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		fd, err = unix.Open(f.name(), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// TestBesideWaits stops the clock while a range is being written: zeros lie there, as read-ahead may see them.
func TestBesideWaits(t *testing.T) {
	const size = 1 << 20
	lower := random(rand.New(rand.NewPCG(1, 2)), size)
	f, fd := layFile(t, lower)
	then := []unix.Timespec{{Sec: 1000}, {Sec: 2000, Nsec: 5}}
	if err := f.setTimes(fd, then); err != nil {
		t.Fatal(err)
	}
	holes, err := f.holes(fd, span{0, size})
	if err != nil {
		t.Fatal(err)
	}
	f.beside.writing.RLock()
	fills, err := f.beginFills(fd, holes, directLeast)
	if err != nil || len(fills) != 1 || fills[0].span != (span{0, size}) {
		t.Fatalf("%v, %v", fills, err)
	}
	if _, err := pwriteFull(fd, make([]byte, size), 0); err != nil {
		t.Fatal(err)
	}
	checkContent(t, f, fd, lower)
	if filled, err := f.checkFilled(fd); filled || err != nil {
		t.Errorf("filled: %v, %v", filled, err)
	}
	if err := f.detach(); err == nil {
		t.Error("the attribute goes while the file is being filled")
	}
	var st unix.Stat_t
	if f.correctTime(fd, &st); st.Mtim != then[1] {
		t.Errorf("modified at %v, want %v", st.Mtim, then[1])
	}
	var others sync.WaitGroup
	began := make(chan struct{}, 2)
	page := bytes.Repeat([]byte("w"), 8192)
	others.Go(func() {
		began <- struct{}{}
		if _, err := f.writeAt(fd, page, 16384); err != nil {
			t.Error(err)
		}
	})
	others.Go(func() {
		began <- struct{}{}
		if err := f.truncate(fd, size-5000); err != nil {
			t.Error(err)
		}
	})
	<-began
	<-began
	if _, err := pwriteFull(fd, lower, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.endFills(fd, fills, nil); err != nil {
		t.Fatal(err)
	}
	f.beside.writing.RUnlock()
	others.Wait()
	want := bytes.Clone(lower[:size-5000])
	copy(want[16384:], page)
	checkContent(t, f, fd, want)
	if filled, err := f.checkFilled(fd); !filled || err != nil {
		t.Errorf("filled: %v, %v", filled, err)
	}
}

func TestBesideKeepsTime(t *testing.T) {
	for name, meanwhile := range map[string]func(f *file, fd int) error{
		"nothing":      func(*file, int) error { return nil },
		"utimensat(2)": func(f *file, fd int) error { return f.setTimes(fd, []unix.Timespec{{Sec: 1}, {Sec: 3000}}) },
		"write(2)":     func(f *file, fd int) error { _, err := f.writeAt(fd, make([]byte, 4096), 1<<20); return err },
	} {
		t.Run(name, func(t *testing.T) {
			f, fd := layFile(t, random(rand.New(rand.NewPCG(1, 2)), 1<<20))
			if err := f.setTimes(fd, []unix.Timespec{{Sec: 1000}, {Sec: 2000}}); err != nil {
				t.Fatal(err)
			}
			holes, err := f.holes(fd, span{0, 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			fills, err := f.beginFills(fd, holes, directLeast)
			if err == nil {
				_, err = pwriteFull(fd, make([]byte, 1<<20), 0)
			}
			if err == nil {
				err = meanwhile(f, fd)
			}
			if err == nil {
				err = f.endFills(fd, fills, nil)
			}
			var st unix.Stat_t
			if err == nil {
				err = unix.Fstat(fd, &st)
			}
			if err != nil {
				t.Fatal(err)
			}
			switch got := st.Mtim.Sec; {
			case name == "nothing" && got != 2000, name == "utimensat(2)" && got != 3000, name == "write(2)" && got < 1_700_000_000:
				t.Errorf("modified at %d", got)
			}
		})
	}
}

// TestBesideFails writes by a descriptor that cannot: all is as it was.
func TestBesideFails(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), 1<<20)
	f, fd := layFile(t, lower)
	readOnly, err := unix.Open(f.name(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(readOnly)
	if err := fillAll(f, fd, readOnly, 1<<20, 512<<10); err == nil {
		t.Error("it could be written to")
	}
	checkContent(t, f, fd, lower)
	if err := fillAll(f, fd, openDirect(t, f), 1<<20, 512<<10); err != nil {
		t.Error(err)
	}
	checkContent(t, reopen(t, f.name(), nil), fd, lower)
}

// TestBesideUnaligned writes from memory that the disk may refuse: then all goes through the page cache.
func TestBesideUnaligned(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), 1<<20)
	f, fd := layFile(t, lower)
	buf := make([]byte, 1<<20+1)[1:]
	copy(buf, lower)
	holes, err := f.holes(fd, span{0, 1 << 20})
	if err == nil {
		err = f.fillDirect(fd, openDirect(t, f), holes, buf, 0, directLeast)
	}
	if err != nil {
		t.Fatal(err)
	}
	checkContent(t, reopen(t, f.name(), nil), fd, lower)
}

// TestBesideWholeWaits: a file is not taken for one with holes while it is being written beside.
func TestBesideWholeWaits(t *testing.T) {
	lower := random(rand.New(rand.NewPCG(1, 2)), aroundMost)
	v, n, fd := aroundOf(t, lower)
	defer v.rooms.close()
	holes, err := n.file.holes(fd, span{0, aroundMost})
	if err != nil {
		t.Fatal(err)
	}
	n.file.beside.writing.RLock()
	fills, err := n.file.beginFills(fd, holes, 1)
	if err != nil || len(fills) != 1 {
		t.Fatalf("%v, %v", fills, err)
	}
	began, ended := make(chan struct{}), make(chan error)
	go func() {
		close(began)
		_, err := (&hydrator{turns: newTurns(v, pieceSize)}).whole(&filling{n: n, fd: fd, direct: -1})
		ended <- err
	}()
	<-began
	if _, err := pwriteFull(fd, lower, 0); err != nil {
		t.Fatal(err)
	}
	if err := n.file.endFills(fd, fills, nil); err != nil {
		t.Fatal(err)
	}
	n.file.beside.writing.RUnlock()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
