package repo

import (
	"context"
	"sync"
)

// window is a piece of a file on its way into the repository: ChunkSize bytes, or what is left at the file's end.
type window struct {
	job     *fileJob
	no      int // counted from the file's beginning
	content []byte
}

// fileJob makes the map of one file from its windows, which workers finish in any order.
//
// Its lock is held while a chunk of loose pages is compressed: those of one file come in order and are few.
type fileJob struct {
	w      *BackupWriter
	parent *directory
	prior  *priorFile // nil: the prior backup has no such file
	hot    bool
	sent   int // windows handed out; the writer's alone

	mu       sync.Mutex
	entry    Entry         // of the file; set with total
	total    int           // windows of the whole file; 0: not known yet
	next     int           // window to be taken up next
	waiting  map[int][]run // windows done before their turn
	runs     []run         // of the windows taken up
	loose    []byte        // changed pages that wait for a chunk to be filled
	looseRef *Ref          // where they will lie
}

// run is an extent whose chunk may not have its place yet.
type run struct {
	ref     *Ref // nil: zeros
	page, n uint32
	loose   []byte // pages to be put with other changed ones; ref is found out then
}

func (w *BackupWriter) newFileJob(parent *directory, name string, hot bool) (*fileJob, error) {
	prior, err := w.prior.file(w.ctx, name)
	if err != nil {
		return nil, err
	}
	return &fileJob{w: w, parent: parent, prior: prior, hot: hot, waiting: map[int][]run{}}, nil
}

// work is the body of one worker.
func (w *BackupWriter) work() error {
	digests := make([]byte, 0, ChunkPages*pageDigestSize)
	for {
		var win window
		var ok bool
		select {
		case win, ok = <-w.windows:
		case <-w.ctx.Done():
			return context.Cause(w.ctx)
		}
		if !ok {
			return nil
		}
		runs, err := win.job.place(win, digests[:0])
		w.buffers <- win.content[:0]
		if err == nil {
			err = win.job.deliver(win.no, runs)
		}
		if err != nil {
			return err
		}
	}
}

// place decides where the pages of a window lie: where they lay, in a chunk of their own, or with other changed pages.
func (j *fileJob) place(win window, digests []byte) ([]run, error) {
	id, digests := j.w.r.digests.sum(win.content, digests)
	n := uint32(pages(int64(len(win.content))))
	if allZero(digests, j.w.r.digests) {
		return []run{{n: n}}, nil
	}
	if j.prior != nil {
		runs, err := j.compare(win.content, digests, uint32(win.no)*ChunkPages)
		if err != nil {
			return nil, err
		}
		if worthKeeping(runs, n) {
			return runs, nil
		}
	}
	ref, err := j.w.store(j.hot, win.content, id, digests)
	return []run{{ref: &ref, n: n}}, err
}

// allZero tells from the digests whether every page is one of zeros.
func allZero(digests []byte, d *digester) bool {
	for ; len(digests) > 0; digests = digests[pageDigestSize:] {
		if [pageDigestSize]byte(digests) != [pageDigestSize]byte(d.zeroPage[:]) {
			return false
		}
	}
	return true
}

// compare finds for each page of content, which begins with page first of the file, whether the prior backup has it at the
// same place.
func (j *fileJob) compare(content, digests []byte, first uint32) ([]run, error) {
	zero := [pageDigestSize]byte(j.w.r.digests.zeroPage[:])
	var runs []run
	for i := uint32(0); len(digests) > 0; i, digests = i+1, digests[pageDigestSize:] {
		digest := [pageDigestSize]byte(digests)
		place, err := j.prior.page(j.w.ctx, first+i, digest)
		if err != nil {
			return nil, err
		}
		next := run{ref: place.ref, page: place.page, n: 1}
		if place.ref == nil && digest != zero {
			page := content[i*PageSize : min(int(i+1)*PageSize, len(content))]
			next.loose = append([]byte(nil), page...)
		}
		runs = appendRun(runs, next)
	}
	return runs, nil
}

// appendRun adds a run to others, joining it with the last where it goes on there.
func appendRun(runs []run, next run) []run {
	if len(runs) > 0 && next.loose == nil {
		last := &runs[len(runs)-1]
		if last.ref == nil && last.loose == nil && next.ref == nil ||
			last.ref != nil && next.ref != nil && *last.ref == *next.ref && last.page+last.n == next.page {
			last.n += next.n
			return runs
		}
	}
	return append(runs, next)
}

