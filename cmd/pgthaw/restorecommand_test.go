package main

import (
	"os/exec"
	"strings"
	"testing"
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
	for overlay, want := range map[string]string{
		"":           ` --repo 'file:///50%%25/r' wal fetch main "%f" "%p"`,
		"/data/50%a": ` --repo 'file:///50%%25/r' wal fetch --overlay '/data/50%%a' main "%f" "%p"`,
	} {
		got, err := restoreCommandFor("file:///50%25/r", "main", overlay)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(got, want) || !strings.HasPrefix(got, "/") {
			t.Errorf("got %s, want an absolute path and%s", got, want)
		}
	}
}
