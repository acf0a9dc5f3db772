package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgthaw/repo/pg"
)

// sealedPart is one sealed part of an object, as whoever holds the store can cut it out.
type sealedPart struct {
	object string
	kind   byte
	salt   salt
	offset int64
	bytes  []byte
}

// sealedParts cuts up every object of an encrypted repository but its configuration and key slots.
func sealedParts(t *testing.T, r *Repository) []sealedPart {
	t.Helper()
	var all []sealedPart
	for _, key := range storedKeys(t, r) {
		if key == configKey || strings.HasPrefix(key, keySlotsPrefix) {
			continue
		}
		b, err := r.store.Get(t.Context(), key, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		cuts := []int64{objectHeaderSize, int64(len(b))}
		switch b[4] {
		case kindPack:
			cuts = packCuts(t, r, b)
		case kindEdition: // its pieces are sealed as parts of the pack
			cuts = []int64{editionHeaderSize, editionAt(t, r, key).at[0]}
		case kindWAL:
			cuts = walCuts(t, r, key)
		}
		for i := range len(cuts) - 1 {
			if cuts[i] < cuts[i+1] {
				all = append(all, sealedPart{key, b[4], salt(b[16:32]), cuts[i], b[cuts[i]:cuts[i+1]]})
			}
		}
	}
	return all
}

func packCuts(t *testing.T, r *Repository, b []byte) (cuts []int64) {
	t.Helper()
	end := uint32(len(b))
	toc, err := r.readTOC(t.Context(), PackID(b[16:32]), packSize{end, binary.LittleEndian.Uint32(b[end-28:])})
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range toc.offsets {
		cuts = append(cuts, int64(at))
	}
	return append(cuts, int64(toc.end()), int64(end-packTrailerSize))
}

func editionAt(t *testing.T, r *Repository, key string) *edition {
	t.Helper()
	id, no, _ := editionOfKey(key)
	e, err := r.openEdition(t.Context(), id, no)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func walCuts(t *testing.T, r *Repository, key string) []int64 {
	t.Helper()
	name, err := pg.ParseWALName(filepath.Base(key))
	if err != nil {
		t.Fatal(err)
	}
	h, err := r.walHead(t.Context(), "main", name)
	if err != nil {
		t.Fatal(err)
	}
	return append([]int64{walHeaderSize}, h.offsets...)
}

// sealedRepository is an encrypted one with two backups and two WAL files.
func sealedRepository(t *testing.T, keys ...Key) *Repository {
	t.Helper()
	r := newTestRepository(t, keys...)
	first, second := goldenFiles()
	b := writeTestBackup(t, r, first, nil)
	writeTestBackup(t, r, second, b)
	for timeline, content := range map[pg.Timeline]string{2: goldenHistory, 3: strings.ToUpper(goldenHistory)} {
		if err := r.PutWAL(t.Context(), "main", pg.WALName{Kind: pg.WALHistory, Timeline: timeline}, []byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// TestSealedPartsStay opens every sealed part of two repositories of one master key's slots at every place of the first:
// each opens at its own place only, whether the salt beside it is the place's or its own.
func TestSealedPartsStay(t *testing.T) {
	key := newTestKey(t)
	r, other := sealedRepository(t, key), sealedRepository(t, key)
	parts := sealedParts(t, r)
	if len(parts) < 30 {
		t.Fatalf("only %d parts", len(parts))
	}
	foreign := sealedParts(t, other)
	open := func(place, part sealedPart, salt salt) error {
		_, err := r.seals.object(place.kind, place.object, salt).open(bytes.Clone(part.bytes), place.offset)
		return err
	}
	for i, place := range parts {
		if err := open(place, place, place.salt); err != nil {
			t.Fatalf("%s at %d does not open: %v", place.object, place.offset, err)
		}
		for j, part := range append(parts[:len(parts):len(parts)], foreign...) {
			if i == j {
				continue
			}
			for _, salt := range []salt{place.salt, part.salt} {
				var c *CorruptError
				if err := open(place, part, salt); !errors.As(err, &c) || c.Object != place.object || c.Offset != place.offset {
					t.Errorf("%s at %d in the place of %s at %d: %v", part.object, part.offset, place.object, place.offset, err)
				}
			}
		}
	}
}

// TestSaltsDiffer encodes the same object twice, as a retry does.
func TestSaltsDiffer(t *testing.T) {
	seen := map[salt]string{}
	for _, p := range sealedParts(t, sealedRepository(t, newTestKey(t))) {
		if was, ok := seen[p.salt]; ok && was != p.object {
			t.Errorf("%s and %s have one salt", was, p.object)
		}
		seen[p.salt] = p.object
	}
	r := newTestRepository(t, newTestKey(t))
	c := Cluster{Name: "main", SegmentSize: 16 << 20}
	var objects [2][]byte
	for i := range objects {
		var err error
		if _, objects[i], err = r.encodeWAL(t.Context(), c, goldenWAL, []byte(goldenHistory)); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Equal(objects[0][16:32], objects[1][16:32]) {
		t.Error("a retry has the salt of the first attempt")
	}
	doc := r.sealDocument("clusters/a", []byte("x"))
	if bytes.Equal(doc, r.sealDocument("clusters/a", []byte("x"))) {
		t.Error("a document sealed twice has one salt")
	}
}

// TestExchangedObjects puts every object of an encrypted repository, and of another one with the same key, in the place
// of every other of its kind: a check then always finds something.
func TestExchangedObjects(t *testing.T) {
	key := newTestKey(t)
	r, other := sealedRepository(t, key), sealedRepository(t, key)
	root := strings.TrimPrefix(r.URL(), "file://")
	objects := map[string][]byte{}
	for _, from := range []*Repository{other, r} {
		for _, k := range storedKeys(t, from) {
			b, err := from.store.Get(t.Context(), k, 0, -1)
			if err != nil {
				t.Fatal(err)
			}
			objects[from.ID()+":"+k] = b
		}
	}
	for _, k := range storedKeys(t, r) {
		own := objects[r.ID()+":"+k]
		for name, b := range objects {
			if bytes.Equal(b, own) || kindOf(name) != kindOf(r.ID()+":"+k) {
				continue
			}
			exchange(t, filepath.Join(root, k), b)
			if !noticed(t.Context(), r.URL(), key) {
				t.Errorf("%s in the place of %s is not noticed", name, k)
			}
		}
		exchange(t, filepath.Join(root, k), own)
	}
}

// kindOf is what an object's key, after its repository's ID, tells of its kind.
func kindOf(name string) string {
	_, key, _ := strings.Cut(name, ":")
	first, _, _ := strings.Cut(key, "/")
	return first + filepath.Ext(key)
}

func exchange(t *testing.T, path string, b []byte) {
	t.Helper()
	os.Remove(path)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// noticed tells whether opening or checking the repository finds anything.
func noticed(ctx context.Context, url string, key Key) bool {
	r, err := Open(ctx, url, Options{Keys: []Key{key}})
	if err != nil {
		return true
	}
	defer r.Close()
	found := false
	_, err = r.Check(ctx, CheckOptions{ReadData: true}, func(Finding) { found = true })
	return found || err != nil
}

// TestNothingIsReadable looks for what must stay secret in the bytes of all objects. In a repository that is not encrypted
// each is found, so the search can find it.
func TestNothingIsReadable(t *testing.T) {
	bothSeals(t, func(t *testing.T, keys ...Key) {
		r := newTestRepository(t, keys...)
		secret := func(n uint64) []byte {
			b := make([]byte, 200)
			for i, rng := 0, rand.New(rand.NewPCG(n, 9)); i < len(b); i++ {
				b[i] = byte(128 + rng.IntN(128)) // what does not compress lies in a frame as it is
			}
			return b
		}
		name, inline, page := secret(1), secret(2), secret(3)
		files := testFiles{"pgdata/" + string(name): inline, "pgdata/t": append(bytes.Clone(page), incompressible(3)...)}
		_, err := r.WriteBackup(t.Context(), "main", BackupOptions{}, func(_ context.Context, w *BackupWriter) (Manifest, error) {
			m := testManifest()
			m.Label, m.DataDirectory = "label of a secret", "/secret/directory"
			m.Settings = map[string]string{"primary_conninfo": "a secret setting"}
			return m, writeFiles(w, files)
		})
		if err != nil {
			t.Fatal(err)
		}
		wal := "1\t0/3000028\thistory of a secret\n"
		if err := r.PutWAL(t.Context(), "main", goldenWAL, []byte(wal)); err != nil {
			t.Fatal(err)
		}
		var all []byte
		for _, k := range storedKeys(t, r) {
			b, err := r.store.Get(t.Context(), k, 0, -1)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b...)
		}
		for _, needle := range []string{string(name[:100]), string(inline[:100]), string(page[:100]), "label of a secret", "/secret/directory",
			"a secret setting", wal, fmt.Sprint(uint64(testSystemID)), `"main"`} {
			if found := bytes.Contains(all, []byte(needle)); found != (len(keys) == 0) {
				t.Errorf("%.20q: found %v", needle, found)
			}
		}
	})
}
