package integration

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// documented is a command line of a page and how it is run.
type documented struct {
	line   string            // as the page has it
	before string            // what has to be done first, in the same shell
	under  string            // what runs the line
	with   map[string]string // what stands for its words in capitals, besides CLUSTER, BACKUP and URL; or for a path
	and    string            // flags that the line leaves out, and where its output goes
}

// commandLine is a line of an indented block, a command in the text, or one that a setting holds.
var commandLine = regexp.MustCompile("(?m)^    (\\S.*)$|`(pgthaw [a-z][^`]*)`|'(pgthaw [^']+)'")

// commandLines are those of a page, in its order.
func commandLines(t *testing.T, page string) (lines []string) {
	t.Helper()
	text, err := os.ReadFile("../docs/" + page)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range commandLine.FindAllStringSubmatch(string(text), -1) {
		lines = append(lines, m[1]+m[2]+m[3])
	}
	return lines
}

var placeholder = regexp.MustCompile(`\[?\b[A-Z]{2,}\b\]?`)

// script is what is typed for a line.
func (d documented) script(t *testing.T) string {
	t.Helper()
	line := placeholder.ReplaceAllStringFunc(d.line, func(word string) string {
		word = strings.Trim(word, "[]")
		values := map[string]string{"CLUSTER": "main", "BACKUP": "latest", "URL": "$PGTHAW_REPO"}
		for name, value := range d.with {
			values[name] = value
		}
		value, known := values[word]
		if !known {
			t.Errorf("%s: nothing stands for %s", d.line, word)
		}
		return value
	})
	for name, value := range d.with {
		line = strings.ReplaceAll(line, name, value)
	}
	return fmt.Sprintf("%s\n%s %s %s", d.before, d.under, line, d.and)
}

