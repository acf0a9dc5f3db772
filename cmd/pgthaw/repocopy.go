package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

const (
	toKeyFileFlag    = "to-key-file"
	toPassphraseFlag = "to-passphrase-file"
)

func repoCopyCommand() *cli.Command {
	return &cli.Command{
		Name: "copy", Usage: "copy backups and WAL to another repository", ArgsUsage: "DESTINATION [CLUSTER...]",
		Description: "Copies from the repository of --repo to the one at DESTINATION, which \"pgthaw repo init\" has made, what that does not have\n" +
			"yet: all clusters or those that are named, their backups, oldest first, and all their WAL. Every byte is verified and encrypted\n" +
			"anew, with the destination's keys. Run again, it brings what is new; interrupted, it goes on. It deletes nothing.\n" +
			"What is damaged in the source is named and left out, and the exit code is then 16.",
		Flags: []cli.Flag{
			setting(toKeyFileFlag, "`FILE` with a key of the destination: an age identity, or an SSH private key"),
			setting(toPassphraseFlag, "`FILE` whose first line is a passphrase of the destination"),
			text("backup", "copy only the backup with this `ID`, or latest, the newest of each cluster; and all WAL"),
			jobsFlag(),
		},
		Action: repoCopy,
	}
}

// copyJSON is what repo copy did.
type copyJSON struct {
	Source      string          `json:"source"`
	Destination string          `json:"destination"`
	Backups     []copiedJSON    `json:"backups"`
	Images      int             `json:"boot_images"`
	Present     int             `json:"backups_present"`
	Deleted     int             `json:"backups_deleted"`
	WALFiles    int             `json:"wal_files"`
	WALBytes    int64           `json:"wal_bytes"`
	WALPresent  int             `json:"wal_files_present"`
	ReadBytes   int64           `json:"read_bytes"`
	NotCopied   []notCopiedJSON `json:"not_copied"`

	causes []error // of what was not copied
}

type copiedJSON struct {
	Cluster     string `json:"cluster"`
	ID          string `json:"id"`
	OriginalID  string `json:"original_id"`
	SizeBytes   int64  `json:"size_bytes"`
	StoredBytes int64  `json:"stored_bytes"`
}

type notCopiedJSON struct {
	Cluster string `json:"cluster"`
	Backup  string `json:"backup,omitempty"`
	WAL     string `json:"wal,omitempty"`
	Error   string `json:"error"`
}

func repoCopy(c *cli.Context) error {
	if c.NArg() == 0 {
		return usage("DESTINATION is missing")
	}
	clusters := c.Args().Slice()[1:]
	for _, name := range clusters {
		if err := repo.ValidClusterName(name); err != nil {
			return usage("%w", err)
		}
	}
	from, err := openRepository(c)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := openDestination(c, c.Args().First())
	if err != nil {
		return err
	}
	defer to.Close()
	out := copyJSON{Source: from.URL(), Destination: to.URL(), Backups: []copiedJSON{}, NotCopied: []notCopiedJSON{}}
	p := newProgress(c)
	began := time.Now()
	done, err := from.Copy(c.Context, to, repo.CopyOptions{Clusters: clusters, Backup: c.String("backup"), Workers: c.Int("jobs"),
		NotCopied: out.leftOut, Progress: p.update})
	p.done()
	out.count(done, from.ReadBytes())
	if c.Bool("json") {
		err = firstOf(err, printJSON(c.App.Writer, out))
	} else {
		err = firstOf(err, out.print(c.App.Writer, err == nil, time.Since(began)))
	}
	if err == nil && len(out.causes) > 0 {
		err = &notCopiedError{out.causes}
	}
	return err
}

// openDestination opens the repository to copy to, with keys of its own. The source is open by now.
func openDestination(c *cli.Context, url string) (*repo.Repository, error) {
	keys, err := keysOf(c, toKeyFileFlag, toPassphraseFlag)
	if err != nil {
		return nil, err
	}
	r, err := openWith(c.Context, c, url, keys, &keySearch{c: c, ask: func(ctx context.Context) (string, error) {
		fmt.Fprintf(c.App.ErrWriter, "pgthaw: the destination is %s\n", url)
		return askPassphrase(ctx)
	}})
	if errors.Is(err, repo.ErrNoKey) {
		err = &failure{err: err, code: exitKey, hint: "Put the key file there, or give --to-key-file FILE or --to-passphrase-file FILE, or set PGTHAW_TO_KEY_FILE or PGTHAW_TO_PASSPHRASE_FILE."}
	}
	if err != nil {
		return nil, fmt.Errorf("destination: %w", err)
	}
	return r, nil
}

// notCopiedError says how much was left out; its exit code is that of the gravest cause.
type notCopiedError struct{ causes []error }

func (e *notCopiedError) Unwrap() []error { return e.causes }

func (e *notCopiedError) Error() string {
	if len(e.causes) == 1 {
		return "not everything was copied: 1 finding"
	}
	return fmt.Sprintf("not everything was copied: %d findings", len(e.causes))
}

func (k *copyJSON) leftOut(n repo.NotCopied) {
	j := notCopiedJSON{Cluster: n.Cluster, Backup: n.Backup, Error: n.Err.Error()}
	if n.WAL != (pg.WALName{}) {
		j.WAL = n.WAL.String()
	}
	k.NotCopied = append(k.NotCopied, j)
	k.causes = append(k.causes, n.Err)
}

func (k *copyJSON) count(done repo.Copied, read int64) {
	for _, m := range done.Backups {
		k.Backups = append(k.Backups, copiedJSON{m.Cluster, m.ID, repo.OriginalID(m.ID), m.SizeBytes, m.StoredBytes})
	}
	k.Images = done.Images
	k.Present, k.Deleted, k.ReadBytes = done.Present, done.Deleted, read
	k.WALFiles, k.WALBytes, k.WALPresent = done.WALFiles, done.WALBytes, done.WALThere
}

// print writes what was left out and what was copied, and a summary if the copy came to its end.
func (k copyJSON) print(w io.Writer, whole bool, took time.Duration) error {
	for _, n := range k.NotCopied {
		fmt.Fprintf(w, "Not copied: %s%s: %s\n", n.what(), n.Cluster, n.Error)
	}
	for _, b := range k.Backups {
		fmt.Fprintf(w, "Backup %s of %s: %s, %s stored\n", b.ID, b.Cluster, size(b.SizeBytes), size(b.StoredBytes))
	}
	if !whole {
		return nil
	}
	if k.Images > 0 {
		fmt.Fprintf(w, "Boot images: %d\n", k.Images)
	}
	if len(k.Backups) == 0 && k.Images == 0 && k.WALFiles == 0 && len(k.NotCopied) == 0 {
		fmt.Fprint(w, "Nothing to copy")
	} else {
		fmt.Fprintf(w, "Copied: %d backups, %d WAL files (%s) in %s, %s read", len(k.Backups), k.WALFiles, size(k.WALBytes), duration(took), size(k.ReadBytes))
	}
	fmt.Fprintf(w, "; there already: %d backups, %d WAL files", k.Present, k.WALPresent)
	if k.Deleted > 0 {
		fmt.Fprintf(w, "; deleted in the destination, and not copied again: %d backups", k.Deleted)
	}
	_, err := fmt.Fprintln(w)
	return err
}

// what is "backup ... of ", "WAL file ... of " or, for the cluster as a whole, "cluster ".
func (n notCopiedJSON) what() string {
	switch {
	case n.Backup != "":
		return "backup " + n.Backup + " of "
	case n.WAL != "":
		return "WAL file " + n.WAL + " of "
	}
	return "cluster "
}
