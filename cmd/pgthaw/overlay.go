package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
	"pgthaw/repo"
)

func overlayCommand() *cli.Command {
	return &cli.Command{
		Name: "overlay", Usage: "look after a thawed data directory",
		Subcommands: []*cli.Command{overlayStatusCommand(), overlayResumeCommand(), overlayFinishCommand(), overlayDiscardCommand(), overlayServeCommand()},
	}
}

func overlayStatusCommand() *cli.Command {
	return &cli.Command{
		Name: "status", Usage: "show how much of a thawed directory is on disk", ArgsUsage: "DIR",
		Description: "The state is hydrating, hydrated, or lost: then the daemon is gone, and \"pgthaw overlay resume\" takes the directory up again.",
		Action:      overlayStatus,
	}
}

func overlayStatus(c *cli.Context) error {
	args, err := arguments(c, "DIR")
	if err != nil {
		return err
	}
	s, err := recovery.Status(c.Context, args[0])
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, s)
	}
	return printStatus(c.App.Writer, s)
}

func overlayResumeCommand() *cli.Command {
	return &cli.Command{
		Name: "resume", Usage: "take up a thawed directory after a crash or a reboot", ArgsUsage: "DIR",
		Description: "Unless a key is given, the key files that thaw used are used again.",
		Flags:       []cli.Flag{readTimeoutFlag()},
		Action:      overlayResume,
	}
}

func overlayResume(c *cli.Context) error {
	args, err := arguments(c, "DIR")
	if err != nil {
		return err
	}
	return recovery.Resume(c.Context, args[0], spawnOverlay(c))
}

func overlayFinishCommand() *cli.Command {
	return &cli.Command{
		Name: "finish", Usage: "copy the rest to disk and take the mount off", ArgsUsage: "DIR",
		Description: "Afterwards DIR is an ordinary data directory that needs pgthaw no more. PostgreSQL must be stopped for the last step:\n" +
			"--restart does that when all is copied, and starts it again as it was started, usually within a second.",
		Flags:  []cli.Flag{&cli.BoolFlag{Name: "restart", Usage: "restart PostgreSQL around the last step, if it runs there"}},
		Action: overlayFinish,
	}
}

func overlayFinish(c *cli.Context) error {
	args, err := arguments(c, "DIR")
	if err != nil {
		return err
	}
	p := newProgress(c)
	update := func(g recovery.Progress) { p.update(g.Phase, g.Done, g.Total) }
	if !c.Bool("restart") {
		defer p.done()
		return recovery.Finish(c.Context, args[0], update)
	}
	downtime, err := recovery.Restart(c.Context, args[0], update)
	p.done()
	if err != nil || downtime == 0 {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, struct {
			DowntimeMS int64 `json:"downtime_ms"`
		}{downtime.Milliseconds()})
	}
	_, err = fmt.Fprintf(c.App.Writer, "PostgreSQL was restarted; it accepted no connections for %.2f s\n", downtime.Seconds())
	return err
}

func overlayDiscardCommand() *cli.Command {
	return &cli.Command{
		Name: "discard", Usage: "take the mount off and throw the copy away", ArgsUsage: "DIR",
		Description: "PostgreSQL must be stopped. The backup in the repository is not touched.",
		Action:      overlayDiscard,
	}
}

func overlayDiscard(c *cli.Context) error {
	args, err := arguments(c, "DIR")
	if err != nil {
		return err
	}
	return recovery.Discard(c.Context, args[0])
}

// overlayServeCommand is the daemon behind a thawed directory. thaw and resume start it.
func overlayServeCommand() *cli.Command {
	return &cli.Command{Name: "serve", Hidden: true, ArgsUsage: "DIR", Flags: []cli.Flag{readyFlag(), readTimeoutFlag()}, Action: overlayServe}
}

func overlayServe(c *cli.Context) error {
	args, err := arguments(c, "DIR")
	if err != nil {
		return err
	}
	open := func(ctx context.Context, url string, k recovery.KeyFiles) (*repo.Repository, error) {
		return notReplaced(openRecorded(ctx, c, url, k))
	}
	return announced(c, func(ready func() error) error {
		return mountFailed(recovery.Serve(c.Context, args[0], open, ready, logger(c)))
	})
}

func printStatus(w io.Writer, s recovery.OverlayStatus) error {
	t := table{{"Directory", s.Target}, {"State", s.State}, {"On disk", onDisk(s)}}
	if s.Hydrate != "" {
		t.row("Hydration", pace(s))
	}
	if s.Backup != "" {
		t.row("Backup", s.Backup+" of "+s.Cluster)
	}
	if s.PID != 0 {
		t.row("Daemon", fmt.Sprintf("process %d, %s read from the repository", s.PID, size(s.RepositoryBytesRead)))
	}
	if s.ServerPID != 0 {
		t.row("PostgreSQL", fmt.Sprintf("process %d", s.ServerPID))
	}
	if len(s.Native) > 0 {
		t.row("Without mount", strings.Join(below(s.Target, s.Native), ", "))
	}
	for _, h := range s.Held {
		t.row("Still mounted", below(s.Target, []string{h.Dir})[0]+": "+heldBy(h.Processes))
	}
	if w := s.Waiting; w != nil {
		t.row("Waiting", fmt.Sprintf("for the repository, since %s: %s", clock(w.Since), w.For))
	}
	switch {
	case s.LastErrorAt != nil:
		t.row("Last error", fmt.Sprintf("%s: %s", clock(*s.LastErrorAt), s.LastError))
	case s.LastError != "":
		t.row("Last error", s.LastError)
	}
	if s.State == "lost" {
		t.row("Next step", "pgthaw overlay resume "+shellQuote(s.Target))
	}
	return t.print(w)
}

// below shortens the directories in dir.
func below(dir string, paths []string) (short []string) {
	for _, path := range paths {
		short = append(short, strings.TrimPrefix(path, dir+"/"))
	}
	return short
}

func heldBy(processes []recovery.HeldBy) string {
	if len(processes) == 0 {
		return "files were opened before it was on disk"
	}
	var names []string
	for _, p := range processes {
		names = append(names, fmt.Sprintf("%d (%s)", p.PID, p.Command))
	}
	return "files are open since before it was on disk, by process " + strings.Join(names, ", ")
}

// pace writes "auto, 312 MB/s, 7 s left".
func pace(s recovery.OverlayStatus) string {
	text := s.Hydrate
	switch s.Hydrate {
	case "off":
		return "off: what is read or written is copied"
	case "held":
		return "begins when recovery has ended"
	case "auto":
	default:
		text = "at most " + s.Hydrate + " a second"
	}
	if s.BytesPerSecond > 0 {
		text += fmt.Sprintf(", %s/s, %s left", size(s.BytesPerSecond), duration(time.Duration(s.SecondsLeft)*time.Second))
	}
	return text
}

func onDisk(s recovery.OverlayStatus) string {
	if s.BytesTotal == 0 {
		return map[bool]string{true: "all of it", false: "not known"}[s.State == "hydrated"]
	}
	return fmt.Sprintf("%s of %s (%.0f %%), %d of %d files", size(s.BytesHydrated), size(s.BytesTotal),
		100*float64(s.BytesHydrated)/float64(s.BytesTotal), s.FilesWhole, s.FilesTotal)
}
