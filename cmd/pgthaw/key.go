package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"pgthaw/repo"
)

// Keys come from files only: what stands in a command line or the environment can be seen by others.

const (
	keyFileFlag    = "key-file"
	passphraseFlag = "passphrase-file"
)

// givenKeys reads the keys that the flags name. There may be none.
func givenKeys(c *cli.Context) ([]repo.Key, error) {
	keys, err := readKeyFile(c.String(keyFileFlag))
	if err != nil {
		return nil, err
	}
	more, err := readPassphraseFile(c.String(passphraseFlag))
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

// keyArgs hand the key files on to a program that runs elsewhere, later, and without anybody to ask.
func keyArgs(c *cli.Context) (args []string, err error) {
	for _, name := range []string{keyFileFlag, passphraseFlag} {
		if c.String(name) == "" {
			continue
		}
		path, err := filepath.Abs(c.String(name))
		if err != nil {
			return nil, err
		}
		args = append(args, "--"+name, path)
	}
	return args, nil
}

// openRepository opens the repository that --repo names. If it is encrypted and no key is given, a person is asked, who
// is at the terminal whatever stdin and stderr are.
func openRepository(c *cli.Context) (*repo.Repository, error) {
	r, err := openUnattended(c)
	if !errors.Is(err, repo.ErrNoKey) {
		return r, err
	}
	tty, noTerminal := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if noTerminal != nil {
		return nil, err
	}
	defer tty.Close()
	line, err := askPassphrase(c.Context, tty)
	if err != nil {
		return nil, keyFailure(fmt.Errorf("ask for the passphrase: %w", err))
	}
	k, err := repo.PassphraseKey(line)
	if err != nil {
		return nil, keyFailure(err)
	}
	return repo.Open(c.Context, c.String("repo"), repo.Options{Log: logger(c), Keys: []repo.Key{k}})
}

// openUnattended is for what runs without a person, or has other programs open the repository, too: nobody is asked.
func openUnattended(c *cli.Context) (*repo.Repository, error) {
	if c.String("repo") == "" {
		return nil, &failure{err: usage("no repository is given"), code: exitUsage, hint: "Give --repo URL, or set PGTHAW_REPO."}
	}
	return openAt(c.Context, c, c.String("repo"))
}

func openAt(ctx context.Context, c *cli.Context, url string) (*repo.Repository, error) {
	keys, err := givenKeys(c)
	if err != nil {
		return nil, err
	}
	return repo.Open(ctx, url, repo.Options{Log: logger(c), Keys: keys})
}

// askPassphrase reads a line that the terminal does not show. When ctx ends meanwhile, the program is about to end, and
// leaves the terminal as it was.
func askPassphrase(ctx context.Context, tty *os.File) (string, error) {
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

// makeKeyFile makes an age identity, durable before anything is encrypted for it. If the file exists already, made is false.
func makeKeyFile(path string) (made bool, err error) {
	_, text, err := repo.NewKey()
	if err != nil {
		return false, fmt.Errorf("make key: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("make key file: %w", err)
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = syncDirectory(filepath.Dir(path))
	}
	if err != nil {
		return false, fmt.Errorf("write key file %s: %w", path, err)
	}
	return true, nil
}

func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
