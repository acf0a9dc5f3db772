package repo

import (
	"context"
	"fmt"
	"io"
	"time"
)

// FileWriter takes the content of one file, in order.
type FileWriter struct {
	w      *BackupWriter
	name   string
	parent *directory
	entry  Entry
	job    *fileJob // nil: the file is small enough to lie in the tree
	inline []byte
	buffer []byte // window being filled; nil: none
	left   int64  // bytes of the announced size still to come
}

// SetModTime changes the modification time that the file was made with.
func (f *FileWriter) SetModTime(t time.Time) { f.entry.ModTime = t }

// Write takes the next bytes.
func (f *FileWriter) Write(p []byte) (int, error) {
	if int64(len(p)) > f.left {
		return 0, fmt.Errorf("%s: more bytes than announced", f.name)
	}
	f.left -= int64(len(p))
	if f.job == nil {
		f.inline = append(f.inline, p...)
		return len(p), nil
	}
	for rest := p; len(rest) > 0; {
		room, err := f.room()
		if err != nil {
			return 0, err
		}
		n := copy(room, rest)
		rest = rest[n:]
		if err := f.filled(n); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// ReadFrom takes the bytes that r gives, to its end.
func (f *FileWriter) ReadFrom(r io.Reader) (n int64, err error) {
	if f.job == nil {
		return io.CopyBuffer(struct{ io.Writer }{f}, r, make([]byte, maxInline)) // io.Copy's buffer is 32 KiB
	}
	for {
		room, err := f.room()
		if err != nil {
			return n, err
		}
		k, err := io.ReadFull(r, room)
		n, f.left = n+int64(k), f.left-int64(k)
		if f.left < 0 {
			return n, fmt.Errorf("%s: more bytes than announced", f.name)
		}
		if e := f.filled(k); e != nil {
			return n, e
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// room returns the free part of the window, waiting for a buffer if it has to begin one.
func (f *FileWriter) room() ([]byte, error) {
	if f.buffer == nil {
		select {
		case f.buffer = <-f.w.buffers:
		case <-f.w.ctx.Done():
			return nil, context.Cause(f.w.ctx)
		}
	}
	return f.buffer[len(f.buffer):cap(f.buffer)], nil
}

// filled says that n bytes were put into the room, and sends the window off when it is full.
func (f *FileWriter) filled(n int) error {
	f.buffer = f.buffer[:len(f.buffer)+n]
	if len(f.buffer) < cap(f.buffer) {
		return nil
	}
	return f.send()
}

func (f *FileWriter) send() error {
	win := window{job: f.job, no: f.job.sent, content: f.buffer}
	f.job.sent++
	f.buffer = nil
	select {
	case f.w.windows <- win:
		return nil
	case <-f.w.ctx.Done():
		return context.Cause(f.w.ctx)
	}
}

// Close ends the file. It fails if fewer bytes came than were announced.
func (f *FileWriter) Close() error {
	f.w.open = nil
	if f.entry.Size == UnknownSize {
		f.entry.Size, f.left = maxFileSize-f.left, 0
	}
	if f.left != 0 {
		return fmt.Errorf("%s: %d bytes are missing", f.name, f.left)
	}
	f.w.count(f.entry.Size)
	if f.entry.Size <= maxInline {
		return f.closeInline()
	}
	sent := f.job.sent
	if len(f.buffer) > 0 {
		sent++
	}
	if err := f.job.end(f.entry, sent); err != nil {
		return err
	}
	if len(f.buffer) > 0 {
		return f.send()
	}
	f.giveBack()
	return nil
}

// closeInline ends a file that lies in the tree.
func (f *FileWriter) closeInline() error {
	if f.job != nil { // it could have become larger
		f.inline = append(f.inline, f.buffer...)
	}
	if len(f.inline) > 0 {
		f.entry.content = content{kind: contentInline, bytes: f.inline}
	}
	f.giveBack()
	return f.parent.finish(f.entry)
}

func (f *FileWriter) giveBack() {
	if f.buffer != nil {
		f.w.buffers <- f.buffer[:0]
	}
}
