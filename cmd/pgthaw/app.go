package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/urfave/cli/v2"
)

// version is set by the linker for a release.
var version = "0.1.0-dev"

// newApp builds the commands afresh: cli keeps what it parsed in them.
func newApp(stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:      "pgthaw",
		Usage:     "back up PostgreSQL, and open any backup as a writable data directory in about a second",
		Version:   version,
		Writer:    stdout,
		ErrWriter: stderr,
		Flags:     globalFlags(),
		Before:    applyConfig,
		Action:    noCommand,
		Commands: []*cli.Command{
			repoCommand(), backupCommand(), bootImageCommand(), listCommand(), showCommand(),
			mountCommand(), umountCommand(), thawCommand(), overlayCommand(), restoreCommand(), walCommand(),
		},
		DisableSliceFlagSeparator: true,                         // a tablespace's path may hold a comma
		ExitErrHandler:            func(*cli.Context, error) {}, // run decides
		OnUsageError:              usageError,
	}
	forEachCommand(app, func(name string, c *cli.Command) {
		c.OnUsageError = usageError
		if len(c.Subcommands) > 0 {
			c.Action = noCommand
			return
		}
		c.HideHelpCommand = true // a cluster may be called help
		c.Description = strings.TrimSpace(c.Description + "\n\nExit codes: " + exitCodes(name) + ".")
	})
	return app
}

func globalFlags() []cli.Flag {
	return []cli.Flag{
		setting("repo", "`URL` of the repository: a path or file:///path"),
		setting("config", "read settings from `FILE`, which a flag or an environment variable overrides"),
		setting(keyFileFlag, "`FILE` with a key of the repository: an age identity, or an SSH private key"),
		setting(passphraseFlag, "`FILE` whose first line is a passphrase of the repository"),
		toggle("json", "write the result as one JSON document"),
		switchSetting("verbose", "log what is done to stderr"),
		switchSetting("trace", "log every operation to stderr"),
	}
}

// forEachCommand visits all commands with their full names, groups first.
func forEachCommand(app *cli.App, visit func(name string, c *cli.Command)) {
	var walk func(prefix string, commands []*cli.Command)
	walk = func(prefix string, commands []*cli.Command) {
		for _, c := range commands {
			visit(prefix+c.Name, c)
			walk(prefix+c.Name+" ", c.Subcommands)
		}
	}
	walk("", app.Commands)
}

func usageError(_ *cli.Context, err error, _ bool) error { return usage("%w", err) }

// noCommand answers a line that names no command, or one that is not there.
func noCommand(c *cli.Context) error {
	problem := "no command is given"
	if c.NArg() > 0 {
		group := strings.TrimPrefix(c.Command.HelpName, c.App.Name)
		problem = fmt.Sprintf("there is no command %q", strings.TrimSpace(group+" "+c.Args().First()))
	}
	return &failure{err: errors.New(problem), code: exitUsage, hint: "Commands are: " + commandNames(c.Command) + "."}
}

func commandNames(c *cli.Command) string {
	var names []string
	for _, sub := range c.VisibleCommands() {
		names = append(names, sub.Name)
	}
	return strings.Join(names, ", ")
}

// arguments returns the positional arguments, of which there must be as many as names.
func arguments(c *cli.Context, names ...string) ([]string, error) {
	given := c.Args().Slice()
	if len(given) > len(names) {
		return nil, usage("unexpected argument %q", given[len(names)])
	}
	if len(given) < len(names) {
		return nil, usage("%s is missing", names[len(given)])
	}
	return given, nil
}

// logger writes to stderr: warnings, with --verbose events, with --trace every operation.
func logger(c *cli.Context) *slog.Logger {
	level := slog.LevelWarn
	if c.Bool("verbose") {
		level = slog.LevelInfo
	}
	if c.Bool("trace") {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(c.App.ErrWriter, &slog.HandlerOptions{Level: level}))
}
