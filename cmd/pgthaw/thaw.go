package main

import (
	"context"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
	"pgthaw/repo"
)

func thawCommand() *cli.Command {
	return &cli.Command{
		Name: "thaw", Usage: "open a backup as a writable data directory in about a second", ArgsUsage: "CLUSTER BACKUP",
		Description: "PostgreSQL can start at once: what it reads comes from the repository, what it writes goes to DIR, and the rest is\n" +
			"copied there in the background until DIR is an ordinary data directory. \"pgthaw overlay\" shows and steers that.\n" +
			"BACKUP is an id from \"pgthaw list\", or latest: with a recovery target, the newest backup from which it can be reached.\n" +
			"Without a target, all WAL in the repository is recovered. What cannot be reached is refused before anything is written.",
		Flags: append(recoveryFlags(),
			readTimeoutFlag(),
			setting("hydrate", "copy the rest in the background: auto, off, or a `RATE` such as 50MB (per second)"),
			toggle("no-boot-image", "recover from the backup itself also where it has a boot image")),
		Action: thaw,
	}
}

func thaw(c *cli.Context) error {
	p := newProgress(c)
	return recoverBackup(c, p, func(ctx context.Context, r *repo.Repository, o recovery.Options) (_ recovery.Result, err error) {
		o.NoBootImage = c.Bool("no-boot-image")
		if o.RestoreCommand, err = restoreCommandFor(c, r.URL(), o.Cluster, o.Dir); err != nil {
			return recovery.Result{}, err
		}
		keys, err := keyFiles(c)
		if err != nil {
			return recovery.Result{}, err
		}
		return recovery.Thaw(ctx, r, recovery.ThawOptions{Options: o, Hydrate: c.String("hydrate"), KeyFiles: keys, SpawnDaemon: spawnOverlay(c)})
	})
}
