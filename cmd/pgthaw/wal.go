package main

import "github.com/urfave/cli/v2"

func walCommand() *cli.Command {
	return &cli.Command{
		Name: "wal", Usage: "store and fetch WAL",
		Subcommands: []*cli.Command{walStreamCommand(), walPushCommand(), walFetchCommand(), walListCommand()},
	}
}
