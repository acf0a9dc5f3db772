package recovery

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestCopyElsewhere: what a cluster has outside of its data directory need not be where its copy is.
func TestCopyElsewhere(t *testing.T) {
	long(t)
	top := place(t)
	etc, log := filepath.Join(top, "etc"), filepath.Join(top, "log")
	for _, dir := range []string{etc, log} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		own(t, dir)
	}
	cert, key := filepath.Join(etc, "cert.pem"), filepath.Join(etc, "key.pem")
	makeCertificate(t, cert, key)
	s := newSource(t, "ssl = on", "ssl_cert_file = '"+cert+"'", "ssl_key_file = '"+key+"'",
		"logging_collector = on", "log_directory = '"+log+"'")
	s.sql("alter system set hba_file = '" + etc + "/pg_hba.conf'") // in the file, and never in force
	s.backup()
	s.push()
	before := names(t, log)

	copies := place(t)
	restored := func(name string) (res Result, warned string) {
		t.Helper()
		var text bytes.Buffer
		o := s.options(filepath.Join(copies, name))
		o.Log = slog.New(slog.NewTextHandler(&text, &slog.HandlerOptions{Level: slog.LevelWarn}))
		res, err := Restore(t.Context(), s.repo, o)
		t.Cleanup(func() { endServer(t, res) })
		if err != nil {
			t.Fatal(err)
		}
		return res, text.String()
	}
	with, warned := restored("with")
	if on := copySQL(t, with, "show ssl"); on != "on" || warned != "" {
		t.Errorf("with its certificate, ssl is %s; %s", on, warned)
	}
	if got := copySQL(t, with, "show log_directory"); got != "log" {
		t.Errorf("log_directory is %s", got)
	}
	if got := copySQL(t, with, "show hba_file"); got != filepath.Join(with.Target, hbaFile) {
		t.Errorf("hba_file is %s", got)
	}
	for i, gone := range []string{key, cert} {
		if err := os.Remove(gone); err != nil {
			t.Fatal(err)
		}
		without, warned := restored("without" + string(rune('0'+i)))
		if on := copySQL(t, without, "show ssl"); on != "off" || !strings.Contains(warned, gone) {
			t.Errorf("without %s, ssl is %s; warned %q", gone, on, warned)
		}
	}
	if after := names(t, log); !slices.Equal(before, after) {
		t.Errorf("the copies wrote into the original's logs: %q, before %q", after, before)
	}
}

// TestUnreadableKey: a key that the server's user may not read is none.
func TestUnreadableKey(t *testing.T) {
	long(t)
	if postgresUser(t) == nil {
		t.Skip("needs root, to have a key that the server's user may not read")
	}
	cert, key := filepath.Join(place(t), "cert.pem"), filepath.Join(place(t), "key.pem")
	makeCertificate(t, cert, key)
	s := newSource(t, "ssl = on", "ssl_cert_file = '"+cert+"'", "ssl_key_file = '"+key+"'")
	s.backup()
	s.push()
	if err := os.Lchown(key, 0, 0); err != nil {
		t.Fatal(err)
	}
	res, err := Restore(t.Context(), s.repo, s.options(filepath.Join(place(t), "copy")))
	t.Cleanup(func() { endServer(t, res) })
	if err != nil {
		t.Fatal(err)
	}
	if on := copySQL(t, res, "show ssl"); on != "off" {
		t.Errorf("ssl is %s", on)
	}
}

func makeCertificate(t *testing.T, cert, key string) {
	t.Helper()
	out, err := exec.Command("openssl", "req", "-new", "-x509", "-nodes", "-subj", "/CN=localhost", "-days", "1",
		"-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", cert, "-keyout", key).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl: %v\n%s", err, out)
	}
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	own(t, cert, key)
}

func names(t *testing.T, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// TestMissingLibrary: without a library of shared_preload_libraries no server starts, which is said before anything is written.
func TestMissingLibrary(t *testing.T) {
	s := newSource(t)
	s.configure(`shared_preload_libraries = 'auto_explain, "$libdir/nosuch"'`) // it is not restarted
	s.backup()
	s.push()
	dir := filepath.Join(place(t), "copy")
	res, err := Restore(t.Context(), s.repo, s.options(dir))
	endServer(t, res)
	var h interface{ Hint() string }
	if !errors.Is(err, ErrServer) || !strings.Contains(err.Error(), "nosuch") || strings.Contains(err.Error(), "auto_explain") ||
		!errors.As(err, &h) || !strings.Contains(h.Hint(), "shared_preload_libraries") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s was made: %v", dir, err)
	}
}
