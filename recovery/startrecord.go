package recovery

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"pgthaw/repo"
)

const (
	// startWindow is how long after a server's start what it reads counts as its start.
	startWindow = 2 * time.Minute
	// startLook is the time between looks for a server that starts.
	startLook = 200 * time.Millisecond
	// storeLimit bounds the storing of a start record, for which an ending daemon is waited for.
	storeLimit = 5 * time.Second
	// startBytes bounds what a start record names.
	startBytes = 128 << 20
	// startUrgent is how much of a record is read beforehand whoever waits: what a server wants until it answers. What was wanted behind
	// that were queries, and may be others this time.
	startUrgent = 16 << 20
	// page is the unit in which reads are recorded.
	page = repo.PageSize
)

// starting is the start of a server on an overlay: what was read beforehand, because the last start wanted it, and what
// somebody had to wait for.
type starting struct {
	mu     sync.Mutex
	before []repo.Span // of the record that there was
	opened map[string]bool
	reads  []repo.Span
	of     map[string][]int // indexes of reads, by path
	bytes  int64            // of reads
}

// touched hears from fusefs what is wanted of the backup.
func (s *starting) touched(path string, off, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opened == nil {
		s.opened, s.of = map[string]bool{}, map[string][]int{}
	}
	if len(s.opened) < repo.MaxStartReads {
		s.opened[path] = true
	}
	if n == 0 || s.bytes >= startBytes {
		return
	}
	from, to := off/page*page, (off+n+page-1)/page*page
	if s.join(path, from, to) || len(s.reads) == repo.MaxStartReads {
		return
	}
	s.of[path] = append(s.of[path], len(s.reads))
	s.reads = append(s.reads, repo.Span{Path: path, Off: from, Len: to - from})
	s.bytes += to - from
}

// lastFew is how many reads of a file a new one is compared with.
const lastFew = 8

// join makes a read part of one that it adjoins. Caller holds mu.
func (s *starting) join(path string, from, to int64) bool {
	all := s.of[path]
	for _, i := range all[max(0, len(all)-lastFew):] {
		r := &s.reads[i]
		if from <= r.Off+r.Len && r.Off <= to {
			end := max(r.Off+r.Len, to)
			s.bytes -= r.Len
			r.Off = min(r.Off, from)
			r.Len = end - r.Off
			s.bytes += r.Len
			return true
		}
	}
	return false
}

// worthStoring returns the reads of a new record: those of the one before whose files were opened, then what it lacked. It is nil
// where the one before is as good.
func (s *starting) worthStoring() (reads []repo.Span) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var bytes int64
	for _, r := range s.before {
		if s.opened[r.Path] {
			reads = append(reads, r)
			bytes += r.Len
		}
	}
	if len(s.before) > 0 && len(reads) > len(s.before)/2 && s.bytes < bytes/8 {
		return nil
	}
	return append(reads, s.reads...)
}

// prefetchStart reads what the last start of the cluster wanted.
func (d *daemon) prefetchStart(ctx context.Context, b *repo.Backup) {
	began := time.Now()
	last, err := d.repo.Start(ctx, d.record.Cluster)
	if err != nil {
		if !errors.Is(err, repo.ErrNoStart) {
			d.log.Info("what the last start wanted is not known", "error", err)
		}
		return
	}
	d.starting.mu.Lock()
	d.starting.before = last.Reads
	d.starting.mu.Unlock()
	urgent, later := firstBytes(last.Reads, startUrgent)
	err = d.prefetch(ctx, b, urgent, false)
	if err == nil && len(later) > 0 {
		err = d.prefetch(ctx, b, later, true)
	}
	if err != nil {
		d.log.Info("what the last start wanted was not read beforehand", "error", err)
		return
	}
	d.log.Debug("what the last start wanted is there", "reads", len(last.Reads), "took", time.Since(began))
}

// firstBytes splits spans behind the first n bytes of them.
func firstBytes(spans []repo.Span, n int64) (first, rest []repo.Span) {
	for i, s := range spans {
		if n -= s.Len; n < 0 {
			return spans[:i], spans[i:]
		}
	}
	return spans, nil
}

// prefetch fills holes of the mounts.
func (d *daemon) prefetch(ctx context.Context, b *repo.Backup, spans []repo.Span, yield bool) (err error) {
	for _, m := range d.overlays {
		var own []repo.Span
		for _, s := range spans {
			if strings.HasPrefix(s.Path, m.root.Path+"/") {
				own = append(own, s)
			}
		}
		if len(own) > 0 && !m.Left() {
			err = errors.Join(err, m.Prefetch(ctx, b, m.root.Path, own, yield))
		}
	}
	return err
}

// recordStart waits for a server to start, and stores what that wants until the window ends, the server, or ctx.
func (d *daemon) recordStart(ctx context.Context, lower *repo.Manifest) {
	var pid int
	for ; pid == 0; pid = d.bare.postmaster() {
		if wait(ctx, startLook); ctx.Err() != nil {
			return
		}
	}
	for end := time.Now().Add(startWindow); ctx.Err() == nil && time.Now().Before(end) && d.bare.postmaster() == pid; {
		awaitPID(ctx, pid, startLook)
	}
	reads := d.starting.worthStoring()
	if len(reads) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeLimit)
	defer cancel()
	s := repo.StartRecord{Cluster: d.record.Cluster, Backup: lower.ID, MadeAt: time.Now(), Reads: reads}
	if err := d.repo.PutStart(ctx, s); err != nil {
		d.log.Info("what this start wanted is not recorded: the next one is not faster", "error", err)
		return
	}
	d.log.Debug("what this start wanted is recorded", "reads", len(reads))
}
