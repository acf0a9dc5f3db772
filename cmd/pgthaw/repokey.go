package main

import (
	"bytes"
	"crypto/sha256"
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
}

func keysJSON(slots []repo.KeySlot) []keyJSON {
	all := []keyJSON{}
	for _, s := range slots {
		all = append(all, keyJSON{s.ID, s.Type, s.Label, s.Recipient, s.CreatedAt})
	}
	return all
}

func keyListCommand() *cli.Command {
	return &cli.Command{
		Name: "list", Usage: "show which keys open the repository",
		Description: "Of a key the repository knows the public part only, of a passphrase nothing.",
		Action:      keyList,
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
		t.row(s.ID, s.Type, clock(s.CreatedAt), s.Label, s.Recipient)
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
	keys, err := newKeys(c)
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
func newKeys(c *cli.Context) ([]repo.Key, error) {
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
	if _, err := makeKeyFile(path); err != nil {
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
	k, file, err := repo.NewKey()
	if err != nil {
		return err
	}
	slot, err := r.AddKey(c.Context, k, "recovery sheet")
	if err != nil {
		return err
	}
	if err := printSheet(c.App.Writer, r, slot, file); err != nil {
		return fmt.Errorf("print the recovery sheet of key %s, which \"pgthaw repo key remove\" removes: %w", slot.ID, err)
	}
	return nil
}

// printSheet writes what a person needs who has nothing but the store, this program and this sheet. file is an age
// identity file, whose last line is the key.
func printSheet(w io.Writer, r *repo.Repository, slot repo.KeySlot, file []byte) error {
	lines := bytes.Split(bytes.TrimSpace(file), []byte("\n"))
	key := lines[len(lines)-1]
	sum := fmt.Sprintf("%x", sha256.Sum256(key))
	_, err := fmt.Fprintf(w, `pgthaw recovery sheet

Repository  %s
ID          %s
Key         %s
Made        %s

Whoever has this sheet and can read the repository can read the databases in it.

%s
To use it, run this, type the lines above (0 is zero; O, I and B do not occur) and end with
Ctrl-D. Blanks do not matter.

    (umask 077; tr -d ' \n' > recovery.key); sha256sum recovery.key

That has to print a line that begins with %s %s. Then the key opens the repository:

    pgthaw --repo %s --key-file recovery.key list
`, r.URL(), r.ID(), slot.ID, slot.CreatedAt.Format("2006-01-02 15:04 MST"), grouped(string(key)), sum[:4], sum[4:8], shellQuote(r.URL()))
	return err
}

// grouped writes a key in groups of five characters, five to a line.
func grouped(key string) string {
	var b strings.Builder
	for i := 0; i < len(key); i += 5 {
		switch {
		case i%25 == 0:
			b.WriteString("    ")
		default:
			b.WriteString("  ")
		}
		b.WriteString(key[i:min(i+5, len(key))])
		if i%25 == 20 || i+5 >= len(key) {
			b.WriteString("\n")
		}
	}
	return b.String()
}
