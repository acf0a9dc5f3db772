package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/ingest"
	"pgthaw/recovery"
	"pgthaw/repo"
)

func backupCommand() *cli.Command {
	return &cli.Command{
		Name: "backup", Usage: "back up a running PostgreSQL", ArgsUsage: "CLUSTER",
		Description: "Takes a base backup over the replication protocol, with the WAL that makes it consistent. CLUSTER is the name that the\n" +
			"server has in the repository; the first backup binds it to the server's system identifier. Only pages that are not in the\n" +
			"repository yet are stored, and yet every backup is a full one to whoever reads it.",
		Flags: append([]cli.Flag{
			connectionFlag(),
			text("label", "name the backup `LABEL`"),
			toggle("full", "do not compare with the newest backup"),
			toggle("slow-checkpoint", "wait for the server's next checkpoint instead of asking for one now"),
			toggle("no-verify-checksums", "back up pages whose checksum is wrong instead of failing"),
			setting("max-rate", "let the server send at most `RATE` kB per second; suffixes k and M"),
			jobsFlag(),
			toggle("boot-image", "then have PostgreSQL start from the backup, and store what thaws of it then need not replay"),
		}, imageFlags()...),
		Action: backup,
	}
}

func backup(c *cli.Context) error {
	args, err := arguments(c, "CLUSTER")
	if err != nil {
		return err
	}
	if err := repo.ValidClusterName(args[0]); err != nil {
		return usage("%w", err)
	}
	rate, err := parseRate(c.String("max-rate"))
	if err != nil {
		return err
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := asSeen(c.Context, r, args[0]); err != nil {
		return err
	}
	began := time.Now()
	p := newProgress(c)
	m, err := ingest.Backup(c.Context, r, ingest.BackupOptions{
		Cluster: args[0], ConnString: c.String("pg-connection"), Label: c.String("label"), Full: c.Bool("full"),
		SlowCheckpoint: c.Bool("slow-checkpoint"), NoVerifyChecksums: c.Bool("no-verify-checksums"),
		MaxRate: rate, Workers: c.Int("jobs"), Log: logger(c), Tool: "pgthaw " + version,
		Progress: func(g ingest.Progress) { p.update("backup", g.Done, g.Total) },
	})
	p.done()
	if err != nil {
		return err
	}
	took := time.Since(began)
	var images recovery.Images
	if c.Bool("boot-image") {
		images, err = imagesOfNew(c, r, m)
	}
	if c.Bool("json") {
		b := newListed(m)
		b.Images = newImageJSON(images.Made)
		return errors.Join(err, printJSON(c.App.Writer, b))
	}
	fmt.Fprintf(c.App.Writer, "Backup %s of %s: %s in %s, %s stored\n",
		m.ID, m.Cluster, size(m.SizeBytes), duration(took), size(m.StoredBytes))
	if c.Bool("boot-image") && err == nil {
		err = printImages(c.App.Writer, images)
	}
	return err
}

// imagesOfNew makes the boot images of a backup that was just made. That stands, whatever comes of them.
func imagesOfNew(c *cli.Context, r *repo.Repository, m *repo.Manifest) (recovery.Images, error) {
	if err := ingest.ArchiveCheckpoint(c.Context, r, m, c.String("pg-connection")); err != nil {
		logger(c).Warn("the boot image from which recovery goes on has to wait for a checkpoint", "error", err)
	}
	images, err := makeImages(c, r, m.Cluster, m.ID)
	if err != nil {
		err = fmt.Errorf("backup %s was made, but not its boot image: %w", m.ID, err)
	}
	return images, err
}
