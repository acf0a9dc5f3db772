package ingest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"pgthaw/repo"
)

// walkArchive calls fn with each entry of a tar file, its name clean and below the archive's root. content is the
// file's bytes.
func walkArchive(r io.Reader, fn func(h *tar.Header, content io.Reader) error) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		// Directories and links end with a slash, and pg_wal/archive_status begins with "./" (basebackup.c).
		h.Name = strings.TrimPrefix(strings.TrimSuffix(h.Name, "/"), "./")
		if !plain(h) {
			return fmt.Errorf("%s: tar entry of type %q with %d extensions", h.Name, h.Typeflag, len(h.PAXRecords))
		}
		if !fs.ValidPath(h.Name) || h.Name == "." || h.Size < 0 {
			return fmt.Errorf("entry of impossible name %q or size %d", h.Name, h.Size)
		}
		if err := fn(h, t); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
}

// plain says whether the entry is one that PostgreSQL makes (tar.c). Others could stand for more bytes than are sent.
func plain(h *tar.Header) bool {
	return len(h.PAXRecords) == 0 && (h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeDir || h.Typeflag == tar.TypeSymlink)
}

// tree puts the files of the archives into the backup's tree, and keeps what backup_manifest will be compared with.
type tree struct {
	w       *repo.BackupWriter
	dirMode fs.FileMode // of directories that no archive has an entry for

	dirs     map[string]bool
	database string     // directory of the database whose files are coming; "": none
	arrived  arrivals   // files of the archives
	label    []byte     // backup_label
	owner    repo.Entry // an entry with the server's user and group
}

func newTree(w *repo.BackupWriter, dataDirectoryMode string) *tree {
	t := &tree{w: w, dirMode: 0o700, dirs: map[string]bool{}, arrived: newArrivals()}
	if mode, err := strconv.ParseUint(dataDirectoryMode, 8, 32); err == nil {
		t.dirMode = fs.FileMode(mode) & fs.ModePerm
	}
	return t
}

const (
	dataDir   = "pgdata" // of a backup's tree
	walDir    = dataDir + "/pg_wal"
	statusDir = walDir + "/archive_status"
)

// root is where in the tree the archive's entries go, and manifestPrefix what backup_manifest puts before their names.
func (row tablespaceRow) root() (root, manifestPrefix string) {
	if row.oid == 0 {
		return dataDir, ""
	}
	oid := strconv.FormatUint(uint64(row.oid), 10)
	if row.inPlace() {
		return dataDir + "/pg_tblspc/" + oid, "pg_tblspc/" + oid + "/"
	}
	return "tablespaces/" + oid, "pg_tblspc/" + oid + "/"
}

// inPlace tells a tablespace whose directory is in pg_tblspc itself (allow_in_place_tablespaces).
func (row tablespaceRow) inPlace() bool { return row.oid != 0 && !strings.HasPrefix(row.path, "/") }

// archiveName is how BASE_BACKUP names the row's archive.
func (row tablespaceRow) archiveName() string {
	if row.oid == 0 {
		return "base.tar"
	}
	return strconv.FormatUint(uint64(row.oid), 10) + ".tar"
}

// archive takes in the archive of one tablespace.
func (t *tree) archive(r io.Reader, row tablespaceRow) error {
	root, prefix := row.root()
	err := walkArchive(r, func(h *tar.Header, content io.Reader) error {
		e := repo.Entry{
			Mode:    fs.FileMode(h.Mode) & fs.ModePerm,
			UID:     uint32(h.Uid),
			GID:     uint32(h.Gid),
			Size:    h.Size,
			ModTime: h.ModTime,
			Link:    h.Linkname,
		}
		t.owner = repo.Entry{UID: e.UID, GID: e.GID, ModTime: e.ModTime}
		if err := t.enter(path.Dir(root + "/" + h.Name)); err != nil {
			return err
		}
		return t.entry(h.Typeflag, root+"/"+h.Name, prefix+h.Name, e, content)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", row.archiveName(), err)
	}
	return t.enter(root)
}

// enter makes the directory in which the next entry lies. The server walks depth first (sendDir), so that a database's
// directory is complete once an entry lies outside of it; those alone have very many files.
func (t *tree) enter(dir string) error {
	if t.database != "" && dir != t.database && !strings.HasPrefix(dir, t.database+"/") {
		if err := t.w.CloseDir(t.database); err != nil {
			return err
		}
		t.database = ""
	}
	if t.database == "" && isDatabase(dir) {
		t.database = dir
	}
	return t.makeDirs(dir)
}

// isDatabase tells the directory of a database, in the data directory or a tablespace.
func isDatabase(dir string) bool {
	for _, pattern := range []string{dataDir + "/base/*", "tablespaces/*/PG_*/*", dataDir + "/pg_tblspc/*/PG_*/*"} {
		if ok, _ := path.Match(pattern, dir); ok {
			return true
		}
	}
	return false
}

// makeDirs makes the directories down to dir that are not there: the archives' roots, which have no entry of their
// own, and those above an in-place tablespace, whose entries come later.
func (t *tree) makeDirs(dir string) error {
	if dir == "." || t.dirs[dir] {
		return nil
	}
	if err := t.makeDirs(path.Dir(dir)); err != nil {
		return err
	}
	e := t.owner
	e.Mode = t.dirMode
	return t.mkdir(dir, e)
}

func (t *tree) mkdir(name string, e repo.Entry) error {
	if t.dirs[name] {
		return nil
	}
	t.dirs[name] = true
	return t.w.Mkdir(name, e)
}

func (t *tree) entry(kind byte, name, manifestName string, e repo.Entry, content io.Reader) error {
	switch kind {
	case tar.TypeDir:
		return t.mkdir(name, e)
	case tar.TypeSymlink:
		return t.w.Symlink(name, e)
	default:
		return t.file(name, manifestName, e, content)
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// summing passes on what it reads, and sums it.
type summing struct {
	io.Reader
	size int64
	crc  uint32 // CRC-32C
}

func (s *summing) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	s.size += int64(n)
	s.crc = crc32.Update(s.crc, castagnoli, p[:n])
	return n, err
}

func (t *tree) file(name, manifestName string, e repo.Entry, content io.Reader) error {
	if name == dataDir+"/backup_label" {
		label, err := readLabel(content, e.Size)
		if err != nil {
			return err
		}
		t.label, content = label, bytes.NewReader(label)
	}
	s := &summing{Reader: content}
	if err := t.write(name, e, s); err != nil {
		return err
	}
	return t.arrived.add(arrival{manifestName, s.size, s.crc})
}

// maxLabelBytes is far above what a label of MAXPGPATH bytes makes.
const maxLabelBytes = 64 << 10

func readLabel(r io.Reader, size int64) ([]byte, error) {
	if size > maxLabelBytes {
		return nil, fmt.Errorf("%d bytes", size)
	}
	return io.ReadAll(r)
}

// write stores one file. Close notices when r has not given e.Size bytes.
func (t *tree) write(name string, e repo.Entry, r io.Reader) error {
	f, err := t.w.Create(name, e, repo.Hot(name, e.Size))
	if err != nil {
		return err
	}
	if _, err := f.ReadFrom(r); err != nil {
		return err
	}
	return f.Close()
}

// add stores a file that no archive has, as the server's user would have made it.
func (t *tree) add(name string, content []byte) error {
	e := t.owner
	e.Mode, e.Size = 0o600, int64(len(content))
	if err := t.makeDirs(path.Dir(name)); err != nil {
		return err
	}
	return t.write(name, e, bytes.NewReader(content))
}
