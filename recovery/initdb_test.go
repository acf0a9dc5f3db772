package recovery

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// templates are data directories as initdb makes them, by installation, of which tests get copies.
var templates = struct {
	sync.Mutex
	dirs map[string]string
}{dirs: make(map[string]string)}

func removeTemplates() {
	for _, dir := range templates.dirs {
		os.RemoveAll(dir)
	}
}

// initdb makes the cluster. All of one installation have one system identifier.
func (s *source) initdb() {
	s.t.Helper()
	if out, err := exec.Command("cp", "-a", s.template(), s.data).CombinedOutput(); err != nil {
		s.t.Fatalf("cp: %v\n%s", err, out)
	}
}

func (s *source) template() string {
	s.t.Helper()
	templates.Lock()
	defer templates.Unlock()
	if templates.dirs[s.bin] == "" {
		dir, err := os.MkdirTemp("", "pgthaw-initdb")
		if err != nil {
			s.t.Fatal(err)
		}
		templates.dirs[s.bin] = dir
		own(s.t, dir)
		data := filepath.Join(dir, "data")
		s.run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C", "-k", "--wal-segsize=1")
		s.dropTemplates(data)
	}
	return filepath.Join(templates.dirs[s.bin], "data")
}

// dropTemplates drops the databases that tests have no use for: two thirds of a cluster's files are theirs.
func (s *source) dropTemplates(data string) {
	s.t.Helper()
	cmd := s.command("postgres", "--single", "-F", "-D", data, "postgres")
	cmd.Stdin = strings.NewReader("update pg_database set datistemplate = false\ndrop database template0\ndrop database template1\n")
	out, err := cmd.CombinedOutput()
	if left, _ := filepath.Glob(filepath.Join(data, "base", "*")); err != nil || len(left) != 1 {
		s.t.Fatalf("%v, left %q\n%s", err, left, out)
	}
}
