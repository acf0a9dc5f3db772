package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

func repoHoldCommand() *cli.Command {
	return &cli.Command{
		Name: "hold", Usage: "keep single backups, whatever prune is told",
		Subcommands: []*cli.Command{holdAddCommand(), holdListCommand(), holdRemoveCommand()},
	}
}

// holdJSON is a hold as --json writes it.
type holdJSON struct {
	ID        string     `json:"id"`
	Cluster   string     `json:"cluster"`
	Backup    string     `json:"backup"`
	Reason    string     `json:"reason"`
	CreatedAt time.Time  `json:"created_at"`
	Until     *time.Time `json:"until"`
}

func newHoldJSON(h repo.Hold) holdJSON {
	j := holdJSON{h.ID, h.Cluster, h.Backup, h.Reason, h.CreatedAt, nil}
	if !h.Until.IsZero() {
		until := h.Until.UTC()
		j.Until = &until
	}
	return j
}

func holdAddCommand() *cli.Command {
	return &cli.Command{
		Name: "add", Usage: "hold a backup", ArgsUsage: "CLUSTER BACKUP",
		Description: "BACKUP is an id from \"pgthaw list\", or latest. A backup that was deleted already cannot be held. While a prune runs,\n" +
			"which may have decided before it could see the hold, the exit code is 11: the hold is there, and \"pgthaw list\" shows later whether the\n" +
			"backup is, too.",
		Flags: []cli.Flag{
			text("reason", "`TEXT` that says why, for people"),
			text("until", "hold it up to a `TIME` such as 2027-01-01 00:00 (default: until the hold is removed)"),
		},
		Action: holdAdd,
	}
}

func holdAdd(c *cli.Context) error {
	args, err := arguments(c, "CLUSTER", "BACKUP")
	if err != nil {
		return err
	}
	if c.String("reason") == "" {
		return usage("--reason is missing")
	}
	var until time.Time
	if c.IsSet("until") {
		if until, err = parseTime(c.String("until"), time.Now()); err != nil {
			return err
		}
		if until.Before(time.Now()) {
			return usage("--until %s: that is past", clock(until))
		}
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	h, err := r.AddHold(c.Context, args[0], args[1], c.String("reason"), until)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, newHoldJSON(h))
	}
	_, err = fmt.Fprintf(c.App.Writer, "Hold %s on backup %s of %s: %s\n", h.ID, h.Backup, h.Cluster, h.String())
	return err
}

func holdListCommand() *cli.Command {
	return &cli.Command{
		Name: "list", Usage: "list holds", ArgsUsage: "[CLUSTER]",
		Description: "Also those whose time is over: they hold nothing, a day later at the latest.",
		Action:      holdList,
	}
}

func holdList(c *cli.Context) error {
	if c.NArg() > 1 {
		return usage("unexpected argument %q", c.Args().Get(1))
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	if name := c.Args().First(); name != "" {
		if _, err := r.Cluster(c.Context, name); err != nil {
			return err
		}
	}
	holds, bad := r.Holds(c.Context, c.Args().First())
	if c.Bool("json") {
		all := []holdJSON{}
		for _, h := range holds {
			all = append(all, newHoldJSON(h))
		}
		return errors.Join(bad, printJSON(c.App.Writer, all))
	}
	t := table{{"ID", "CLUSTER", "BACKUP", "CREATED", "UNTIL", "REASON"}}
	for _, h := range holds {
		t.row(h.ID, h.Cluster, h.Backup, clock(h.CreatedAt), clock(h.Until), h.Reason)
	}
	return errors.Join(bad, t.print(c.App.Writer))
}

func holdRemoveCommand() *cli.Command {
	return &cli.Command{
		Name: "remove", Usage: "end a hold", ArgsUsage: "ID",
		Description: "ID is one of \"pgthaw repo hold list\".",
		Action:      holdRemove,
	}
}

func holdRemove(c *cli.Context) error {
	args, err := arguments(c, "ID")
	if err != nil {
		return err
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := r.RemoveHold(c.Context, args[0]); err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]string{"id": args[0]})
	}
	_, err = fmt.Fprintf(c.App.Writer, "Hold %s removed\n", args[0])
	return err
}
