package ingest

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgthaw/repo"
)

// manyFiles is a cluster of very many small files.
type manyFiles struct {
	files, databases int
	size             int  // bytes of a file
	same             bool // in all files
}

// send writes the cluster's base.tar and, when that is read to its end, its backup_manifest.
func (m manyFiles) send(archive, manifest io.Writer) error {
	s := &sender{tar: tar.NewWriter(archive), sum: sha256.New()}
	s.manifest = bufio.NewWriter(io.MultiWriter(manifest, s.sum))
	io.WriteString(s.manifest, "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [")
	s.file("backup_label", []byte("START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n"+
		"BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-20 22:16:37 UTC\nLABEL: x\nSTART TIMELINE: 1\n"))
	page := make([]byte, m.size)
	each := m.files / m.databases
	for i := range each * m.databases {
		for k := 0; k < 400 && !m.same; k += 8 { // what does not compress
			binary.LittleEndian.PutUint64(page[k:], uint64(i*1000+k)*0x9e3779b97f4a7c15)
		}
		s.file(fmt.Sprintf("base/%d/%d", 16384+i/each, 16384+i*7919%m.files), page)
	}
	s.file("global/pg_control", page)
	io.WriteString(s.manifest, "\n],\n\"WAL-Ranges\": [\n{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }\n],\n")
	err := errors.Join(s.err, s.tar.Close(), s.manifest.Flush())
	_, last := fmt.Fprintf(manifest, "\"Manifest-Checksum\": \"%x\"}\n", s.sum.Sum(nil))
	return errors.Join(err, last)
}

type sender struct {
	tar      *tar.Writer
	manifest *bufio.Writer
	sum      interface {
		io.Writer
		Sum([]byte) []byte
	}
	comma string
	err   error
}

func (s *sender) file(name string, content []byte) {
	if s.err != nil {
		return
	}
	h := tar.Header{Name: name, Mode: 0o600, Uid: 104, Gid: 105, Size: int64(len(content)), ModTime: time.Unix(1_700_000_000, 0)}
	if s.err = s.tar.WriteHeader(&h); s.err == nil {
		_, s.err = s.tar.Write(content)
	}
	crc := binary.LittleEndian.AppendUint32(nil, crc32.Checksum(content, castagnoli))
	fmt.Fprintf(s.manifest, "%s\n{ \"Path\": \"%s\", \"Size\": %d, \"Last-Modified\": \"2026-11-20 22:16:38 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"%x\" }",
		s.comma, name, len(content), crc)
	s.comma = ","
}

// backup does all that Backup does, but for the connections. received is called between archive and backup_manifest.
func (m manyFiles) backup(t testing.TB, r *repo.Repository, full bool, received func()) {
	t.Helper()
	ctx := t.Context()
	prior, err := choosePrior(ctx, r, BackupOptions{Cluster: "main", Full: full})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := os.Create(filepath.Join(t.TempDir(), "backup_manifest"))
	if err != nil {
		t.Fatal(err)
	}
	defer manifest.Close()
	start, stop := position{0x2000028, 1}, position{0x2000100, 1}
	_, err = r.WriteBackup(ctx, "main", repo.BackupOptions{Prior: prior}, func(ctx context.Context, w *repo.BackupWriter) (d repo.Manifest, err error) {
		b := &backup{server: &server{systemID: 1, segmentSize: 1 << 20}, repo: r, w: w, tree: newTree(w, "0700"), stop: stop}
		in, out := io.Pipe()
		defer in.Close()
		go func() {
			buffered := bufio.NewWriterSize(out, 1<<20)
			out.CloseWithError(errors.Join(m.send(buffered, manifest), buffered.Flush()))
		}()
		if err := b.tree.archive(in, tablespaceRow{}); err != nil {
			return d, err
		}
		if _, err := io.Copy(io.Discard, in); err != nil {
			return d, err
		}
		received()
		if _, err := manifest.Seek(0, io.SeekStart); err != nil {
			return d, err
		}
		if err := b.readManifest(manifest); err != nil {
			return d, err
		}
		b.wal = capturedWAL{first: 2, last: 2, partial: make([]byte, 1<<20), stoppedAt: time.Now()}
		return repo.Manifest{SystemIdentifier: 1, SegmentSize: 1 << 20}, b.finishTree(&baseBackup{start: start})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func manyFilesRepository(t testing.TB) *repo.Repository {
	t.Helper()
	r, err := repo.Init(t.Context(), t.TempDir()+"/repo", repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if _, err := r.BindCluster(t.Context(), "main", 1, 1<<20); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestMemoryOfManyFiles counts what is left in memory of a file that was received, once its database's directory is
// complete. All files have one content, for chunks are known by an index that has its own bound.
func TestMemoryOfManyFiles(t *testing.T) {
	const few, many, most = 5_000, 55_000, 40 // the last in bytes
	r := manyFilesRepository(t)
	var live [2][2]int64
	for i, n := range []int{few, many} {
		m := manyFiles{files: n, databases: 50, size: 600, same: true}
		for k, full := range []bool{true, false} {
			m.backup(t, r, full, func() { live[i][k] = leastHeap(live[0][k] + (many-few)*most) })
		}
	}
	for k, name := range []string{"first", "second"} {
		took := live[1][k] - live[0][k]
		t.Logf("%s backup: a file takes %d bytes", name, took/(many-few))
		if took > (many-few)*most {
			t.Errorf("%s backup: %d files take %d bytes", name, many-few, took)
		}
	}
}

// leastHeap waits a while for what is reachable to go down to enough bytes: a worker may be writing the last listing.
func leastHeap(enough int64) (live int64) {
	var m runtime.MemStats
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); {
		runtime.GC()
		runtime.GC() // what pools held
		runtime.ReadMemStats(&m)
		if live = int64(m.HeapAlloc); live <= enough {
			break
		}
	}
	return live
}

// BenchmarkManyFiles tells the peak of resident memory while a million files are backed up, for the first and the second time:
//
//	go test -run '^$' -bench ManyFiles -benchtime 1x ./ingest
func BenchmarkManyFiles(b *testing.B) {
	for _, databases := range []int{1, 4, 4000} {
		m := manyFiles{files: 1_000_000, databases: databases, size: 8192}
		r := manyFilesRepository(b)
		for _, name := range []string{"first", "second"} {
			b.Run(fmt.Sprintf("%s of %d databases", name, databases), func(b *testing.B) {
				for b.Loop() {
					debug.FreeOSMemory()
					// proc(5): the peak is counted anew.
					if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
						b.Fatal(err)
					}
					m.backup(b, r, name == "first", func() {})
				}
				b.ReportMetric(float64(peakMemory(b)>>20), "peak-MiB")
			})
		}
	}
}

// peakMemory is the most that this process had in memory, in bytes.
func peakMemory(t testing.TB) int64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	kB, err := strconv.ParseInt(strings.Fields(after)[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kB << 10
}
