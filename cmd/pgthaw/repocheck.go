package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

func repoCheckCommand() *cli.Command {
	return &cli.Command{
		Name: "check", Usage: "prove the repository, and say what damage costs",
		Description: "Without flags it checks structure: every cluster, manifest and pack list, that each pack is there and has its size, and that\n" +
			"the WAL has no gap. --maps adds each pack's table of contents, every directory and file map, and the place of each chunk that they\n" +
			"name. --read-data adds every byte, --read-data=5% about a twentieth, another every day. Goes on after what is damaged, names all of\n" +
			"it, and says what it costs. --repair then makes anew what the rest of the repository determines, sees to it that no new backup builds\n" +
			"on what is lost, and says what to do next. It deletes nothing that is whole.",
		Flags: []cli.Flag{
			toggle("maps", "verify every directory and file map, too"),
			&readDataFlag{&cli.GenericFlag{Name: "read-data", Value: &percentage{},
				Usage: "read and verify every byte, too; =5% about a twentieth of packs and WAL, another every day"}},
			toggle("repair", "mend what can be mended of what is found"),
		},
		Action: repoCheck,
	}
}

// readDataFlag may have a value, behind "=", but need not.
type readDataFlag struct{ *cli.GenericFlag }

func (readDataFlag) TakesValue() bool { return false }

// percentage is the value of --read-data: 0 unless the flag is given, 100 if it has no value.
type percentage struct{ percent float64 }

func (p *percentage) IsBoolFlag() bool { return true } // flag: --name is then the same as --name=true

func (p *percentage) String() string { return "" }

func (p *percentage) Set(s string) (err error) {
	if s == "true" {
		s = "100%"
	}
	p.percent, err = strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
	if err != nil || !(p.percent >= 0.01 && p.percent <= 100) {
		return fmt.Errorf("%q is no percentage from 0.01%% to 100%%", s)
	}
	return nil
}

// findingJSON is one thing that is wrong, and what it costs.
type findingJSON struct {
	Object  string         `json:"object"`
	Cluster string         `json:"cluster,omitempty"`
	Error   string         `json:"error"`
	Cost    string         `json:"cost,omitempty"`
	Backups []affectedJSON `json:"backups,omitempty"`
	Window  *lostJSON      `json:"lost_window,omitempty"`

	Recorded bool        `json:"recorded"`
	Repair   *remedyJSON `json:"repair,omitempty"` // with --repair
}

// remedyJSON is what was done about a finding.
type remedyJSON struct {
	Outcome repo.Outcome `json:"outcome"`
	Next    string       `json:"next,omitempty"`
}

// affectedJSON is a backup that something damaged is part of.
type affectedJSON struct {
	Cluster    string   `json:"cluster"`
	Backup     string   `json:"backup"`
	Files      []string `json:"files,omitempty"`
	FilesTotal int      `json:"files_total"`
}

// lostJSON is a time to which nothing can be recovered.
type lostJSON struct {
	FromLSN  pg.LSN     `json:"from_lsn"`
	FromTime *time.Time `json:"from_time,omitempty"`
	ToLSN    *pg.LSN    `json:"to_lsn,omitempty"`
	ToTime   *time.Time `json:"to_time,omitempty"`
	Backups  []string   `json:"backups"`
}

type checkJSON struct {
	Clusters  int           `json:"clusters"`
	Backups   int           `json:"backups"`
	Packs     int           `json:"packs"`
	Maps      int           `json:"maps"`
	WALFiles  int           `json:"wal_files"`
	PacksRead int           `json:"packs_read"`
	WALRead   int           `json:"wal_files_read"`
	Bytes     int64         `json:"bytes_verified"`
	Part      string        `json:"part,omitempty"`
	Findings  []findingJSON `json:"findings"`
	Notes     []findingJSON `json:"notes"`
}

