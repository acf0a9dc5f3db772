package repo

import (
	"context"
	"io"
	"math/rand/v2"
	"testing"
)

// benchFiles is 256 MiB that compress about 4:1, as rows do.
func benchFiles() testFiles {
	return testFiles{"pgdata/PG_VERSION": []byte("15\n"), "pgdata/base/5/2": pagesOf(3, 16<<10), "pgdata/base/5/3": pagesOf(4, 16<<10)}
}

func BenchmarkWriteBackup(b *testing.B) {
	files := benchFiles()
	b.SetBytes(256 << 20)
	for b.Loop() {
		writeTestBackup(b, newTestRepository(b), files, nil)
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

func openBenchFile(b *testing.B) *File {
	b.Helper()
	backup := writeTestBackup(b, newTestRepository(b), benchFiles(), nil)
	e, err := backup.Stat(context.Background(), "pgdata/base/5/2")
	if err != nil {
		b.Fatal(err)
	}
	f, err := backup.Open(context.Background(), e)
	if err != nil {
		b.Fatal(err)
	}
	return f
}

func BenchmarkReadSequential(b *testing.B) {
	f := openBenchFile(b)
	p := make([]byte, 1<<20)
	b.SetBytes(f.Size())
	for b.Loop() {
		if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.NewSectionReader(f, 0, f.Size()), p); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadRandomPage(b *testing.B) {
	f := openBenchFile(b)
	p := make([]byte, PageSize)
	rng := rand.New(rand.NewPCG(1, 1))
	for b.Loop() {
		if _, err := f.ReadAt(p, rng.Int64N(f.Size()/PageSize)*PageSize); err != nil {
			b.Fatal(err)
		}
	}
}
