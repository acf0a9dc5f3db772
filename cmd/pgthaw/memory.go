package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"pgthaw/repo"
)

// hostMemory keeps a repo.Memory in small files of the user's state directory:
//
//	<id>-<hash>.json   what was seen of the repository <id> at the URL that has the hash: a URL may hold a password
//	url-<hash>         the ID of the repository at that URL
//	lock               held while one of them is replaced
//
// They are replaced in one step and not synced: a power cut may take the last change, or leave a file that cannot be read
// and counts as none. So a "wal push" pays for no sync. What cannot be read or written is logged, once.
type hostMemory struct {
	dir  string
	log  func(msg string, args ...any)
	once sync.Once // for log
}

const (
	lockPatience = time.Second // others hold the lock for less than a millisecond, unless they are stopped
	lockEvery    = 5 * time.Millisecond
)

// newMemory returns the memory of the user's, or none if there is no place for one.
func newMemory(log func(msg string, args ...any)) repo.Memory {
	dir, err := stateDir()
	if err != nil {
		log("this host cannot remember what the repository holds", "error", err)
		return nil
	}
	return &hostMemory{dir: dir, log: log}
}

// stateDir is where the XDG Base Directory Specification has it. A server's environment may lack HOME.
func stateDir() (string, error) {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "pgthaw"), nil
	}
	home := os.Getenv("HOME")
	if home == "" {
		u, err := user.Current()
		if err != nil {
			return "", err
		}
		home = u.HomeDir
	}
	if _, err := os.Stat(home); err != nil {
		return "", fmt.Errorf("find the home directory: %w", err) // none is made
	}
	return filepath.Join(home, ".local", "state", "pgthaw"), nil
}

func (m *hostMemory) At(url string) string {
	b, err := os.ReadFile(m.urlFile(url))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.warn(err)
	}
	return strings.TrimSpace(string(b))
}

func (m *hostMemory) Settle(url, id string) {
	m.locked(func() error { return replaceFile(m.urlFile(url), []byte(id+"\n")) })
}

func (m *hostMemory) Seen(url, id string) repo.Seen {
	seen, err := m.read(url, id)
	if err != nil {
		m.warn(err)
	}
	return seen
}

func (m *hostMemory) Update(url, id string, change func(repo.Seen)) {
	m.locked(func() error {
		seen, err := m.read(url, id)
		if err != nil {
			m.warn(err)
		}
		change(seen)
		b, err := json.MarshalIndent(seen, "", "  ")
		if err != nil {
			return err
		}
		b = append(b, '\n')
		if was, err := os.ReadFile(m.file(url, id)); err == nil && bytes.Equal(was, b) {
			return nil
		}
		return replaceFile(m.file(url, id), b)
	})
}

func (m *hostMemory) file(url, id string) string {
	return filepath.Join(m.dir, id+"-"+urlHash(url)+".json")
}

func (m *hostMemory) urlFile(url string) string { return filepath.Join(m.dir, "url-"+urlHash(url)) }

func urlHash(url string) string {
	sum := sha256.Sum256([]byte(url))
	return fmt.Sprintf("%x", sum[:16])
}

// read never returns a nil map.
func (m *hostMemory) read(url, id string) (repo.Seen, error) {
	b, err := os.ReadFile(m.file(url, id))
	if errors.Is(err, fs.ErrNotExist) {
		return repo.Seen{}, nil
	}
	if err != nil {
		return repo.Seen{}, err
	}
	seen := repo.Seen{}
	if err := json.Unmarshal(b, &seen); err != nil || seen == nil {
		return repo.Seen{}, fmt.Errorf("%s cannot be read, and is forgotten: %v", m.file(url, id), err)
	}
	return seen, nil
}

// locked runs fn while no other process replaces a file, or not at all.
func (m *hostMemory) locked(fn func() error) {
	if err := m.lockAnd(fn); err != nil {
		m.warn(err)
	}
}

func (m *hostMemory) lockAnd(fn func() error) error {
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(m.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	deadline := time.Now().Add(lockPatience)
	for {
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return fn()
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			return fmt.Errorf("lock %s: %w", lock.Name(), err)
		}
		time.Sleep(lockEvery)
	}
}

// replaceFile is called under the lock.
func replaceFile(path string, content []byte) error {
	fresh := path + ".new"
	if err := os.WriteFile(fresh, content, 0o600); err != nil {
		return err
	}
	return os.Rename(fresh, path)
}

func (m *hostMemory) warn(err error) {
	m.once.Do(func() { m.log("this host cannot remember what the repository holds", "error", err) })
}
