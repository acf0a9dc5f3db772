package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/recovery"
	"pgthaw/repo/pg"
)

// A setting is true of a machine rather than of one command: it may also come from the environment and from the file
// that --config names. What one command is asked to do comes from its flags alone.

func setting(name, usage string) *cli.StringFlag {
	return &cli.StringFlag{Name: name, Usage: usage, EnvVars: []string{variable(name)}}
}

func switchSetting(name, usage string) *cli.BoolFlag {
	return &cli.BoolFlag{Name: name, Usage: usage, EnvVars: []string{variable(name)}, DisableDefaultText: true}
}

func numberSetting(name, usage, byDefault string) *cli.IntFlag {
	return &cli.IntFlag{Name: name, Usage: usage, EnvVars: []string{variable(name)}, DefaultText: byDefault}
}

func text(name, usage string) *cli.StringFlag { return &cli.StringFlag{Name: name, Usage: usage} }

func toggle(name, usage string) *cli.BoolFlag {
	return &cli.BoolFlag{Name: name, Usage: usage, DisableDefaultText: true}
}

// readTimeout is the flag of what serves a mount.
const readTimeout = "read-timeout"

func readTimeoutFlag() cli.Flag {
	return &cli.DurationFlag{
		Name: readTimeout, EnvVars: []string{variable(readTimeout)}, Value: time.Minute, DefaultText: "1m",
		Usage: "let who reads through the mount wait this `LONG` for a repository that does not answer, before the read fails (EIO)",
	}
}

// variable is the environment variable of a flag: pg-connection has PGTHAW_PG_CONNECTION.
func variable(flag string) string {
	return "PGTHAW_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

func connectionFlag() cli.Flag {
	return setting("pg-connection", "how to reach PostgreSQL: a `URI` or keywords; what it leaves out comes from libpq's variables, service and password file")
}

func jobsFlag() cli.Flag {
	return numberSetting("jobs", "do `N` things at once", "one per processor")
}

// recoveryFlags are those of thaw and restore, spelled after PostgreSQL's settings.
func recoveryFlags() []cli.Flag {
	return []cli.Flag{
		text("target", "put the data directory at `DIR`, which is empty or does not exist"),
		toggle("start", "start PostgreSQL there, and wait until it answers"),
		&cli.IntFlag{Name: "port", Usage: "let the started server listen on `PORT`", DefaultText: "the original's if it is free, else any that is"},
		text("to", "recover to a `TIME`: RFC 3339, \"2026-11-20 14:30\", \"5 minutes ago\", \"yesterday 14:30\""),
		text("to-lsn", "recover to an `LSN`"),
		text("to-xid", "recover to a transaction `ID`"),
		text("to-name", "recover to the restore point `NAME`"),
		toggle("to-immediate", "recover no further than the end of the backup"),
		toggle("exclusive", "stop just before the target instead of just after it"),
		text("timeline", "follow `TIMELINE`: latest, current or a number (default: latest)"),
		text("action", "then pause, promote or shutdown: `ACTION` (default: promote)"),
		&cli.StringSliceFlag{Name: "tablespace-mapping", Usage: "put the tablespace at `OLD=NEW` instead; repeatable"},
		bindirFlag(),
		jobsFlag(),
	}
}

// recoveryTarget reads the flags that say where recovery ends. A resolved time goes to stderr before anything is done.
func recoveryTarget(c *cli.Context) (t recovery.Target, err error) {
	if err := atMostOne(c, "to", "to-lsn", "to-xid", "to-name", "to-immediate"); err != nil {
		return t, err
	}
	t = recovery.Target{Name: c.String("to-name"), Immediate: c.Bool("to-immediate"), Exclusive: c.Bool("exclusive"),
		Timeline: c.String("timeline"), Action: c.String("action")}
	if c.IsSet("to") {
		if t.Time, err = parseTime(c.String("to"), time.Now()); err != nil {
			return t, err
		}
		fmt.Fprintf(c.App.ErrWriter, "pgthaw: recovery target time is %s\n", t.Time.Format("2006-01-02 15:04:05.999999-07:00 MST"))
	}
	if c.IsSet("to-lsn") {
		if t.LSN, err = pg.ParseLSN(c.String("to-lsn")); err != nil {
			return t, usage("--to-lsn: %w", err)
		}
	}
	if c.IsSet("to-xid") {
		if t.Xid, err = parseXid(c.String("to-xid")); err != nil {
			return t, usage("--to-xid: %w", err)
		}
	}
	return t, nil
}

func atMostOne(c *cli.Context, names ...string) error {
	first := ""
	for _, name := range names {
		switch {
		case !c.IsSet(name):
		case first != "":
			return usage("--%s and --%s exclude each other", first, name)
		case !c.Bool(name) && c.String(name) == "":
			return usage("--%s is empty", name)
		default:
			first = name
		}
	}
	return nil
}

// parseXid reads a transaction ID, with its epoch as pg_current_xact_id prints it or without
// (recovery_target_xid: only the lower 32 bits count).
func parseXid(s string) (uint32, error) {
	x, err := strconv.ParseUint(s, 10, 64)
	if err != nil || uint32(x) < 3 { // 0 to 2 are no transactions (transam.h: FirstNormalTransactionId)
		return 0, fmt.Errorf("invalid transaction ID %q", s)
	}
	return uint32(x), nil
}

// tablespaceMapping reads --tablespace-mapping as pg_basebackup does: "=" within a path is written "\=".
func tablespaceMapping(c *cli.Context) (map[string]string, error) {
	m := map[string]string{}
	for _, arg := range c.StringSlice("tablespace-mapping") {
		parts := strings.Split(strings.ReplaceAll(arg, `\=`, "\x00"), "=")
		if len(parts) != 2 || !strings.HasPrefix(parts[0], "/") || !strings.HasPrefix(parts[1], "/") {
			return nil, usage("--tablespace-mapping %q: must be OLDDIR=NEWDIR, two absolute paths", arg)
		}
		m[strings.ReplaceAll(parts[0], "\x00", "=")] = strings.ReplaceAll(parts[1], "\x00", "=")
	}
	return m, nil
}

// parseRate reads pg_basebackup's --max-rate: kilobytes a second, or with suffix k or M. Empty is no limit, 0.
func parseRate(s string) (kilobytes int, err error) {
	if s == "" {
		return 0, nil
	}
	factor := 1
	digits, mega := strings.CutSuffix(s, "M")
	if mega {
		factor = 1024
	}
	n, err := strconv.Atoi(strings.TrimSuffix(digits, "k"))
	if err != nil || n <= 0 || n > math.MaxInt32/factor {
		return 0, usage("--max-rate %q: must be kilobytes per second, or end in k or M", s)
	}
	return n * factor, nil
}
