package repo

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// Range is the bytes [From, To) of a file.
type Range struct{ From, To int64 }

// Patch is a file as it lies over one of the prior backup: the ranges of Data are there, whatever else lies below Limit is
// that of the prior backup's file at Base, and the rest is zeros.
type Patch struct {
	Base  string
	Limit int64
	Data  []Range // ascending, apart
	Local io.ReaderAt
}

// Untouched tells whether the file is still that of the prior backup, whose entry is base.
func (p *Patch) untouched(size int64, base Entry) bool {
	return len(p.Data) == 0 && p.Limit == size && base.Size == size
}

// AddPatched makes a file of an image. No more of the prior backup is read than its file map, and where a page was changed in
// part, or so many of its neighbours that they are stored anew together. A file that was not changed costs nothing.
func (w *BackupWriter) AddPatched(name string, e Entry, hot bool, p Patch) error {
	base, err := w.prior.b.Stat(w.ctx, p.Base)
	if err != nil {
		return fmt.Errorf("%s lies over %s: %w", name, p.Base, err)
	}
	if p.untouched(e.Size, base) {
		return w.Keep(name, p.Base, base)
	}
	lower, err := w.prior.b.Open(w.ctx, base)
	if err != nil {
		return err
	}
	content := patchedFile{p, lower}
	if e.Size <= maxInline || !base.content.mapped() {
		f, err := w.Create(name, e, hot)
		if err != nil {
			return err
		}
		if _, err := f.ReadFrom(io.NewSectionReader(content, 0, e.Size)); err != nil {
			return err
		}
		return f.Close()
	}
	parent, err := w.parent(name, &e)
	if err != nil {
		return err
	}
	e.Mode, e.Link = e.Mode&fs.ModePerm, ""
	return w.patch(parent, e, hot, content)
}

// Keep makes a file that is the one at a path of the prior backup, whose entry was is.
func (w *BackupWriter) Keep(name, from string, was Entry) error {
	if was.content.kind == contentWAL || was.IsDir() {
		return fmt.Errorf("%s of the prior backup cannot be a file of an image", from)
	}
	parent, err := w.parent(name, &was)
	if err != nil {
		return err
	}
	if err := w.keepChunks(from, was); err != nil {
		return err
	}
	if was.Mode.IsRegular() {
		w.count(was.Size)
	}
	return parent.add(was)
}

// keepChunks counts what a kept file refers to, unless the image's original has it: that is counted.
func (w *BackupWriter) keepChunks(from string, was Entry) error {
	if !was.content.mapped() {
		return nil
	}
	first, err := w.imageOf.Stat(w.ctx, from)
	if err == nil && first.content.same(was.content) {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	m, err := w.r.fileMap(w.ctx, was)
	if err != nil {
		return err
	}
	w.live.add(m.chunks...)
	if was.content.kind == contentMap {
		w.live.add(was.content.ref)
	}
	return nil
}

func (c content) same(o content) bool {
	return c.kind == o.kind && c.ref == o.ref && bytes.Equal(c.bytes, o.bytes)
}

// patch makes a file whose content lies in chunks. The goroutine that calls it does the work: there is little.
func (w *BackupWriter) patch(parent *directory, e Entry, hot bool, content patchedFile) error {
	prior, err := w.prior.file(w.ctx, content.Base)
	if err != nil {
		return err
	}
	j := &fileJob{w: w, parent: parent, prior: prior, hot: hot, waiting: map[int][]run{}}
	parent.hold()
	w.count(e.Size)
	windows := int((e.Size + ChunkSize - 1) / ChunkSize)
	for no := range windows {
		runs, err := j.patchWindow(no, e.Size, &content)
		if err == nil {
			err = j.deliver(no, runs)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", e.Name, err)
		}
	}
	return j.end(e, windows)
}

// patchWindow decides where the pages of one window lie. What the file has not changed is not read.
func (j *fileJob) patchWindow(no int, size int64, content *patchedFile) ([]run, error) {
	if err := j.w.ctx.Err(); err != nil {
		return nil, err
	}
	begin := int64(no) * ChunkSize
	end := min(begin+ChunkSize, size)
	var runs []run
	for off := begin; off < end; off += PageSize {
		next, err := j.patchPage(off, size, content)
		if err != nil {
			return nil, err
		}
		runs = appendRun(runs, next)
	}
	changed := false
	for _, r := range runs {
		changed = changed || r.loose != nil
	}
	if !changed || worthKeeping(runs, uint32(pages(end-begin))) {
		return runs, nil
	}
	whole := make([]byte, end-begin)
	if _, err := content.ReadAt(whole, begin); err != nil {
		return nil, err
	}
	id, digests := j.w.r.digests.sum(whole, nil)
	ref, err := j.w.store(j.hot, whole, id, digests)
	return []run{{ref: &ref, n: uint32(pages(end - begin))}}, err
}

// patchPage finds where one page lies. One that is in the prior backup as it is has its place there; of others the bytes
// are compared, for what was only read is data, too.
func (j *fileJob) patchPage(off, size int64, content *patchedFile) (run, error) {
	page, end := uint32(off/PageSize), min(off+PageSize, size)
	if content.hole(off, end) {
		switch m := j.prior.m; {
		case off >= content.Limit:
			return run{n: 1}, nil
		case off+PageSize <= content.Limit, content.Limit == size && m.size == size:
			chunk, at, _ := m.place(page)
			if chunk == zeros {
				return run{n: 1}, nil
			}
			return run{ref: &m.chunks[chunk], page: at, n: 1}, nil
		}
	}
	bytes := make([]byte, end-off)
	if _, err := content.ReadAt(bytes, off); err != nil {
		return run{}, err
	}
	_, digests := j.w.r.digests.sum(bytes, nil)
	runs, err := j.compare(bytes, digests, page)
	if err != nil {
		return run{}, err
	}
	return runs[0], nil
}

// patchedFile is the content of a file as whoever reads it through the mount sees it.
type patchedFile struct {
	Patch
	lower *File
}

// hole tells whether none of the bytes [from, to) is there. Ranges that end before are forgotten: pages come in order.
func (f *patchedFile) hole(from, to int64) bool {
	for len(f.Data) > 0 && f.Data[0].To <= from-ChunkSize { // the window may be read once more
		f.Data = f.Data[1:]
	}
	for _, d := range f.Data {
		if d.From >= to {
			break
		}
		if d.To > from {
			return false
		}
	}
	return true
}

// ReadAt fills p, which lies within the file.
func (f patchedFile) ReadAt(p []byte, off int64) (int, error) {
	pos, end := off, off+int64(len(p))
	for _, d := range f.Data {
		from, to := max(d.From, pos), min(d.To, end)
		if from >= to {
			continue
		}
		if err := f.readLower(p[pos-off:from-off], pos); err != nil {
			return 0, err
		}
		if n, err := f.Local.ReadAt(p[from-off:to-off], from); int64(n) < to-from {
			return 0, fmt.Errorf("read %d bytes at %d: %w", to-from, from, errors.Join(err, io.ErrUnexpectedEOF))
		}
		pos = to
	}
	return len(p), f.readLower(p[pos-off:], pos)
}

// readLower reads what is not there: the prior backup's bytes, and zeros behind them.
func (f patchedFile) readLower(p []byte, off int64) error {
	n := max(0, min(off+int64(len(p)), f.Limit)-off)
	clear(p[n:])
	if n == 0 {
		return nil
	}
	_, err := f.lower.ReadAt(p[:n], off)
	return err
}
