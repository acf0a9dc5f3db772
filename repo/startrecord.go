package repo

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"pgthaw/repo/store"
)

// StartRecord tells what the start of a server on a thawed backup, and its first minutes, read of the cluster's files: the
// next start reads it beforehand. It refers to no piece, and nothing needs it. The newest of a cluster counts.
//
// Format: docs/format.md, "Start records".
type StartRecord struct {
	Cluster string
	Backup  string // id of the backup, or boot image, on which the server started
	MadeAt  time.Time
	Reads   []Span // whole pages, in the order in which they were wanted
}

type startDocument struct {
	document
	Cluster string    `json:"cluster"`
	Backup  string    `json:"backup"`
	MadeAt  time.Time `json:"made_at"`
	Reads   []string  `json:"reads"`
}

const (
	startsRoot = "starts/"
	startKind  = "pgthaw start"
	// MaxStartReads bounds a start record: it is half a megabyte then.
	MaxStartReads = 8192
)

func startsPrefix(cluster string) string { return startsRoot + cluster + "/" }

// ErrNoStart: the cluster has no start record.
var ErrNoStart = errors.New("no start record")

// PutStart stores a start record and takes away those that it replaces.
func (r *Repository) PutStart(ctx context.Context, s StartRecord) error {
	d := startDocument{document: document{startKind, formatVersion}, Cluster: s.Cluster, Backup: s.Backup, MadeAt: s.MadeAt.UTC().Truncate(time.Second)}
	for _, read := range s.Reads[:min(len(s.Reads), MaxStartReads)] {
		d.Reads = append(d.Reads, formatStartRead(read))
	}
	var no [8]byte
	rand.Read(no[:])
	key := startsPrefix(s.Cluster) + hex.EncodeToString(no[:])
	if err := r.putDocument(ctx, key, d); err != nil {
		return fmt.Errorf("put start record: %w", err)
	}
	all, err := r.starts(ctx, startsPrefix(s.Cluster))
	own := slices.IndexFunc(all, func(o store.Object) bool { return o.Key == key })
	for _, o := range all {
		if own >= 0 && o.Key != key && !o.Modified.After(all[own].Modified) {
			err = errors.Join(err, r.store.Delete(ctx, o.Key))
		}
	}
	return err
}

// starts lists start records, older ones before newer ones.
func (r *Repository) starts(ctx context.Context, prefix string) (all []store.Object, err error) {
	for o, err := range r.store.List(ctx, prefix) {
		if err != nil {
			return nil, fmt.Errorf("list start records: %w", err)
		}
		all = append(all, o)
	}
	slices.SortFunc(all, func(a, b store.Object) int {
		return cmp.Or(a.Modified.Compare(b.Modified), cmp.Compare(a.Key, b.Key))
	})
	return all, nil
}

// Start returns a cluster's newest start record. ErrNoStart: there is none.
func (r *Repository) Start(ctx context.Context, cluster string) (*StartRecord, error) {
	all, err := r.starts(ctx, startsPrefix(cluster))
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s: %w", cluster, ErrNoStart)
	}
	return r.readStart(ctx, all[len(all)-1].Key)
}

func (r *Repository) readStart(ctx context.Context, key string) (*StartRecord, error) {
	var d startDocument
	_, err := r.getDocument(ctx, key, startKind, &d)
	if errors.Is(err, store.ErrNotExist) {
		err = ErrNoStart // replaced meanwhile
	}
	if err != nil {
		return nil, fmt.Errorf("read start record: %w", err)
	}
	s := &StartRecord{Cluster: d.Cluster, Backup: d.Backup, MadeAt: d.MadeAt}
	if startCluster(key) != d.Cluster || len(d.Reads) > MaxStartReads {
		return nil, corrupt(key, "it has %d reads of cluster %q", len(d.Reads), d.Cluster)
	}
	for _, text := range d.Reads {
		read, err := parseStartRead(text)
		if err != nil {
			return nil, corrupt(key, "%v", err)
		}
		s.Reads = append(s.Reads, read)
	}
	return s, nil
}

// startCluster is whose start record has a key.
func startCluster(key string) string {
	cluster, _, _ := strings.Cut(strings.TrimPrefix(key, startsRoot), "/")
	return cluster
}

// formatStartRead gives the text "<first page>+<pages> <path>".
func formatStartRead(s Span) string {
	first, last := s.Off/PageSize, (s.Off+s.Len-1)/PageSize
	return fmt.Sprintf("%d+%d %s", first, last-first+1, s.Path)
}

func parseStartRead(text string) (s Span, err error) {
	pages, name, ok := strings.Cut(text, " ")
	first, count, ok2 := strings.Cut(pages, "+")
	page, err := strconv.ParseUint(first, 10, 32)
	n, err2 := strconv.ParseUint(count, 10, 32)
	if !ok || !ok2 || err != nil || err2 != nil || n == 0 || !fs.ValidPath(name) || name == "." {
		return s, fmt.Errorf("%q is not pages of a file", text)
	}
	return Span{name, int64(page) * PageSize, int64(n) * PageSize}, nil
}

// forgetStarts deletes the start records that are not their cluster's newest, and those of clusters without a backup. Nothing needs
// one, so nothing is to be waited for.
func (p *pruner) forgetStarts(ctx context.Context, i *inventory) error {
	alive := map[string]bool{}
	for _, b := range i.kept {
		alive[b.Cluster] = true
	}
	all, err := p.r.starts(ctx, startsRoot)
	if err != nil {
		return err
	}
	for _, o := range slices.Backward(all) {
		cluster := startCluster(o.Key)
		if alive[cluster] {
			alive[cluster] = false // the next ones are older
			continue
		}
		if !p.o.Apply {
			continue
		}
		if err := p.r.store.Delete(ctx, o.Key); err != nil {
			return fmt.Errorf("delete a start record: %w", err)
		}
	}
	return nil
}

// checkStarts reads the start records.
func (c *checker) checkStarts(ctx context.Context) error {
	all, err := c.r.starts(ctx, startsRoot)
	if err != nil {
		return err
	}
	for _, o := range all {
		_, err := c.r.readStart(ctx, o.Key)
		if err == nil || errors.Is(err, ErrNoStart) {
			continue
		}
		c.report(Finding{Object: o.Key, Cluster: startCluster(o.Key), Err: err, Cost: "The next start of a thawed server is slower. Nothing else needs it."})
		if err := unanswered(ctx, err); err != nil {
			return err
		}
	}
	return nil
}

const nextStart = "The next thaw that starts a server makes another."

// start removes a damaged start record.
func (k *repairer) start(ctx context.Context, m *Remedy) error {
	err := k.remove(ctx, m.Object, func() error { _, err := k.r.readStart(ctx, m.Object); return err })
	if err == nil {
		m.Outcome, m.Next = Removed, nextStart
	}
	return err
}
