package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"pgthaw/repo/pg"
)

// BackupOptions of WriteBackup. The zero value works.
type BackupOptions struct {
	Prior   *Backup // whose unchanged pages are used again; nil: none
	Workers int     // that hash and compress; 0: one for each processor
	CopyOf  string  // id of the backup in another repository; "": it is not a copy

	ImageOf *Manifest // the backup that this is a boot image of; nil: it is a backup itself. Prior is that backup, or another image of it
}

// WriteBackup runs fn, which writes the backup's files and returns what it knows of the manifest, and publishes the
// backup when fn returns nil: packs first, the manifest last. When fn fails, or ctx ends, nothing becomes visible and
// what was written is deleted again. ErrGivenUp: the backup may exist, but cannot be relied on.
func (r *Repository) WriteBackup(ctx context.Context, cluster string, o BackupOptions, fn func(context.Context, *BackupWriter) (Manifest, error)) (*Manifest, error) {
	if err := r.ensureCluster(ctx, cluster); err != nil {
		return nil, err
	}
	session, err := r.begin(ctx, o.session(cluster))
	if err != nil {
		return nil, err
	}
	defer session.Leave() // it protects what is published until listings are sure to show that; prune cleans up
	m, err := r.prepareBackup(ctx, session, o, fn)
	if err != nil {
		return nil, err
	}
	// From here on the backup may exist, whatever the store answers: nothing is deleted any more.
	if err := r.putDocument(ctx, manifestKey(cluster, m.ID), m); err != nil {
		return nil, fmt.Errorf("publish backup %s: %w", m.ID, err)
	}
	if err := session.rely(ctx); err != nil {
		return nil, fmt.Errorf("backup %s was published, but cannot be relied on: %w", m.ID, err)
	}
	session.done(ctx)
	return m, nil
}

// session describes the session of a backup that is about to begin.
func (o BackupOptions) session(cluster string) SessionInfo {
	var salt [2]byte
	rand.Read(salt[:])
	info := SessionInfo{Operation: "backup", Makes: []BackupName{{cluster, newBackupID(time.Now(), salt)}}}
	if o.CopyOf != "" {
		info.Operation, info.Makes[0].Backup = "copy", newCopyID(o.CopyOf)
	}
	if o.Prior != nil {
		info.Uses = []BackupName{o.Prior.Manifest.Name()}
	}
	if o.ImageOf != nil {
		info.Operation, info.Makes[0].Backup = "boot image", newImageID(o.ImageOf.ID)
		info.Uses = append(info.Uses, o.ImageOf.Name())
	}
	return info
}

// prepareBackup writes all that comes before the manifest, or leaves nothing of it, and of the session.
func (r *Repository) prepareBackup(ctx context.Context, session *Session, o BackupOptions, fn func(context.Context, *BackupWriter) (Manifest, error)) (*Manifest, error) {
	w, err := r.newBackupWriter(ctx, session.Info.ID, o)
	if err != nil {
		return nil, errors.Join(err, session.End(context.WithoutCancel(ctx)))
	}
	m, packList, err := w.write(session.Info.Makes[0], fn)
	if err == nil {
		err = w.checkWAL(m)
	}
	listing := err == nil
	if listing {
		err = r.putPackList(ctx, m, packList)
	}
	if err == nil {
		return m, nil
	}
	if left := w.abandon(context.WithoutCancel(ctx), session, listing); left != nil { // prune does it when the session shows no sign of life
		return nil, errors.Join(err, left)
	}
	left := "nothing of it is left in the repository"
	if listing {
		left = "prune takes away the session that is left of it"
	}
	return nil, fmt.Errorf("%w; no backup was made, and %s", err, left)
}

