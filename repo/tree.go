package repo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"pgthaw/repo/pg"
)

// Entry is one name in a directory of a backup.
type Entry struct {
	Name     string
	Mode     fs.FileMode // type and permissions
	UID, GID uint32
	Size     int64     // bytes; of regular files
	ModTime  time.Time // whole seconds, as tar brings them
	Link     string    // where a symbolic link leads

	content content
}

// IsDir tells whether the entry is a directory.
func (e Entry) IsDir() bool { return e.Mode.IsDir() }

// Inline returns the bytes of a file that lies in the tree itself, so that reading it costs nothing more.
func (e Entry) Inline() (b []byte, ok bool) {
	if e.content.kind == contentEmpty || e.content.kind == contentInline {
		return e.content.bytes, e.Mode.IsRegular()
	}
	return nil, false
}

// content says where a file's bytes, or a directory's listing, lie.
type content struct {
	kind  byte
	bytes []byte     // of contentInline: the file; of contentInlineMap: its encoded map
	ref   Ref        // of contentMap and contentTree
	wal   pg.WALName // of contentWAL
}

// Kinds of content, as the tree encodes them.
const (
	contentEmpty     = 0 // a file of no bytes; a symbolic link
	contentInline    = 1 // the bytes are in the tree
	contentInlineMap = 2 // the file map is in the tree
	contentMap       = 3 // the file map is a piece
	contentTree      = 4 // the listing is a piece
	contentWAL       = 5 // the bytes are those of a WAL object of the same cluster
)

const (
	// maxInline is the largest file whose bytes lie in the tree: enough for PG_VERSION, backup_label, signal files.
	maxInline = 512
	// maxInlineMap is the largest encoded map that lies in the tree: that of a file of one or two chunks.
	maxInlineMap = 160
)

// File types and permissions as inode(7) has them, so that a tree means the same everywhere.
const (
	sIFREG = 0o100000
	sIFDIR = 0o040000
	sIFLNK = 0o120000
)

func unixMode(m fs.FileMode) (uint32, error) {
	perm := uint32(m.Perm())
	switch m.Type() {
	case 0:
		return sIFREG | perm, nil
	case fs.ModeDir:
		return sIFDIR | perm, nil
	case fs.ModeSymlink:
		return sIFLNK | perm, nil
	}
	return 0, fmt.Errorf("a backup holds no file of type %v", m.Type())
}

func goMode(m uint32) (fs.FileMode, error) {
	perm := fs.FileMode(m & 0o777)
	switch m &^ 0o777 {
	case sIFREG:
		return perm, nil
	case sIFDIR:
		return perm | fs.ModeDir, nil
	case sIFLNK:
		return perm | fs.ModeSymlink, nil
	}
	return 0, fmt.Errorf("mode %o", m)
}

// appendTo encodes the entry.
//
// Format: docs/format.md, "Tree".
func (e *Entry) appendTo(b []byte) ([]byte, error) {
	mode, err := unixMode(e.Mode)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.Name, err)
	}
	b = appendString(b, e.Name)
	b = binary.AppendUvarint(b, uint64(mode))
	b = binary.AppendUvarint(b, uint64(e.UID))
	b = binary.AppendUvarint(b, uint64(e.GID))
	b = binary.AppendVarint(b, e.ModTime.Unix())
	b = binary.AppendUvarint(b, uint64(e.Size))
	b = appendString(b, e.Link)
	return e.content.appendTo(b), nil
}

func (c content) appendTo(b []byte) []byte {
	b = append(b, c.kind)
	switch c.kind {
	case contentInline, contentInlineMap:
		b = appendString(b, string(c.bytes))
	case contentMap, contentTree:
		b = appendRef(b, c.ref)
	case contentWAL:
		b = appendString(b, c.wal.String())
	}
	return b
}

// treeDecoder takes an encoded tree apart entry by entry: a million of them decoded take a multiple of their bytes.
type treeDecoder struct {
	d    decoder
	left int    // entries
	last string // name of the entry before
}

func newTreeDecoder(b []byte) (*treeDecoder, error) {
	t := &treeDecoder{d: decoder{b: b}}
	if t.d.byte() != pieceTree || t.d.byte() != formatVersion {
		return nil, errors.New("not a tree of version 1")
	}
	t.left = t.d.count(8)
	return t, t.d.err
}

// next returns the next entry, after the last io.EOF.
func (t *treeDecoder) next() (e Entry, err error) {
	if t.left == 0 {
		if err := t.d.end(); err != nil {
			return e, err
		}
		return e, io.EOF
	}
	t.left--
	e.decode(&t.d)
	if t.d.err == nil && e.Name <= t.last {
		t.d.fail("%q follows %q", e.Name, t.last)
	}
	t.last = e.Name
	return e, t.d.err
}

func (e *Entry) decode(d *decoder) {
	e.Name = d.string()
	mode, err := goMode(d.uint32())
	if err == nil {
		err = validName(e.Name)
	}
	if err != nil {
		d.fail("entry %q: %v", e.Name, err)
	}
	e.Mode = mode
	e.UID, e.GID = d.uint32(), d.uint32()
	e.ModTime = time.Unix(d.varint(), 0).UTC()
	e.Size = int64(d.uvarint())
	e.Link = d.string()
	e.content.decode(d)
	if d.err == nil {
		if err := e.validate(); err != nil {
			d.fail("entry %q: %v", e.Name, err)
		}
	}
}

func (c *content) decode(d *decoder) {
	switch c.kind = d.byte(); c.kind {
	case contentEmpty:
	case contentInline, contentInlineMap:
		c.bytes = d.bytes(d.count(1))
	case contentMap, contentTree:
		c.ref = d.ref()
	case contentWAL:
		name, err := pg.ParseWALName(d.string())
		if err != nil {
			d.fail("%v", err)
		}
		c.wal = name
	default:
		d.fail("content of kind %d", c.kind)
	}
}

// validate refuses an entry whose type, size and content contradict each other.
func (e *Entry) validate() error {
	kind, regular := e.content.kind, e.Mode.IsRegular()
	switch {
	case e.Size < 0 || e.Size > maxFileSize:
		return fmt.Errorf("%d bytes", uint64(e.Size))
	case e.IsDir() != (kind == contentTree):
		return fmt.Errorf("mode %v with content of kind %d", e.Mode, kind)
	case (e.Mode.Type() == fs.ModeSymlink) != (e.Link != ""):
		return fmt.Errorf("mode %v with link %q", e.Mode, e.Link)
	case !regular && (e.Size != 0 || !e.IsDir() && kind != contentEmpty):
		return fmt.Errorf("mode %v with content", e.Mode)
	case kind == contentInline && int64(len(e.content.bytes)) != e.Size, kind == contentEmpty && e.Size != 0:
		return fmt.Errorf("%d bytes of %d are in the tree", len(e.content.bytes), e.Size)
	}
	return nil
}

// validName refuses what cannot be a name in a directory.
func validName(name string) error {
	if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q is no file name", name)
	}
	return nil
}
