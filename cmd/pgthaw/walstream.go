package main

import (
	"github.com/urfave/cli/v2"

	"pgthaw/ingest"
)

func walStreamCommand() *cli.Command {
	return &cli.Command{
		Name: "stream", Usage: "receive WAL as it is written, until stopped", ArgsUsage: "CLUSTER",
		Description: "Streams over a physical replication slot and stores every segment once it is whole. The server is told that WAL is safe\n" +
			"only when it is durable in the repository. Stop it with SIGINT or SIGTERM: it then exits 0.",
		Flags: []cli.Flag{
			connectionFlag(),
			setting("slot", "use the replication slot `NAME` (default: "+ingest.DefaultSlot+")"),
			toggle("create-slot", "make the slot if it does not exist"),
		},
		Action: walStream,
	}
}

func walStream(c *cli.Context) error {
	args, err := arguments(c, "CLUSTER")
	if err != nil {
		return err
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	warnUnlessAsSeen(c, r, args[0])
	return ingest.StreamWAL(c.Context, r, ingest.StreamOptions{
		Cluster: args[0], ConnString: c.String("pg-connection"), Slot: c.String("slot"), CreateSlot: c.Bool("create-slot"), Log: logger(c),
	})
}
