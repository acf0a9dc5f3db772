package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

// A repository that is older than this host has seen it is refused by what makes a backup or a copy of one, and shown, with
// the error behind, by what only looks. Archiving goes on: WAL that is not taken fills the server's disk. A repository that
// lies where this host has seen another one is refused by all that does not only look.

// openOptions are those of every repository that a command opens, but for its keys.
func openOptions(c *cli.Context) repo.Options {
	log := logger(c).Warn
	switch c.Command.Name {
	case "push", "fetch": // many a minute, into the server's log
		log = logger(c).Info
	}
	return repo.Options{Log: logger(c), Memory: newMemory(log), Patience: c.Duration(readTimeout)}
}

// openRepository opens the repository that --repo names, and asks a person for a passphrase as openToLook does.
func openRepository(c *cli.Context) (*repo.Repository, error) { return notReplaced(openToLook(c)) }

// openUnattended is for what runs without a person, or has other programs open the repository, too: nobody is asked.
func openUnattended(c *cli.Context) (*repo.Repository, error) { return notReplaced(lookUnattended(c)) }

func notReplaced(r *repo.Repository, err error) (*repo.Repository, error) {
	if err == nil && r.Replaced() != nil {
		return nil, errors.Join(r.Replaced(), r.Close())
	}
	return r, err
}

// asSeen is an error if this host has seen more of the clusters than there is, of all clusters if none is named.
func asSeen(ctx context.Context, r *repo.Repository, clusters ...string) error {
	lost, err := r.Losses(ctx, clusters...)
	if len(lost) == 0 {
		return err
	}
	var all []error
	for _, l := range lost {
		all = append(all, l)
	}
	return &failure{err: errors.Join(all...), code: exitDamaged} // whatever else follows from it: that there is no such cluster
}

// warnUnlessAsSeen is for what goes on nevertheless.
func warnUnlessAsSeen(c *cli.Context, r *repo.Repository, clusters ...string) {
	if err := asSeen(c.Context, r, clusters...); err != nil {
		printProblem(c.App.ErrWriter, "warning", err)
	}
}

// olderThanSeen is what --json has of asSeen's error.
func olderThanSeen(err error) (all []string) {
	switch e := err.(type) {
	case *repo.RollbackError:
		return []string{e.Detail}
	case interface{ Unwrap() error }:
		return olderThanSeen(e.Unwrap())
	case interface{ Unwrap() []error }:
		for _, one := range e.Unwrap() {
			all = append(all, olderThanSeen(one)...)
		}
	}
	return all
}

func repoAcceptCommand() *cli.Command {
	return &cli.Command{
		Name: "accept", Usage: "take the repository as it is for the newest that this host has seen",
		Description: "For a repository that was put back on purpose: restored from a copy of itself, or made anew at its URL. Says what was there,\n" +
			"as far as this host knows, and is not any more. Only what this user on this host remembers changes, nothing in the repository.",
		Action: repoAccept,
	}
}

func repoAccept(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	r, err := openToLook(c)
	if err != nil {
		return err
	}
	defer r.Close()
	lost, err := r.Accept(c.Context)
	if err != nil {
		return err
	}
	given := []string{}
	for _, l := range lost {
		given = append(given, l.Error())
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, acceptJSON{r.URL(), r.ID(), given})
	}
	if len(given) == 0 {
		_, err = fmt.Fprintln(c.App.Writer, "The repository holds all that this host has seen of it.")
	}
	for _, g := range given {
		_, err = fmt.Fprintf(c.App.Writer, "Accepted: %s\n", g)
	}
	return err
}

type acceptJSON struct {
	URL      string   `json:"repository"`
	ID       string   `json:"id"`
	Accepted []string `json:"older_than_seen"`
}
