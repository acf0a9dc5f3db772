package ingest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestMain(m *testing.M) {
	code := m.Run()
	for _, dir := range templates.dirs {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// templates are data directories as initdb makes them, by installation and options, of which tests get copies.
var templates = struct {
	sync.Mutex
	dirs map[string]string
}{dirs: make(map[string]string)}

// initdb makes the cluster. Clusters of the same options have one system identifier.
func (s *testServer) initdb(options ...string) {
	s.t.Helper()
	if out, err := exec.Command("cp", "-a", s.template(options), s.data).CombinedOutput(); err != nil {
		s.t.Fatalf("cp: %v\n%s", err, out)
	}
}

func (s *testServer) template(options []string) string {
	s.t.Helper()
	templates.Lock()
	defer templates.Unlock()
	key := fmt.Sprint(s.bin, options)
	if templates.dirs[key] == "" {
		dir, err := os.MkdirTemp("", "pgthaw-initdb")
		if err != nil {
			s.t.Fatal(err)
		}
		templates.dirs[key] = dir
		s.own(dir)
		data := filepath.Join(dir, "data")
		s.run("initdb", append([]string{"-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"}, options...)...)
		s.dropTemplates(data)
	}
	return filepath.Join(templates.dirs[key], "data")
}

// dropTemplates drops the databases that tests have no use for: two thirds of a cluster's files are theirs.
func (s *testServer) dropTemplates(data string) {
	s.t.Helper()
	cmd := s.command("postgres", "--single", "-F", "-D", data, "postgres")
	cmd.Stdin = strings.NewReader("update pg_database set datistemplate = false\ndrop database template0\ndrop database template1\n")
	out, err := cmd.CombinedOutput()
	if left, _ := filepath.Glob(filepath.Join(data, "base", "*")); err != nil || len(left) != 1 {
		s.t.Fatalf("%v, left %q\n%s", err, left, out)
	}
}
