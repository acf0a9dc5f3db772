package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgthaw/repo"
)

func repoKeyCommand() *cli.Command {
	return &cli.Command{
		Name: "key", Usage: "manage the keys of an encrypted repository",
		Subcommands: []*cli.Command{keyListCommand(), keyAddCommand(), keyRemoveCommand(), keyExportCommand()},
	}
}

// keyJSON is a key slot as --json writes it.
type keyJSON struct {
	ID        string    `json:"id"`
	Type      string    `json:"type"`
	Label     string    `json:"label"`
	Recipient string    `json:"recipient"`
	CreatedAt time.Time `json:"created_at"`
	Foreign   bool      `json:"foreign"`
}

func keysJSON(slots []repo.KeySlot) []keyJSON {
	all := []keyJSON{}
	for _, s := range slots {
		all = append(all, keyJSON{s.ID, s.Type, s.Label, s.Recipient, s.CreatedAt, s.Foreign})
	}
	return all
}

func keyListCommand() *cli.Command {
	return &cli.Command{
		Name: "list", Usage: "show which keys open the repository",
		Description: "Of a key the repository knows the public part only, of a passphrase nothing. FOREIGN is an entry that was changed, or put there,\n" +
			"by somebody without a key of the repository: nothing opens with it, and what it says of itself may be wrong. Remove it.",
		Action: keyList,
	}
}

func keyList(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	slots, bad := r.KeySlots(c.Context)
	if c.Bool("json") {
		return errors.Join(bad, printJSON(c.App.Writer, keysJSON(slots)))
	}
	if r.Encryption() == repo.EncryptionNone {
		_, err := fmt.Fprintln(c.App.Writer, "The repository is not encrypted.")
		return err
	}
	t := table{{"ID", "TYPE", "CREATED", "LABEL", "RECIPIENT"}}
	for _, s := range slots {
		label := s.Label
		if s.Foreign {
			label = fmt.Sprintf("FOREIGN: %q", label) // it may hold anything
		}
		t.row(s.ID, s.Type, clock(s.CreatedAt), label, s.Recipient)
	}
	return errors.Join(bad, t.print(c.App.Writer))
}

func keyAddCommand() *cli.Command {
	return &cli.Command{
		Name: "add", Usage: "let another key open the repository",
		Description: "One of the keys that open it already is needed, too. No backup is touched or written anew.",
		Flags: []cli.Flag{
			text("recipient", "a `PUBLIC KEY`: age1..., or \"ssh-ed25519 ...\" or \"ssh-rsa ...\" as authorized_keys has it"),
			text("new-passphrase-file", "`FILE` whose first line is the new passphrase"),
			text("new-key-file", "`FILE` with the new key, which is made if it does not exist"),
			text("label", "what \"pgthaw repo key list\" shows with it: a `NAME` of who or what holds the key"),
		},
		Action: keyAdd,
	}
}

func keyAdd(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	if err := atMostOne(c, "recipient", "new-passphrase-file", "new-key-file"); err != nil {
		return err
	}
	if !c.IsSet("recipient") && !c.IsSet("new-passphrase-file") && !c.IsSet("new-key-file") {
		return usage("one of --recipient, --new-passphrase-file and --new-key-file is needed")
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	if r.Encryption() == repo.EncryptionNone { // before a key is made
		return fmt.Errorf("%s: %w", r.URL(), repo.ErrPlain)
	}
	keys, err := newKeys(c, r)
	if err != nil {
		return err
	}
	var added []repo.KeySlot
	for _, k := range keys {
		slot, err := r.AddKey(c.Context, k, c.String("label"))
		if err != nil {
			return err
		}
		added = append(added, slot)
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, keysJSON(added))
	}
	for _, slot := range added {
		fmt.Fprintf(c.App.Writer, "Key %s added\n", slot.ID)
	}
	return nil
}

// newKeys are those that the command's flags name.
func newKeys(c *cli.Context, r *repo.Repository) ([]repo.Key, error) {
	switch {
	case c.IsSet("recipient"):
		k, err := repo.ParseRecipient(c.String("recipient"))
		if err != nil {
			return nil, usage("--recipient: %w", err)
		}
		return []repo.Key{k}, nil
	case c.IsSet("new-passphrase-file"):
		return readPassphraseFile(c.String("new-passphrase-file"))
	}
	path := c.String("new-key-file")
	if _, err := makeKeyFile(path, aboutKey(r.URL(), r.ID())); err != nil {
		return nil, err
	}
	return readKeyFile(path)
}

func keyRemoveCommand() *cli.Command {
	return &cli.Command{
		Name: "remove", Usage: "keep a key from opening the repository", ArgsUsage: "ID",
		Description: "ID is one of \"pgthaw repo key list\". The last key cannot be removed. Who has opened the repository with the key before\n" +
			"may have kept what it led to: where a key has been stolen, make a new repository.",
		Action: keyRemove,
	}
}

func keyRemove(c *cli.Context) error {
	args, err := arguments(c, "ID")
	if err != nil {
		return err
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := r.RemoveKey(c.Context, args[0]); err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, map[string]string{"id": args[0]})
	}
	_, err = fmt.Fprintf(c.App.Writer, "Key %s removed\n", args[0])
	return err
}

func keyExportCommand() *cli.Command {
	return &cli.Command{
		Name: "export", Usage: "print a recovery sheet",
		Description: "The sheet holds a new key that opens the repository, made to be typed in by a person, and how to use it. Print it and lock it away:\n" +
			"pgthaw keeps no copy. It goes to stdout and nowhere else, and is not to be had as JSON.",
		Action: keyExport,
	}
}

func keyExport(c *cli.Context) error {
	if _, err := arguments(c); err != nil {
		return err
	}
	if c.Bool("json") {
		return usage("a recovery sheet is for people: --json is not possible")
	}
	r, err := openRepository(c)
	if err != nil {
		return err
	}
	defer r.Close()
	k, lines, err := repo.NewSheetKey()
	if err != nil {
		return err
	}
	slot, err := r.AddKey(c.Context, k, "recovery sheet")
	if err != nil {
		return err
	}
	if err := printSheet(c.App.Writer, r, slot, lines); err != nil {
		return fmt.Errorf("print the recovery sheet of key %s, which \"pgthaw repo key remove\" removes: %w", slot.ID, err)
	}
	return nil
}

// printSheet writes what a person needs who has nothing but the store, this program and this sheet.
func printSheet(w io.Writer, r *repo.Repository, slot repo.KeySlot, key []string) error {
	url := shellQuote(r.URL())
	_, err := fmt.Fprintf(w, `pgthaw recovery sheet

Repository  %s
ID          %s
Key         %s
Made        %s

This is a key of the repository above, which holds backups of PostgreSQL servers, encrypted. Whoever has this
sheet and can read the repository can read those databases. Lock it away, not on a computer.

    %s

To use it: put pgthaw on a machine that can read the repository, run this, type the lines above as they
are, with their last four digits, and end with Ctrl-D. Blanks and case do not matter; 0 is zero, and the
groups have no O, I and B. A line with a typing mistake is named when the key is used.

    (umask 077; cat > recovery.key)

Then this shows the backups, and "pgthaw thaw" or "pgthaw restore" in the place of "list" gets one back:

    pgthaw --repo %s --key-file recovery.key list

To have every command of a user find the key, put it where they look for it:

    install -D -m 600 recovery.key ~/.config/pgthaw/keys/%s.key
`, r.URL(), r.ID(), slot.ID, slot.CreatedAt.Format("2006-01-02 15:04 MST"), strings.Join(key, "\n    "), url, r.ID())
	return err
}
