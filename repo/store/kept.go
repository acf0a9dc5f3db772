package store

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// kept has objects open that were read a moment ago. What of them lies in the page cache can be read without a chance to wait for the
// medium (preadv2(2), RWF_NOWAIT), and so by the thread that wants it. To open the file and to have another goroutine wait for it was an
// eighth of the processor time of an overlay's daemon that serves random reads: a server on which nothing is hydrated answered 2600
// instead of 3000 selects a second. They are closed soon: a file that is open keeps its file system mounted, and its room taken when it
// is deleted.
type kept struct {
	mu     sync.Mutex
	files  map[string]*keptFile
	sweep  *time.Timer // nil: none is open
	unable bool        // the file system has no such reads
}

// keptFile is closed by whoever takes it out of the map: os.File lets those finish who are reading.
type keptFile struct {
	*os.File
	used time.Time
}

const (
	keptFiles = 32
	keptFor   = time.Second
)

// read gives n bytes from off, if they are at hand.
func (k *kept) read(key string, off, n int64) ([]byte, bool) {
	f := k.find(key)
	if f == nil {
		return nil, false
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, false
	}
	b := make([]byte, n)
	var got int
	var deleted bool
	var readErr error
	err = raw.Control(func(fd uintptr) {
		var st unix.Stat_t
		readErr = unix.Fstat(int(fd), &st)
		if deleted = st.Nlink == 0; readErr == nil && !deleted {
			got, readErr = unix.Preadv2(int(fd), [][]byte{b}, off, unix.RWF_NOWAIT)
		}
	})
	if err != nil { // it was closed meanwhile
		return nil, false
	}
	switch {
	case errors.Is(readErr, unix.EOPNOTSUPP):
		k.close(true)
	case deleted: // another object may have its name by now
		k.drop(key, f)
	}
	return b, readErr == nil && got == len(b)
}

func (k *kept) find(key string) *os.File {
	k.mu.Lock()
	defer k.mu.Unlock()
	f := k.files[key]
	if f == nil {
		return nil
	}
	f.used = time.Now()
	return f.File
}

// keep takes over a file that was read, or closes it.
func (k *kept) keep(key string, f *os.File) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.files[key] != nil || k.unable {
		f.Close()
		return
	}
	if len(k.files) == keptFiles {
		k.closeOldest()
	}
	if k.files == nil {
		k.files = map[string]*keptFile{}
	}
	k.files[key] = &keptFile{f, time.Now()}
	if k.sweep == nil {
		k.sweep = time.AfterFunc(keptFor, k.closeIdle)
	}
}

func (k *kept) closeOldest() {
	var oldest string
	for key, f := range k.files {
		if oldest == "" || f.used.Before(k.files[oldest].used) {
			oldest = key
		}
	}
	k.files[oldest].Close()
	delete(k.files, oldest)
}

// closeIdle closes what nobody has used for keptFor, and looks again as long as there is anything.
func (k *kept) closeIdle() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, f := range k.files {
		if time.Since(f.used) >= keptFor {
			f.Close()
			delete(k.files, key)
		}
	}
	if k.sweep = nil; len(k.files) > 0 {
		k.sweep = time.AfterFunc(keptFor, k.closeIdle)
	}
}

func (k *kept) drop(key string, f *os.File) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if now := k.files[key]; now != nil && now.File == f {
		f.Close()
		delete(k.files, key)
	}
}

// close closes all.
func (k *kept) close(unable bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, f := range k.files {
		f.Close()
		delete(k.files, key)
	}
	k.unable = k.unable || unable
}
