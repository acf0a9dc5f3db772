package main

import (
	"errors"
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

func repoPruneCommand() *cli.Command {
	return &cli.Command{
		Name: "prune", Usage: "show which backups and WAL are not kept, and with --yes delete them", ArgsUsage: "[CLUSTER...]",
		Description: "A backup is kept if any rule keeps it, is held, or is its cluster's newest. Without a --keep flag all are, and only what\n" +
			"is dead already is reclaimed. A backup that is deleted cannot be listed or opened from then on; what it consists of goes with the next\n" +
			"prune after the grace period. WAL that no backup can use goes. Packs of which half or more is dead are made smaller.\n" +
			"Without --yes nothing is changed.\n" +
			"A DURATION is a number and min, h, d or w. Days, weeks, months and years are those of the local zone.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "keep-last", Usage: "keep the newest `N`", DefaultText: "no such rule"},
			text("keep-within", "keep those that ended within a `DURATION` from now"),
			&cli.IntFlag{Name: "keep-daily", Usage: "keep the newest of each of the last `N` days that have a backup", DefaultText: "no such rule"},
			&cli.IntFlag{Name: "keep-weekly", Usage: "the same of `N` weeks", DefaultText: "no such rule"},
			&cli.IntFlag{Name: "keep-monthly", Usage: "the same of `N` months", DefaultText: "no such rule"},
			&cli.IntFlag{Name: "keep-yearly", Usage: "the same of `N` years", DefaultText: "no such rule"},
			text("keep-window", "keep what recovery to any point within a `DURATION` from now needs, with the WAL; of other backups only their own WAL"),
			&cli.StringFlag{Name: "grace", Usage: "leave what is deleted for a `DURATION` to those who use it", DefaultText: "24h"},
			&cli.StringFlag{Name: "repack-limit", Usage: "read and write at most `SIZE` of packs to make mostly dead ones smaller; 0: none", Value: "10GB"},
			toggle("yes", "do it"),
		},
		Action: repoPrune,
	}
}