// runPage runs all command lines of a page, which have to be those of the table, in a home directory of their own.
func runPage(t *testing.T, page string, table []documented) {
	t.Helper()
	var want []string
	for _, d := range table {
		want = append(want, d.line)
	}
	if got := commandLines(t, page); !slices.Equal(got, want) {
		t.Fatalf("docs/%s has the command lines\n%s\nbut the test runs\n%s", page, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	c := newCluster(t, postgresql(t, 15), clusterOptions{pgbenchScale: 1})
	home := postgresDir(t)
	t.Cleanup(func() { // a step that failed may leave its mount
		for _, point := range mountsBelow(home) {
			unmount(point)
		}
	})
	env := []string{"PGDATA=" + c.data, "PGTHAW_REPO=" + home + "/repo"}
	for _, d := range table {
		if out, code := typed(t, c, home, d.script(t), env...); code != 0 {
			t.Fatalf("%s\nended with exit code %d:\n%s", d.script(t), code, out)
		}
	}
}

// thawAgain thaws to a directory that nothing fills.
func thawAgain(dir string) string {
	return "pgthaw thaw main latest --target " + dir + " --hydrate off"
}

// newSegment ends a segment of WAL, and names it.
const newSegment = `segment=$(psql -Atc "SELECT pg_walfile_name(pg_current_wal_lsn())"); psql -c "SELECT pg_switch_wal()"`

// TestCommandLinePageRuns runs every command of docs/cli.md, as the page has it.
func TestCommandLinePageRuns(t *testing.T) {
	t.Parallel()
	const anySegment = `segment=$(pgthaw wal list main --json | grep -m 1 '"first"' | cut -d '"' -f 4)`
	runPage(t, "cli.md", []documented{
		{line: "pgthaw list", before: "pgthaw repo init ~/first; export PGTHAW_REPO=~/first"},
		{line: "pgthaw repo init [URL]"},
		{line: "pgthaw repo info"},
		{line: "pgthaw repo check"},
		{line: "pgthaw repo give-up OBJECT", and: "--yes", with: map[string]string{"OBJECT": "sessions/0123456789abcdef.begun"},
			before: "mkdir -p ~/repo/sessions; echo > ~/repo/sessions/0123456789abcdef.begun; touch -d '3 days ago' ~/repo/sessions/0123456789abcdef.begun"},
		{line: "pgthaw repo accept"},
		{line: "pgthaw repo copy DESTINATION [CLUSTER...]", before: "pgthaw repo init ~/copy",
			with: map[string]string{"DESTINATION": "~/copy", "CLUSTER": "", "...]": ""}},
		{line: "pgthaw repo prune [CLUSTER...]", before: "pgthaw backup main", with: map[string]string{"...]": ""}},
		{line: "pgthaw repo hold add CLUSTER BACKUP", and: "--reason 'a test'"},
		{line: "pgthaw repo hold list [CLUSTER]"},
		{line: "pgthaw repo hold remove ID", with: map[string]string{"ID": `"$id"`},
			before: `id=$(pgthaw repo hold list --json | grep '"id"' | cut -d '"' -f 4)`},
		{line: "pgthaw repo key list"},
		{line: "pgthaw repo key add", before: "echo many a word > ~/passphrase", and: "--new-passphrase-file ~/passphrase --label people"},
		{line: "pgthaw repo key remove ID", with: map[string]string{"ID": `"$id"`},
			before: `id=$(pgthaw repo key list --json | grep -B 3 '"people"' | grep '"id"' | cut -d '"' -f 4)`},
		{line: "pgthaw repo key export", and: "> ~/sheet"},
		{line: "pgthaw backup CLUSTER"},
		{line: "pgthaw boot-image CLUSTER [BACKUP]"},
		{line: "pgthaw list [CLUSTER]"},
		{line: "pgthaw show CLUSTER BACKUP"},
		{line: "pgthaw mount DIR", before: "mkdir ~/mount", with: map[string]string{"DIR": "~/mount"}},
		{line: "pgthaw umount DIR", with: map[string]string{"DIR": "~/mount"}},
		{line: "pgthaw thaw CLUSTER BACKUP", and: "--target ~/thawed --hydrate off"},
		{line: "pgthaw restore CLUSTER BACKUP", and: "--target ~/restored"},
		{line: "pgthaw overlay status DIR", with: map[string]string{"DIR": "~/thawed"}},
		{line: "pgthaw overlay resume DIR", with: map[string]string{"DIR": "~/thawed"}},
		{line: "pgthaw overlay finish DIR", with: map[string]string{"DIR": "~/thawed"}},
		{line: "pgthaw overlay discard DIR", before: thawAgain("~/again"), with: map[string]string{"DIR": "~/again"}},
		{line: "pgthaw wal stream CLUSTER", under: "timeout --preserve-status --signal INT 5", and: "--create-slot"},
		{line: "pgthaw wal push CLUSTER PATH", before: newSegment, with: map[string]string{"PATH": "$PGDATA/pg_wal/$segment"}},
		{line: `pgthaw --repo URL wal push CLUSTER "%p"`, before: newSegment, with: map[string]string{"%p": "$PGDATA/pg_wal/$segment"}},
		{line: "pgthaw wal fetch CLUSTER FILE PATH", before: anySegment, with: map[string]string{"FILE": "$segment", "PATH": "~/fetched"}},
		{line: `pgthaw --repo URL wal fetch CLUSTER "%f" "%p"`, before: anySegment, with: map[string]string{"%f": "$segment", "%p": "again"}},
		{line: "pgthaw wal list CLUSTER"},
	})
}

// TestOperationsPageRuns runs every command of docs/operations.md, as the page has it.
func TestOperationsPageRuns(t *testing.T) {
	t.Parallel()
	const killDaemon = `; kill -9 $(pgthaw overlay status ~/data --json | grep '"pid"' | tr -dc 0-9)`
	data := map[string]string{"DIR": "~/data"}
	elsewhere := map[string]string{"URL": "~/elsewhere", "/etc/pgthaw/elsewhere.key": "~/elsewhere.key"}
	start := "-l ~/log -o '-k /tmp -c listen_addresses= -p " + strconv.Itoa(freePort(t)) + "'"
	runPage(t, "operations.md", []documented{
		{line: "pgthaw repo init URL"},
		{line: "pgthaw repo key export", and: "> ~/sheet"},
		{line: "pgthaw repo init --key-file FILE URL", with: map[string]string{"FILE": "~/key", "URL": "~/another"}},
		{line: "pgthaw repo key add", before: "echo many a word > ~/passphrase", and: "--new-passphrase-file ~/passphrase"},
		{line: "pgthaw wal list CLUSTER", before: "pgthaw backup main"},
		{line: "pgthaw backup CLUSTER --boot-image"},
		{line: "pgthaw boot-image CLUSTER"},
		{line: "pgthaw boot-image CLUSTER --refresh"},
		{line: "pgthaw list"},
		{line: "pgthaw overlay resume DIR", before: thawAgain("~/data") + killDaemon, with: data},
		{line: "pg_ctl start -D DIR", with: data, and: start},
		{line: "pgthaw repo prune --keep-window 14d --keep-weekly 8 --keep-monthly 12"},
		{line: "pgthaw repo prune --keep-window 14d --keep-weekly 8 --keep-monthly 12 --yes"},
		{line: `pgthaw repo hold add CLUSTER BACKUP --reason "before the migration" --until "2027-01-01 00:00"`, with: map[string]string{"2027": "2099"}},
		{line: "pgthaw repo check"},
		{line: "pgthaw repo check --read-data=5%", before: "pg_ctl stop -D ~/data; pgthaw overlay discard ~/data"},
		{line: "pgthaw repo check --read-data"},
		{line: "pgthaw repo check"},
		{line: "pgthaw repo accept"},
		{line: "pgthaw repo check --read-data --repair"},
		{line: "pgthaw backup CLUSTER"},
		{line: "pgthaw backup CLUSTER"},
		{line: "pgthaw wal push", before: newSegment, and: "main $PGDATA/pg_wal/$segment"},
		{line: "pgthaw repo init --key-file /etc/pgthaw/elsewhere.key URL", with: elsewhere},
		{line: "pgthaw repo copy URL --to-key-file /etc/pgthaw/elsewhere.key", with: elsewhere},
		{line: "pgthaw repo info"},
	})
}
