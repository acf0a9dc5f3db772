package integration

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestOverlayDiskFull fills the disk under a thawed directory: hydration says so and goes on when there is room again, whether
// its daemon lived through it or not.
func TestOverlayDiskFull(t *testing.T) {
	t.Parallel()
	a := newArchived(t, postgresql(t, 15), clusterOptions{checksums: true, pgbenchScale: 3, conf: []string{"fsync = off"}})
	a.backup(t)
	a.Stop()
	disk := mountTemp(t, "tmpfs", "size=256m,mode=755")
	data := filepath.Join(disk, "postgres", "data")
	if err := os.Mkdir(filepath.Dir(data), 0o755); err != nil {
		t.Fatal(err)
	}
	ownedByPostgres(t, filepath.Dir(data))
	a.copyTo(t, invocation{}, "thaw", "latest", data, "--hydrate", "off").ok(t)
	ballast := fillDisk(t, disk)
	finishFails := func() thawed {
		t.Helper()
		r := pgthaw(t, "overlay", "finish", data).exits(t, 1)
		if !strings.Contains(r.stderr, "no space left on device") || !strings.Contains(r.stderr, "tries again") {
			t.Errorf("overlay finish on a full disk says\n%s", r.stderr)
		}
		s := overlayStatus(t, invocation{}, data)
		if s.State != "hydrating" || !s.Mounted || s.BytesHydrated >= s.BytesTotal {
			t.Errorf("status is %+v", s)
		}
		if text := pgthaw(t, "overlay", "status", data).ok(t).stdout; !strings.Contains(text, "no space left on device") {
			t.Errorf("the status does not tell of the full disk:\n%s", text)
		}
		return s
	}
	before := finishFails()
	if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, stopLimit, "end of the daemon", func() bool { return !alive(before.PID) })
	if s := overlayStatus(t, invocation{}, data); s.State != "lost" {
		t.Errorf("status after the daemon's death is %+v", s)
	}
	pgthaw(t, "overlay", "resume", data).ok(t)
	if after := finishFails(); after.PID == before.PID {
		t.Errorf("the daemon is still process %d", after.PID)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	pgthaw(t, "overlay", "finish", data).ok(t)
	checkNothingOfOurs(t, data)
	c := adopt(t, a.installation, data)
	c.waitRecovered()
	c.pgbenchBalances()
	c.amcheck()
	c.Stop()
	a.checksums(t, data)
}

// fillDisk leaves no block free.
func fillDisk(t *testing.T, disk string) (ballast string) {
	t.Helper()
	f, err := os.Create(filepath.Join(disk, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at, n := int64(0), int64(64<<20); n >= 4096; {
		switch err := syscall.Fallocate(int(f.Fd()), 0, at, n); {
		case err == nil:
			at += n
		case errors.Is(err, syscall.ENOSPC):
			n /= 2
		default:
			t.Fatal(err)
		}
	}
	return f.Name()
}
