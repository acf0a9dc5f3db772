package fusefs

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"pgthaw/repo"
)

// browseLarge mounts a backup with one file of n bytes that do not compress, and returns the file's path. hurt, if not negative, is where a
// chunk of it is damaged.
func browseLarge(t *testing.T, n, hurt int) (content []byte, file string, c *child) {
	t.Helper()
	r, repository := newRepository(t)
	content = random(rand.New(rand.NewPCG(seed(t), 0)), n)
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	tree.file("pgdata/large", 0o600, content)
	m := backUp(t, r, tree)
	if hurt >= 0 {
		flip(t, repository, content[hurt:hurt+64])
	}
	dir, c := browseIn(t, repository)
	return content, filepath.Join(dir, "main", m.ID, "pgdata/large"), c
}

func openShown(t *testing.T, name string) *os.File {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// checkPart reads from an open file and compares.
func checkPart(t *testing.T, f *os.File, off, n int, content []byte) {
	t.Helper()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, int64(off)); err != nil {
		t.Errorf("read %d+%d: %v", off, n, err)
	} else if !bytes.Equal(p, content[off:off+n]) {
		t.Errorf("read %d+%d: other bytes", off, n)
	}
}

// TestBrowseAheadOfDamage reads a file from front to back up to where what is read ahead is damaged: nobody hears of it. Whoever
// reads on gets EIO for that chunk, and all others' bytes.
func TestBrowseAheadOfDamage(t *testing.T) {
	const size, hurt = 16 << 20, 9 << 20
	content, name, c := browseLarge(t, size, hurt)
	f := openShown(t, name)
	const first = 3 << 20 // the kernel itself reads ahead 4 MiB at most, the mount 4 MiB more
	for off := 0; off < first; off += repo.ChunkSize {
		checkPart(t, f, off, repo.ChunkSize, content)
	}
	expectQuiet(t, c)
	for off := first; off < size; off += repo.ChunkSize {
		if off != hurt {
			checkPart(t, f, off, repo.ChunkSize, content)
			continue
		}
		if _, err := f.ReadAt(make([]byte, repo.ChunkSize), hurt); !errors.Is(err, syscall.EIO) {
			t.Errorf("read of the damaged chunk: %v", err)
		}
	}
}

// TestBrowseAheadClosed closes files while they are read ahead. The child ends with an error if anything goes on.
func TestBrowseAheadClosed(t *testing.T) {
	content, name, c := browseLarge(t, 16<<20, -1)
	var readers sync.WaitGroup
	for range 8 {
		f := openShown(t, name)
		readers.Go(func() {
			for off := 0; off < 2<<20; off += 256 << 10 {
				checkPart(t, f, off, 256<<10, content)
			}
			f.Close()
		})
	}
	readers.Wait()
	expectQuiet(t, c)
}

// TestBrowseAheadBeside reads a file from front to back, twice, and beside it pages from all over it.
func TestBrowseAheadBeside(t *testing.T) {
	const size = 16 << 20
	content, name, c := browseLarge(t, size, -1)
	var readers sync.WaitGroup
	for i := range 4 {
		f := openShown(t, name)
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for off := 0; off < size; off += 256 << 10 {
				if i < 2 {
					checkPart(t, f, off, 256<<10, content)
				} else {
					checkPart(t, f, rng.IntN(size/8192)*8192, 8192, content)
				}
			}
		})
	}
	readers.Wait()
	expectQuiet(t, c)
}
