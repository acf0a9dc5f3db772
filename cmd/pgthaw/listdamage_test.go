package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// newListedRepository makes a repository of these clusters, each with two backups and the WAL that they need.
func newListedRepository(t *testing.T, clusters ...string) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "r")
	r, err := repo.Init(t.Context(), dir, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, name := range clusters {
		if _, err := r.BindCluster(t.Context(), name, testSystemID, testSegment); err != nil {
			t.Fatal(err)
		}
		putSegment(t, r, name)
		for range 2 {
			_, err := r.WriteBackup(t.Context(), name, repo.BackupOptions{}, func(context.Context, *repo.BackupWriter) (repo.Manifest, error) {
				return repo.Manifest{SystemIdentifier: testSystemID, PGVersion: "15.18", PGVersionNum: 150018, PageSize: 8192,
					SegmentSize: testSegment, Timeline: 1, StartLSN: 0x200028, StopLSN: 0x200100,
					StartedAt: time.Unix(1_700_000_000, 0).UTC(), StoppedAt: time.Unix(1_700_000_060, 0).UTC()}, nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

const (
	testSystemID = 7123456789012345678
	testSegment  = 1 << 20
)

// putSegment stores a WAL segment without a record in it.
func putSegment(t *testing.T, r *repo.Repository, cluster string) {
	t.Helper()
	seg := make([]byte, testSegment)
	binary.LittleEndian.PutUint16(seg[0:], 0xD110) // XLOG_PAGE_MAGIC of 15
	binary.LittleEndian.PutUint16(seg[2:], 2)      // XLP_LONG_HEADER
	binary.LittleEndian.PutUint32(seg[4:], 1)
	binary.LittleEndian.PutUint64(seg[8:], 2*testSegment)
	binary.LittleEndian.PutUint64(seg[24:], testSystemID)
	binary.LittleEndian.PutUint32(seg[32:], testSegment)
	binary.LittleEndian.PutUint32(seg[36:], 8192)
	if err := r.PutWAL(t.Context(), cluster, pg.SegmentName(1, 2, testSegment), seg); err != nil {
		t.Fatal(err)
	}
}

// lists runs list and returns how many backups of each cluster it shows.
func lists(t *testing.T, dir string, wantCode int) (backups map[string]int, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"pgthaw", "--repo", dir, "list", "--json"}, &out, &errs); code != wantCode {
		t.Errorf("list: exit code %d, want %d\n%s", code, wantCode, &errs)
	}
	var all []listed
	if err := json.Unmarshal(out.Bytes(), &all); err != nil {
		t.Fatalf("%v in\n%s", err, &out)
	}
	backups = make(map[string]int)
	for _, b := range all {
		if b.Window == nil {
			t.Errorf("backup %s of %s shows no window", b.ID, b.Cluster)
		}
		backups[b.Cluster]++
	}
	return backups, errs.String()
}

// One cluster that cannot be read does not hide the others, for a person as for a script.
func TestListGoesOnAfterADamagedCluster(t *testing.T) {
	dir := newListedRepository(t, "alpha", "beta", "gamma")
	if err := os.WriteFile(filepath.Join(dir, "clusters", "beta"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, stderr := lists(t, dir, 16)
	if got["alpha"] != 2 || got["beta"] != 0 || got["gamma"] != 2 {
		t.Errorf("backups listed: %v, want two of alpha and of gamma", got)
	}
	if !strings.Contains(stderr, "clusters/beta") || strings.Contains(stderr, "alpha") {
		t.Errorf("stderr names another object than clusters/beta:\n%s", stderr)
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"pgthaw", "--repo", dir, "list"}, &out, &errs); code != 16 ||
		strings.Count(out.String(), "\nRecoverable: ") != 2 || !strings.Contains(errs.String(), "clusters/beta") {
		t.Errorf("exit code %d, stdout\n%sstderr\n%s", code, &out, &errs)
	}
}

// Where nothing can be read, "No backups yet." would be a lie.
func TestListOfNothingButADamagedCluster(t *testing.T) {
	dir := newListedRepository(t, "beta")
	if err := os.WriteFile(filepath.Join(dir, "clusters", "beta"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"pgthaw", "--repo", dir, "list"}, &out, &errs); code != 16 || out.Len() > 0 {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, &out, &errs)
	}
}

// A listing of WAL takes a request for each thousand segments: one for a cluster, however many backups it has.
func TestListListsWALOncePerCluster(t *testing.T) {
	dir := newListedRepository(t, "alpha", "beta")
	seen := watchOpens(t, filepath.Join(dir, "wal", "alpha"))
	if got, stderr := lists(t, dir, 0); got["alpha"] != 2 || got["beta"] != 2 || stderr != "" {
		t.Fatalf("backups listed: %v; %s", got, stderr)
	}
	if n := seen(); n != 1 {
		t.Errorf("the WAL of alpha was listed %d times, want once", n)
	}
}

// watchOpens counts how often a directory is opened from now on: inotify(7).
func watchOpens(t *testing.T, dir string) (seen func() int) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	return func() (n int) {
		buf := make([]byte, 64<<10)
		size, err := unix.Read(fd, buf)
		if err != nil {
			return 0 // EAGAIN: nothing happened
		}
		for at := 0; at < size; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&buf[at]))
			if e.Len == 0 { // the directory itself, not what is in it
				n++
			}
			at += unix.SizeofInotifyEvent + int(e.Len)
		}
		return n
	}
}
