package recovery

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

const (
	// aheadBytes is how much WAL is read ahead of recovery, besides the segment that it asked for last.
	aheadBytes = 64 << 20
	// aheadIdle is how long the WAL that was read ahead is kept for a recovery that asks for no more.
	aheadIdle = time.Minute
)

// walAhead reads WAL before recovery asks for it, and then the pages that redo will read. All of it is for speed: what fails here,
// recovery asks for itself.
type walAhead struct {
	d    *daemon
	b    *repo.Backup // that the overlay lies over
	size pg.SegmentSize
	wake chan struct{} // holds one word that asked changed

	versionDirs map[uint32]string // of tablespaces, by OID; owned by run

	pages  walPages   // owned by run
	parsed pg.WALName // the last segment that pages took in; owned by run

	mu      sync.Mutex
	changed *sync.Cond // what readers look at
	asked   pg.WALName // the segment that recovery asked for last; the zero name: none
	ahead   int64      // so many behind it are to be read
	reading int        // so many are being read
	late    bool       // recovery had to wait for one
	files   map[pg.WALName]*aheadFile
}

// aheadFile is a segment that somebody reads, or has read when done is closed.
type aheadFile struct {
	done    chan struct{}
	content []byte
	err     error
	staged  stagedFile
}

func newWALAhead(d *daemon, b *repo.Backup) *walAhead {
	a := &walAhead{d: d, b: b, size: b.Manifest.SegmentSize, wake: make(chan struct{}, 1),
		files: map[pg.WALName]*aheadFile{}, versionDirs: map[uint32]string{}}
	a.changed = sync.NewCond(&a.mu)
	return a
}

// get answers recovery: with the content of a file of WAL, or by putting it into pg_wal as the free name put, if that is not "" and
// the file is a segment.
func (a *walAhead) get(ctx context.Context, name, put string) (content []byte, done bool, err error) {
	n, err := pg.ParseWALName(name)
	if err != nil || n.Kind != pg.WALSegment {
		content, err = walFile(ctx, a.d.repo, a.d.record.Cluster, name)
		return content, false, err
	}
	began := time.Now()
	f, err := a.segment(ctx, n)
	if err != nil {
		return nil, false, err
	}
	late := time.Since(began) > time.Millisecond
	if put != "" {
		a.stage(n, f)
		done = f.staged.linkAs(a.d.bare, put)
	}
	a.ask(n, late)
	return f.content, done, nil
}

// segment is what recovery asked for, read.
func (a *walAhead) segment(ctx context.Context, n pg.WALName) (*aheadFile, error) {
	load := func() ([]byte, error) { return walFile(ctx, a.d.repo, a.d.record.Cluster, n.String()) }
	f, mine := a.claim(n)
	if mine {
		f.read(load)
	}
	<-f.done
	if f.err == nil {
		return f, nil
	}
	a.forget(n, f)
	if !mine { // what was read ahead is not the last word
		f = &aheadFile{done: f.done}
		f.content, f.err = load()
	}
	return f, f.err
}

// stage lays a segment beneath the mount.
func (a *walAhead) stage(n pg.WALName, f *aheadFile) {
	if err := f.staged.put(a.d.bare, f.content); err != nil {
		a.d.log.Debug("WAL is handed to recovery as bytes", "wal", n.String(), "error", err)
	}
}

// read has load read the segment.
func (f *aheadFile) read(load func() ([]byte, error)) {
	defer close(f.done)
	f.content, f.err = load()
}

// claim returns the file of a name; mine means that the caller has to read it.
func (a *walAhead) claim(n pg.WALName) (f *aheadFile, mine bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if f = a.files[n]; f == nil {
		f, mine = &aheadFile{done: make(chan struct{})}, true
		a.files[n] = f
	}
	return f, mine
}

