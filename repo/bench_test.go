package repo

import (
	"bytes"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"
)

// benchFiles is 256 MiB that compress about 4:1, as rows do.
func benchFiles() testFiles {
	return testFiles{"pgdata/PG_VERSION": []byte("15\n"), "pgdata/base/5/2": pagesOf(3, 16<<10), "pgdata/base/5/3": pagesOf(4, 16<<10)}
}

// plainAndSealed prepares a repository in memory that is not encrypted and one that is, runs what that returned in turns,
// and reports the processor time that each took, and the ratio.
func plainAndSealed(b *testing.B, prepare func(r *Repository) func()) {
	sides := [2]func(){prepare(newMemRepository(b)), prepare(newMemRepository(b, newTestKey(b)))}
	var took [2]time.Duration
	for b.Loop() {
		for i, f := range sides {
			runtime.GC() // each begins with nothing of the other's
			before := processorTime(b)
			f()
			took[i] += processorTime(b) - before
		}
	}
	b.ReportMetric(took[0].Seconds()*1e3/float64(b.N), "plain-cpu-ms/op")
	b.ReportMetric(took[1].Seconds()*1e3/float64(b.N), "sealed-cpu-ms/op")
	b.ReportMetric(took[0].Seconds()/took[1].Seconds(), "plain/sealed")
}

// processorTime is what this process has used, of user and system.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// reportProcessorTime reports what one iteration took until the function that it returns is called.
func reportProcessorTime(b *testing.B) func() {
	began := processorTime(b)
	return func() { b.ReportMetric(float64(processorTime(b)-began)/float64(b.N), "cpu-ns/op") }
}

// BenchmarkWriteBackup deletes each backup again: memory would end.
func BenchmarkWriteBackup(b *testing.B) {
	files := benchFiles()
	plainAndSealed(b, func(r *Repository) func() {
		before := storedKeys(b, r)
		return func() {
			writeTestBackup(b, r, files, nil)
			for _, key := range storedKeys(b, r) {
				if slices.Contains(before, key) {
					continue
				}
				if err := r.store.Delete(b.Context(), key); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}

// BenchmarkSealing stands beside BenchmarkCompressing: what encryption adds to a chunk, the derivation of the key included.
func BenchmarkSealing(b *testing.B) {
	m := newMasterKey()
	seals := seals{master: &m}
	codec, err := newCodec()
	if err != nil {
		b.Fatal(err)
	}
	frame := codec.storeChunk(nil, pagesOf(3, ChunkPages))
	b.Run("derive", func(b *testing.B) {
		defer reportProcessorTime(b)()
		for b.Loop() {
			seals.object(kindPack, PackID{1}.key(), salt{})
		}
	})
	sealer := seals.object(kindPack, PackID{1}.key(), salt{})
	b.Run("seal", func(b *testing.B) {
		defer reportProcessorTime(b)()
		room := append(make([]byte, 0, len(frame)+sealer.overhead()), frame...)
		for b.Loop() {
			sealer.seal(room, 0)
		}
	})
	sealed := sealer.seal(bytes.Clone(frame), 0)
	b.Run("open", func(b *testing.B) {
		defer reportProcessorTime(b)()
		room := make([]byte, len(sealed))
		for b.Loop() {
			copy(room, sealed)
			if _, err := seals.object(kindPack, PackID{1}.key(), salt{}).open(room, 0); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkCompressing(b *testing.B) {
	codec, err := newCodec()
	if err != nil {
		b.Fatal(err)
	}
	content := pagesOf(3, ChunkPages)
	var frame []byte
	b.Run("compress", func(b *testing.B) {
		defer reportProcessorTime(b)()
		for b.Loop() {
			frame = codec.storeChunk(frame[:0], content)
		}
	})
	b.Run("decompress", func(b *testing.B) {
		defer reportProcessorTime(b)()
		room := make([]byte, 0, ChunkSize)
		for b.Loop() {
			if _, err := codec.chunkContent(room, frame); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkPassphrase opens a key slot of a passphrase: what it costs to find one.
func BenchmarkPassphrase(b *testing.B) {
	k := passphraseKey(b, "a b c")
	m := newMasterKey()
	slot, err := (&seals{master: &m}).newKeySlot(k, "")
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := slot.unwrap(k); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteUnchangedBackup(b *testing.B) {
	files := benchFiles()
	r := newTestRepository(b)
	prior := writeTestBackup(b, r, files, nil)
	b.SetBytes(256 << 20)
	for b.Loop() {
		writeTestBackup(b, r, files, prior)
	}
}

func openBenchFile(b *testing.B, r *Repository) *File {
	b.Helper()
	backup := writeTestBackup(b, r, benchFiles(), nil)
	e, err := backup.Stat(b.Context(), "pgdata/base/5/2")
	if err != nil {
		b.Fatal(err)
	}
	f, err := backup.Open(b.Context(), e)
	if err != nil {
		b.Fatal(err)
	}
	return f
}

// BenchmarkReadSequential reads 128 MiB.
func BenchmarkReadSequential(b *testing.B) {
	p := make([]byte, 1<<20)
	plainAndSealed(b, func(r *Repository) func() {
		f := openBenchFile(b, r)
		return func() {
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.NewSectionReader(f, 0, f.Size()), p); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkReadRandomPages reads 1000 pages, each from a chunk that no cache holds.
func BenchmarkReadRandomPages(b *testing.B) {
	p := make([]byte, PageSize)
	rng := rand.New(rand.NewPCG(1, 1))
	plainAndSealed(b, func(r *Repository) func() {
		f := openBenchFile(b, r)
		return func() {
			for range 1000 {
				if _, err := f.ReadAt(p, rng.Int64N(f.Size()/PageSize)*PageSize); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}
