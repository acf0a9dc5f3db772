package repo

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgthaw/repo/pg"
)

var damages = flag.Int("damages", 1000, "damages to do to a repository, to one of either seal")

// smallFiles make a repository with every kind of object and content in it, small enough to be read thousands of times.
func smallFiles() testFiles {
	return testFiles{
		"pgdata/PG_VERSION":        []byte("15\n"),
		"pgdata/global/pg_control": pagesOf(1, 1),
		"pgdata/base/5/1":          pagesOf(2, 3),
		"pgdata/base/5/2":          pagesOf(3, 100),
		"pgdata/base/5/3":          append(pagesOf(4, 4), make([]byte, 40*PageSize)...),
		"tablespaces/16385/t":      pagesOf(6, 17)[:16*PageSize+5],
	}
}

// TestDamage flips bytes of, cuts off and deletes every kind of object: each read then gives the right bytes or an
// error that names the object. Never other bytes, never a panic.
func TestDamage(t *testing.T) { bothSeals(t, testDamage) }

func testDamage(t *testing.T, keys ...Key) {
	r := newTestRepository(t, keys...)
	files := smallFiles()
	first := writeTestBackup(t, r, files, nil)
	changed := bytes.Clone(files["pgdata/base/5/2"])
	copy(changed[7*PageSize:], pagesOf(77, 1))
	files["pgdata/base/5/2"] = changed
	id := writeTestBackup(t, r, files, first).Manifest.ID
	history := []byte("1\t0/3000000\tno recovery target specified\n")
	if err := r.PutWAL(t.Context(), "main", pg.WALName{Kind: pg.WALHistory, Timeline: 2}, history); err != nil {
		t.Fatal(err)
	}

	root := strings.TrimPrefix(r.URL(), "file://")
	objects := storedKeys(t, r)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	n, noticed := rounds(*damages), 0
	for i := range n {
		key := objects[i%len(objects)]
		undo, what := damage(t, filepath.Join(root, key), rng)
		err := readEverything(t.Context(), r.URL(), keys, id, files, history)
		undo()
		switch {
		case errors.Is(err, errWrongBytes):
			t.Errorf("%s of %s: %v", what, key, err)
		case err != nil:
			noticed++
			if !strings.Contains(err.Error(), nameOf(key)) {
				t.Errorf("%s of %s gives an error that does not name it: %v", what, key, err)
			}
		}
	}
	if noticed < n/4 {
		t.Errorf("only %d of %d damages were noticed: the reads do not reach them", noticed, n)
	}
}

// nameOf is what an error about an object has to contain: the name by which its user knows it.
func nameOf(key string) string {
	switch base := filepath.Base(key); {
	case key == configKey:
		return ""
	case strings.HasPrefix(key, keySlotsPrefix):
		return "key" // one that is gone has no name any more
	case strings.HasSuffix(base, manifestSuffix):
		return strings.TrimSuffix(base, manifestSuffix)
	case strings.HasSuffix(base, packListSuffix):
		return strings.TrimSuffix(base, packListSuffix)
	default:
		return base
	}
}

var errWrongBytes = errors.New("wrong bytes")

// readEverything opens the repository afresh and reads one backup and the history file.
func readEverything(ctx context.Context, url string, keys []Key, id string, files testFiles, history []byte) error {
	r, err := Open(ctx, url, Options{Keys: keys})
	if err != nil {
		return err
	}
	defer r.Close()
	m, err := r.Manifest(ctx, "main", id)
	if err != nil {
		return err
	}
	got, err := r.WAL(ctx, "main", pg.WALName{Kind: pg.WALHistory, Timeline: 2})
	if err != nil {
		return err
	}
	if !bytes.Equal(got, history) {
		return fmt.Errorf("history file: %w", errWrongBytes)
	}
	if _, err := r.packList(ctx, m); err != nil {
		return err
	}
	b := r.OpenBackup(m)
	seen := 0
	err = b.Walk(ctx, ".", func(name string, e Entry) error {
		if !e.Mode.IsRegular() {
			return nil
		}
		seen++
		got, err := readFile(ctx, b, e)
		if err == nil && !bytes.Equal(got, files[name]) {
			err = fmt.Errorf("%s: %w", name, errWrongBytes)
		}
		return err
	})
	if err == nil && seen != len(files) {
		return fmt.Errorf("%d files instead of %d: %w", seen, len(files), errWrongBytes)
	}
	return err
}

// damage does something to an object and returns how to undo it.
func damage(t *testing.T, path string, rng *rand.Rand) (undo func(), what string) {
	t.Helper()
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	now := bytes.Clone(was)
	switch rng.IntN(8) {
	case 0:
		what, now = "deletion", nil
	case 1:
		n := rng.IntN(len(now))
		what, now = fmt.Sprintf("cutting at %d", n), now[:n]
	default:
		at := rng.IntN(len(now))
		now[at] ^= byte(1 << rng.IntN(8))
		what = fmt.Sprintf("flip at %d", at)
	}
	replace := func(b []byte) {
		os.Remove(path)
		if b == nil {
			return
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	replace(now)
	return func() { replace(was) }, what
}

// TestCheckFindsDamage damages one pack: the check names the backup and the file.
func TestCheckFindsDamage(t *testing.T) {
	r := newTestRepository(t)
	writeTestBackup(t, r, smallFiles(), nil)
	root := strings.TrimPrefix(r.URL(), "file://")
	var pack string
	err := filepath.WalkDir(filepath.Join(root, "packs"), func(path string, d fs.DirEntry, err error) error {
		if info, e := d.Info(); e == nil && info.Size() > 100_000 {
			pack = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(pack)
	if err != nil {
		t.Fatal(err)
	}
	b[5000] ^= 1
	os.Remove(pack)
	if err := os.WriteFile(pack, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var findings []Finding
	if _, err := r.Check(t.Context(), CheckOptions{ReadData: true}, func(f Finding) { findings = append(findings, f) }); err != nil {
		t.Fatal(err)
	}
	if len(findings) != 1 || !errors.Is(findings[0].Err, ErrCorrupt) || len(findings[0].Backups) != 1 || findings[0].Backups[0].Total != 1 {
		t.Errorf("found %v", findings)
	}
	b[5000] ^= 1
	os.Remove(pack)
	if err := os.WriteFile(pack, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
