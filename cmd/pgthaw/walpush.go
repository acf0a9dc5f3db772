package main

import (
	"github.com/urfave/cli/v2"

	"pgthaw/ingest"
)

func walPushCommand() *cli.Command {
	return &cli.Command{
		Name: "push", Usage: "answer PostgreSQL's archive_command", ArgsUsage: "CLUSTER PATH",
		Description: "archive_command = 'pgthaw --repo URL wal push CLUSTER \"%p\"'\n" +
			"Exits 0 once the file is durable in the repository. The same file again is fine; another one of that name is an error.\n" +
			"No exit code is over 125: PostgreSQL keeps the file and tries again.",
		Action: walPush,
	}
}

func walPush(c *cli.Context) error {
	args, err := arguments(c, "CLUSTER", "PATH")
	if err != nil {
		return err
	}
	r, err := openUnattended(c)
	if err != nil {
		return err
	}
	defer r.Close()
	return ingest.PushWAL(c.Context, r, args[0], args[1])
}
