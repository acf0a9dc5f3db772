package repo

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"path"
	"sort"
	"testing"
	"testing/synctest"
	"time"

	"pgthaw/repo/pg"
)

// patched is a file of an image that lies over one of the prior backup; with no base it is new.
type patched struct {
	base  string
	limit int64
	data  []Range
	local []byte // the whole file; only what is in data counts
}

// content is what whoever reads the file through a mount sees.
func (p patched) content(files testFiles) []byte {
	all := make([]byte, len(p.local))
	copy(all[:p.limit], files[p.base])
	for _, d := range p.data {
		copy(all[d.From:d.To], p.local[d.From:d.To])
	}
	return all
}

// writeTestImage makes an image of a backup, over prior, and returns it with what is to be in it.
func writeTestImage(t testing.TB, of, prior *Backup, files testFiles, changes map[string]patched, image Image) (*Backup, testFiles) {
	t.Helper()
	r, want := of.r, testFiles{}
	image.Of = of.Manifest.ID
	o := BackupOptions{Prior: prior, ImageOf: of.Manifest}
	m, err := r.WriteBackup(t.Context(), "main", o, func(_ context.Context, w *BackupWriter) (Manifest, error) {
		m := testManifest()
		m.Image = &image
		return m, writePatched(w, changes)
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range changes {
		want[name] = p.content(files)
	}
	return r.OpenBackup(m), want
}

func writePatched(w *BackupWriter, changes map[string]patched) error {
	var names []string
	for name := range changes {
		names = append(names, name)
	}
	sort.Strings(names)
	made := map[string]bool{".": true}
	for _, name := range names {
		if err := makeParents(w, path.Dir(name), made); err != nil {
			return err
		}
		p := changes[name]
		if err := w.AddPatched(name, testEntry(p.local), false, Patch{p.base, p.limit, p.data, bytes.NewReader(p.local)}); err != nil {
			return err
		}
	}
	return nil
}

// asItWas is a file that was not changed.
func asItWas(name string, files testFiles) patched {
	size := int64(len(files[name]))
	return patched{name, size, nil, make([]byte, size)}
}

// TestImageFiles lays random changes over files of all sizes, image over image, and reads what comes of them.
func TestImageFiles(t *testing.T) { bothSeals(t, testImageFiles) }

func testImageFiles(t *testing.T, keys ...Key) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	r := newTestRepository(t, keys...)
	files := testFiles{}
	for i := range 8 {
		files["pgdata/"+string(rune('a'+i))] = pagesOf(uint64(i), random.IntN(60)*i)
	}
	files["pgdata/odd"] = pagesOf(9, 40)[:40*PageSize-777]
	files["pgdata/small"] = []byte("small")
	of := writeTestBackup(t, r, files, nil)
	prior := of
	for range rounds(20) {
		changes := map[string]patched{}
		for name := range files {
			changes[name] = randomPatch(random, name, files[name])
		}
		prior, files = writeTestImage(t, of, prior, files, changes, Image{Kind: ImageRecovery, LSN: 0x3000000})
		checkFiles(t, prior, files)
	}
}

// randomPatch changes a file in blocks of 4 KiB, as file systems have them, and its length to any number of bytes.
func randomPatch(random *rand.Rand, name string, base []byte) patched {
	size := int64(len(base))
	switch random.IntN(4) {
	case 0:
		size = random.Int64N(size + 1)
	case 1:
		size += random.Int64N(40 * PageSize)
	}
	p := patched{base: name, limit: min(size, int64(len(base))), local: make([]byte, size)}
	if random.IntN(4) == 0 {
		p.limit = random.Int64N(p.limit + 1)
	}
	for i := range p.local {
		p.local[i] = byte(random.Uint32())
	}
	copy(p.local[size/2:], base[min(size/2, int64(len(base))):]) // was read, not written
	const block = 4096
	for at := int64(0); at < size; at += block * (1 + random.Int64N(30)) {
		end := min(at+block*(1+random.Int64N(6)), size)
		if random.IntN(3) > 0 && (len(p.data) == 0 || p.data[len(p.data)-1].To < at) {
			p.data = append(p.data, Range{at, end})
		}
	}
	return p
}

// TestImageReadsWhatChanged counts: of a file that was not changed nothing is read, of one of which a page was changed its map.
func TestImageReadsWhatChanged(t *testing.T) {
	r := newTestRepository(t)
	files := testFiles{"pgdata/a": incompressible(4000), "pgdata/b": incompressible(4000)}
	of := writeTestBackup(t, r, files, nil)
	before := r.ReadBytes()
	change := asItWas("pgdata/a", files)
	change.data = []Range{{100 * PageSize, 101 * PageSize}}
	copy(change.local[100*PageSize:], bytes.Repeat([]byte("x"), PageSize))
	b, want := writeTestImage(t, of, of, files, map[string]patched{"pgdata/a": change, "pgdata/b": asItWas("pgdata/b", files)}, Image{Kind: ImagePromoted})
	if read := r.ReadBytes() - before; read > 500<<10 { // tables of contents and a map
		t.Errorf("%d bytes read to change a page of a file of %d", read, len(files["pgdata/a"]))
	}
	if b.Manifest.StoredBytes > 50<<10 {
		t.Errorf("%d bytes stored", b.Manifest.StoredBytes)
	}
	checkFiles(t, b, want)
}

// TestImageIsNoBackup: nobody who looks for backups finds an image, by its id neither.
func TestImageIsNoBackup(t *testing.T) {
	r := newTestRepository(t)
	files := testFiles{"pgdata/a": incompressible(40)}
	of := writeTestBackup(t, r, files, nil)
	image, _ := writeTestImage(t, of, of, files, map[string]patched{"pgdata/a": asItWas("pgdata/a", files)}, Image{Kind: ImagePromoted})
	if got := listedBackups(t, r); got != "["+of.Manifest.ID+"]" {
		t.Errorf("listed %s", got)
	}
	if m, err := r.Manifest(t.Context(), "main", Latest); err != nil || m.ID != of.Manifest.ID {
		t.Errorf("latest is %+v, %v", m, err)
	}
	if _, err := r.Manifest(t.Context(), "main", image.Manifest.ID); !errors.Is(err, ErrNoBackup) {
		t.Errorf("by its id: %v", err)
	}
	if _, err := r.AddHold(t.Context(), "main", image.Manifest.ID, "", time.Time{}); !errors.Is(err, ErrNoBackup) {
		t.Errorf("held: %v", err)
	}
	all, err := r.ImagesOf(t.Context(), of.Manifest)
	if err != nil || len(all) != 1 || all[0].ID != image.Manifest.ID {
		t.Errorf("its images are %v, %v", all, err)
	}
	if i, err := r.Info(t.Context()); err != nil || *i.Reclaimable != (PackCount{}) || i.Unfinished != (PackCount{}) || len(i.Clusters[0].Backups) != 1 {
		t.Errorf("info %+v, %v", i, err)
	}
}

// TestPruneImages: an image goes with its backup, when a newer one replaces it, and when the WAL that it leads to goes; and as long as it is
// there nothing that it needs goes.
func TestPruneImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newMemRepository(t)
		files := testFiles{"pgdata/a": incompressible(200)}
		of := writeTestBackup(t, r, files, nil)
		prior, want := of, files
		make := func(kind ImageKind, lsn pg.LSN) {
			change := asItWas("pgdata/a", files)
			change.data = []Range{{int64(lsn) * PageSize, int64(lsn+1) * PageSize}}
			copy(change.local[lsn*PageSize:], incompressible(1))
			prior, want = writeTestImage(t, of, prior, want, map[string]patched{"pgdata/a": change}, Image{Kind: kind, LSN: lsn})
			time.Sleep(time.Minute)
		}
		make(ImagePromoted, 1)
		make(ImageRecovery, 2)
		make(ImageRecovery, 3)
		expect := func(keep int, ids ...string) {
			t.Helper()
			for range 3 {
				time.Sleep(2 * sessionLife)
				prune(t, r, keep, DefaultGrace)
				checkClean(t, r)
			}
			stored, err := r.storedBackups(t.Context(), backupsRoot)
			var got []string
			for _, b := range stored {
				if b.manifest {
					got = append(got, b.Backup)
				}
			}
			sort.Strings(ids)
			sort.Strings(got)
			if err != nil || len(got) != len(ids) {
				t.Fatalf("there are %v (%v), want %v", got, err, ids)
			}
		}
		images, err := r.ImagesOf(t.Context(), of.Manifest)
		if err != nil || len(images) != 3 {
			t.Fatalf("%v, %v", images, err)
		}
		expect(1, of.Manifest.ID, images[0].ID, images[2].ID)
		checkFiles(t, prior, want)
		checkFiles(t, of, files)
		if report := prune(t, r, 1, DefaultGrace); len(report.WALSpared) > 0 {
			t.Errorf("WAL is spared: %+v", report.WALSpared)
		}
		second := writeTestBackup(t, r, testFiles{"pgdata/b": incompressible(3)}, nil)
		expect(1, second.Manifest.ID)
		if packs := prune(t, r, 1, DefaultGrace); packs.Later.Packs > 0 || packs.Dead.Packs > 0 {
			t.Errorf("packs are left: %+v", packs)
		}
	})
}