// BackupWriter writes the files of one backup. Its methods are called by one goroutine at a time; hashing, comparing
// and compressing run beside it.
type BackupWriter struct {
	r       *Repository
	packs   *packWriters
	prior   *priorBackup
	index   *chunkIndex
	dirs    map[string]*directory // by path: those that names may still come into
	root    Ref                   // set when the root's listing is written
	files   int                   // regular ones
	bytes   int64                 // of them
	open    *FileWriter
	live    liveBytes
	wal     map[pg.WALName]bool // WAL objects that files are
	imageOf *Backup             // nil: it is no image
	base    context.Context     // the caller's
	ctx     context.Context     // base, ended by the first failure of a worker and when all are done
	workers *errgroup.Group
	windows chan window
	buffers chan []byte
}

func (r *Repository) newBackupWriter(ctx context.Context, session SessionID, o BackupOptions) (*BackupWriter, error) {
	if o.Workers <= 0 {
		o.Workers = runtime.GOMAXPROCS(0)
	}
	w := &BackupWriter{r: r, base: ctx, index: newChunkIndex(), wal: map[pg.WALName]bool{}}
	w.dirs = map[string]*directory{".": {w: w, name: ".", holders: 1}}
	w.workers, w.ctx = errgroup.WithContext(ctx)
	w.packs = newPackWriters(ctx, r, session)
	if o.Prior != nil {
		var err error
		if w.prior, err = openPrior(ctx, r, o.Prior, w.index); err != nil {
			return nil, err
		}
	}
	if o.ImageOf != nil {
		if err := w.makeImage(ctx, o.ImageOf); err != nil {
			return nil, err
		}
	}
	// So many windows wait for a worker at most: whoever receives them and the workers seldom wait for one another.
	w.buffers = make(chan []byte, 8*o.Workers)
	w.windows = make(chan window, cap(w.buffers))
	for range cap(w.buffers) {
		w.buffers <- make([]byte, 0, ChunkSize)
	}
	for range o.Workers {
		w.workers.Go(w.work)
	}
	return w, nil
}

// write runs fn and writes all that comes before the manifest. m is never nil.
func (w *BackupWriter) write(name BackupName, fn func(context.Context, *BackupWriter) (Manifest, error)) (*Manifest, []byte, error) {
	fields, err := fn(w.ctx, w)
	m := &fields
	m.document = document{manifestKind, formatVersion}
	m.ID, m.Cluster = name.Backup, name.Cluster
	if err = w.drain(err); err != nil {
		return m, nil, err
	}
	if err := w.closeDirs(); err != nil {
		return m, nil, err
	}
	m.Root, m.Files, m.SizeBytes = w.root, w.files, w.bytes
	if err := w.packs.finish(); err != nil {
		return m, nil, err
	}
	uses, err := w.packUses()
	if err != nil {
		return m, nil, err
	}
	list, listID := w.r.encodePackList(packListKey(m.Cluster, m.ID), uses)
	m.Packs = PackListRef{Count: len(uses), ID: listID}
	m.StoredBytes = w.packs.stored.Load() + int64(len(list))
	return m, list, nil
}

// drain waits until every window is done, or for the workers to give up. fnErr is what the caller's function returned:
// the end of its context, or the failure of a worker, which ended it as well, explains it better.
func (w *BackupWriter) drain(fnErr error) error {
	close(w.windows)
	err := w.workers.Wait()
	switch {
	case w.base.Err() != nil:
		return context.Cause(w.base)
	case err != nil:
		return err
	case fnErr == nil && w.open != nil:
		return fmt.Errorf("%s was not closed", w.open.name)
	}
	return fnErr
}

// abandon deletes what an unsuccessful writer put, and then its session: what is left then would be nobody's. A pack list that
// was being put may still come, whatever the store answered: the session stays, so that prune knows whose it is.
func (w *BackupWriter) abandon(ctx context.Context, session *Session, listing bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	b := session.Info.Makes[0]
	if err := errors.Join(w.packs.abandon(ctx), w.r.store.Delete(ctx, packListKey(b.Cluster, b.Backup))); err != nil {
		session.Leave()
		return err
	}
	if listing {
		session.Leave()
		return nil
	}
	return session.End(ctx)
}

