package recovery

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

// FetchWAL answers restore_command: it puts the WAL file called name, verified and whole, at path. It may be asked for
// the same file again.
//
// repo.ErrNoWAL means that recovery may end here: the repository was listed, has no such file, and nothing that comes
// later on that timeline. Whatever else keeps the file from its place, a gap too, is another error: PostgreSQL takes an
// exit of 1 for the end of WAL, and promotes (xlogarchive.c).
func FetchWAL(ctx context.Context, r *repo.Repository, cluster, name, path string) error {
	content, err := walFile(ctx, r, cluster, name)
	if err != nil {
		return err
	}
	return putInPlace(path, content)
}

// FetchOverlayWAL does what FetchWAL does, through the daemon of the overlay at dir: the server's user needs no access to
// the repository, nor to its key. ErrNoDaemon: the overlay is an ordinary directory by now, or its daemon died.
func FetchOverlayWAL(ctx context.Context, dir, cluster, name, path string) error {
	dir, err := canonical(dir)
	if err != nil {
		return err
	}
	q := request{Command: commandWAL, Cluster: cluster, WAL: name}
	if at, err := canonical(filepath.Dir(path)); err == nil && at == filepath.Join(dir, "pg_wal") {
		q.Put = filepath.Base(path)
	}
	r, err := askFor(ctx, dir, q)
	if err != nil {
		return err
	}
	if r.Put {
		return checkPut(path, r.Bytes)
	}
	if len(r.wal) == 0 {
		return fmt.Errorf("the daemon of %s gave no bytes for %s", dir, name)
	}
	return putInPlace(path, r.wal)
}

// checkPut makes sure of what the daemon put in place, where its caller sees it.
func checkPut(path string, size int64) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.Size() != size {
		return fmt.Errorf("%s has %d bytes instead of %d", path, info.Size(), size)
	}
	return nil
}

// walFile is the content of the WAL file called name, or of what may stand for it.
func walFile(ctx context.Context, r *repo.Repository, cluster, name string) ([]byte, error) {
	n, err := pg.ParseWALName(name)
	if err != nil {
		return nil, err
	}
	content, err := r.WAL(ctx, cluster, n)
	if errors.Is(err, repo.ErrNoWAL) {
		return standIn(ctx, r, cluster, n)
	}
	return content, err
}

// standIn is called when a file seems to be absent. It returns what may be given in its stead, or makes sure.
func standIn(ctx context.Context, r *repo.Repository, cluster string, n pg.WALName) ([]byte, error) {
	a, err := openArchive(ctx, r, cluster)
	if err != nil {
		return nil, err
	}
	if n.Kind != pg.WALSegment {
		return nil, a.absent(ctx, n)
	}
	no, err := n.SegmentNo(a.size)
	if err != nil {
		return nil, err
	}
	s := segment{n.Timeline, no}
	if file, ok := a.find(s); ok && file.Kind == pg.WALPartial {
		return r.WAL(ctx, cluster, file)
	}
	if newest, ok := a.newest[s.timeline]; ok && newest >= no {
		return nil, fmt.Errorf("gap in the WAL: %s is missing, but the repository has %s",
			n, a.segmentName(segment{s.timeline, newest}))
	}
	return nil, a.absent(ctx, n)
}

// absent is ErrNoWAL, unless the listing has the file that could not be read, or this host has seen what recovery would come
// to after it and the listing lacks: a segment of the timeline at n or behind it; of a history, a segment of that timeline or a later one.
func (a *archive) absent(ctx context.Context, n pg.WALName) error {
	if n.Kind == pg.WALHistory && a.histories[n.Timeline] {
		return fmt.Errorf("%s is listed in the repository but cannot be read", n)
	}
	unlisted, err := a.r.UnlistedWAL(ctx, a.cluster, a.names)
	if err != nil {
		return err
	}
	for seen, why := range unlisted {
		if n.Kind == pg.WALHistory && seen.Timeline >= n.Timeline || seen.Timeline == n.Timeline && seen.String() >= n.String() {
			return fmt.Errorf("%s is not in the repository: %w", n, why)
		}
	}
	return fmt.Errorf("%s of %s: %w", n, a.cluster, repo.ErrNoWAL)
}

// walTemp is how PostgreSQL's own unfinished files in pg_wal begin: what a crash leaves, it removes at its next start
// (RemoveTempXlogFiles).
const walTemp = "xlogtemp.pgthaw-"

// putInPlace writes content durably at path, in one step: whoever finds a file there finds all of it.
func putInPlace(path string, content []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, walTemp+"*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
