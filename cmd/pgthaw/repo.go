package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

func repoCommand() *cli.Command {
	return &cli.Command{
		Name: "repo", Usage: "make, check, measure, copy and prune repositories, manage their keys",
		Subcommands: []*cli.Command{repoInitCommand(), repoInfoCommand(), repoCheckCommand(), repoGiveUpCommand(), repoAcceptCommand(), repoCopyCommand(),
			repoPruneCommand(), repoHoldCommand(), repoKeyCommand()},
	}
}

func repoInitCommand() *cli.Command {
	return &cli.Command{
		Name: "init", Usage: "make a repository", ArgsUsage: "[URL]",
		Description: "URL is a path or file:///path, empty or absent; without it, the one of --repo.\n" +
			"Where there is a repository already, nothing is changed and the exit code is 21.\n" +
			"It is encrypted. Its key is made, too, in ~/.config/pgthaw/keys of the user who owns it, or by root in /etc/pgthaw/keys, where every\n" +
			"command finds it: keep a recovery sheet (\"pgthaw repo key export\") or a copy elsewhere, for without a key nobody can ever read the repository.\n" +
			"With --key-file or --passphrase-file either opens it, and no other key is made. A key file that does not exist is made.",
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
	m := keyMaker{c: c}
	o := openOptions(c)
	o.FindKeys = m.keys
	if c.Bool("no-encryption") {
		if c.String(keyFileFlag) != "" || c.String(passphraseFlag) != "" {
			return errContradiction
		}
		o.FindKeys = nil
	}
	r, err := repo.Init(c.Context, url, o)
	if err != nil {
		return m.undo(err)
	}
	if r.Encryption() == repo.EncryptionNone {
		if err := allowPlain(r); err != nil {
			return errors.Join(err, r.Close())
		}
	}
	_, err = r.Accept(c.Context) // whatever this host has seen there before
	return errors.Join(err, m.print(r), r.Close())
}

var errContradiction = &failure{err: errors.New("--no-encryption and a key contradict each other"), code: exitUsage,
	hint: "Leave one of them away; PGTHAW_KEY_FILE, PGTHAW_PASSPHRASE_FILE and the file of --config count, too."}

// keyMaker provides the keys of a repository that is about to be made.
type keyMaker struct {
	c      *cli.Context
	remove func() error // the key file, if it was made here
	found  bool         // without a flag, every command finds it
}

// keys reads the keys that the flags name, of which the key file is made if it does not exist. Without flags a key file is made
// where every command looks for it.
func (m *keyMaker) keys(p repo.Place) ([]repo.Key, error) {
	path := m.c.String(keyFileFlag)
	switch {
	case path != "":
		made, err := makeKeyFile(path, aboutKey(p.URL, p.ID))
		if err != nil {
			return nil, err
		}
		if made {
			m.remove = func() error { return os.Remove(path) }
		}
		return givenKeys(m.c)
	case m.c.String(passphraseFlag) != "":
		return givenKeys(m.c)
	}
	home := keyHomes(p)[0]
	path, b, err := home.make(p)
	if err != nil {
		return nil, &failure{err: err, code: exitFailed, hint: "Name another file with --key-file FILE, or give --no-encryption."}
	}
	m.found = true
	m.remove = func() error { return home.remove(path) }
	if err := m.c.Set(keyFileFlag, path); err != nil {
		return nil, err
	}
	return repo.ParseKeys(b)
}

// undo removes a key file that was made for a repository that was not.
func (m *keyMaker) undo(err error) error {
	switch {
	case m.remove == nil:
		return err
	case errors.Is(err, repo.ErrPerhapsMade):
		return &failure{err: err, code: exitCode(err),
			hint: fmt.Sprintf("If \"pgthaw list\" opens it, use it: its key is in %s. Otherwise remove that file, and what is there.", m.c.String(keyFileFlag))}
	}
	return errors.Join(err, m.remove())
}

func (m *keyMaker) print(r *repo.Repository) error {
	k, err := keyFiles(m.c)
	if err != nil {
		return err
	}
	out := m.c.App.Writer
	if m.c.Bool("json") {
		return printJSON(out, madeJSON{r.URL(), r.ID(), r.Encryption(), k.KeyFile})
	}
	if r.Encryption() == repo.EncryptionNone {
		fmt.Fprintf(out, "Repository %s made at %s, not encrypted\n", r.ID(), r.URL())
		return nil
	}
	fmt.Fprintf(out, "Repository %s made at %s, encrypted\n", r.ID(), r.URL())
	if m.remove == nil {
		return nil
	}
	option := ""
	if !m.found {
		option = " --key-file " + shellQuote(k.KeyFile)
	}
	_, err = fmt.Fprintf(out, `
Its key is in %s
and nowhere else. Without it nobody can ever read what is in the repository, and nobody can make another key.
Print a recovery sheet now, or copy that file, and keep it off this machine:

    pgthaw --repo %s%s repo key export
`, k.KeyFile, shellQuote(r.URL()), option)
	return err
}

// madeJSON is a new repository as --json writes it.
type madeJSON struct {
	Repository string `json:"repository"`
	ID         string `json:"id"`
	Encryption string `json:"encryption"`
	KeyFile    string `json:"key_file,omitempty"`
}
