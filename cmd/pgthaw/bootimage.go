package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
	"pgthaw/repo"
)

func bootImageCommand() *cli.Command {
	return &cli.Command{
		Name: "boot-image", Usage: "have thaws of a backup start with next to nothing to replay", ArgsUsage: "CLUSTER [BACKUP]",
		Description: "Thaws the backup (default: latest) into a temporary directory, has PostgreSQL recover there and shut down, and stores the pages\n" +
			"that this changed. One image is of the backup's own end, another one of the newest checkpoint in the WAL behind it, from where\n" +
			"recovery goes on. Makes what is missing, and starts a server from the first one. It proves that PostgreSQL starts from the backup:\n" +
			"\"pgthaw list\" says so.",
		Flags:  append(imageFlags(), toggle("refresh", "bring the second image forward to the newest checkpoint; the primary is not touched")),
		Action: bootImage,
	}
}

// imageFlags are those of whatever makes boot images.
func imageFlags() []cli.Flag {
	return []cli.Flag{
		setting("scratch", "make the temporary directory in `DIR`, which takes what a start writes (default: $TMPDIR, or /tmp)"),
		bindirFlag(),
	}
}

func bindirFlag() cli.Flag {
	return setting("bindir", "use PostgreSQL's programs in `DIR` (default: those of the backup's major version, where Debian and PGDG put them)")
}

func bootImage(c *cli.Context) error {
	args := c.Args().Slice()
	if len(args) == 1 {
		args = append(args, repo.Latest)
	}
	if len(args) != 2 {
		_, err := arguments(c, "CLUSTER", "BACKUP")
		return err
	}
	r, err := openUnattended(c) // the daemon opens it, too
	if err != nil {
		return err
	}
	defer r.Close()
	if err := asSeen(c.Context, r, args[0]); err != nil {
		return err
	}
	images, err := makeImages(c, r, args[0], args[1])
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, newImagesJSON(images))
	}
	return printImages(c.App.Writer, images)
}

// makeImages makes the boot images of a backup that it lacks.
func makeImages(c *cli.Context, r *repo.Repository, cluster, backup string) (recovery.Images, error) {
	keys, err := keyFiles(c)
	if err != nil {
		return recovery.Images{}, err
	}
	p := newProgress(c)
	defer p.done()
	return recovery.MakeImages(c.Context, r, recovery.ImageOptions{
		Cluster: cluster, Backup: backup, Refresh: c.Bool("refresh"), Scratch: c.String("scratch"), BinDir: c.String("bindir"), KeyFiles: keys,
		Tool: "pgthaw " + version, Log: logger(c), SpawnDaemon: spawnOverlay(c),
		RestoreCommand: func(dir string) (string, error) { return restoreCommandFor(c, r.URL(), cluster, dir) },
		Progress:       func(g recovery.Progress) { p.update(g.Phase, g.Done, g.Total) },
	})
}

// imagesJSON is what boot-image --json prints.
type imagesJSON struct {
	Made      []imageJSON `json:"made"`
	NoForward string      `json:"no_forward,omitempty"`
}

// imageJSON is a boot image as --json shows it.
type imageJSON struct {
	ID          string `json:"id"`
	StoredBytes int64  `json:"stored_bytes"`
	*repo.Image
}

func newImagesJSON(images recovery.Images) imagesJSON {
	return imagesJSON{newImageJSON(images.Made), images.NoForward}
}

func newImageJSON(manifests []*repo.Manifest) []imageJSON {
	all := []imageJSON{}
	for _, m := range manifests {
		all = append(all, imageJSON{m.ID, m.StoredBytes, m.Image})
	}
	return all
}

func printImages(w io.Writer, images recovery.Images) error {
	for _, m := range images.Made {
		if _, err := fmt.Fprintf(w, "Boot image of %s of %s: %s, %s stored\n", m.Image.Of, m.Cluster, describeImage(m.Image), size(m.StoredBytes)); err != nil {
			return err
		}
	}
	if images.NoForward != "" {
		_, err := fmt.Fprintf(w, "No boot image from which recovery goes on: %s\n", images.NoForward)
		return err
	}
	if len(images.Made) == 0 {
		_, err := fmt.Fprintln(w, "The boot images are there already")
		return err
	}
	return nil
}

// describeImage is what a person wants to know of an image.
func describeImage(i *repo.Image) string {
	if i.Kind == repo.ImagePromoted {
		return fmt.Sprintf("the backup's end, %s", i.LSN)
	}
	return fmt.Sprintf("%s, from where recovery goes on", i.LSN)
}