// checkWAL makes sure that the WAL objects that the backup refers to are there, and that these and what recovery may want
// behind them stay. No prune that begins later deletes any: it sees the session. So this looks for what those before were about to.
func (w *BackupWriter) checkWAL(m *Manifest) error {
	if w.imageOf != nil {
		return nil // it needs no WAL that its backup does not need, and that it announced
	}
	if err := w.r.checkFloors(w.base, m); err != nil {
		return err
	}
	for name := range w.wal {
		key := walKey(m.Cluster, name)
		if found, err := w.r.exists(w.base, key); err != nil || !found {
			return errors.Join(err, errorIf(err == nil, fmt.Errorf("%s is gone from the repository", key)))
		}
	}
	return nil
}

func (r *Repository) putPackList(ctx context.Context, m *Manifest, list []byte) error {
	if err := r.store.Put(ctx, packListKey(m.Cluster, m.ID), list); err != nil {
		return fmt.Errorf("write pack list of backup %s: %w", m.ID, err)
	}
	return nil
}

// Stored is how many bytes this backup has put into the store so far.
func (w *BackupWriter) Stored() int64 { return w.packs.stored.Load() }

// Mkdir makes a directory. Its parent exists.
func (w *BackupWriter) Mkdir(name string, e Entry) error {
	parent, err := w.parent(name, &e)
	if err != nil {
		return err
	}
	if w.dirs[name] != nil {
		return fmt.Errorf("%s: %w", name, fs.ErrExist)
	}
	e.Mode = e.Mode&fs.ModePerm | fs.ModeDir
	e.Size, e.Link = 0, ""
	parent.hold()
	w.dirs[name] = &directory{w: w, name: name, entry: e, parent: parent, holders: 1}
	return nil
}

// CloseDir says that no further name comes into a directory, so that its listing is written and takes no more memory.
// Who does not call it keeps all listings in memory until the backup ends.
func (w *BackupWriter) CloseDir(name string) error {
	d := w.dirs[name]
	if d == nil {
		return fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	delete(w.dirs, name)
	return d.release()
}

// Symlink makes a symbolic link that leads to e.Link.
func (w *BackupWriter) Symlink(name string, e Entry) error {
	parent, err := w.parent(name, &e)
	if err != nil {
		return err
	}
	e.Mode = e.Mode&fs.ModePerm | fs.ModeSymlink
	e.Size = 0
	return parent.add(e)
}

// AddWAL makes a file whose bytes are those of a WAL object of the cluster, which was put already.
func (w *BackupWriter) AddWAL(name string, e Entry, wal pg.WALName) error {
	parent, err := w.parent(name, &e)
	if err != nil {
		return err
	}
	e.Mode, e.Link = e.Mode&fs.ModePerm, ""
	e.content = content{kind: contentWAL, wal: wal}
	w.wal[wal] = true
	w.count(e.Size)
	return parent.add(e)
}

// UnknownSize of an Entry says that the file's size is known only when it is closed.
const UnknownSize = -1

// Create makes a regular file of e.Size bytes, which are then written. One file is open at a time. What is hot lies
// together with all else that is hot.
func (w *BackupWriter) Create(name string, e Entry, hot bool) (*FileWriter, error) {
	if w.open != nil {
		return nil, fmt.Errorf("create %s: %s is still open", name, w.open.name)
	}
	if e.Size < UnknownSize || e.Size > maxFileSize {
		return nil, fmt.Errorf("create %s: %d bytes", name, e.Size)
	}
	parent, err := w.parent(name, &e)
	if err != nil {
		return nil, err
	}
	e.Mode, e.Link = e.Mode&fs.ModePerm, ""
	f := &FileWriter{w: w, name: name, parent: parent, entry: e, left: e.Size}
	if e.Size == UnknownSize {
		f.left = maxFileSize
	}
	if f.left > maxInline {
		if f.job, err = w.newFileJob(parent, name, hot); err != nil {
			return nil, err
		}
	}
	parent.hold()
	w.open = f
	return f, nil
}

// parent returns the directory that a name comes into, and puts the name's last element into e. Whether it is there
// already is found out when the directory's listing is written.
func (w *BackupWriter) parent(name string, e *Entry) (*directory, error) {
	dir, base := path.Split(name)
	if err := validName(base); err != nil {
		return nil, err
	}
	parent := w.dirs[path.Clean(dir)]
	if parent == nil {
		return nil, fmt.Errorf("%s: its directory does not exist, or was closed", name)
	}
	e.Name = base
	return parent, nil
}

func (w *BackupWriter) count(size int64) {
	w.files++
	w.bytes += size
}

// closeDirs writes all listings that are not written yet. All files are done.
func (w *BackupWriter) closeDirs() error {
	for name := range w.dirs {
		if err := w.CloseDir(name); err != nil {
			return err
		}
	}
	if w.root == (Ref{}) {
		return errors.New("a file was not written to its end")
	}
	return nil
}

// directory is one of the tree that is being written.
type directory struct {
	w      *BackupWriter
	name   string // path
	entry  Entry
	parent *directory // nil: it is the root

	mu      sync.Mutex
	listing listing
	holders int // what may still add to the listing: open directories in it, files being written, and until it is closed itself
}

// hold keeps the listing from being written until release.
func (d *directory) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.holders++
}

