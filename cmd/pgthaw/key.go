package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"pgthaw/recovery"
	"pgthaw/repo"
)

// Keys come from files only: what stands in a command line or the environment can be seen by others.

const (
	keyFileFlag    = "key-file"
	passphraseFlag = "passphrase-file"
)

// givenKeys reads the keys that the flags name. There may be none.
func givenKeys(c *cli.Context) ([]repo.Key, error) { return keysOf(c, keyFileFlag, passphraseFlag) }

// keysOf reads the keys that two flags name.
func keysOf(c *cli.Context, keyFile, passphraseFile string) ([]repo.Key, error) {
	keys, err := readKeyFile(c.String(keyFile))
	if err != nil {
		return nil, err
	}
	more, err := readPassphraseFile(c.String(passphraseFile))
	return append(keys, more...), err
}

func readKeyFile(path string) ([]repo.Key, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, keyFailure(fmt.Errorf("read key file: %w", err))
	}
	keys, err := repo.ParseKeys(b)
	if err != nil {
		return nil, keyFailure(fmt.Errorf("read key file %s: %w", path, err))
	}
	return keys, nil
}

// readPassphraseFile takes the first line, without its end.
func readPassphraseFile(path string) ([]repo.Key, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, keyFailure(fmt.Errorf("read passphrase file: %w", err))
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	k, err := repo.PassphraseKey(string(bytes.TrimSuffix(line, []byte("\r"))))
	if err != nil {
		return nil, keyFailure(fmt.Errorf("read passphrase file %s: %w", path, err))
	}
	return []repo.Key{k}, nil
}

func keyFailure(err error) error { return &failure{err: err, code: exitKey} }

// keyFiles are the files that the flags name, or that were found in their stead.
func keyFiles(c *cli.Context) (k recovery.KeyFiles, err error) {
	absolute := func(flag string) string {
		path := c.String(flag)
		if path != "" && err == nil {
			path, err = filepath.Abs(path)
		}
		return path
	}
	return recovery.KeyFiles{KeyFile: absolute(keyFileFlag), PassphraseFile: absolute(passphraseFlag)}, err
}

// keyArgs hand the key files on to a program that runs elsewhere, later, and without anybody to ask.
func keyArgs(c *cli.Context) (args []string, err error) {
	k, err := keyFiles(c)
	if k.KeyFile != "" {
		args = append(args, "--"+keyFileFlag, k.KeyFile)
	}
	if k.PassphraseFile != "" {
		args = append(args, "--"+passphraseFlag, k.PassphraseFile)
	}
	return args, err
}

// openToLook opens the repository that --repo names, whatever this host has seen of it. If there is no key to be found, but a passphrase would do, a person is
// asked, who is at the terminal whatever stdin and stderr are.
func openToLook(c *cli.Context) (*repo.Repository, error) { return openNamed(c, askPassphrase) }

// lookUnattended asks nobody.
func lookUnattended(c *cli.Context) (*repo.Repository, error) { return openNamed(c, nil) }

func openNamed(c *cli.Context, ask askFunc) (*repo.Repository, error) {
	if c.String("repo") == "" {
		return nil, &failure{err: usage("no repository is given"), code: exitUsage, hint: "Give --repo URL, or set PGTHAW_REPO."}
	}
	return openAt(c.Context, c, c.String("repo"), &keySearch{c: c, ask: ask})
}

// openRecorded opens an overlay's repository: with the keys that the flags name, else those that it was thawed with.
func openRecorded(ctx context.Context, c *cli.Context, url string, k recovery.KeyFiles) (*repo.Repository, error) {
	s := &keySearch{c: c}
	if c.String(keyFileFlag) == "" && c.String(passphraseFlag) == "" {
		s.take(keyFileFlag, k.KeyFile)
		s.take(passphraseFlag, k.PassphraseFile)
	}
	return openAt(ctx, c, url, s)
}

func openAt(ctx context.Context, c *cli.Context, url string, s *keySearch) (*repo.Repository, error) {
	keys, err := givenKeys(c)
	if err != nil {
		return nil, err
	}
	return openWith(ctx, c, url, keys, s)
}

func openWith(ctx context.Context, c *cli.Context, url string, keys []repo.Key, s *keySearch) (*repo.Repository, error) {
	o := openOptions(c)
	o.Keys, o.FindKeys = keys, s.find
	r, err := repo.Open(ctx, url, o)
	switch {
	case err == nil && len(keys) == 0:
		if err = refuseDowngrade(r); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	case errors.Is(err, repo.ErrWrongKey) && s.found != "":
		err = fmt.Errorf("%w (%s)", err, s.found)
	}
	return r, err
}

