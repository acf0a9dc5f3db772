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
	mu    sync.Mutex
	files map[string]keptFile
	sweep *time.Timer // nil: none is open
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
	b := make([]byte, n)
	got, deleted, err := readNow(f, b, off)
	if deleted { // another object may have its name by now
		k.release(func(name string, x keptFile) bool { return name == key && x.File == f })
	}
	return b, err == nil && got == len(b) && !deleted
}

// readNow reads what lies in memory. EOPNOTSUPP: the file system cannot tell.
func readNow(f *os.File, b []byte, off int64) (n int, deleted bool, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, false, err
	}
	var readErr error
	err = raw.Control(func(fd uintptr) {
		var st unix.Stat_t
		if readErr = unix.Fstat(int(fd), &st); readErr == nil {
			deleted = st.Nlink == 0
			n, readErr = unix.Preadv2(int(fd), [][]byte{b}, off, unix.RWF_NOWAIT)
		}
	})
	return n, deleted, errors.Join(err, readErr)
}

func (k *kept) find(key string) *os.File {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, ok := k.files[key]
	if !ok {
		return nil
	}
	f.used = time.Now()
	k.files[key] = f
	return f.File
}

// keep takes over a file that was read: it keeps it, or closes it.
func (k *kept) keep(key string, f *os.File) {
	if _, _, err := readNow(f, make([]byte, 1), 0); errors.Is(err, unix.EOPNOTSUPP) || !k.add(key, f) {
		f.Close()
		return
	}
	if oldest, full := k.oldest(); full {
		k.release(func(name string, _ keptFile) bool { return name == oldest })
	}
}

func (k *kept) add(key string, f *os.File) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.files[key]; ok {
		return false
	}
	if k.files == nil {
		k.files = map[string]keptFile{}
	}
	k.files[key] = keptFile{f, time.Now()}
	if k.sweep == nil {
		k.sweep = time.AfterFunc(keptFor, k.closeIdle)
	}
	return true
}

// oldest is what was not used for longest, and whether there are too many.
func (k *kept) oldest() (key string, full bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, f := range k.files {
		if key == "" || f.used.Before(k.files[key].used) {
			key = name
		}
	}
	return key, len(k.files) > keptFiles
}

// closeIdle closes what nobody has used for keptFor, and looks again as long as there is anything.
func (k *kept) closeIdle() {
	k.release(func(_ string, f keptFile) bool { return time.Since(f.used) >= keptFor })
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.sweep = nil; len(k.files) > 0 {
		k.sweep = time.AfterFunc(keptFor, k.closeIdle)
	}
}

// release closes the files that are over.
func (k *kept) release(over func(key string, f keptFile) bool) {
	var released []*os.File
	k.mu.Lock()
	for key, f := range k.files {
		if over(key, f) {
			released = append(released, f.File)
			delete(k.files, key)
		}
	}
	k.mu.Unlock()
	for _, f := range released {
		f.Close()
	}
}
