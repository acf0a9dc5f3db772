package main

import (
	"errors"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
)

func walFetchCommand() *cli.Command {
	return &cli.Command{
		Name: "fetch", Usage: "answer PostgreSQL's restore_command", ArgsUsage: "CLUSTER FILE PATH",
		Description: "restore_command = 'pgthaw --repo URL wal fetch CLUSTER \"%f\" \"%p\"'\n" +
			"Exits 0 with the verified file at PATH, 1 if the repository certainly has neither FILE nor anything later on its\n" +
			"timeline, and 200 for anything else, which makes PostgreSQL stop instead of promote with what it has.",
		Flags:  []cli.Flag{text("overlay", "ask the daemon of the overlay at `DIR`; without one, the repository")},
		Action: walFetch,
	}
}

func walFetch(c *cli.Context) error {
	args, err := arguments(c, "CLUSTER", "FILE", "PATH")
	if err != nil {
		return err
	}
	if dir := c.String("overlay"); dir != "" {
		err := recovery.FetchOverlayWAL(c.Context, dir, args[0], args[1], args[2])
		if !errors.Is(err, recovery.ErrNoDaemon) {
			return err
		}
	}
	r, err := openUnattended(c)
	if err != nil {
		return err
	}
	defer r.Close()
	return recovery.FetchWAL(c.Context, r, args[0], args[1], args[2])
}
