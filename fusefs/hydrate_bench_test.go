package fusefs

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"pgthaw/repo"
)

// BenchmarkHydrateManyFiles hydrates a directory of small files:
//
//	go test -run '^$' -bench HydrateManyFiles -benchtime 1x -cpuprofile /tmp/cpu ./fusefs
func BenchmarkHydrateManyFiles(b *testing.B) {
	const files = 20_000
	r, url := newRepository(b)
	tree := lowerTree{}
	tree.dir("pgdata", 0o700)
	for i := range files {
		page := make([]byte, 8192)
		for k := 0; k < 400; k += 8 { // what does not compress
			binary.LittleEndian.PutUint64(page[k:], uint64(i*1000+k)*0x9e3779b97f4a7c15)
		}
		tree.file(fmt.Sprintf("pgdata/%d", i), 0o600, page)
	}
	m := backUp(b, r, tree)
	r, err := repo.Open(b.Context(), url, repo.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	for b.Loop() {
		b.StopTimer()
		dir := filepath.Join(b.TempDir(), "pgdata")
		if err := os.Mkdir(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		if _, err := Lay(b.Context(), r.OpenBackup(m), "pgdata", dir, LayOptions{}); err != nil {
			b.Fatal(err)
		}
		v, err := MountOverlay(context.WithoutCancel(b.Context()), dir, r.OpenBackup(m), OverlayOptions{})
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := v.Hydrate(b.Context(), 0); err != nil {
			b.Error(err)
		}
		b.StopTimer()
		if err := v.Unmount(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
