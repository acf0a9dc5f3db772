package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"

	"github.com/urfave/cli/v2"

	"pgthaw/fusefs"
	"pgthaw/repo"
)

var errFilled = errors.New("the directory is not empty, or something is mounted there already")

func mountCommand() *cli.Command {
	return &cli.Command{
		Name: "mount", Usage: "show all backups as a read-only file system", ArgsUsage: "DIR",
		Description: "DIR shows <cluster>/<backup>/pgdata, <cluster>/<backup>/tablespaces/<oid>, <cluster>/<backup>/manifest.json,\n" +
			"<cluster>/latest and <cluster>/wal/<timeline>/<segment>. New backups appear while it is mounted.\n" +
			"Returns once the mount answers; \"pgthaw umount DIR\" ends it. Every byte that is read is verified.",
		Flags: []cli.Flag{
			toggle("foreground", "do not go to the background; end on SIGINT or SIGTERM"),
			setting("as-user", "show everything as owned by `USER` (default: the owners of the original, or who mounts it if that is not root)"),
			switchSetting("allow-other", "let other users look, by the files' owners and modes (others than root: user_allow_other in /etc/fuse.conf)"),
			readTimeoutFlag(),
			setting("log-file", "in the background, log to `FILE` (default: nowhere)"),
			readyFlag(),
		},
		Action: mount,
	}
}

func mount(c *cli.Context) error {
	args, err := arguments(c, "DIR")
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(args[0])
	if err != nil {
		return fmt.Errorf("find %s: %w", args[0], err)
	}
	owner, err := shownOwner(c.String("as-user"))
	if err != nil {
		return err
	}
	open := lookUnattended // the daemon opens it once more
	if c.Bool("foreground") {
		open = openToLook
	}
	r, err := open(c)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := refuseFilled(dir); err != nil {
		return err
	}
	warnUnlessAsSeen(c, r)
	if !c.Bool("foreground") {
		return spawnMount(c, r.URL(), dir)
	}
	return announced(c, func(ready func() error) error { return serveMount(c, r, dir, owner, ready) })
}

// refuseFilled keeps a mount from hiding something, another mount among it.
func refuseFilled(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return mountFailed(fmt.Errorf("mount: %w", err))
	}
	if len(entries) > 0 {
		return fmt.Errorf("mount %s: %w", dir, errFilled)
	}
	return nil
}

// shownOwner finds a user by name or number. Without one, an ordinary user sees everything as his own, for he could not
// read the server's files otherwise.
func shownOwner(name string) (*fusefs.Owner, error) {
	if name == "" {
		if os.Geteuid() == 0 {
			return nil, nil
		}
		return &fusefs.Owner{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return nil, usage("--as-user %s: no such user", name)
		}
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err1 != nil || err2 != nil {
		return nil, usage("--as-user %s: its user and group are not numbers", name)
	}
	return &fusefs.Owner{UID: uint32(uid), GID: uint32(gid)}, nil
}

// spawnMount has a daemon do what this command was asked to.
func spawnMount(c *cli.Context, repoURL, dir string) error {
	var log *os.File
	if path := c.String("log-file"); path != "" {
		var err error
		if log, err = os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
			return fmt.Errorf("open log: %w", err)
		}
		defer log.Close()
	}
	args, err := daemonArgs(c)
	if err != nil {
		return err
	}
	args = append(args, "--repo", repoURL, "mount", "--"+readTimeout, c.String(readTimeout), "--foreground", "--as-user", c.String("as-user"))
	if c.Bool("allow-other") {
		args = append(args, "--allow-other")
	}
	return spawn(c.Context, log, append(args, dir)...)
}

// serveMount shows the repository until somebody takes the mount off, or a signal asks to.
func serveMount(c *cli.Context, r *repo.Repository, dir string, owner *fusefs.Owner, ready func() error) error {
	m, err := fusefs.Browse(c.Context, dir, r, fusefs.BrowseOptions{
		Log: logger(c), AllowOther: c.Bool("allow-other"), AsUser: owner, Debug: c.Bool("trace"),
	})
	if err != nil {
		return mountFailed(err)
	}
	if err := ready(); err != nil {
		return errors.Join(err, m.Unmount())
	}
	return m.Wait()
}
