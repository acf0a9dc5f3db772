package ingest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// PushWAL puts one file of pg_wal into the repository, durably when it returns: a segment, a .partial one, a .history
// or a .backup file. path is what PostgreSQL gives archive_command for %p, so the directory above pg_wal is taken for
// the data directory. The first push binds the cluster.
//
// The same file again is fine. One with other bytes is repo.ErrWALConflict, one of another server repo.ErrOtherCluster.
func PushWAL(ctx context.Context, r *repo.Repository, cluster, path string) error {
	name, err := pg.ParseWALName(filepath.Base(path))
	if err != nil {
		return &Error{err: err, hint: "The file must have its name of pg_wal: archive_command gives it as %p."}
	}
	content, err := readWALFile(path)
	if err != nil {
		return fmt.Errorf("read WAL file: %w", err)
	}
	if err := bindByWAL(ctx, r, cluster, path, name, content); err != nil {
		return err
	}
	return putWAL(ctx, r, cluster, name, content)
}

// maxWALFileBytes is PostgreSQL's largest segment size.
const maxWALFileBytes = 1 << 30

func readWALFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxWALFileBytes {
		return nil, fmt.Errorf("%s: %d bytes, %s", path, info.Size(), info.Mode())
	}
	content := make([]byte, info.Size())
	_, err = io.ReadFull(f, content)
	return content, err
}

// bindByWAL makes sure that the file is the cluster's. A segment says whose it is; for other files the server's
// pg_control does, if it can be seen from here.
func bindByWAL(ctx context.Context, r *repo.Repository, cluster, path string, name pg.WALName, content []byte) error {
	if name.Kind == pg.WALSegment || name.Kind == pg.WALPartial {
		_, _, _, systemID, size, _, err := pg.ParseLongPageHeader(content)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		_, err = r.BindCluster(ctx, cluster, systemID, size)
		return err
	}
	control, err := readControlFile(filepath.Dir(filepath.Dir(path)))
	if err == nil {
		_, err = r.BindCluster(ctx, cluster, control.SystemIdentifier, control.SegmentSize)
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_, err = r.Cluster(ctx, cluster)
	if errors.Is(err, repo.ErrNoCluster) {
		return &Error{
			err:  fmt.Errorf("%s does not tell which server it is of: %w", name, err),
			hint: "Push a WAL segment first, make a backup, or push from the server's data directory, as archive_command does.",
		}
	}
	return err
}

// readControlFile reads a data directory's pg_control, again if it was being written.
func readControlFile(dataDirectory string) (control pg.ControlFile, err error) {
	for range 3 {
		content, err := os.ReadFile(filepath.Join(dataDirectory, "global", "pg_control"))
		if err != nil {
			return control, fmt.Errorf("read pg_control: %w", err)
		}
		if control, err = pg.ParseControlFile(content); err == nil {
			return control, nil
		}
	}
	return pg.ParseControlFile(nil)
}

// putWAL puts a WAL file. When a timeline ends, its last segment may come twice as .partial, from the stream up to the
// switch and from the promoted server with whatever follows in the file: one that begins with the other is no conflict,
// for an archiver that is refused tries for ever.
func putWAL(ctx context.Context, r *repo.Repository, cluster string, name pg.WALName, content []byte) error {
	err := r.PutWAL(ctx, cluster, name, content)
	if name.Kind != pg.WALPartial || !errors.Is(err, repo.ErrWALConflict) {
		return err
	}
	stored, readErr := r.WAL(ctx, cluster, name)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	if samePartial(stored, content) {
		return nil
	}
	return err
}

func samePartial(a, b []byte) bool {
	a, b = bytes.TrimRight(a, "\x00"), bytes.TrimRight(b, "\x00")
	return bytes.HasPrefix(a, b) || bytes.HasPrefix(b, a)
}