func repoCheck(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	r, err := openToLook(c)
	if err != nil {
		return err
	}
	defer r.Close()
	p := newProgress(c)
	o := repo.CheckOptions{Maps: c.Bool("maps"), Progress: p.update}
	if percent := c.Generic("read-data").(*percentage).percent; percent > 0 {
		o.ReadData, o.Sample = true, repo.SampleOf(percent, time.Now())
	}
	out := checkJSON{Findings: []findingJSON{}, Notes: []findingJSON{}}
	lost, err := r.Losses(c.Context)
	if err != nil {
		return err
	}
	for _, l := range lost {
		cost := "What was stored until then, and after what is there now, is missing."
		if l.Cluster == "" {
			cost = "What is there is not what this host has stored."
		}
		out.add(repo.Finding{Object: l.Object, Cluster: l.Cluster, Err: l, Cost: cost})
	}
	done, err := checkOrRepair(c, r, o, &out, len(lost) == 0)
	p.done()
	out.sort()
	out.count(done, o.Sample)
	if c.Bool("json") {
		err = firstOf(err, printJSON(c.App.Writer, out))
	} else {
		err = firstOf(err, out.print(c.App.Writer, o, err == nil))
	}
	if left := out.left(); err == nil && left > 0 {
		return fmt.Errorf("%w: %s", repo.ErrCorrupt, findings(left))
	}
	return err
}

// checkOrRepair does what the flags say. A repository that is not as this host has seen it is only looked at.
func checkOrRepair(c *cli.Context, r *repo.Repository, o repo.CheckOptions, out *checkJSON, asSeen bool) (repo.Checked, error) {
	if !c.Bool("repair") {
		return r.Check(c.Context, o, func(f repo.Finding) { out.add(f) })
	}
	if !asSeen {
		return r.Check(c.Context, o, func(f repo.Finding) {
			out.add(f).Repair = &remedyJSON{repo.Left, "The repository is not as this host has seen it: find out why, then \"pgthaw repo accept\", then repair."}
		})
	}
	return r.Repair(c.Context, o, func(m repo.Remedy) {
		out.add(m.Finding).Repair = &remedyJSON{m.Outcome, m.Next}
	})
}

