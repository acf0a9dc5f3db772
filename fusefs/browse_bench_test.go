package fusefs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

const benchSize = 1 << 30 // a whole relation segment

// relationPages writes pages that compress about as well as a table of texts, numbers and times does: four to five times.
type relationPages struct {
	rng  *rand.Rand
	left int
}

var benchWords = []string{"customer", "order", "shipped", "pending", "address", "street", "invoice", "cancelled", "product", "warehouse",
	"2026-11-20 22:05:", "true", "false", "{\"id\": ", "\"name\": ", "\"price\": ", "null", "berlin", "madrid", "lisbon", "note", "the", "of", "and"}

func (r *relationPages) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p)/8192*8192, r.left)
	for page := range slices.Chunk(p[:n], 8192) {
		r.fill(page)
	}
	r.left -= n
	return n, nil
}

func (r *relationPages) fill(page []byte) {
	clear(page[:24])
	binary.LittleEndian.PutUint64(page, r.rng.Uint64())
	for i := 24; i < len(page); {
		if r.rng.IntN(4) > 0 {
			i += copy(page[i:], benchWords[r.rng.IntN(len(benchWords))])
			continue
		}
		i += copy(page[i:], fmt.Sprint(r.rng.Uint32N(1_000_000)))
	}
}

// benchRepository holds a backup of one relation segment.
func benchRepository(b *testing.B) (repository, file string) {
	b.Helper()
	repository = filepath.Join(b.TempDir(), "repository")
	r, err := repo.Init(b.Context(), repository, repo.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	if _, err := r.BindCluster(b.Context(), "main", browseSystemID, browseSegment); err != nil {
		b.Fatal(err)
	}
	m, err := r.WriteBackup(b.Context(), "main", repo.BackupOptions{}, func(_ context.Context, w *repo.BackupWriter) (repo.Manifest, error) {
		err := w.Mkdir("pgdata", repo.Entry{Mode: os.ModeDir | 0o700})
		if err != nil {
			return repo.Manifest{}, err
		}
		f, err := w.Create("pgdata/relation", repo.Entry{Mode: 0o600, Size: benchSize, UID: uint32(os.Geteuid())}, false)
		if err != nil {
			return repo.Manifest{}, err
		}
		_, err = f.ReadFrom(&relationPages{rand.New(rand.NewPCG(1, 2)), benchSize})
		return repo.Manifest{SegmentSize: browseSegment, Timeline: 1}, errors.Join(err, f.Close())
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("%.1f times compressed", benchSize/float64(m.StoredBytes))
	return repository, filepath.Join("main", m.ID, "pgdata/relation")
}

// forget drops a file from the page cache, so that it has to be read from the repository again.
func forget(b *testing.B, f *os.File) {
	b.Helper()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		b.Fatal(err)
	}
}

// openBench mounts a relation segment and opens it.
func openBench(b *testing.B) (*os.File, *child) {
	b.Helper()
	repository, file := benchRepository(b)
	dir, c := browseIn(b, repository)
	f, err := os.Open(filepath.Join(dir, file))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	return f, c
}

// processorTime is what a child has used, of user and system.
func (c *child) processorTime(b *testing.B) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, fields, _ := strings.Cut(string(stat), ") ") // proc_pid_stat(5): the 14th and 15th, in hundredths of a second
	var user, system int64
	if _, err := fmt.Sscan(strings.Join(strings.Fields(fields)[11:13], " "), &user, &system); err != nil {
		b.Fatal(err)
	}
	return time.Duration(user+system) * time.Second / 100
}

// readThrough reads a file from front to back in reads of 1 MiB, as dd bs=1M does.
func readThrough(f *os.File) error {
	p := make([]byte, 1<<20)
	for off := int64(0); off < benchSize; off += int64(len(p)) {
		if _, err := f.ReadAt(p, off); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkBrowseSequential reads a relation segment from front to back. Its processor time is the mount's alone.
func BenchmarkBrowseSequential(b *testing.B) {
	f, c := openBench(b)
	b.SetBytes(benchSize)
	before := c.processorTime(b)
	for b.Loop() {
		forget(b, f)
		if err := readThrough(f); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric((c.processorTime(b)-before).Seconds()/float64(b.N)/benchSize*1e9, "cpu-s/GB")
}

// BenchmarkBrowseRandom reads pages from all over a relation segment.
func BenchmarkBrowseRandom(b *testing.B) {
	f, _ := openBench(b)
	readRandomPages(b, f)
}

// BenchmarkBrowseRandomBesideSequential does so while somebody else reads the file from front to back, again and again.
func BenchmarkBrowseRandomBesideSequential(b *testing.B) {
	f, _ := openBench(b)
	beside, err := os.Open(f.Name())
	if err != nil {
		b.Fatal(err)
	}
	defer beside.Close()
	done, ended := make(chan struct{}), make(chan error)
	go func() {
		for {
			select {
			case <-done:
				ended <- nil
				return
			default:
			}
			err := errors.Join(unix.Fadvise(int(beside.Fd()), 0, 0, unix.FADV_DONTNEED), readThrough(beside))
			if err != nil {
				ended <- err
				return
			}
		}
	}()
	readRandomPages(b, f)
	close(done)
	if err := <-ended; err != nil {
		b.Fatal(err)
	}
}

func readRandomPages(b *testing.B, f *os.File) {
	forget(b, f)
	rng := rand.New(rand.NewPCG(3, 4))
	p := make([]byte, 8192)
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		if _, err := f.ReadAt(p, rng.Int64N(benchSize/8192)*8192); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
}
