package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

func repoInfoCommand() *cli.Command {
	return &cli.Command{
		Name: "info", Usage: "tell what a repository holds, and what it costs",
		Description: "Reads manifests, pack lists and listings. Bytes are told apart by whole packs: what a backup has for itself is in packs that no\n" +
			"other backup uses, and goes with it.",
		Action: repoInfo,
	}
}

// infoJSON is what a repository holds.
type infoJSON struct {
	ID          string            `json:"id"`
	URL         string            `json:"repository"`
	CreatedAt   time.Time         `json:"created_at"`
	Encryption  string            `json:"encryption"`
	SizeBytes   int64             `json:"size_bytes"`
	StoredBytes int64             `json:"stored_bytes"`
	Packs       packsJSON         `json:"packs"`
	WALBytes    int64             `json:"wal_bytes"`
	OtherBytes  int64             `json:"other_bytes"`
	Ratio       *float64          `json:"ratio"`
	Reclaimable *packsJSON        `json:"reclaimable"`
	Unfinished  packsJSON         `json:"unfinished"`
	Clusters    []clusterInfoJSON `json:"clusters"`
	Older       []string          `json:"older_than_seen,omitempty"`
}

// packsJSON is a number of packs.
type packsJSON struct {
	Packs int   `json:"packs"`
	Bytes int64 `json:"bytes"`
}

type clusterInfoJSON struct {
	Name             string           `json:"cluster"`
	SystemIdentifier uint64           `json:"system_identifier,string"`
	SizeBytes        int64            `json:"size_bytes"`
	Packs            packsJSON        `json:"packs"`
	Ratio            *float64         `json:"ratio"`
	WALSegments      int              `json:"wal_segments"`
	WALBytes         int64            `json:"wal_bytes"`
	WALRatio         *float64         `json:"wal_ratio"`
	Oldest           *time.Time       `json:"oldest"`
	Newest           *time.Time       `json:"newest"`
	Backups          []backupInfoJSON `json:"backups"`
}

type backupInfoJSON struct {
	ID          string    `json:"id"`
	StartedAt   time.Time `json:"started_at"`
	SizeBytes   int64     `json:"size_bytes"`
	LiveBytes   int64     `json:"live_bytes"`
	Unique      packsJSON `json:"unique"`
	SharedBytes int64     `json:"shared_bytes"`
	Ratio       *float64  `json:"ratio"`
}

func repoInfo(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	r, err := openToLook(c)
	if err != nil {
		return err
	}
	defer r.Close()
	info, err := r.Info(c.Context)
	if c.Context.Err() != nil {
		return err
	}
	unseen := asSeen(c.Context, r)
	err = errors.Join(unseen, err)
	out := newInfoJSON(info)
	out.Older = olderThanSeen(unseen)
	if c.Bool("json") {
		return errors.Join(err, printJSON(c.App.Writer, out))
	}
	return errors.Join(err, out.print(c.App.Writer))
}

func newInfoJSON(i *repo.Info) infoJSON {
	out := infoJSON{ID: i.ID, URL: i.URL, CreatedAt: i.CreatedAt.UTC(), Encryption: i.Encryption, SizeBytes: i.SizeBytes,
		StoredBytes: i.Packs.Bytes + i.WALBytes + i.OtherBytes, Packs: packsJSON(i.Packs), WALBytes: i.WALBytes, OtherBytes: i.OtherBytes,
		Ratio: ratio(i.SizeBytes, i.Packs.Bytes), Unfinished: packsJSON(i.Unfinished), Clusters: []clusterInfoJSON{}}
	if i.Reclaimable != nil {
		n := packsJSON(*i.Reclaimable)
		out.Reclaimable = &n
	}
	for _, c := range i.Clusters {
		out.Clusters = append(out.Clusters, newClusterInfoJSON(c))
	}
	return out
}

func newClusterInfoJSON(c repo.ClusterInfo) clusterInfoJSON {
	out := clusterInfoJSON{Name: c.Name, SystemIdentifier: c.SystemIdentifier, SizeBytes: c.SizeBytes, Packs: packsJSON(c.Packs),
		Ratio: ratio(c.SizeBytes, c.Packs.Bytes), WALSegments: c.WALSegments, WALBytes: c.WALBytes,
		WALRatio: ratio(int64(c.WALSegments)*int64(c.SegmentSize), c.WALSegmentBytes), Backups: []backupInfoJSON{}}
	for _, b := range c.Backups {
		started := b.StartedAt.UTC()
		if out.Oldest == nil {
			out.Oldest = &started
		}
		out.Newest = &started
		out.Backups = append(out.Backups, backupInfoJSON{b.ID, started, b.SizeBytes, b.LiveBytes, packsJSON(b.Unique), b.SharedBytes,
			ratio(b.SizeBytes, b.LiveBytes)})
	}
	return out
}

// ratio says how many times smaller something is stored than it is, to one place behind the point; nil where nothing is stored.
func ratio(is, stored int64) *float64 {
	if stored == 0 || is == 0 {
		return nil
	}
	r := math.Round(10*float64(is)/float64(stored)) / 10
	return &r
}

func ratioText(r *float64) string {
	if r == nil {
		return "-"
	}
	return strconv.FormatFloat(*r, 'f', 1, 64)
}

func (i infoJSON) print(w io.Writer) error {
	fmt.Fprintf(w, "Repository %s at %s\nMade %s, encryption: %s\n", i.ID, i.URL, clock(i.CreatedAt), i.Encryption)
	for _, c := range i.Clusters {
		if err := c.print(w); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "\nStored: %s, of which packs %s, WAL %s, documents %s\n", size(i.StoredBytes), size(i.Packs.Bytes), size(i.WALBytes), size(i.OtherBytes))
	fmt.Fprintf(w, "Backups: %s, which is %s times the packs\n", size(i.SizeBytes), ratioText(i.Ratio))
	if i.Unfinished.Packs > 0 {
		fmt.Fprintf(w, "Unfinished: %d packs, %s, of backups that are being made or were killed\n", i.Unfinished.Packs, size(i.Unfinished.Bytes))
	}
	if i.Reclaimable == nil {
		_, err := fmt.Fprintln(w, "Reclaimable: not known, for something could not be read")
		return err
	}
	_, err := fmt.Fprintf(w, "Reclaimable: %d packs, %s, which no backup needs: repo prune --yes deletes them\n", i.Reclaimable.Packs, size(i.Reclaimable.Bytes))
	return err
}

func (c clusterInfoJSON) print(w io.Writer) error {
	fmt.Fprintf(w, "\nCluster %s, system identifier %d\n", c.Name, c.SystemIdentifier)
	if len(c.Backups) == 0 {
		fmt.Fprintln(w, "No backups yet.")
	} else {
		t := table{{"BACKUP", "STARTED", ">SIZE", ">LIVE", ">RATIO", ">UNIQUE", ">SHARED"}}
		for _, b := range c.Backups {
			t.row(b.ID, clock(b.StartedAt), size(b.SizeBytes), size(b.LiveBytes), ratioText(b.Ratio), size(b.Unique.Bytes), size(b.SharedBytes))
		}
		if err := t.print(w); err != nil {
			return err
		}
		fmt.Fprintf(w, "Backups: %d from %s to %s, %s, in packs of %s: ratio %s\n", len(c.Backups), clock(*c.Oldest), clock(*c.Newest),
			size(c.SizeBytes), size(c.Packs.Bytes), ratioText(c.Ratio))
	}
	_, err := fmt.Fprintf(w, "WAL: %d segments, %s: ratio %s\n", c.WALSegments, size(c.WALBytes), ratioText(c.WALRatio))
	return err
}