// A window is written anew when half of it changed or when it would lie in more than maxFragments chunks: reading it
// costs a fetch for each, and the bytes are in hand.
const maxFragments = 8

func worthKeeping(runs []run, pages uint32) bool {
	loose, chunks := uint32(0), map[Ref]bool{}
	for _, r := range runs {
		switch {
		case r.loose != nil:
			loose++
		case r.ref != nil:
			chunks[*r.ref] = true
		}
	}
	return 2*loose < pages && len(chunks) < maxFragments
}

// store puts a chunk into a pack, unless it is there already.
func (w *BackupWriter) store(hot bool, content []byte, id ID, digests []byte) (Ref, error) {
	if ref, ok := w.index.find(id); ok {
		return ref, nil
	}
	packer := &w.packs.data
	if hot {
		packer = &w.packs.hot
	}
	ref, err := packer.add(pieceChunk, content, id, append([]byte(nil), digests...))
	if err == nil {
		w.index.add(ref)
	}
	return ref, err
}

// deliver takes up the runs of a window when its turn has come, and finishes the file after the last.
func (j *fileJob) deliver(no int, runs []run) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.waiting[no] = runs
	for {
		runs, ok := j.waiting[j.next]
		if !ok {
			return nil
		}
		delete(j.waiting, j.next)
		j.next++
		for _, r := range runs {
			if err := j.take(r); err != nil {
				return err
			}
		}
		if j.next == j.total {
			return j.finish()
		}
	}
}

// end says what the file is, and how many windows it has, of which all but the last were handed out. It finishes the
// file if the workers are done with it.
func (j *fileJob) end(e Entry, total int) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.entry, j.total = e, total
	if j.next == j.total {
		return j.finish()
	}
	return nil
}

// take adds a run to the file. Caller holds mu.
func (j *fileJob) take(r run) error {
	if r.loose == nil {
		j.runs = appendRun(j.runs, r)
		return nil
	}
	if j.looseRef == nil {
		j.looseRef = &Ref{}
	}
	page := uint32(len(j.loose) / PageSize)
	// The chunk has no place yet: runs of it are told by the pointer.
	if last := len(j.runs) - 1; last >= 0 && j.runs[last].ref == j.looseRef && j.runs[last].page+j.runs[last].n == page {
		j.runs[last].n++
	} else {
		j.runs = append(j.runs, run{ref: j.looseRef, page: page, n: 1})
	}
	j.loose = append(j.loose, r.loose...)
	if len(j.loose) > ChunkSize-PageSize {
		return j.flushLoose()
	}
	return nil
}

// flushLoose stores the changed pages gathered so far as one chunk. Caller holds mu.
func (j *fileJob) flushLoose() error {
	if len(j.loose) == 0 {
		return nil
	}
	id, digests := j.w.r.digests.sum(j.loose, nil)
	ref, err := j.w.store(j.hot, j.loose, id, digests)
	if err != nil {
		return err
	}
	*j.looseRef = ref
	j.loose, j.looseRef = j.loose[:0], nil
	return nil
}

// finish makes the file's map and enters the file into its directory. Caller holds mu.
func (j *fileJob) finish() error {
	err := j.flushLoose()
	if err == nil {
		j.entry.content, err = j.w.mapContent(j.entry.Size, j.runs, j.prior.mapRef())
	}
	if err != nil {
		return err
	}
	return j.parent.finish(j.entry)
}

// mapContent makes the map of a file whose chunks have their places, and stores it, unless it is the prior one, or fits
// into the tree.
func (w *BackupWriter) mapContent(size int64, runs []run, prior Ref) (content, error) {
	m := newFileMap(size, runs)
	w.live.add(m.chunks...)
	encoded := m.appendTo(nil)
	if len(encoded) <= maxInlineMap {
		return content{kind: contentInlineMap, bytes: encoded}, nil
	}
	ref, err := w.writePiece(pieceMap, encoded, prior)
	return content{kind: contentMap, ref: ref}, err
}

func newFileMap(size int64, runs []run) *fileMap {
	m := &fileMap{size: size}
	index := map[Ref]int32{}
	for _, r := range runs {
		e := extent{chunk: zeros, page: r.page, n: r.n}
		if r.ref != nil {
			i, ok := index[*r.ref]
			if !ok {
				i = int32(len(m.chunks))
				index[*r.ref] = i
				m.chunks = append(m.chunks, *r.ref)
			}
			e.chunk = i
		}
		m.extents = append(m.extents, e)
	}
	return m
}
