package ingest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// copyOut is the COPY stream of a BASE_BACKUP, an io.Reader of one of its parts at a time: first the archives, then
// backup_manifest. Reading costs one copy out of the messages' buffer and no allocation.
type copyOut struct {
	m        *messages
	progress func(n int) // told of the bytes of content as they are read
	open     bool        // a part has begun
	waiting  *part       // announced by the server, not begun yet
	ended    bool        // CopyDone has come
}

// part is an archive or, with an empty Name, backup_manifest.
type part struct {
	Name string // <oid>.tar or base.tar
	Path string // of the tablespace on the server, relative to the data directory if it is in-place; empty for base.tar
}

// The first byte of a CopyData message's body (protocol-replication in the manual, BASE_BACKUP).
const (
	copyArchive  = 'n'
	copyManifest = 'm'
	copyContent  = 'd'
	copyProgress = 'p'
)

// next passes over what is left of the current part and begins the next one. io.EOF: there is none.
func (c *copyOut) next() (part, error) {
	if _, err := io.Copy(io.Discard, c); err != nil {
		return part{}, err
	}
	if c.ended {
		return part{}, io.EOF
	}
	p := *c.waiting
	c.waiting, c.open = nil, true
	return p, nil
}

// expect begins the next part, which must have that name.
func (c *copyOut) expect(name string) error {
	p, err := c.next()
	if err == io.EOF {
		return fmt.Errorf("the COPY stream ends where %q belongs", name)
	}
	if err == nil && p.Name != name {
		err = fmt.Errorf("archive %q came where %q belongs", p.Name, name)
	}
	return err
}

// Read reads the current part, to io.EOF at its end.
func (c *copyOut) Read(p []byte) (int, error) {
	for c.m.left == 0 {
		if c.waiting != nil || c.ended {
			return 0, io.EOF
		}
		if err := c.advance(); err != nil {
			return 0, err
		}
	}
	n, err := c.m.read(p)
	c.progress(n)
	return n, err
}

// advance reads the next message, up to its content if it has any.
func (c *copyOut) advance() error {
	kind, err := c.m.next()
	if err != nil {
		return err
	}
	if kind == msgCopyDone {
		c.ended = true
		return nil
	}
	if kind != msgCopyData || c.m.left == 0 {
		return fmt.Errorf("message %q of %d bytes in the COPY stream", kind, c.m.left)
	}
	what, err := c.m.r.ReadByte()
	if err != nil {
		return lost(err)
	}
	c.m.left--
	return c.begin(what)
}

func (c *copyOut) begin(what byte) error {
	switch what {
	case copyContent:
		if !c.open {
			return errors.New("content before an archive has begun")
		}
		return nil
	case copyArchive:
		b, err := c.m.body()
		if err != nil {
			return err
		}
		c.waiting, err = parseArchive(b)
		return err
	case copyManifest:
		c.waiting = &part{}
		_, err := c.m.body()
		return err
	case copyProgress:
		b, err := c.m.body()
		if err == nil && len(b) != binary.Size(int64(0)) {
			err = fmt.Errorf("progress report of %d bytes", len(b))
		}
		return err
	default:
		return fmt.Errorf("CopyData of unknown kind %q", what)
	}
}

// parseArchive reads an archive's name and its tablespace's path, each ended by a NUL.
func parseArchive(b []byte) (*part, error) {
	name, rest, ok1 := bytes.Cut(b, []byte{0})
	path, _, ok2 := bytes.Cut(rest, []byte{0})
	if !ok1 || !ok2 || len(name) == 0 {
		return nil, fmt.Errorf("announcement of an archive %q", b)
	}
	return &part{Name: string(name), Path: string(path)}, nil
}