// add puts an entry into the listing. Somebody holds the directory.
func (d *directory) add(e Entry) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.listing.add(&e); err != nil {
		return fmt.Errorf("%s: %w", d.name, err)
	}
	return nil
}

// release ends a hold. The last one writes the listing, and so on upwards.
func (d *directory) release() error {
	d.mu.Lock()
	d.holders--
	held := d.holders > 0
	d.mu.Unlock()
	if held {
		return nil
	}
	ref, err := d.write()
	if err != nil {
		return fmt.Errorf("write directory %s: %w", d.name, err)
	}
	if d.parent == nil {
		d.w.root = ref
		return nil
	}
	d.entry.content = content{kind: contentTree, ref: ref}
	return d.parent.finish(d.entry)
}

// finish adds the entry of what held the directory.
func (d *directory) finish(e Entry) error {
	return errors.Join(d.add(e), d.release())
}

// write stores the listing and returns its place: that of the prior backup's if nothing in it changed. Nobody holds the
// directory any more.
func (d *directory) write() (Ref, error) {
	encoded, err := d.listing.encode()
	if err != nil {
		return Ref{}, err
	}
	d.listing = listing{}
	return d.w.writePiece(pieceTree, encoded, d.w.prior.tree(d.w.base, d.name))
}

// writePiece stores a metadata piece, unless its content is that of the prior one.
func (w *BackupWriter) writePiece(kind byte, encoded []byte, prior Ref) (Ref, error) {
	id, _ := w.r.digests.sum(encoded, nil)
	ref := prior
	if id != prior.ID {
		var err error
		if ref, err = w.packs.meta.add(kind, encoded, id, nil); err != nil {
			return Ref{}, err
		}
	}
	w.live.add(ref)
	return ref, nil
}

// packUses lists the packs that the new backup refers to, sorted, with the live bytes of each.
func (w *BackupWriter) packUses() ([]packUse, error) {
	var uses []packUse
	for id, live := range w.live.packs() {
		size, ok := w.packs.done[id]
		if !ok {
			size, ok = w.prior.packSize(id)
		}
		if !ok {
			return nil, fmt.Errorf("pack %s is used, but neither written nor the prior backup's", id)
		}
		uses = append(uses, packUse{pack: id, size: size, live: min(live, uint64(size.size))})
	}
	slices.SortFunc(uses, func(a, b packUse) int { return bytes.Compare(a.pack[:], b.pack[:]) })
	return uses, nil
}

// liveBytes counts stored bytes referred to, by pack.
type liveBytes struct {
	mu    sync.Mutex
	count map[PackID]uint64
}

func (l *liveBytes) add(refs ...Ref) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range refs {
		l.plus(r.Pack, uint64(r.Length))
	}
}

// plus counts bytes of a pack. Caller holds mu.
func (l *liveBytes) plus(id PackID, bytes uint64) {
	if l.count == nil {
		l.count = map[PackID]uint64{}
	}
	l.count[id] += bytes
}

func (l *liveBytes) packs() map[PackID]uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}
