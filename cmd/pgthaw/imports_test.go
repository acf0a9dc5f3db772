package main

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "pgthaw/"

// arrows are all the imports that our packages may make of each other.
// Who is not named here may not exist: a room is added by drawing its arrows.
var arrows = map[string][]string{
	"cmd/pgthaw":    {"ingest", "recovery", "fusefs", "repo", "repo/pg"},
	"ingest":        {"repo", "repo/pg"},
	"recovery":      {"fusefs", "repo", "repo/pg"},
	"fusefs":        {"repo"},
	"repo":          {"repo/store", "repo/pg", "repo/pagehash"},
	"repo/store":    {},
	"repo/pg":       {},
	"repo/pagehash": {},
	"integration":   {}, // drives the built binary
}

// testArrows are the leaves that the tests of every room but integration may also use: the in-memory store is
// the project's only fake.
var testArrows = []string{"repo/store", "repo/pg"}

// outsiders are libraries that one room keeps to itself, and who else's tests may import them: a disk that loses power, or is
// slow, is a FUSE file system.
var outsiders = map[string][]string{"github.com/hanwen/go-fuse/": {"fusefs", "fusefs (test)", "repo (test)", "integration (test)"}}

func TestImportsFollowTheArrows(t *testing.T) {
	for _, p := range ourPackages(t) {
		allowed, drawn := arrows[p.room]
		if !drawn {
			t.Errorf("package %s: no arrows are drawn for it", p.room)
			continue
		}
		checkImports(t, p.room, p.imports, allowed)
		if p.room != "integration" {
			allowed = slices.Concat(allowed, testArrows)
		}
		checkImports(t, p.room+" (test)", p.testImports, allowed, p.room)
	}
}

// checkImports fails on every import of ours that is neither in allowed nor the package itself, and on
// every outsider that belongs to another room.
func checkImports(t *testing.T, importer string, imports, allowed []string, self ...string) {
	t.Helper()
	for _, path := range imports {
		room, ours := strings.CutPrefix(path, module)
		if ours && !slices.Contains(allowed, room) && !slices.Contains(self, room) {
			t.Errorf("%s imports %s: no arrow goes that way", importer, room)
		}
		for prefix, owners := range outsiders {
			if strings.HasPrefix(path, prefix) && !slices.Contains(owners, importer) {
				t.Errorf("%s imports %s: only %q may", importer, path, owners)
			}
		}
	}
}

// goPackage is one line of go list.
type goPackage struct {
	room        string // import path within the module
	imports     []string
	testImports []string // of its test files, in the package or beside it
}

func ourPackages(t *testing.T) []goPackage {
	t.Helper()
	format := `{{.ImportPath}}|{{join .Imports " "}}|{{join .TestImports " "}} {{join .XTestImports " "}}`
	out, err := exec.Command("go", "list", "-f", format, module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v%s", err, stderrOf(err))
	}
	var all []goPackage
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), "|")
		all = append(all, goPackage{
			room:        strings.TrimPrefix(f[0], module),
			imports:     strings.Fields(f[1]),
			testImports: strings.Fields(f[2]),
		})
	}
	return all
}

func stderrOf(err error) string {
	if exit, ok := err.(*exec.ExitError); ok {
		return fmt.Sprintf(": %s", exit.Stderr)
	}
	return ""
}
