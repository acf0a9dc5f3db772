package repo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
)

// fileCopier copies the content of one file: its chunks, but for those of which all pages that the file needs are known to
// be in the destination.
type fileCopier struct {
	*backupCopier
	m              *fileMap // in the source
	wasFrom, wasTo *fileMap // of the prior backup's file in the source and in the destination; nil: there is none
	need           []int    // how many bytes the file needs of each chunk of m; 0: none
	refs           []Ref    // where these lie in the destination, when they are there
	runs           []run    // of the file in the destination
}

// copy finds out where the pages of the file lie, has the destination get those that it lacks, and makes the file's runs.
func (f *fileCopier) copy() error {
	f.need, f.refs = make([]int, len(f.m.chunks)), make([]Ref, len(f.m.chunks))
	var runs []run
	for page, end := uint32(0), uint32(pages64(f.m.size)); page < end; {
		r := f.run(page)
		runs = append(runs, r)
		page += r.n
	}
	if err := f.fetch(); err != nil {
		return err
	}
	for _, r := range runs { // chunks have their places only now
		f.runs = appendRun(f.runs, r)
	}
	return nil
}

// run returns where the pages from page on lie in the destination, or will lie when their chunk is there.
func (f *fileCopier) run(page uint32) run {
	chunk, at, n := f.m.place(page)
	if chunk == zeros {
		return run{n: n}
	}
	known, n := f.known(page, f.m.chunks[chunk], at, n)
	if known != nil {
		return *known
	}
	size := min(int64(n)*PageSize, f.m.size-int64(page)*PageSize)
	f.need[chunk] = max(f.need[chunk], int(at)*PageSize+int(size))
	return run{ref: &f.refs[chunk], page: at, n: n}
}

// known returns where n pages, or the first of them, lie in the destination, if the prior backup has them at the same place
// of the file; if not, for how many pages that is so. Of a file that has grown or shrunk, the last page may have, too.
func (f *fileCopier) known(page uint32, ref Ref, at, n uint32) (*run, uint32) {
	if f.wasFrom == nil {
		return nil, n
	}
	whole := uint32(f.wasFrom.size / PageSize)
	if f.wasFrom.size == f.m.size {
		whole = uint32(pages64(f.m.size))
	}
	if page >= whole {
		return nil, n
	}
	chunk, wasAt, m := f.wasFrom.place(page)
	n = min(n, m, whole-page)
	if chunk == zeros || f.wasFrom.chunks[chunk] != ref || wasAt != at {
		return nil, n
	}
	chunk, wasAt, m = f.wasTo.place(page)
	n = min(n, m)
	if chunk == zeros {
		return &run{n: n}, n
	}
	if f.w.prior.unusable.has(f.wasTo.chunks[chunk].Pack) {
		return nil, n
	}
	return &run{ref: &f.wasTo.chunks[chunk], page: wasAt, n: n}, n
}

// place tells where a page of the file lies, and how many from there on lie so.
func (m *fileMap) place(page uint32) (chunk int32, at, n uint32) {
	i := m.at(page)
	e := m.extents[i]
	skip := page - m.first[i]
	return e.chunk, e.page + skip, e.n - skip
}

// fetch brings the chunks that the file needs to the destination, in the order in which they lie in the source.
func (f *fileCopier) fetch() error {
	var wanted []int32
	for i, need := range f.need {
		if need == 0 {
			continue
		}
		if c, ok := f.chunks.find(f.m.chunks[i].ID); ok && int(c.size) >= need {
			f.refs[i] = c.ref
			continue
		}
		wanted = append(wanted, int32(i))
	}
	slices.SortFunc(wanted, func(a, b int32) int {
		p, q := &f.m.chunks[a], &f.m.chunks[b]
		return cmp.Or(bytes.Compare(p.Pack[:], q.Pack[:]), cmp.Compare(p.Offset, q.Offset))
	})
	for len(wanted) > 0 {
		n := neighbours(f.chunksOf(wanted))
		if err := f.fetchTogether(wanted[:n]); err != nil {
			return err
		}
		wanted = wanted[n:]
	}
	return nil
}

// chunksOf gives the chunks of the file's map with these numbers.
func (f *fileCopier) chunksOf(numbers []int32) iter.Seq[Ref] {
	return func(yield func(Ref) bool) {
		for _, i := range numbers {
			if !yield(f.m.chunks[i]) {
				return
			}
		}
	}
}

// fetchTogether copies neighbouring chunks, read at once.
func (f *fileCopier) fetchTogether(wanted []int32) error {
	first, last := f.m.chunks[wanted[0]], f.m.chunks[wanted[len(wanted)-1]]
	hot, err := f.hot(f.ctx, first.Pack)
	if err != nil {
		return err
	}
	frames, err := f.from.getPack(f.ctx, first.Pack, int64(first.Offset), int64(last.end()-first.Offset))
	if err != nil {
		return inSource(f.ctx, err)
	}
	room := f.from.codec.room()
	defer f.from.codec.giveBack(room)
	for _, i := range wanted {
		ref := f.m.chunks[i]
		content, err := f.from.decodeChunk(ref, frames[ref.Offset-first.Offset:][:ref.Length], (*room)[:0:ChunkSize])
		if err == nil && len(content) < f.need[i] {
			err = ref.corrupt(fmt.Sprintf("%d bytes where a file needs %d", len(content), f.need[i]))
		}
		if err != nil {
			return inSource(f.ctx, err)
		}
		if f.refs[i], err = f.store(ref.ID, content, hot); err != nil {
			return err
		}
	}
	return nil
}

// store puts a chunk's content, which was verified, into the destination, unless that has it.
func (b *backupCopier) store(idInSource ID, content []byte, hot bool) (Ref, error) {
	id, digests := b.to.digests.sum(content, nil)
	ref, err := b.w.store(hot, content, id, digests)
	if err == nil {
		b.chunks.add(idInSource, copiedChunk{ref, uint32(len(content))})
	}
	return ref, err
}

// hot tells whether a pack of the source is one of those that every start of a server reads. A damaged header costs no
// more than that knowledge.
func (c *copier) hot(ctx context.Context, id PackID) (bool, error) {
	c.mu.Lock()
	class, ok := c.classes[id]
	c.mu.Unlock()
	if ok {
		return class == classHot, nil
	}
	class, err := c.from.packClass(ctx, id)
	if errors.Is(err, ErrCorrupt) {
		class = classData
	} else if err != nil {
		return false, inSource(ctx, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.classes[id] = class
	return class == classHot, nil
}

// copiedChunks tells where chunks lie in the destination, by their IDs in the source. It spares reading again what several
// files have in common, such as databases made from one template.
type copiedChunks struct {
	mu sync.Mutex // a leaf
	at map[ID]copiedChunk
}

type copiedChunk struct {
	ref  Ref
	size uint32 // of the content
}

// maxCopiedChunks is 64 GiB of content, and takes some 50 MB.
const maxCopiedChunks = 1 << 19

func (c *copiedChunks) find(id ID) (copiedChunk, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	chunk, ok := c.at[id]
	return chunk, ok
}

func (c *copiedChunks) add(id ID, chunk copiedChunk) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at == nil {
		c.at = map[ID]copiedChunk{}
	}
	if len(c.at) < maxCopiedChunks {
		c.at[id] = chunk
	}
}
