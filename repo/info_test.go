package repo

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"pgthaw/repo/pg"
)

// info of the repository as it is on disk.
func (k checkedRepo) info(t testing.TB) (*Info, error) {
	t.Helper()
	r := k.open(t)
	before := r.ReadBytes()
	i, err := r.Info(t.Context())
	if n := r.ReadBytes() - before; n > 16<<10 {
		t.Errorf("%d bytes read", n)
	}
	return i, err
}

// TestInfo adds up: what it tells of each backup makes the packs, and packs, WAL and the rest make the repository.
func TestInfo(t *testing.T) {
	k := newCheckedRepo(t)
	i, err := k.info(t)
	if err != nil || len(i.Clusters) != 1 || len(i.Clusters[0].Backups) != 2 {
		t.Fatalf("%+v, %v", i, err)
	}
	r := k.open(t)
	var stored int64
	for o, err := range r.store.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		stored += o.Size
	}
	c := i.Clusters[0]
	a, b := c.Backups[0], c.Backups[1]
	if got := i.Packs.Bytes + i.WALBytes + i.OtherBytes; got != stored {
		t.Errorf("%d bytes counted of %d", got, stored)
	}
	if c.Packs != i.Packs || c.WALBytes != i.WALBytes || c.WALSegments != 11 || *i.Reclaimable != (PackCount{}) {
		t.Errorf("%+v", c)
	}
	if want := k.a.SizeBytes + k.b.SizeBytes; i.SizeBytes != want || c.SizeBytes != want {
		t.Errorf("%d and %d bytes of backups, want %d", i.SizeBytes, c.SizeBytes, want)
	}
	// B's own packs are its changed chunk and its directories; nothing of A's is A's alone but its directories.
	if b.Unique.Packs != 2 || b.SharedBytes == 0 || b.LiveBytes <= b.SharedBytes || b.ID != k.b.ID {
		t.Errorf("second backup %+v", b)
	}
	if shared := i.Packs.Packs - a.Unique.Packs - b.Unique.Packs; shared != 2 && shared != 3 {
		t.Errorf("%d packs are shared; %+v, %+v", shared, a, b)
	}

	// A third backup with the second's content shares all of the second's packs, and leaves it none of its own.
	files := smallFiles()
	changed := bytes.Clone(files["pgdata/base/5/2"])
	copy(changed[7*PageSize:], pagesOf(77, 1))
	files["pgdata/base/5/2"] = changed
	backupAt(t, r, files, r.OpenBackup(k.b), 11, 12)
	i, err = k.info(t)
	if err != nil {
		t.Fatal(err)
	}
	if b := i.Clusters[0].Backups[1]; b.Unique.Packs != 0 || b.SharedBytes != b.LiveBytes {
		t.Errorf("second backup, beside one of the same content: %+v", b)
	}
}

// TestInfoReclaimable: packs of no backup are their writer's until its session is over.
func TestInfoReclaimable(t *testing.T) {
	sound := newCheckedRepo(t)
	k := sound.copied(t)
	k.remove(t, manifestKey("main", k.b.ID))
	i, err := k.info(t)
	if err != nil || i.Reclaimable == nil || i.Reclaimable.Packs != 0 || i.Unfinished.Packs != 2 {
		t.Errorf("%+v, %v", i, err)
	}
	for _, key := range storedKeys(t, k.open(t)) {
		if strings.HasPrefix(key, sessionsPrefix) {
			k.remove(t, key)
		}
	}
	i, err = k.info(t)
	if err != nil || i.Reclaimable == nil || i.Reclaimable.Packs != 2 || i.Unfinished.Packs != 0 {
		t.Errorf("without the session: %+v, %v", i, err)
	}
	for _, key := range []string{packListKey("main", k.b.ID), clusterKey("main")} {
		k := sound.copied(t)
		k.remove(t, key)
		i, err := k.info(t)
		if !errors.Is(err, ErrCorrupt) || i.Reclaimable != nil || i.Packs.Packs == 0 {
			t.Errorf("without %s: %+v, %v", key, i, err)
		}
	}
}

// TestInfoOfWALAlone: a cluster may have no backups yet.
func TestInfoOfWALAlone(t *testing.T) {
	r := newTestRepository(t)
	if err := r.PutWAL(t.Context(), "main", pg.WALName{Kind: pg.WALHistory, Timeline: 2}, []byte("1\t0/3000000\tx\n")); err != nil {
		t.Fatal(err)
	}
	i, err := r.Info(t.Context())
	if err != nil || i.ID != r.ID() || len(i.Clusters) != 1 || i.Clusters[0].WALSegments != 0 || i.Clusters[0].WALBytes == 0 {
		t.Errorf("%+v, %v", i, err)
	}
}
