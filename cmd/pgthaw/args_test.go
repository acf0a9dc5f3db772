package main

import (
	"io"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func TestFlagsMayStandAnywhere(t *testing.T) {
	for _, tt := range []struct{ line, want, command string }{
		{"list", "list --", "list"},
		{"restore main latest --target D --start", "restore --target D --start -- main latest", "restore"},
		{"restore --target=D main --to-lsn 0/1 latest", "restore --target=D --to-lsn 0/1 -- main latest", "restore"},
		{"list main --json --repo R", "--json --repo R list -- main", "list"},
		{"--repo R repo init --json", "--repo R --json repo init --", "repo init"},
		{"wal --repo R fetch main -- --odd -- P", "--repo R wal fetch -- main --odd -- P", "wal fetch"},
		{"wal fetch main list help", "wal fetch -- main list help", "wal fetch"},
		{"show list help", "show -- list help", "show"},
		{"restore --help --repo R", "--repo R restore --help --", "restore"},
		{"restore a b --nonsense x", "restore --nonsense -- a b x", "restore"},
		{"backup main --repo", "--repo backup -- main", "backup"},
		{"nonsense list", "-- nonsense list", ""},
		{"", "--", ""},
		{"-", "-- -", ""},
	} {
		t.Run(tt.line, func(t *testing.T) {
			ordered, command := arrange(newApp(io.Discard, io.Discard), append([]string{"pgthaw"}, strings.Fields(tt.line)...))
			if got := strings.Join(ordered[1:], " "); got != tt.want || command != tt.command {
				t.Errorf("got %q (command %q), want %q (%q)", got, command, tt.want, tt.command)
			}
		})
	}
}

// A flag that a command and the whole program both had would be taken from one of them.
func TestNoCommandHasAGlobalFlag(t *testing.T) {
	app := newApp(io.Discard, io.Discard)
	forEachCommand(app, func(name string, c *cli.Command) {
		for _, f := range c.Flags {
			if findFlag(app.Flags, f.Names()[0]) != nil {
				t.Errorf("%s: --%s is a global flag, too", name, f.Names()[0])
			}
		}
	})
}
