package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

func repoCheckCommand() *cli.Command {
	return &cli.Command{
		Name: "check", Usage: "prove that every backup is whole",
		Description: "Reads every manifest, directory and file map, and sees that every pack and WAL segment they need is there.\n" +
			"With --read-data also every byte of every file, and the WAL. Goes on after what is damaged, and names all of it.",
		Flags:  []cli.Flag{toggle("read-data", "read and verify every byte, too")},
		Action: repoCheck,
	}
}

// findingJSON is one thing that is wrong.
type findingJSON struct {
	Cluster string `json:"cluster"`
	Backup  string `json:"backup,omitempty"`
	Path    string `json:"path,omitempty"`
	Error   string `json:"error"`
}

type checkJSON struct {
	Backups  int           `json:"backups"`
	Files    int           `json:"files"`
	WALFiles int           `json:"wal_files"`
	Bytes    int64         `json:"bytes_verified"`
	Findings []findingJSON `json:"findings"`
}

func repoCheck(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	out := checkJSON{Findings: []findingJSON{}}
	done, err := r.Check(c.Context, repo.CheckOptions{ReadData: c.Bool("read-data")}, func(f repo.Finding) {
		out.Findings = append(out.Findings, findingJSON{f.Cluster, f.Backup, f.Path, f.Err.Error()})
	})
	if err != nil {
		return err
	}
	out.Backups, out.Files, out.WALFiles, out.Bytes = done.Backups, done.Files, done.WALFiles, done.Bytes
	if c.Bool("json") {
		err = printJSON(c.App.Writer, out)
	} else {
		err = out.print(c.App.Writer)
	}
	if err == nil && len(out.Findings) > 0 {
		return fmt.Errorf("%w: %d findings", repo.ErrCorrupt, len(out.Findings))
	}
	return err
}

func (k checkJSON) print(w io.Writer) error {
	for _, f := range k.Findings {
		fmt.Fprintf(w, "%s\n", f)
	}
	_, err := fmt.Fprintf(w, "%d backups, %d files, %d WAL files checked, %s read and verified: %d findings\n",
		k.Backups, k.Files, k.WALFiles, size(k.Bytes), len(k.Findings))
	return err
}

// String is "main 20261120T143005Z-1a2b base/5/1259: repository damaged: ...", as far as there is each part.
func (f findingJSON) String() string {
	where := f.Cluster
	for _, part := range []string{f.Backup, f.Path} {
		if part != "" {
			where += " " + part
		}
	}
	return where + ": " + f.Error
}
