package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"
)

// What a caller acts on. Any other error of a store means that the medium could not be asked, or refused: nothing is
// known then about the object. ErrOutOfReach is one of them: the store was there, and is not any more.
var (
	ErrExist      = fmt.Errorf("object exists: %w", fs.ErrExist)
	ErrNotExist   = fmt.Errorf("no such object: %w", fs.ErrNotExist)
	ErrOutOfReach = errors.New("store out of reach")
)

// Object is one entry of a listing.
type Object struct {
	Key      string
	Size     int64     // bytes
	Modified time.Time // when it was put, by the medium's clock
}

// Store keeps immutable objects under slash-separated keys. Safe for concurrent use, by any number of processes at once.
//
// A key is valid UTF-8, made of parts joined by "/"; no part is empty, "." or "..", and the first is not "tmp". A key is
// never also the leading parts of another key: that would be a directory and a file of one name.
//
// The medium guarantees, and callers build on, this:
//
//   - Put is atomic: a key appears with all of its bytes or not at all, whenever the writer dies.
//   - Put creates and never replaces: of any number of writers of one key exactly one succeeds, the others get ErrExist.
//   - Put is durable: when it returns nil the object survives a power cut. So it does when Put returns ErrExist, with
//     whichever bytes were first.
//   - What was put is read and listed by everybody from then on. It can be read before Put has returned, and then is not
//     yet durable: whoever builds on what another process put, puts it again.
type Store interface {
	// Put creates the object key. It gives ErrExist if there is one already, whatever its bytes.
	//
	// After any other error, a cancelled ctx among them, the object may be there or not; a retry of Put can then get
	// ErrExist from its own first attempt, so whoever retries compares the bytes. body is not kept.
	Put(ctx context.Context, key string, body []byte) error

	// Get returns n bytes of the object key from offset off, or all from off to the end if n is negative. It gives
	// ErrNotExist, and io.ErrUnexpectedEOF for an object that ends before off+n. The result belongs to the caller.
	Get(ctx context.Context, key string, off, n int64) ([]byte, error)

	// List yields the objects whose keys begin with prefix, in ascending byte order of keys. Objects that are put or
	// deleted while it runs may be yielded or not. An error ends it; objects yielded before are right.
	List(ctx context.Context, prefix string) iter.Seq2[Object, error]

	// Delete removes the object key, durably. An absent object is no error. A Get that runs meanwhile returns the
	// object's bytes or an error.
	Delete(ctx context.Context, key string) error
}

// Open returns the store at rawURL and the URL's canonical spelling, which names the same store from any working
// directory. A URL without a scheme is a path. It reads nothing: whether there is a repository is for the caller to see.
func Open(ctx context.Context, rawURL string) (Store, string, error) {
	if !strings.Contains(rawURL, "://") {
		return openPath(rawURL)
	}
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, "", err
	}
	switch u.Scheme {
	case "file":
		if u.Host != "" && u.Host != "localhost" || u.RawQuery != "" || u.Fragment != "" {
			return nil, "", fmt.Errorf("%s: a file URL is file:// and an absolute path, with %%3F for ? and %%23 for #", rawURL)
		}
		return openPath(u.Path)
	default:
		return nil, "", fmt.Errorf("scheme %s is not supported by this build", u.Scheme)
	}
}

func openPath(path string) (Store, string, error) {
	if path == "" {
		return nil, "", fmt.Errorf("open store: no path given")
	}
	dir, err := filepath.Abs(path)
	if err != nil {
		return nil, "", fmt.Errorf("open store %s: %w", path, err)
	}
	f, err := OpenFile(dir)
	if err != nil {
		return nil, "", err
	}
	u := url.URL{Scheme: "file", Path: dir}
	return f, u.String(), nil
}

// Owner is the user of this machine who owns, or will own, what this process puts into s: on most media that is the user of the
// process; a directory gives what root puts into it to its own owner.
func Owner(s Store) (uid int, err error) {
	switch s := s.(type) {
	case *File:
		return s.owner()
	case *Patient:
		return Owner(s.Store)
	}
	return os.Geteuid(), nil
}

// tmpPart is the first part of no key: a medium keeps what is not yet an object there.
const tmpPart = "tmp"

// checkKey says what is wrong with key, by the rules in Store's comment.
func checkKey(key string) error {
	if !fs.ValidPath(key) || key == "." || strings.ContainsRune(key, 0) || !utf8.ValidString(key) {
		return fmt.Errorf("key %q is not valid", key)
	}
	if first, _, _ := strings.Cut(key, "/"); first == tmpPart {
		return fmt.Errorf("key %q is not valid: %s is the store's own", key, tmpPart)
	}
	return nil
}

// extent returns where in an object of size bytes Get reads, with Get's rules for off and n.
func extent(size, off, n int64) (start, length int64, err error) {
	if n < 0 {
		n = size - off
	}
	if off < 0 || off > size || n < 0 || n > size-off {
		return 0, 0, fmt.Errorf("%d bytes from %d of an object of %d bytes: %w", n, off, size, io.ErrUnexpectedEOF)
	}
	return off, n, nil
}
