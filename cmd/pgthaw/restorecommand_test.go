package main

import (
	"flag"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func TestShellQuote(t *testing.T) {
	for _, word := range []string{"main", "", "a b", "it's", "$HOME", "`id`", `\`, "file:///a/b", "é", "a;b", "--x=~", "50%"} {
		out, err := exec.Command("sh", "-c", "printf %s "+shellQuote(word)).Output()
		if err != nil || string(out) != word {
			t.Errorf("%q is quoted %s, which sh reads as %q (%v)", word, shellQuote(word), out, err)
		}
	}
	if got := shellQuote("file:///var/backups/pgthaw"); got != "file:///var/backups/pgthaw" {
		t.Errorf("quoted without need: %s", got)
	}
}

func TestRestoreCommandDoublesPercentSigns(t *testing.T) {
	app := newApp(io.Discard, io.Discard)
	set := flag.NewFlagSet("", flag.ContinueOnError)
	for _, f := range app.Flags {
		if err := f.Apply(set); err != nil {
			t.Fatal(err)
		}
	}
	if err := set.Parse([]string{"--key-file", "/etc/a key", "--passphrase-file", "/etc/50%"}); err != nil {
		t.Fatal(err)
	}
	c := cli.NewContext(app, set, nil)
	const keys = ` --key-file '/etc/a key' --passphrase-file '/etc/50%%'`
	for overlay, want := range map[string]string{
		"":           ` --repo 'file:///50%%25/r'` + keys + ` wal fetch main "%f" "%p"`,
		"/data/50%a": ` --repo 'file:///50%%25/r'` + keys + ` wal fetch --overlay '/data/50%%a' main "%f" "%p"`,
	} {
		got, err := restoreCommandFor(c, "file:///50%25/r", "main", overlay)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(got, want) || !strings.HasPrefix(got, "/") {
			t.Errorf("got %s, want an absolute path and%s", got, want)
		}
	}
}