// ask notes where recovery is, and whether it had to wait, and forgets what it has left behind.
func (a *walAhead) ask(n pg.WALName, late bool) {
	a.expect(n, a.window(), late)
	a.release(func(old pg.WALName) bool {
		ahead, ok := a.distance(n, old)
		return !ok || ahead < 0 || ahead > a.window()
	})
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// expect has so many segments read that lie behind one. What comes too late is read with others at a time, and else one after the
// other: it takes processor time from a server that is just starting.
func (a *walAhead) expect(n pg.WALName, ahead int64, late bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked, a.ahead, a.late = n, ahead, late
	a.changed.Broadcast()
}

// distance is how many segments a name lies behind another one of its timeline.
func (a *walAhead) distance(from, to pg.WALName) (int64, bool) {
	first, err := from.SegmentNo(a.size)
	last, err2 := to.SegmentNo(a.size)
	return int64(last - first), err == nil && err2 == nil && from.Timeline == to.Timeline
}

// window is how many segments are read ahead.
func (a *walAhead) window() int64 { return aheadBytes / int64(a.size) }

// after is the name of the nth segment behind one.
func (a *walAhead) after(from pg.WALName, n int64) pg.WALName {
	no, err := from.SegmentNo(a.size)
	if err != nil {
		return from
	}
	return pg.SegmentName(from.Timeline, no+uint64(n), a.size)
}

// run follows recovery until ctx ends. starting: the server is about to start.
func (a *walAhead) run(ctx context.Context, starting bool) {
	if err := a.d.bare.clearStage(); err != nil {
		a.d.log.Debug("WAL cannot be laid beneath the mount", "error", err)
	}
	var readers sync.WaitGroup
	defer a.forgetAll()
	defer readers.Wait()
	defer a.wakeReaders() // ctx has ended
	for range 1 + a.window() {
		readers.Go(func() { a.readAhead(ctx) })
	}
	if starting {
		a.begin()
	}
	idle := time.NewTimer(aheadIdle)
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-idle.C:
			a.forgetAll()
			continue
		case <-a.wake:
		}
		for a.parseNext(ctx) {
		}
		idle.Reset(aheadIdle)
	}
}

// firstSegments is how many are read before recovery asks for any: while PostgreSQL starts there is time for so many.
const firstSegments = int64(2)

// begin has the segments read that recovery begins with.
func (a *walAhead) begin() {
	m := a.b.Manifest
	redo, tli := m.StartLSN, m.Timeline
	if i := m.Image; i != nil {
		redo, tli = i.Redo, i.Timeline
		if i.Kind == repo.ImagePromoted {
			return
		}
	}
	a.expect(pg.SegmentName(tli, a.size.Segment(redo)-1, a.size), min(firstSegments, 1+a.window()), false)
}

// forgetAll forgets all WAL, and reads none until recovery asks.
func (a *walAhead) forgetAll() {
	a.expect(pg.WALName{}, 0, false)
	a.release(func(pg.WALName) bool { return true })
	a.pages, a.parsed = walPages{}, pg.WALName{}
}

// release forgets the segments that are over.
func (a *walAhead) release(over func(pg.WALName) bool) {
	var released []*aheadFile
	a.mu.Lock()
	for n, f := range a.files {
		if over(n) {
			released = append(released, f)
			delete(a.files, n)
		}
	}
	a.mu.Unlock()
	for _, f := range released {
		f.staged.remove(a.d.bare)
	}
}

// readAhead reads one segment after the other, until ctx ends.
func (a *walAhead) readAhead(ctx context.Context) {
	for {
		n, f := a.claimAhead(ctx)
		if f == nil {
			return
		}
		f.read(func() ([]byte, error) { return a.d.repo.WAL(ctx, a.d.record.Cluster, n) })
		if f.err == nil {
			a.stage(n, f)
		} else {
			a.forget(n, f)
		}
		a.wasRead(n, f.err)
	}
}

func (a *walAhead) wakeReaders() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.changed.Broadcast()
}

// claimAhead waits for a segment that is to be read. nil: ctx has ended.
func (a *walAhead) claimAhead(ctx context.Context) (pg.WALName, *aheadFile) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for ; ctx.Err() == nil; a.changed.Wait() {
		if a.reading > 0 && !a.late {
			continue
		}
		for i := range a.ahead {
			n := a.after(a.asked, i+1)
			if a.files[n] == nil {
				f := &aheadFile{done: make(chan struct{})}
				a.files[n] = f
				a.reading++
				return n, f
			}
		}
	}
	return pg.WALName{}, nil
}

// wasRead ends a claim. What lies behind one that could not be read is not read until recovery asks again.
func (a *walAhead) wasRead(n pg.WALName, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reading--
	if until, ok := a.distance(a.asked, n); err != nil && ok && until > 0 {
		a.ahead = min(a.ahead, until-1)
	}
	a.changed.Broadcast()
}

// forget lets who asks for a segment that could not be read try for himself.
func (a *walAhead) forget(n pg.WALName, f *aheadFile) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.files[n] == f {
		delete(a.files, n)
	}
}