func repoPrune(c *cli.Context) error {
	o, err := pruneOptions(c)
	if err != nil {
		return err
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	for _, name := range o.Clusters {
		if _, err := r.Cluster(c.Context, name); err != nil {
			return err
		}
	}
	shown := newProgress(c)
	shown.objects = true
	o.Progress = shown.update
	report, err := r.Prune(c.Context, o)
	shown.done()
	if err != nil {
		return err
	}
	out := newPruneJSON(o, report)
	if c.Bool("json") {
		err = printJSON(c.App.Writer, out)
	} else {
		err = out.print(c.App.Writer)
	}
	err = errors.Join(err, report.Unrepacked)
	if len(report.Unexplained) > 0 {
		err = errors.Join(err, fmt.Errorf("%w: the manifest of backup %s is missing: no pack is deleted", repo.ErrCorrupt, report.Unexplained[0]))
	}
	return err
}

func pruneOptions(c *cli.Context) (o repo.PruneOptions, err error) {
	o = repo.PruneOptions{Clusters: c.Args().Slice(), Grace: repo.DefaultGrace, Apply: c.Bool("yes")}
	p := &o.Policy
	for name, to := range map[string]*int{"keep-last": &p.Last, "keep-daily": &p.Daily, "keep-weekly": &p.Weekly, "keep-monthly": &p.Monthly, "keep-yearly": &p.Yearly} {
		if *to = c.Int(name); c.IsSet(name) && *to < 1 {
			return o, usage("--%s %d: must be at least 1", name, *to)
		}
	}
	for name, to := range map[string]*time.Duration{"keep-within": &p.Within, "keep-window": &p.Window, "grace": &o.Grace} {
		if !c.IsSet(name) {
			continue
		}
		if *to, err = parseDuration(c.String(name)); err != nil {
			return o, usage("--%s: %w", name, err)
		}
		if *to == 0 && name != "grace" {
			return o, usage("--%s %s: must be more than nothing", name, c.String(name))
		}
	}
	if o.RepackLimit, err = parseSize(c.String("repack-limit")); err != nil {
		return o, usage("--repack-limit: %w", err)
	}
	return o, nil
}

// parseSize reads a size with one of PostgreSQL's units, which are powers of 1024: "500MB", "10GB". A bare 0 has none.
func parseSize(s string) (int64, error) {
	digits := strings.TrimRight(s, "BkMGT")
	unit, known := map[string]int64{"kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}[s[len(digits):]]
	n, err := strconv.ParseUint(digits, 10, 20)
	if s == "0" {
		return 0, nil
	}
	if !known || err != nil {
		return 0, fmt.Errorf("%q is no size: it must be a number and kB, MB, GB or TB", s)
	}
	return int64(n) * unit, nil
}

// parseDuration reads a number and a unit: "14d", "2w", "36h", "90min". m alone could be months.
func parseDuration(s string) (time.Duration, error) {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyz")
	unit, known := map[string]time.Duration{"s": time.Second, "min": time.Minute, "h": time.Hour, "d": 24 * time.Hour, "w": 7 * 24 * time.Hour}[s[len(digits):]]
	n, err := strconv.ParseUint(digits, 10, 16)
	if s == "0" {
		return 0, nil
	}
	if !known || err != nil {
		return 0, fmt.Errorf("%q is no duration: it must be a number and s, min, h, d or w", s)
	}
	return time.Duration(n) * unit, nil
}

// pruneJSON is what a prune did, or would do.
type pruneJSON struct {
	Done        bool              `json:"done"`
	Rules       bool              `json:"rules"` // whether any was given
	Backups     []decisionJSON    `json:"backups"`
	Waiting     []repo.BackupName `json:"waiting"`
	Collected   []repo.BackupName `json:"collected"`
	Unexplained []repo.BackupName `json:"unexplained"`
	GivenUp     []givenUpJSON     `json:"given_up"`
	Packs       packsJSON         `json:"packs"`
	Later       packsJSON         `json:"packs_later"`
	Repacked    repackedJSON      `json:"repacked"`
	WAL         []walRangeJSON    `json:"wal"`
	WALSpared   []walSparedJSON   `json:"wal_spared"`
}

// decisionJSON is a backup and what becomes of it.
type decisionJSON struct {
	Cluster    string    `json:"cluster"`
	Backup     string    `json:"backup"`
	StoppedAt  time.Time `json:"stopped_at"`
	SizeBytes  int64     `json:"size_bytes"`
	Keep       bool      `json:"keep"`
	Standalone bool      `json:"standalone"`
	Reasons    []string  `json:"reasons"`
}

// repackedJSON is what became of mostly dead packs.
type repackedJSON struct {
	Packs        int   `json:"packs"`
	ReadBytes    int64 `json:"read_bytes"`
	WrittenBytes int64 `json:"written_bytes"`
	WonBytes     int64 `json:"won_bytes"`
	Maps         int   `json:"maps"`
	LeftPacks    int   `json:"left_packs"`
}

type givenUpJSON struct {
	Operation string    `json:"operation"`
	Host      string    `json:"host"`
	PID       int       `json:"pid"`
	StartedAt time.Time `json:"started_at"`
}

// walRangeJSON is a run of WAL files that share a fate.
type walRangeJSON struct {
	Cluster  string      `json:"cluster"`
	Timeline pg.Timeline `json:"timeline"`
	First    string      `json:"first"`
	Last     string      `json:"last"`
	Files    int         `json:"files"`
	Bytes    int64       `json:"bytes"`
	Fate     string      `json:"fate"` // "keep", "later" or "delete"
	Reason   string      `json:"reason"`
}

type walSparedJSON struct {
	Cluster string `json:"cluster"`
	Reason  string `json:"reason"`
}

var walFates = map[repo.WALFate]string{repo.WALStays: "keep", repo.WALWaits: "later", repo.WALGoes: "delete"}

func newPruneJSON(o repo.PruneOptions, r *repo.PruneReport) pruneJSON {
	p := r.Repacked
	out := pruneJSON{Done: o.Apply, Rules: o.Policy != (repo.Policy{}), Backups: []decisionJSON{}, GivenUp: []givenUpJSON{},
		Waiting: orEmpty(r.Waiting), Collected: orEmpty(r.Collected), Unexplained: orEmpty(r.Unexplained), Packs: packsJSON(r.Packs),
		Later: packsJSON{r.Dead.Packs + r.Later.Packs, r.Dead.Bytes + r.Later.Bytes}, Repacked: repackedJSON{p.Packs, p.Read, p.Written, p.Won, p.Maps, p.Left}, WAL: []walRangeJSON{}, WALSpared: []walSparedJSON{}}
	for _, d := range r.Decisions {
		out.Backups = append(out.Backups, decisionJSON{d.Backup.Cluster, d.Backup.ID, d.Backup.StoppedAt.UTC(), d.Backup.SizeBytes, d.Keep, d.Standalone, d.Reasons})
	}
	for _, s := range r.GivenUp {
		out.GivenUp = append(out.GivenUp, givenUpJSON{s.Operation, s.Host, s.PID, s.StartedAt})
	}
	for _, w := range r.WAL {
		out.WAL = append(out.WAL, walRangeJSON{w.Cluster, w.Timeline, w.First, w.Last, w.Files, w.Bytes, walFates[w.Fate], w.Reason})
	}
	for _, s := range r.WALSpared {
		out.WALSpared = append(out.WALSpared, walSparedJSON(s))
	}
	return out
}

func orEmpty(names []repo.BackupName) []repo.BackupName { return append([]repo.BackupName{}, names...) }

func (p pruneJSON) print(w io.Writer) error {
	for _, cluster := range p.clusters() {
		fmt.Fprintf(w, "Cluster %s\n", cluster)
		if err := errors.Join(p.printBackups(w, cluster), p.printWAL(w, cluster)); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	p.printRest(w)
	_, err := fmt.Fprintln(w, p.summary())
	return err
}

func (p pruneJSON) clusters() (names []string) {
	for _, b := range p.Backups {
		names = append(names, b.Cluster)
	}
	for _, r := range p.WAL {
		names = append(names, r.Cluster)
	}
	for _, s := range p.WALSpared {
		names = append(names, s.Cluster)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (p pruneJSON) printBackups(w io.Writer, cluster string) error {
	t := table{{"BACKUP", "ENDED", ">SIZE", "FATE", "WHY"}}
	for _, b := range p.Backups {
		if b.Cluster == cluster {
			t.row(b.Backup, clock(b.StoppedAt), size(b.SizeBytes), b.fate(), strings.Join(b.Reasons, "; "))
		}
	}
	if len(t) == 1 {
		return nil
	}
	return t.print(w)
}

func (b decisionJSON) fate() string {
	switch {
	case b.Standalone:
		return "keep, to its own end only"
	case b.Keep:
		return "keep"
	default:
		return "delete"
	}
}

func (p pruneJSON) printWAL(w io.Writer, cluster string) error {
	for _, s := range p.WALSpared {
		if s.Cluster == cluster {
			fmt.Fprintf(w, "All WAL is kept for now: %s\n", s.Reason)
		}
	}
	t := table{{"WAL FROM", "TO", ">FILES", ">STORED", "FATE", "WHY"}}
	for _, r := range p.WAL {
		if r.Cluster == cluster {
			t.row(r.First, r.Last, strconv.Itoa(r.Files), size(r.Bytes), r.Fate, r.Reason)
		}
	}
	if len(t) == 1 {
		return nil
	}
	return t.print(w)
}

// printRest tells of what is deleted already.
func (p pruneJSON) printRest(w io.Writer) {
	for _, b := range p.Collected {
		fmt.Fprintf(w, "Backup %s was deleted, and goes\n", b)
	}
	for _, b := range p.Waiting {
		fmt.Fprintf(w, "Backup %s is deleted, and goes when the grace period is over and nobody uses it\n", b)
	}
	for _, g := range p.GivenUp {
		fmt.Fprintf(w, "Given up: %s by process %d on %s, since %s, which shows no sign of life\n", g.Operation, g.PID, g.Host, clock(g.StartedAt))
	}
}

// summary is the last line.
func (p pruneJSON) summary() string {
	var deleted int
	for _, b := range p.Backups {
		if !b.Keep {
			deleted++
		}
	}
	wal := map[string]packsJSON{}
	for _, r := range p.WAL {
		sum := wal[r.Fate]
		wal[r.Fate] = packsJSON{sum.Packs + r.Files, sum.Bytes + r.Bytes}
	}
	goes, later := wal["delete"], wal["later"]
	s := fmt.Sprintf("%d of %d backups are not kept. Reclaimed: %s in %d packs, %s in %d WAL files; later: %s in %d packs, %s in %d WAL files.",
		deleted, len(p.Backups), size(p.Packs.Bytes), p.Packs.Packs, size(goes.Bytes), goes.Packs,
		size(p.Later.Bytes), p.Later.Packs, size(later.Bytes), later.Packs)
	if r := p.Repacked; r.Packs > 0 || r.LeftPacks > 0 {
		s += fmt.Sprintf("\n%d mostly dead packs made smaller by %s: %s read, %s written.", r.Packs, size(r.WonBytes), size(r.ReadBytes), size(r.WrittenBytes))
	}
	if left := p.Repacked.LeftPacks; left > 0 {
		s += fmt.Sprintf(" %d more are left for the next prune, by --repack-limit.", left)
	}
	if !p.Rules {
		s += "\nNo --keep flag was given: every backup is kept."
	}
	if !p.Done {
		s += "\nNothing was changed. --yes does it."
	}
	return s
}
