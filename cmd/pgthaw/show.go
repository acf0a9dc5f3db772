package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
	"pgthaw/repo"
)

func showCommand() *cli.Command {
	return &cli.Command{
		Name: "show", Usage: "show everything about one backup", ArgsUsage: "CLUSTER BACKUP",
		Description: `BACKUP is an id from "pgthaw list", or latest.`,
		Action:      show,
	}
}

// shown is the manifest, as it lies in the repository, with what can be recovered from it.
type shown struct {
	*repo.Manifest
	Window *recovery.Window `json:"recoverable"`
	Images []imageJSON      `json:"boot_images,omitempty"`
	Older  []string         `json:"older_than_seen,omitempty"`
}

func show(c *cli.Context) error {
	args, err := arguments(c, "CLUSTER", "BACKUP")
	if err != nil {
		return err
	}
	r, err := openToLook(c)
	if err != nil {
		return err
	}
	defer r.Close()
	unseen := asSeen(c.Context, r, args[0])
	m, err := r.Manifest(c.Context, args[0], args[1])
	if err != nil {
		return errors.Join(unseen, err)
	}
	w, err := recovery.Windows(c.Context, r, m.Cluster, []*repo.Manifest{m})
	if err != nil {
		return err
	}
	images, err := r.ImagesOf(c.Context, m)
	unread := errors.Join(unseen, err)
	if c.Bool("json") {
		return errors.Join(unread, printJSON(c.App.Writer, shown{m, w[0], newImageJSON(images), olderThanSeen(unseen)}))
	}
	return errors.Join(unread, printShown(c.App.Writer, m, w[0], images))
}

func recoverable(win *recovery.Window) string {
	if win.Standalone {
		return fmt.Sprintf("to its own end only, %s (%s): the WAL behind was pruned", clock(win.To.Time), win.To.LSN)
	}
	return fmt.Sprintf("%s (%s) to %s (%s)", clock(win.From.Time), win.From.LSN, clock(win.To.Time), win.To.LSN)
}

func printShown(w io.Writer, m *repo.Manifest, win *recovery.Window, images []*repo.Manifest) error {
	t := table{
		{"Backup", m.ID},
		{"Cluster", m.Cluster},
		{"Label", m.Label},
		{"PostgreSQL", m.PGVersion},
		{"System identifier", strconv.FormatUint(m.SystemIdentifier, 10)},
		{"Taken from", map[bool]string{true: "a standby", false: "the primary"}[m.FromStandby]},
		{"Started", clock(m.StartedAt)},
		{"Stopped", clock(m.StoppedAt)},
		{"Timeline", m.Timeline.String()},
		{"Start LSN", fmt.Sprintf("%s, in %s", m.StartLSN, m.WALFirst)},
		{"Stop LSN", fmt.Sprintf("%s, in %s", m.StopLSN, m.WALLast)},
		{"Recoverable", recoverable(win)},
		{"Files", strconv.Itoa(m.Files)},
		{"Size", size(m.SizeBytes)},
		{"Stored", size(m.StoredBytes)},
		{"Data checksums", map[bool]string{true: "on", false: "off"}[m.DataChecksums]},
		{"Data directory", m.DataDirectory},
		{"Configuration", m.ConfigFile},
	}
	for _, i := range images {
		t.row("Boot image", fmt.Sprintf("%s; started by PostgreSQL %s at %s, %s stored", describeImage(i.Image), i.Image.PGVersion, clock(i.Image.MadeAt), size(i.StoredBytes)))
	}
	for _, s := range m.Tablespaces {
		t.row("Tablespace", fmt.Sprintf("%d at %s", s.OID, s.Path))
	}
	for _, name := range slices.Sorted(maps.Keys(m.Settings)) {
		t.row("Setting", name+" = "+m.Settings[name])
	}
	t.row("Written by", m.Tool)
	return t.print(w)
}
