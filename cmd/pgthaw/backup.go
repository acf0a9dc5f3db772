package main

import (
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/ingest"
	"pgthaw/repo"
)

func backupCommand() *cli.Command {
	return &cli.Command{
		Name: "backup", Usage: "back up a running PostgreSQL", ArgsUsage: "CLUSTER",
		Description: "Takes a base backup over the replication protocol, with the WAL that makes it consistent. CLUSTER is the name that the\n" +
			"server has in the repository; the first backup binds it to the server's system identifier. Only pages that are not in the\n" +
			"repository yet are stored, and yet every backup is a full one to whoever reads it.",
		Flags: []cli.Flag{
			connectionFlag(),
			text("label", "name the backup `LABEL`"),
			toggle("full", "do not compare with the newest backup"),
			toggle("slow-checkpoint", "wait for the server's next checkpoint instead of asking for one now"),
			toggle("no-verify-checksums", "back up pages whose checksum is wrong instead of failing"),
			setting("max-rate", "let the server send at most `RATE` kB per second; suffixes k and M"),
			jobsFlag(),
		},
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
	if c.Bool("json") {
		return printJSON(c.App.Writer, newListed(m))
	}
	_, err = fmt.Fprintf(c.App.Writer, "Backup %s of %s: %s in %s, %s stored\n",
		m.ID, m.Cluster, size(m.SizeBytes), duration(time.Since(began)), size(m.StoredBytes))
	return err
}