// left is how many findings are not whole again.
func (k *checkJSON) left() (n int) {
	for _, f := range k.Findings {
		if f.Repair == nil || f.Repair.Outcome != repo.Repaired {
			n++
		}
	}
	return n
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// add enters a finding, and returns where it is until the next one is entered.
func (k *checkJSON) add(f repo.Finding) *findingJSON {
	j := findingJSON{Object: f.Object, Cluster: f.Cluster, Error: f.Err.Error(), Cost: f.Cost, Recorded: f.Recorded}
	for _, a := range f.Backups {
		j.Backups = append(j.Backups, affectedJSON{a.Cluster, a.Backup, a.Files, a.Total})
	}
	if w := f.Window; w != nil {
		j.Window = &lostJSON{FromLSN: w.From.LSN, Backups: w.Backups}
		if !w.From.Time.IsZero() {
			j.Window.FromTime = &w.From.Time
		}
		if w.To.LSN != 0 {
			j.Window.ToLSN, j.Window.ToTime = &w.To.LSN, &w.To.Time
		}
	}
	to := &k.Findings
	if f.Note {
		to = &k.Notes
	}
	*to = append(*to, j)
	return &(*to)[len(*to)-1]
}

// sort puts what is found in the order of keys: WAL objects are read several at a time.
func (k *checkJSON) sort() {
	for _, list := range [][]findingJSON{k.Findings, k.Notes} {
		slices.SortStableFunc(list, func(a, b findingJSON) int { return strings.Compare(a.Object, b.Object) })
	}
}

func (k *checkJSON) count(done repo.Checked, s repo.Sample) {
	k.Clusters, k.Backups, k.Packs, k.Maps = done.Clusters, done.Backups, done.Packs, done.Maps
	k.WALFiles, k.PacksRead, k.WALRead, k.Bytes = done.WALFiles, done.PacksRead, done.WALRead, done.Bytes
	if s.Parts > 1 {
		k.Part = fmt.Sprintf("%d of %d", s.Part+1, s.Parts)
	}
}

// print writes what was found, and what was looked at if the check came to its end.
func (k checkJSON) print(w io.Writer, o repo.CheckOptions, whole bool) error {
	for _, f := range k.Findings {
		f.print(w, "")
	}
	for _, f := range k.Notes {
		f.print(w, "note: ")
	}
	if !whole {
		return nil
	}
	fmt.Fprintf(w, "Checked: %d clusters, %d backups, %d packs, %d WAL files", k.Clusters, k.Backups, k.Packs, k.WALFiles)
	if o.Maps || o.ReadData {
		fmt.Fprintf(w, ", %d directories and file maps", k.Maps)
	}
	fmt.Fprintln(w)
	switch {
	case k.Part != "":
		fmt.Fprintf(w, "Read: part %s, which is %d of %d packs and %d of %d WAL files, %s. Tomorrow it is another part.\n",
			k.Part, k.PacksRead, k.Packs, k.WALRead, k.WALFiles, size(k.Bytes))
	case o.ReadData:
		fmt.Fprintf(w, "Read: every byte of %d packs and %d WAL files, %s\n", k.PacksRead, k.WALRead, size(k.Bytes))
	case o.Maps:
		fmt.Fprintln(w, "Not read: the contents of files and WAL (--read-data)")
	default:
		fmt.Fprintln(w, "Not read: tables of contents, directories and file maps (--maps), the contents of files and WAL (--read-data)")
	}
	_, err := fmt.Fprintln(w, k.summary())
	return err
}

// summary is "3 findings, of which 2 are repaired".
func (k checkJSON) summary() string {
	s, n := findings(len(k.Findings)), len(k.Findings)-k.left()
	switch n {
	case 0:
		return s
	case 1:
		return s + ", of which 1 is repaired"
	default:
		return fmt.Sprintf("%s, of which %d are repaired", s, n)
	}
}

func findings(n int) string {
	switch n {
	case 0:
		return "Nothing is damaged"
	case 1:
		return "1 finding"
	default:
		return fmt.Sprintf("%d findings", n)
	}
}

// print writes a finding: what is damaged, then indented what that costs, and whom.
func (f findingJSON) print(w io.Writer, prefix string) {
	fmt.Fprintf(w, "%s%s\n", prefix, f.Error)
	if f.Cost != "" {
		fmt.Fprintf(w, "    %s\n", f.Cost)
	}
	for _, a := range f.Backups {
		fmt.Fprintf(w, "    backup %s of %s%s\n", a.Backup, a.Cluster, fileList(a.Files, a.FilesTotal))
	}
	if f.Window != nil {
		fmt.Fprintf(w, "    No recovery of %s %s\n", f.Cluster, f.Window)
	}
	switch {
	case f.Repair != nil:
		f.Repair.print(w)
	case f.Recorded:
		fmt.Fprintln(w, "    recorded as damaged: no new backup builds on it")
	}
}

// print writes what was done, and what is to be done.
func (r *remedyJSON) print(w io.Writer) {
	text := map[repo.Outcome]string{
		repo.Repaired: "repaired: it is whole again",
		repo.Recorded: "recorded as damaged: no new backup builds on it",
		repo.Removed:  "removed, to make room for the file itself",
		repo.Left:     "left as it is",
	}[r.Outcome]
	fmt.Fprintf(w, "    %s\n", text)
	if r.Next != "" {
		fmt.Fprintf(w, "    next: %s\n", r.Next)
	}
}

func fileList(files []string, total int) string {
	if len(files) == 0 {
		return ""
	}
	s := ": " + strings.Join(files, ", ")
	if more := total - len(files); more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}

// String is "behind 0/5000000 (last commit before it: ...) from these backups: ...; again from 0/9000100 (...) on".
func (l *lostJSON) String() string {
	s := fmt.Sprintf("behind %s", l.FromLSN)
	if l.FromTime != nil {
		s += fmt.Sprintf(" (last commit before it: %s)", clock(*l.FromTime))
	}
	if l.ToLSN != nil {
		s += fmt.Sprintf(", up to %s (%s), where the next backup ends,", *l.ToLSN, clock(*l.ToTime))
	}
	return s + " from " + strings.Join(l.Backups, ", ")
}
