package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
	"pgthaw/repo"
)

func restoreCommand() *cli.Command {
	return &cli.Command{
		Name: "restore", Usage: "write a backup to disk, whole, and recover it", ArgsUsage: "CLUSTER BACKUP",
		Description: "BACKUP is an id from \"pgthaw list\", or latest: with a recovery target, the newest backup from which it can be reached.\n" +
			"Without a target, all WAL in the repository is recovered. What cannot be reached is refused before anything is written.",
		Flags:  recoveryFlags(),
		Action: restore,
	}
}

func restore(c *cli.Context) error {
	p := newProgress(c)
	return recoverBackup(c, p, func(ctx context.Context, r *repo.Repository, o recovery.Options) (_ recovery.Result, err error) {
		if o.RestoreCommand, err = restoreCommandFor(c, r.URL(), o.Cluster, ""); err != nil {
			return recovery.Result{}, err
		}
		return recovery.Restore(ctx, r, o)
	})
}

// recoverBackup reads the flags that thaw and restore share, does the one or the other, and prints what came of it.
func recoverBackup(c *cli.Context, p *progress, do func(context.Context, *repo.Repository, recovery.Options) (recovery.Result, error)) error {
	o, err := recoveryOptions(c)
	if err != nil {
		return err
	}
	r, err := openUnattended(c) // restore_command opens it, too
	if err != nil {
		return err
	}
	defer r.Close()
	if err := asSeen(c.Context, r, o.Cluster); err != nil {
		if o.Backup == repo.Latest {
			return err
		}
		printProblem(c.App.ErrWriter, "warning", err) // who names a backup gets it
	}
	o.Progress = func(g recovery.Progress) { p.update(g.Phase, g.Done, g.Total) }
	result, err := do(c.Context, r, o)
	p.done()
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, result)
	}
	return printResult(c.App.Writer, result)
}

func recoveryOptions(c *cli.Context) (o recovery.Options, err error) {
	args, err := arguments(c, "CLUSTER", "BACKUP")
	if err != nil {
		return o, err
	}
	if c.String("target") == "" {
		return o, usage("--target DIR is missing")
	}
	target, err := recoveryTarget(c)
	if err != nil {
		return o, err
	}
	mapping, err := tablespaceMapping(c)
	if err != nil {
		return o, err
	}
	return recovery.Options{
		Cluster: args[0], Backup: args[1], Dir: c.String("target"), Target: target, TablespaceMapping: mapping,
		Start: c.Bool("start"), Port: c.Int("port"), BinDir: c.String("bindir"), Workers: c.Int("jobs"), Log: logger(c),
	}, nil
}

func printResult(w io.Writer, r recovery.Result) error {
	fmt.Fprintf(w, "Backup %s of %s is at %s: %s, %s read from the repository\n", r.Backup, r.Cluster, r.Target, size(r.SizeBytes), size(r.ReadBytes))
	for _, phase := range []struct {
		name string
		ms   int64
	}{{"Restored", r.RestoredMS}, {"Mounted", r.MountedMS}, {"PostgreSQL answered", r.ReadyMS}} {
		if phase.ms > 0 {
			fmt.Fprintf(w, "%s after %s\n", phase.name, duration(time.Duration(phase.ms)*time.Millisecond))
		}
	}
	if r.BootImage != nil {
		fmt.Fprintf(w, "It starts from its boot image: %s\n", describeImage(r.BootImage))
	}
	if r.Standalone {
		fmt.Fprintln(w, "The WAL behind the backup was pruned: its own end is all that can be recovered to")
	}
	if e := r.Recovery; e != nil {
		fmt.Fprintf(w, "Recovery ended at %s, timeline %s: %s", e.LSN, e.Timeline, e.State)
		if e.Time != nil {
			fmt.Fprintf(w, "; last commit %s", clock(*e.Time))
		}
		fmt.Fprintln(w)
	}
	if r.NoLogin != "" {
		fmt.Fprintf(w, "The server answers, but nobody could log in to see how far it is: %s\n", r.NoLogin)
	}
	if r.ServerLog != "" {
		fmt.Fprintf(w, "The server's log is %s\n", r.ServerLog)
	}
	if r.Port == 0 {
		_, err := fmt.Fprintf(w, "Start it with: pg_ctl start -D %s\n", shellQuote(r.Target))
		return err
	}
	_, err := fmt.Fprintf(w, "Connect with: psql -h %s -p %d\nStop it with: pg_ctl stop -D %s\n", shellQuote(r.SocketDir), r.Port, shellQuote(r.Target))
	return err
}
