package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"pgthaw/recovery"
	"pgthaw/repo"
)

// A repository made without a word about keys has its key in a file that is named after its id, in the home of the user who
// owns the repository. Whoever gives no key has this file looked for.

// keyHome is where one user keeps the keys of repositories. Root goes there with no more rights than that user's: what
// lies in a home, links too, is its user's invention.
type keyHome struct {
	dir      string
	uid, gid int
	shared   bool  // the group may read keys
	err      error // the user has no home
}

// hostKeys is where root keeps the keys of a host's repositories, in no home. archive_command and restore_command run as the
// server's user, so that user's group, if the host has it, may read them.
const (
	hostKeys    = "/etc/pgthaw/keys"
	serverGroup = "postgres"
)

func hostHome() keyHome {
	h := keyHome{dir: hostKeys}
	if g, err := user.LookupGroup(serverGroup); err == nil {
		h.gid, _ = strconv.Atoi(g.Gid)
		h.shared = true
	}
	return h
}

// keyHomes are where the key of a repository is looked for, in turn, and made: in the first. Root begins with the home of who
// owns the repository, for there the server's user can read it, too; what root owns is the host's, unless the environment
// gives root another home.
func keyHomes(p repo.Place) (homes []keyHome) {
	own := ownHome()
	if os.Geteuid() != 0 {
		return []keyHome{own, hostHome()}
	}
	if p.UID != 0 {
		homes = append(homes, homeOf(p.UID))
	}
	if own.dir == homeOf(0).dir {
		homes = append(homes, hostHome())
	}
	return append(homes, own)
}

// homeOf is the home that the password file gives a user.
func homeOf(uid int) keyHome {
	u, err := user.LookupId(strconv.Itoa(uid))
	if err == nil && !filepath.IsAbs(u.HomeDir) {
		err = fmt.Errorf("user %s has no home directory", u.Username)
	}
	if err != nil {
		return keyHome{err: fmt.Errorf("find the key file of user %d: %w", uid, err)}
	}
	gid, _ := strconv.Atoi(u.Gid)
	return keyHome{dir: keysIn(filepath.Join(u.HomeDir, ".config")), uid: uid, gid: gid}
}

func ownerID(info fs.FileInfo) int { return int(info.Sys().(*syscall.Stat_t).Uid) }

func keysIn(config string) string { return filepath.Join(config, "pgthaw", "keys") }

// ownHome is that of the user of this process: $XDG_CONFIG_HOME, else $HOME, but not one that runuser or sudo left of another
// user's, else what the password file says.
func ownHome() keyHome {
	own := keyHome{uid: os.Geteuid(), gid: os.Getegid()}
	if config := os.Getenv("XDG_CONFIG_HOME"); filepath.IsAbs(config) {
		own.dir = keysIn(config)
		return own
	}
	home := os.Getenv("HOME")
	info, err := os.Stat(home)
	if err == nil && filepath.IsAbs(home) && ownerID(info) == own.uid {
		own.dir = keysIn(filepath.Join(home, ".config"))
		return own
	}
	if h := homeOf(own.uid); h.err == nil || !filepath.IsAbs(home) {
		return h
	}
	own.dir = keysIn(filepath.Join(home, ".config")) // a container's user, whom nobody knows
	return own
}

func (h keyHome) file(id string) string { return filepath.Join(h.dir, id+".key") }

// read gives the key file of a repository. fs.ErrNotExist: there is none.
func (h keyHome) read(id string) (b []byte, err error) {
	if h.err != nil {
		return nil, fmt.Errorf("%w: %w", h.err, fs.ErrNotExist)
	}
	err = recovery.AsUser(h.uid, h.gid, func() (err error) {
		b, err = readRegular(h.file(id))
		return err
	})
	return b, err
}

// readRegular does not wait for what is no file, but a pipe, to have a writer.
func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	}
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, maxKeyFile))
}

// maxKeyFile is more than any key file has, in bytes.
const maxKeyFile = 64 << 10

// make makes the key file of a repository, and the directories above that are missing. It gives what is in it.
func (h keyHome) make(p repo.Place) (path string, b []byte, err error) {
	if h.err != nil {
		return "", nil, h.err
	}
	path = h.file(p.ID)
	err = recovery.AsUser(h.uid, h.gid, func() error {
		if err := h.makeDirs(h.dir); err != nil {
			return fmt.Errorf("make key file: %w", err)
		}
		made, err := makeKeyFile(path, aboutKey(p.URL, p.ID))
		if err == nil && !made {
			err = fmt.Errorf("make key file %s: %w", path, fs.ErrExist)
		}
		if err == nil && h.shared {
			err = errors.Join(os.Chown(path, h.uid, h.gid), os.Chmod(path, 0o640))
		}
		if err == nil {
			b, err = os.ReadFile(path)
		}
		return err
	})
	return path, b, err
}

func (h keyHome) remove(path string) error {
	return recovery.AsUser(h.uid, h.gid, func() error { return os.Remove(path) })
}

// aboutKey is what a key file says of its repository.
func aboutKey(url, id string) string {
	return fmt.Sprintf("# key of the pgthaw repository %s\n%s%s\n", id, madeAt, url)
}

const madeAt = "# made at "

// keyMadeAt is a key file of this home that was made for a repository at the URL; "" if there is none.
func (h keyHome) keyMadeAt(url string) (found string) {
	if h.err != nil {
		return ""
	}
	_ = recovery.AsUser(h.uid, h.gid, func() error { // what cannot be read tells nothing
		files, err := os.ReadDir(h.dir)
		for _, f := range files {
			path := filepath.Join(h.dir, f.Name())
			if b, err := readRegular(path); err == nil && saysMadeAt(b, url) {
				found = path
			}
		}
		return err
	})
	return found
}

// plainFile says that the repository of this id was made not to be encrypted, by whoever has this home.
func (h keyHome) plainFile(id string) string { return filepath.Join(h.dir, id+".plain") }

func (h keyHome) notePlain(id string) error {
	return recovery.AsUser(h.uid, h.gid, func() error { return os.WriteFile(h.plainFile(id), nil, 0o600) })
}

func (h keyHome) notedPlain(id string) bool {
	return recovery.AsUser(h.uid, h.gid, func() error {
		_, err := os.Stat(h.plainFile(id))
		return err
	}) == nil
}

func saysMadeAt(file []byte, url string) bool {
	for lines := bufio.NewScanner(bytes.NewReader(file)); lines.Scan(); {
		if at, ok := strings.CutPrefix(lines.Text(), madeAt); ok && at == url {
			return true
		}
	}
	return false
}

// makeDirs makes dir and whatever above it is missing, durably, for this user alone, or such that others can name what is in it.
func (h keyHome) makeDirs(dir string) error {
	mode := fs.FileMode(0o700)
	if h.shared {
		mode = 0o711
	}
	err := os.Mkdir(dir, mode)
	if errors.Is(err, fs.ErrNotExist) {
		if err := h.makeDirs(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, mode)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDirectory(filepath.Dir(dir))
}

// makeKeyFile makes an age identity, durable before anything is encrypted for it. If the file exists already, made is false.
func makeKeyFile(path, about string) (made bool, err error) {
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
	_, err = f.Write(append([]byte(about), text...))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = syncDirectory(filepath.Dir(path))
	}
	if err != nil {
		return false, errors.Join(fmt.Errorf("write key file %s: %w", path, err), os.Remove(path))
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
