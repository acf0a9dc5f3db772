package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// arrange orders a command line as urfave/cli reads it: global flags, command, its flags, "--", positional arguments.
// cli stops looking for flags at the first positional argument; here they may stand anywhere before a "--".
// command is the command's full name, "wal fetch", as far as the line names one.
func arrange(app *cli.App, argv []string) (ordered []string, command string) {
	app.Setup() // adds help and version
	l := line{globals: app.Flags, commands: app.Commands}
	rest := argv[1:]
	for len(rest) > 0 && rest[0] != "--" {
		rest = l.take(rest)
	}
	if len(rest) > 0 {
		l.positional = append(l.positional, rest[1:]...)
	}
	ordered = slices.Concat(argv[:1], l.globalArgs, l.path, l.localArgs, []string{"--"}, l.positional)
	return ordered, strings.Join(l.path, " ")
}

// line is a command line taken apart.
type line struct {
	globals, locals []cli.Flag     // that may be met
	commands        []*cli.Command // that may be named next

	globalArgs, localArgs, path, positional []string
}

// take consumes one flag with its value, one command name or one positional argument.
func (l *line) take(args []string) (rest []string) {
	a := args[0]
	if len(a) > 1 && a[0] == '-' {
		return l.takeFlag(args)
	}
	for _, c := range l.commands {
		if c.HasName(a) && len(l.positional) == 0 {
			l.path = append(l.path, a)
			l.locals, l.commands = c.Flags, c.Subcommands
			return args[1:]
		}
	}
	l.positional = append(l.positional, a)
	return args[1:]
}

// takeFlag consumes a flag. One that nobody knows goes to the command, where cli refuses it by name.
func (l *line) takeFlag(args []string) (rest []string) {
	name, _, hasValue := strings.Cut(strings.TrimLeft(args[0], "-"), "=")
	n := 1
	known := findFlag(l.locals, name)
	into := &l.localArgs
	if known == nil && !slices.Contains(cli.HelpFlag.Names(), name) {
		if known = findFlag(l.globals, name); known != nil {
			into = &l.globalArgs
		}
	}
	if known != nil && takesValue(known) && !hasValue && len(args) > 1 {
		n = 2
	}
	*into = append(*into, args[:n]...)
	return args[n:]
}

func findFlag(flags []cli.Flag, name string) cli.Flag {
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

func takesValue(f cli.Flag) bool {
	d, ok := f.(cli.DocGenerationFlag)
	return ok && d.TakesValue()
}