// TestCopyImages: a backup's newest images go with it, also those that come later.
func TestCopyImages(t *testing.T) {
	from, to := newTestRepository(t), newTestRepository(t, newTestKey(t))
	files := testFiles{"pgdata/a": incompressible(200)}
	of := writeTestBackup(t, from, files, nil)
	change := asItWas("pgdata/a", files)
	change.data = []Range{{PageSize, 2 * PageSize}}
	var want testFiles
	for lsn := pg.LSN(1); lsn < 3; lsn++ {
		change.local[PageSize]++
		_, want = writeTestImage(t, of, of, files, map[string]patched{"pgdata/a": change}, Image{Kind: ImageRecovery, LSN: lsn})
		for _, n := range []int{1, 0} {
			done, err := from.Copy(t.Context(), to, CopyOptions{})
			if err != nil || done.Images != n {
				t.Fatalf("%+v, %v; want %d images", done, err, n)
			}
		}
	}
	copied, err := to.Manifest(t.Context(), "main", of.Manifest.ID)
	if err != nil {
		t.Fatal(err)
	}
	images, err := to.ImagesOf(t.Context(), copied)
	if err != nil || len(images) != 2 || images[1].Image.LSN != 2 || images[1].StoredBytes > 100<<10 {
		t.Fatalf("%+v, %v", images, err)
	}
	checkFiles(t, to.OpenBackup(images[1]), want)
}

// TestImageBelowFloor: a backup that is restorable to its own end only still gets an image, where no backup could be written any more.
func TestImageBelowFloor(t *testing.T) {
	r := newTestRepository(t)
	files := testFiles{"pgdata/a": incompressible(40)}
	of := writeTestBackup(t, r, files, nil)
	floor := walFloors{walFloorOf{"main", 1}: of.Manifest.StartLSN + 1}
	if err := r.putFloors(t.Context(), nil, floor); err != nil {
		t.Fatal(err)
	}
	_, err := r.WriteBackup(t.Context(), "main", BackupOptions{}, func(context.Context, *BackupWriter) (Manifest, error) { return testManifest(), nil })
	if !errors.Is(err, ErrWALPruned) {
		t.Fatalf("a backup below the floor: %v", err)
	}
	image, want := writeTestImage(t, of, of, files, map[string]patched{"pgdata/a": asItWas("pgdata/a", files)}, Image{Kind: ImagePromoted})
	checkFiles(t, image, want)
}
