package main

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

func repoCommand() *cli.Command {
	return &cli.Command{
		Name: "repo", Usage: "make, check and measure repositories, manage their keys",
		Subcommands: []*cli.Command{repoInitCommand(), repoInfoCommand(), repoCheckCommand(), repoKeyCommand()},
	}
}

func repoInitCommand() *cli.Command {
	return &cli.Command{
		Name: "init", Usage: "make a repository", ArgsUsage: "[URL]",
		Description: "URL is a path or file:///path, empty or absent; without it, the one of --repo.\n" +
			"Where there is a repository already, nothing is changed and the exit code is 21.\n" +
			"With --key-file or --passphrase-file it is encrypted, and either opens it. A key file that does not exist is made:\n" +
			"keep a copy of it elsewhere, for without a key nobody can read the repository.",
		Flags:  []cli.Flag{toggle("no-encryption", "make a repository that anybody who can read its files can read")},
		Action: repoInit,
	}
}

func repoInit(c *cli.Context) error {
	url := c.String("repo")
	if c.NArg() > 0 || url == "" {
		args, err := arguments(c, "URL")
		if err != nil {
			return err
		}
		url = args[0]
	}
	keyFile := c.String(keyFileFlag)
	if c.Bool("no-encryption") && (keyFile != "" || c.String(passphraseFlag) != "") {
		return errContradiction
	}
	// Asked before a key is made, which is before the repository.
	if err := repo.Vacant(c.Context, url); err != nil {
		return err
	}
	keyMade := false
	if keyFile != "" {
		var err error
		if keyMade, err = makeKeyFile(keyFile); err != nil {
			return err
		}
	}
	keys, err := givenKeys(c)
	if err != nil {
		return err
	}
	r, err := repo.Init(c.Context, url, repo.Options{Log: logger(c), Keys: keys})
	if err != nil {
		return err
	}
	return errors.Join(printMade(c, r, keyMade), r.Close())
}

var errContradiction = &failure{err: errors.New("--no-encryption and a key contradict each other"), code: exitUsage,
	hint: "Leave one of them away; PGTHAW_KEY_FILE, PGTHAW_PASSPHRASE_FILE and the file of --config count, too."}

func printMade(c *cli.Context, r *repo.Repository, keyMade bool) error {
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]string{"repository": r.URL(), "id": r.ID(), "encryption": r.Encryption()})
	}
	encrypted := ""
	if r.Encryption() != repo.EncryptionNone {
		encrypted = ", encrypted"
	}
	_, err := fmt.Fprintf(c.App.Writer, "Repository %s made at %s%s\n", r.ID(), r.URL(), encrypted)
	if keyMade && err == nil {
		_, err = fmt.Fprintf(c.App.Writer, "Its key is in %s: copy that to another place. Who has no key cannot read the repository, and nobody can make another.\n", c.String(keyFileFlag))
	}
	return err
}
