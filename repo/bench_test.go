package repo

import (
	"bytes"
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
	for name, keys := range map[string][]Key{"plain": nil, "encrypted": {newTestKey(b)}} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(256 << 20)
			for b.Loop() {
				writeTestBackup(b, newTestRepository(b, keys...), files, nil)
			}
		})
	}
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
		for b.Loop() {
			seals.object(kindPack, PackID{1}.key(), salt{})
		}
	})
	sealer := seals.object(kindPack, PackID{1}.key(), salt{})
	b.Run("seal", func(b *testing.B) {
		room := append(make([]byte, 0, len(frame)+sealer.overhead()), frame...)
		for b.Loop() {
			sealer.seal(room, 0)
		}
	})
	sealed := sealer.seal(bytes.Clone(frame), 0)
	b.Run("open", func(b *testing.B) {
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
		for b.Loop() {
			frame = codec.storeChunk(frame[:0], content)
		}
	})
	b.Run("decompress", func(b *testing.B) {
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