// parseNext brings the pages that the next segment will want. false: there is none, for now.
func (a *walAhead) parseNext(ctx context.Context) bool {
	n, f := a.next()
	if f == nil {
		return false
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		return false
	}
	if f.err != nil {
		return false
	}
	a.parsed = n
	spans, err := a.pages.of(f.content, n, a.size, func(b pg.BlockRef) (string, int64, bool) { return a.pageOf(ctx, b) })
	if err == nil {
		err = a.d.prefetch(ctx, a.b, spans, false)
	}
	if err != nil {
		a.d.log.Debug("pages that recovery wants are not read ahead", "wal", n.String(), "error", err)
	}
	return true
}

// next is the segment behind the last one that was parsed, or what recovery asked for if it has passed that.
func (a *walAhead) next() (pg.WALName, *aheadFile) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.asked
	if ahead, ok := a.distance(a.asked, a.parsed); ok && ahead >= -1 && ahead <= a.window() {
		n = a.after(a.parsed, 1)
	}
	return n, a.files[n]
}

// walPages finds in WAL the pages that redo reads: not those of which WAL had an image, or that it makes anew, before, nor those it has
// named before.
type walPages struct {
	records pg.WALBlocks
	known   map[pageRun]uint16 // a bit for each page
}

// pageRun is 16 pages, which lie in one chunk when a file is first stored.
type pageRun struct {
	tablespace, database, relation uint32
	fork                           uint8
	no                             uint32
}

const (
	pagesInRun = repo.ChunkPages
	// maxKnown bounds known, to some 12 MB: 32 GiB of relations, if all their pages are named.
	maxKnown = 1 << 18
)

// of gives spans that cover the pages which redo of a segment reads, one for each run, in the order in which they are wanted. file gives
// a page's place in the backup.
func (w *walPages) of(seg []byte, n pg.WALName, size pg.SegmentSize, file func(pg.BlockRef) (string, int64, bool)) (spans []repo.Span, err error) {
	if w.known == nil || len(w.known) > maxKnown {
		w.known = map[pageRun]uint16{}
	}
	at := map[pageRun]int{} // in spans
	err = w.records.Segment(seg, n, size, func(_ pg.LSN, b pg.BlockRef) {
		run := pageRun{b.Tablespace, b.Database, b.Relation, b.Fork, b.Block / pagesInRun}
		bit := uint16(1) << (b.Block % pagesInRun)
		was := w.known[run]
		if w.known[run] = was | bit; was&bit != 0 || b.Image || b.Init {
			return
		}
		name, off, ok := file(b)
		if !ok {
			return
		}
		i, wanted := at[run]
		if !wanted {
			at[run] = len(spans)
			spans = append(spans, repo.Span{Path: name, Off: off, Len: page})
			return
		}
		end := max(spans[i].Off+spans[i].Len, off+page)
		spans[i].Off = min(spans[i].Off, off)
		spans[i].Len = end - spans[i].Off
	})
	return spans, err
}

// pageOf is the place of a page in the backup. It is not ok for a tablespace that the backup does not have.
func (a *walAhead) pageOf(ctx context.Context, ref pg.BlockRef) (name string, off int64, ok bool) {
	tablespace, name, off, ok := ref.File()
	if !ok || tablespace == 0 {
		return "pgdata/" + name, off, ok
	}
	dir, known := a.versionDirs[tablespace]
	if !known {
		dir = versionDir(ctx, a.b, tablespace)
		a.versionDirs[tablespace] = dir
	}
	return dir + "/" + name, off, dir != ""
}

// versionDir is the directory of a tablespace that is named for the server's version (TABLESPACE_VERSION_DIRECTORY); "": there is none.
func versionDir(ctx context.Context, b *repo.Backup, tablespace uint32) string {
	prefix := fmt.Sprintf("PG_%d_", b.Manifest.PGVersionNum/10000)
	for _, dir := range []string{"tablespaces", "pgdata/pg_tblspc"} {
		dir = fmt.Sprintf("%s/%d", dir, tablespace)
		list, err := b.ReadDir(ctx, dir)
		for i := 0; err == nil && i < list.Len(); i++ {
			if e := list.At(i); strings.HasPrefix(e.Name, prefix) {
				return dir + "/" + e.Name
			}
		}
	}
	return ""
}
