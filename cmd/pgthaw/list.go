package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
	"pgthaw/repo"
	"pgthaw/repo/pg"
)

func listCommand() *cli.Command {
	return &cli.Command{
		Name: "list", Usage: "list backups, and what can be recovered", ArgsUsage: "[CLUSTER]",
		Action: list,
	}
}

// listed is a backup as list --json shows it. The window is what can be recovered from it on the latest timeline.
type listed struct {
	ID               string           `json:"id"`
	Cluster          string           `json:"cluster"`
	Label            string           `json:"label"`
	SystemIdentifier uint64           `json:"system_identifier,string"`
	PGVersion        string           `json:"pg_version"`
	FromStandby      bool             `json:"from_standby"`
	Timeline         pg.Timeline      `json:"timeline"`
	StartLSN         pg.LSN           `json:"start_lsn"`
	StopLSN          pg.LSN           `json:"stop_lsn"`
	StartedAt        time.Time        `json:"started_at"`
	StoppedAt        time.Time        `json:"stopped_at"`
	SizeBytes        int64            `json:"size_bytes"`
	StoredBytes      int64            `json:"stored_bytes"`
	Files            int              `json:"files"`
	Window           *recovery.Window `json:"recoverable,omitempty"`
	Images           []imageJSON      `json:"boot_images,omitempty"`
}

func newListed(m *repo.Manifest) listed {
	return listed{
		ID: m.ID, Cluster: m.Cluster, Label: m.Label, SystemIdentifier: m.SystemIdentifier, PGVersion: m.PGVersion,
		FromStandby: m.FromStandby, Timeline: m.Timeline, StartLSN: m.StartLSN, StopLSN: m.StopLSN,
		StartedAt: m.StartedAt.UTC(), StoppedAt: m.StoppedAt.UTC(),
		SizeBytes: m.SizeBytes, StoredBytes: m.StoredBytes, Files: m.Files,
	}
}

func list(c *cli.Context) error {
	if c.NArg() > 1 {
		return usage("unexpected argument %q", c.Args().Get(1))
	}
	r, err := openToLook(c)
	if err != nil {
		return err
	}
	defer r.Close()
	unseen := asSeen(c.Context, r, c.Args().Slice()...)
	clusters, err := chosenClusters(c.Context, r, c.Args().First())
	if len(clusters) == 0 && err != nil {
		return errors.Join(unseen, err)
	}
	damaged := []error{unseen, err}
	all := []listed{}
	for _, cluster := range clusters {
		backups, err := listCluster(c.Context, r, cluster.Name)
		all = append(all, backups...)
		damaged = append(damaged, err)
	}
	if c.Bool("json") {
		return errors.Join(append(damaged, printJSON(c.App.Writer, all))...)
	}
	return errors.Join(append(damaged, printList(c.App.Writer, clusters, all))...)
}

// chosenClusters are one, or all: those that can be read, and the errors of those that cannot.
func chosenClusters(ctx context.Context, r *repo.Repository, name string) ([]repo.Cluster, error) {
	if name == "" {
		return r.Clusters(ctx)
	}
	cluster, err := r.Cluster(ctx, name)
	if err != nil {
		return nil, err
	}
	return []repo.Cluster{cluster}, nil
}

// listCluster returns the backups that can be read, and the errors of those that cannot.
func listCluster(ctx context.Context, r *repo.Repository, cluster string) (backups []listed, err error) {
	manifests, err := r.Backups(ctx, cluster)
	windows, windowsErr := recovery.Windows(ctx, r, cluster, manifests)
	images, imagesErr := r.Images(ctx, cluster)
	for i, m := range manifests {
		b := newListed(m)
		b.Window, b.Images = windows[i], newImageJSON(images[m.ID])
		backups = append(backups, b)
	}
	return backups, errors.Join(err, windowsErr, imagesErr)
}

func printList(w io.Writer, clusters []repo.Cluster, all []listed) error {
	if len(clusters) == 0 {
		_, err := fmt.Fprintln(w, "No backups yet.")
		return err
	}
	for i, cluster := range clusters {
		if i > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "Cluster %s, system identifier %d\n", cluster.Name, cluster.SystemIdentifier)
		if err := printCluster(w, slices.DeleteFunc(slices.Clone(all), func(b listed) bool { return b.Cluster != cluster.Name })); err != nil {
			return err
		}
	}
	return nil
}

func printCluster(w io.Writer, backups []listed) error {
	if len(backups) == 0 {
		_, err := fmt.Fprintln(w, "No backups yet.")
		return err
	}
	t := table{{"BACKUP", "STARTED", ">TOOK", ">SIZE", ">STORED", ">TLI", "START LSN", "STOP LSN", "VERSION", "LABEL"}}
	for _, b := range backups {
		t.row(b.ID, clock(b.StartedAt), duration(b.StoppedAt.Sub(b.StartedAt)), size(b.SizeBytes), size(b.StoredBytes),
			strconv.Itoa(int(b.Timeline)), b.StartLSN.String(), b.StopLSN.String(), shortVersion(b.PGVersion), b.Label)
	}
	if err := t.print(w); err != nil {
		return err
	}
	for _, b := range backups {
		if b.Window != nil && b.Window.Standalone {
			fmt.Fprintf(w, "Recoverable to its own end only: %s, %s (%s)\n", b.ID, clock(b.Window.To.Time), b.Window.To.LSN)
		}
	}
	for _, b := range backups {
		for _, i := range b.Images {
			fmt.Fprintf(w, "Started by PostgreSQL %s: %s; boot image of %s\n", i.PGVersion, b.ID, describeImage(i.Image))
		}
	}
	for _, win := range joined(backups) {
		fmt.Fprintf(w, "Recoverable: %s (%s) to %s (%s)\n", clock(win.From.Time), win.From.LSN, clock(win.To.Time), win.To.LSN)
	}
	return nil
}

// shortVersion leaves out what a packager adds: "15.18 (Debian 15.18-0+deb12u1)".
func shortVersion(v string) string {
	v, _, _ = strings.Cut(v, " ")
	return v
}

// joined are the windows of a cluster's backups, oldest first, those that touch made one.
func joined(backups []listed) []recovery.Window {
	var all []recovery.Window
	for _, b := range backups {
		switch last := len(all) - 1; {
		case b.Window == nil, b.Window.Standalone:
		case last >= 0 && all[last].To.LSN >= b.Window.From.LSN:
			if b.Window.To.LSN > all[last].To.LSN {
				all[last].To = b.Window.To
			}
		default:
			all = append(all, *b.Window)
		}
	}
	return all
}
