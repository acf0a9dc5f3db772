package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
)

const cliPage = "../../docs/cli.md"

var update = flag.Bool("update", false, "write what is generated of "+cliPage)

// The page's parts between these two lines are the program's own tables. Everything else is written by hand.
var generated = regexp.MustCompile(`(?s)<!-- from the program: ([a-z -]+) -->\n(.*?)<!-- end -->\n`)

func TestCommandLinePage(t *testing.T) {
	page, err := os.ReadFile(cliPage)
	if err != nil {
		t.Fatal(err)
	}
	want := pageParts()
	fresh := generated.ReplaceAllStringFunc(string(page), func(part string) string {
		m := generated.FindStringSubmatch(part)
		text, known := want[m[1]]
		if !known {
			t.Errorf("the page has a part %q, and the program has nothing of that name", m[1])
			return part
		}
		delete(want, m[1])
		if m[2] != text && !*update {
			t.Errorf("%s differs; go test -update writes it. The page has\n%sthe program\n%s", m[1], m[2], text)
		}
		return "<!-- from the program: " + m[1] + " -->\n" + text + "<!-- end -->\n"
	})
	for name := range want {
		t.Errorf("the page has no part %q", name)
	}
	if *update {
		if err := os.WriteFile(cliPage, []byte(fresh), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// pageParts are the generated parts of the page by name.
func pageParts() map[string]string {
	app := newApp(io.Discard, io.Discard)
	parts := map[string]string{
		"global flags": flagTable(app.Flags),
		"settings":     settingTable(app),
		"exit codes":   exitTable(),
	}
	forEachCommand(app, func(name string, c *cli.Command) {
		if !c.Hidden && len(c.Subcommands) == 0 {
			parts[name] = fmt.Sprintf("    pgthaw %s\n\n%s.\n\n%s\n%s", strings.TrimSpace(name+" "+c.ArgsUsage),
				strings.ToUpper(c.Usage[:1])+c.Usage[1:], strings.ReplaceAll(c.Description, "<", "&lt;")+"\n", flagTable(c.Flags))
		}
	})
	return parts
}

func flagTable(flags []cli.Flag) string {
	var b strings.Builder
	for _, f := range flags {
		d := f.(cli.DocGenerationFlag)
		if v, ok := f.(cli.VisibleFlag); !ok || !v.IsVisible() {
			continue
		}
		name, usage := "--"+f.Names()[0], d.GetUsage()
		if _, after, ok := strings.Cut(usage, "`"); ok {
			placeholder, _, _ := strings.Cut(after, "`")
			name += " " + placeholder
		}
		if def := d.GetDefaultText(); def != "" && d.TakesValue() {
			usage += " (default: " + def + ")"
		}
		fmt.Fprintf(&b, "| `%s` | %s |\n", name, strings.ReplaceAll(strings.ReplaceAll(usage, "`", ""), "|", `\|`))
	}
	if b.Len() == 0 {
		return ""
	}
	return "| Flag | |\n|---|---|\n" + b.String() + "\n"
}

func settingTable(app *cli.App) string {
	var b strings.Builder
	all := settings(app)
	b.WriteString("| Flag | Environment | Key in the file |\n|---|---|---|\n| `--config` | `PGTHAW_CONFIG` | |\n")
	var names []string
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(&b, "| `--%s` | `%s` | `%s` |\n", name, variable(name), name)
	}
	return b.String() + "\n"
}

func exitTable() string {
	var b strings.Builder
	b.WriteString("| Exit | Meaning |\n|---|---|\n")
	for _, e := range exits {
		unused := ""
		if e.is == nil && e.code > exitFailed {
			unused = " (no command of this version gives it)"
		}
		fmt.Fprintf(&b, "| %d | %s%s |\n", e.code, e.meaning, unused)
	}
	return b.String() + "\n"
}

// Every command's codes are of the table.
func TestCommandsExitWithCodesOfTheTable(t *testing.T) {
	app := newApp(io.Discard, io.Discard)
	names := map[string]bool{"wal fetch": true}
	forEachCommand(app, func(name string, c *cli.Command) {
		if _, known := commandExits[name]; len(c.Subcommands) == 0 && !known && name != "wal fetch" {
			t.Errorf("%s has no exit codes", name)
		}
		names[name] = true
	})
	for name, codes := range commandExits {
		if !names[name] {
			t.Errorf("there is no command %q", name)
		}
		for _, code := range codes {
			if !slices.ContainsFunc(exits, func(e exit) bool { return e.code == code && e.is != nil }) {
				t.Errorf("%s: exit code %d is not in the table", name, code)
			}
		}
	}
}

// What --json writes is documented, every field.
func TestJSONFieldsAreOnThePage(t *testing.T) {
	page, err := os.ReadFile(cliPage)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []any{listed{}, recovery.Window{}, recovery.Point{}, checkJSON{}, findingJSON{}, affectedJSON{}, lostJSON{},
		infoJSON{}, packsJSON{}, clusterInfoJSON{}, backupInfoJSON{}, acceptJSON{}, walListing{}, walRun{}, keyJSON{}, madeJSON{},
		pruneJSON{}, decisionJSON{}, givenUpJSON{}, walRangeJSON{}, walSparedJSON{}, holdJSON{},
		recovery.Result{}, recovery.RecoveryEnd{}, recovery.OverlayStatus{}} {
		typ := reflect.TypeOf(v)
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if name != "" && !strings.Contains(string(page), "`"+name+"`") {
				t.Errorf("%s.%s: `%s` is not on the page", typ, typ.Field(i).Name, name)
			}
		}
	}
}