type askFunc func(context.Context) (string, error)

// keySearch finds the key of a repository for a command that was given none.
type keySearch struct {
	c      *cli.Context
	ask    askFunc // nil: nobody is there to be asked
	looked []string
	found  string
}

const otherKeyHint = "Put a copy of the key there, or give another key of the repository with --key-file FILE or --passphrase-file FILE."

// take has a flag name a file, unless that is not there.
func (s *keySearch) take(flag, path string) {
	if path == "" {
		return
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		s.looked = append(s.looked, path)
		return
	}
	_ = s.c.Set(flag, path) // fails for flags that do not exist
}

// find looks for the key file that "repo init" made. From then on it is as if --key-file had named it, also for daemons
// and restore_command, which may have another home.
func (s *keySearch) find(p repo.Place) ([]repo.Key, error) {
	for _, h := range keyHomes(p) {
		b, err := h.read(p.ID)
		if errors.Is(err, fs.ErrNotExist) {
			if h.err == nil {
				s.looked = append(s.looked, h.file(p.ID))
			}
			continue
		}
		s.found = h.file(p.ID)
		var keys []repo.Key
		if err == nil {
			keys, err = repo.ParseKeys(b)
		}
		if err != nil {
			return nil, &failure{err: fmt.Errorf("read the repository's key file %s: %w", s.found, err), code: exitKey, hint: otherKeyHint}
		}
		return keys, s.c.Set(keyFileFlag, s.found)
	}
	if s.ask != nil && p.Passphrase {
		line, err := s.ask(s.c.Context)
		if !errors.Is(err, errNoTerminal) {
			return passphraseKeys(line, err)
		}
	}
	return nil, fmt.Errorf("%s: %w, nor found as %s", p.URL, repo.ErrNoKey, strings.Join(s.looked, " or "))
}

func passphraseKeys(line string, err error) ([]repo.Key, error) {
	if err != nil {
		return nil, keyFailure(fmt.Errorf("ask for the passphrase: %w", err))
	}
	k, err := repo.PassphraseKey(line)
	if err != nil {
		return nil, keyFailure(err)
	}
	return []repo.Key{k}, nil
}

// refuseDowngrade is for a repository that is not encrypted, opened without a key. Where a key was made for one at this URL, and this one
// was not made there on purpose, who can write to the store has replaced it, and would read what is written now.
func refuseDowngrade(r *repo.Repository) error {
	if r.Encryption() != repo.EncryptionNone {
		return nil
	}
	p, err := r.Place()
	if err != nil {
		return err
	}
	for _, h := range keyHomes(p) {
		if path := h.keyMadeAt(p.URL); path != "" && !ownHome().notedPlain(p.ID) {
			return fmt.Errorf("%s: %w: %s was made for it", r.URL(), repo.ErrNotEncrypted, path)
		}
	}
	return nil
}

// allowPlain notes that a repository was made not to be encrypted, where a key is from one that was there before.
func allowPlain(r *repo.Repository) error {
	p, err := r.Place()
	if err != nil {
		return err
	}
	for _, h := range keyHomes(p) {
		if h.keyMadeAt(p.URL) == "" {
			continue
		}
		if err := ownHome().notePlain(p.ID); err != nil {
			return fmt.Errorf("note that %s is not encrypted, unlike one that was there before: %w", p.URL, err)
		}
	}
	return nil
}

var errNoTerminal = errors.New("no terminal")

// askPassphrase has a person type a line that the terminal does not show. When ctx ends meanwhile, the program is about to end, and
// leaves the terminal as it was.
func askPassphrase(ctx context.Context) (string, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return "", errNoTerminal
	}
	defer tty.Close()
	fd := int(tty.Fd())
	state, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	fmt.Fprint(tty, "Passphrase of the repository: ")
	defer fmt.Fprintln(tty)
	type answer struct {
		line []byte
		err  error
	}
	read := make(chan answer, 1)
	go func() {
		line, err := term.ReadPassword(fd)
		read <- answer{line, err}
	}()
	select {
	case a := <-read:
		return string(a.line), a.err
	case <-ctx.Done():
		return "", errors.Join(ctx.Err(), term.Restore(fd, state))
	}
}
