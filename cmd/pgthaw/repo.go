package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

func repoCommand() *cli.Command {
	return &cli.Command{
		Name: "repo", Usage: "make, check and measure repositories",
		Subcommands: []*cli.Command{repoInitCommand(), repoInfoCommand(), repoCheckCommand()},
	}
}

func repoInitCommand() *cli.Command {
	return &cli.Command{
		Name: "init", Usage: "make a repository", ArgsUsage: "[URL]",
		Description: "URL is a path or file:///path, empty or absent; without it, the one of --repo.\nWhere there is a repository already, nothing is changed and the exit code is 21.",
		Action:      repoInit,
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
	r, err := repo.Init(c.Context, url, repo.Options{Log: logger(c)})
	if err != nil {
		return err
	}
	defer r.Close()
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]string{"repository": r.URL(), "id": r.ID()})
	}
	_, err = fmt.Fprintf(c.App.Writer, "Repository %s made at %s\n", r.ID(), r.URL())
	return err
}
