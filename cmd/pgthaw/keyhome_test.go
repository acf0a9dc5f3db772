package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"pgthaw/repo"
)

// someUser has no rights anywhere.
const someUser = 54321

// TestHomesOfOthers has a home's user lead root astray: what that user may not do, root does not do there.
func TestHomesOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root keeps keys for others")
	}
	top, err := os.MkdirTemp("", "pgthaw-home") // t.TempDir is closed to others
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(top)
	home, roots := filepath.Join(top, "home"), filepath.Join(top, "roots")
	err = errors.Join(os.Chmod(top, 0o755), os.Mkdir(home, 0o755), os.Chown(home, someUser, someUser), os.Mkdir(roots, 0o755),
		os.Symlink(roots, filepath.Join(home, ".config")))
	if err != nil {
		t.Fatal(err)
	}
	h := keyHome{dir: keysIn(filepath.Join(home, ".config")), uid: someUser, gid: someUser}
	p := repo.Place{URL: "file:///r", ID: "0123456789abcdef0123456789abcdef", UID: someUser}
	if path, _, err := h.make(p); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("root makes %s where the user may not: %v", path, err)
	}
	if left, err := os.ReadDir(roots); err != nil || len(left) > 0 {
		t.Errorf("there is %v, %v", left, err)
	}

	if err := os.Remove(filepath.Join(home, ".config")); err != nil {
		t.Fatal(err)
	}
	path, want, err := h.make(p)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 || ownerID(info) != someUser {
		t.Errorf("%v, %v", info, err)
	}
	if got, err := h.read(p.ID); err != nil || string(got) != string(want) {
		t.Errorf("read: %q, %v", got, err)
	}
	if got := h.keyMadeAt(p.URL); got != path {
		t.Errorf("the key made at %s is %q", p.URL, got)
	}

	secret := filepath.Join(roots, "secret")
	err = errors.Join(h.remove(path), os.WriteFile(secret, want, 0o600), os.Symlink(secret, path))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.read(p.ID); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("root reads for the user what only root may read: %v", err)
	}
	if got := h.keyMadeAt(p.URL); got != "" {
		t.Errorf("the key made at %s is %q", p.URL, got)
	}
}

// TestOwnHome: HOME is believed if it is the user's own.
func TestOwnHome(t *testing.T) {
	own := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Setenv("HOME", own)
	if got, want := ownHome().dir, filepath.Join(own, ".config", "pgthaw", "keys"); got != want {
		t.Errorf("HOME leads to %s, want %s", got, want)
	}
	t.Setenv("XDG_CONFIG_HOME", filepath.Join(own, "c"))
	if got, want := ownHome().dir, filepath.Join(own, "c", "pgthaw", "keys"); got != want {
		t.Errorf("XDG_CONFIG_HOME leads to %s, want %s", got, want)
	}
	t.Setenv("XDG_CONFIG_HOME", "c")
	for _, home := range []string{"", "relative", filepath.Join(own, "absent")} {
		t.Setenv("HOME", home)
		if got := ownHome(); got.dir != homeOf(os.Geteuid()).dir {
			t.Errorf("HOME=%s leads to %+v", home, got)
		}
	}
	if os.Geteuid() == 0 {
		t.Setenv("HOME", own)
		if err := os.Chown(own, someUser, someUser); err != nil {
			t.Fatal(err)
		}
		if got := ownHome(); got.dir != homeOf(0).dir {
			t.Errorf("somebody else's HOME leads to %+v", got)
		}
	}
}
