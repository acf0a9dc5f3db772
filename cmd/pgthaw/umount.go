package main

import (
	"github.com/urfave/cli/v2"

	"pgthaw/fusefs"
)

func umountCommand() *cli.Command {
	return &cli.Command{
		Name: "umount", Usage: "take off what mount mounted", ArgsUsage: "DIR",
		Description: "Refuses while somebody has a file open or a working directory below DIR.",
		Action:      umount,
	}
}

func umount(c *cli.Context) error {
	args, err := arguments(c, "DIR")
	if err != nil {
		return err
	}
	return fusefs.Unmount(args[0])
}
