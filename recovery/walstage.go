package recovery

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sync"
	"syscall"
)

// stageDir has WAL that recovery will want, as files. To hand a segment to recovery is then a link(2) beneath the mount; as bytes it
// goes through a socket and through FUSE while recovery waits: 60 to 130 ms for 16 MiB in a daemon that reads ahead, instead of 2.
// They are not synced: PostgreSQL syncs what restore_command gave it (KeepFileRestoredFromArchive in xlogarchive.c), and while a
// server starts, which syncs half a dozen small files, the disk should not be busy with them.
const stageDir = privateDir + "/wal"

// stagedFile is a segment in stageDir, or shall be one. It may be used by several goroutines.
type stagedFile struct {
	once sync.Once
	name string // beneath the mount; "": it is not there
}

// put writes content, unless it was written, or removed, before. Who wants the segment gets it as bytes if that fails.
func (s *stagedFile) put(b bareDir, content []byte) (err error) {
	s.once.Do(func() {
		name := path.Join(stageDir, rand.Text())
		if err = b.writeNew(name, content); err != nil {
			_ = b.Remove(name)
			return
		}
		s.name = name
	})
	return err
}

// remove also keeps it from being written.
func (s *stagedFile) remove(b bareDir) {
	s.once.Do(func() {})
	if s.name != "" {
		_ = b.Remove(s.name) // what stays, clearStage removes
	}
}

// linkAs gives the segment to recovery, by a name in pg_wal that must be free. false: it has to be sent.
func (s *stagedFile) linkAs(b bareDir, name string) bool {
	defer s.remove(b)
	return s.name != "" && name == filepath.Base(name) && b.Link(s.name, path.Join("pg_wal", name)) == nil
}

// writeNew makes a file that belongs to the directory's owner.
func (b bareDir) writeNew(name string, content []byte) error {
	info, err := b.Stat(".")
	if err != nil {
		return err
	}
	f, err := b.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	o := info.Sys().(*syscall.Stat_t)
	if err := errors.Join(err, f.Chown(int(o.Uid), int(o.Gid)), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// clearStage makes the directory anew: nobody vouches for what an earlier daemon left there.
func (b bareDir) clearStage() error {
	if err := b.RemoveAll(stageDir); err != nil {
		return err
	}
	return b.Mkdir(stageDir, 0o700)
}
