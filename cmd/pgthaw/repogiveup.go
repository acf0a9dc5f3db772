package main

import (
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

func repoGiveUpCommand() *cli.Command {
	return &cli.Command{
		Name: "give-up", Usage: "do without a backup or a session that is damaged", ArgsUsage: "OBJECT",
		Description: "OBJECT is one that \"pgthaw repo check\" names: a backup's manifest (backups/CLUSTER/BACKUP.json), or a session (sessions/ID.begun).\n" +
			"While it is damaged prune reclaims nothing, for what it protects is not known. Says what is lost, and with --yes gives it up.\n" +
			"Refuses what can be read, and what the storage does not answer for; a backup that is held; and a session that may be at work, as its\n" +
			"last sign of life is less than two days old. No other backup loses anything.",
		Flags:  []cli.Flag{toggle("yes", "give it up; without it nothing is changed")},
		Action: repoGiveUp,
	}
}

func repoGiveUp(c *cli.Context) error {
	args, err := arguments(c, "OBJECT")
	if err != nil {
		return err
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	given, err := r.GiveUp(c.Context, args[0], c.Bool("yes"))
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, newGiveUpJSON(given, c.Bool("yes")))
	}
	_, err = fmt.Fprintf(c.App.Writer, "%s\n%s\n%s\n", given.Err, costOfGivingUp(given), map[bool]string{true: "Given up.",
		false: "Nothing was changed. With --yes it is given up."}[c.Bool("yes")])
	return err
}

// costOfGivingUp says what is lost.
func costOfGivingUp(a repo.Abandoned) string {
	if a.Backup.Backup != "" {
		return fmt.Sprintf("Backup %s of %s is lost for good: it is not listed any more, and nothing can be restored from it. What only it needs, a prune reclaims "+
			"when its grace period is over, and reclaims nothing before. No other backup loses anything.", a.Backup.Backup, a.Backup.Cluster)
	}
	return fmt.Sprintf("Whose session it was, and which backups it used or made, is lost. Its last sign of life came at %s: no backup, restore, thaw, copy or prune that "+
		"began before may run anywhere any more, for what it uses may be reclaimed.", clock(a.Last))
}

type giveUpJSON struct {
	Object  string     `json:"object"`
	Cluster string     `json:"cluster,omitempty"`
	Backup  string     `json:"backup,omitempty"`
	Last    *time.Time `json:"session_last_seen,omitempty"`
	Error   string     `json:"error"`
	Costs   string     `json:"costs"`
	Done    bool       `json:"done"`
}

func newGiveUpJSON(a repo.Abandoned, done bool) giveUpJSON {
	j := giveUpJSON{Object: a.Object, Cluster: a.Backup.Cluster, Backup: a.Backup.Backup, Error: a.Err.Error(), Costs: costOfGivingUp(a), Done: done}
	if a.Backup.Backup == "" {
		last := a.Last.UTC()
		j.Last = &last
	}
	return j
}
