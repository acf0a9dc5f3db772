package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal finds the default action again, and kills.
	context.AfterFunc(ctx, stop)
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	os.Exit(run(ctx, os.Args, os.Stdout, os.Stderr))
}

// memoryLimit is where Go begins to collect garbage more often instead of doubling what is in use, in bytes. Few commands
// come near: a backup of a million files in one database has 541 MiB at its peak without, 390 MiB with it. Above it there is
// room for restore's buffers, up to 512 MiB.
const memoryLimit = 384 << 20

// run executes one command line and returns its exit code. An error is printed here, once.
func run(ctx context.Context, argv []string, stdout, stderr io.Writer) int {
	app := newApp(stdout, stderr)
	ordered, command := arrange(app, argv)
	err := guard(stderr, func() error { return app.RunContext(ctx, ordered) })
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		err = interrupted(err)
	}
	code := answer(command, err)
	switch {
	case command == "wal fetch" && code == exitNoSuchWAL:
		fmt.Fprintf(stderr, "pgthaw: %v\n", err) // every recovery asks for files that are not there: no error, in the server's log
	case err != nil:
		printError(stderr, err)
	}
	return code
}

// guard turns a panic of fn into an error, its trace printed. Panics of other goroutines abort the process: to
// PostgreSQL that is a signal, which stops recovery, whereas Go's usual exit code 2 would end it
// (xlogarchive.c: an exit over 125 or a signal stops recovery).
func guard(stderr io.Writer, fn func() error) (err error) {
	debug.SetTraceback("crash")
	noCoreDump()
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(stderr, "%s", debug.Stack())
			err = fmt.Errorf("bug in pgthaw: %v", p)
		}
	}()
	return fn()
}

// noCoreDump keeps an abort from leaving a file in PGDATA. That it cannot be set is no reason to stop.
func noCoreDump() {
	_ = syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
}

// printError writes an error as PostgreSQL's programs do, each line of a joined error on its own, and the hint if there is
// one. That something was canceled says nothing beside the reason.
func printError(w io.Writer, err error) { printProblem(w, "error", err) }

func printProblem(w io.Writer, severity string, err error) {
	for i, line := range strings.Split(strings.TrimRight(err.Error(), "\n"), "\n") {
		if i == 0 || line != context.Canceled.Error() {
			fmt.Fprintf(w, "pgthaw: %s: %s\n", severity, line)
		}
	}
	if hint := hintFor(err); hint != "" {
		fmt.Fprintf(w, "HINT: %s\n", hint)
	}
}
