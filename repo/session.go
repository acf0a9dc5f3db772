package repo

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"pgthaw/repo/pg"
	"pgthaw/repo/store"
)

// SessionID names a session: 8 random bytes, with which the IDs of the packs that it writes end.
type SessionID [8]byte

func (id SessionID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText gives 16 hexadecimal digits.
func (id SessionID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, id[:]), nil }

// UnmarshalText reads what MarshalText wrote.
func (id *SessionID) UnmarshalText(b []byte) error { return decodeHex(id[:], b) }

// BackupName names a backup in the repository.
type BackupName struct {
	Cluster string `json:"cluster"`
	Backup  string `json:"backup"`
}

func (n BackupName) String() string { return n.Cluster + " " + n.Backup }

// WALFloor says that WAL of a timeline was pruned, or may be at any time, all of it before an LSN.
type WALFloor struct {
	Cluster  string      `json:"cluster"`
	Timeline pg.Timeline `json:"timeline"`
	Before   pg.LSN      `json:"before"`
}

// SessionInfo describes a session to the others.
//
// Format: docs/format.md, "Session".
type SessionInfo struct {
	document
	ID        SessionID    `json:"id"`
	Operation string       `json:"operation"` // "backup", "restore", "thaw", "prune", "copy", "WAL pruned"
	Host      string       `json:"host"`
	PID       int          `json:"pid"`
	StartedAt time.Time    `json:"started_at"` // by that host's clock
	Makes     []BackupName `json:"makes"`      // backups that it may publish
	Uses      []BackupName `json:"uses"`       // backups that it refers to or reads
	Floors    []WALFloor   `json:"floors"`     // such a session never ends, but one that has lower ones only
}

const (
	sessionKind     = "pgthaw session"
	sessionsPrefix  = "sessions/"
	begunSuffix     = ".begun"
	givenUpSuffix   = ".givenup"
	doneSuffix      = ".done"
	signOfLifeEvery = 6 * time.Hour
	// signsKept is how many signs of life a session has: a listing that is stale, each key by itself by up to a day, or goes
	// on for half a day, still shows one of them.
	signsKept = 8
	// sessionLife is after how long without a sign of life a session is given up, besides the grace period.
	sessionLife = 24 * time.Hour
)

func (id SessionID) key(suffix string) string { return sessionsPrefix + id.String() + suffix }

// Session is an operation that everybody else who uses the repository knows of: what it uses and what it writes stays
// until it ends. The protocol: docs/format.md, "Sessions and deletion".
type Session struct {
	Info SessionInfo
	r    *Repository

	stop  context.CancelFunc // ends the signs of life
	alive sync.WaitGroup
	sign  int // number of the newest sign of life
}

// Use announces that an operation reads backups, so that prune leaves them alone until the session is ended. ErrDeleted:
// one of them is deleted. Where nothing can be written the session is nil, which can be left and ended like another: what
// protects the operation then is the grace period.
func (r *Repository) Use(ctx context.Context, operation string, backups ...BackupName) (*Session, error) {
	s, err := r.begin(ctx, SessionInfo{Operation: operation, Uses: backups})
	if errors.Is(err, ErrDeleted) {
		return nil, err
	}
	return s, r.unannounced(ctx, operation, err)
}

// UseStill is Use for who read the backups before and goes on although they may be deleted by now: they stay from now on if
// their bytes are there.
func (r *Repository) UseStill(ctx context.Context, operation string, backups ...BackupName) (*Session, error) {
	s, err := r.announce(ctx, SessionInfo{Operation: operation, Uses: backups})
	return s, r.unannounced(ctx, operation, err)
}

// unannounced makes do without a session.
func (r *Repository) unannounced(ctx context.Context, operation string, err error) error {
	if err == nil || ctx.Err() != nil {
		return err
	}
	r.log.Warn("the repository does not know of this operation: if the backup is deleted, prune may reclaim it before the end", "operation", operation, "error", err)
	return nil
}

// begin announces a session, and then makes sure that what it uses is not deleted: prune, the other way round, marks what
// it deletes and then looks for sessions. So at least one of the two sees the other.
func (r *Repository) begin(ctx context.Context, info SessionInfo) (*Session, error) {
	s, err := r.announce(ctx, info)
	if err != nil {
		return nil, err
	}
	for _, used := range info.Uses {
		if err := r.undeleted(ctx, used); err != nil {
			return nil, errors.Join(err, s.End(context.WithoutCancel(ctx)))
		}
	}
	return s, nil
}

func (r *Repository) announce(ctx context.Context, info SessionInfo) (*Session, error) {
	info.document = document{sessionKind, formatVersion}
	rand.Read(info.ID[:])
	info.Host, _ = os.Hostname()
	info.PID = os.Getpid()
	info.StartedAt = time.Now().UTC().Truncate(time.Second)
	s := &Session{Info: info, r: r}
	if err := s.put(ctx, begunSuffix); err != nil {
		return nil, fmt.Errorf("announce %s: %w", info.Operation, err)
	}
	var live context.Context
	live, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.alive.Go(func() { s.signs(live) })
	return s, nil
}

// undeleted gives ErrDeleted for a backup that is marked as deleted.
func (r *Repository) undeleted(ctx context.Context, b BackupName) error {
	found, err := r.exists(ctx, deletedKey(b.Cluster, b.Backup))
	if err == nil && found {
		err = fmt.Errorf("%s: %w", b, ErrDeleted)
	}
	return err
}

// exists asks for an object itself, which is never stale as a listing may be.
func (r *Repository) exists(ctx context.Context, key string) (bool, error) {
	_, err := r.store.Get(ctx, key, 0, 0)
	if errors.Is(err, store.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (s *Session) put(ctx context.Context, suffix string) error {
	return s.r.putDocument(ctx, s.Info.ID.key(suffix), s.Info)
}

// signs puts signs of life until ctx ends. One that fails is not missed as long as the next one comes in time.
func (s *Session) signs(ctx context.Context) {
	tick := time.NewTicker(signOfLifeEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.signOfLife(ctx); err != nil && ctx.Err() == nil {
			s.r.log.Warn("no sign of life could be left in the repository", "operation", s.Info.Operation, "error", err)
		}
	}
}

// signOfLife puts the next sign and deletes one that is old enough.
func (s *Session) signOfLife(ctx context.Context) error {
	s.sign++
	if err := s.put(ctx, signSuffix(s.sign)); err != nil {
		return err
	}
	if s.sign <= signsKept {
		return nil
	}
	return s.r.store.Delete(ctx, s.Info.ID.key(signSuffix(s.sign-signsKept)))
}

func signSuffix(n int) string { return fmt.Sprintf(".%08x", n) }

// rely tells whether the session protects what it wrote, up to now: nil; or ErrGivenUp. Whoever publishes something asks
// afterwards, and promises nothing before. The word that it was given up goes only when the backup is marked as deleted, or was seen.
func (s *Session) rely(ctx context.Context) error {
	givenUp, err := s.r.exists(ctx, s.Info.ID.key(givenUpSuffix))
	if err != nil || givenUp {
		return errors.Join(err, errorIf(givenUp, ErrGivenUp))
	}
	for _, b := range s.Info.Makes {
		if err := s.r.undeleted(ctx, b); err != nil {
			return errors.Join(errorIf(errors.Is(err, ErrDeleted), ErrGivenUp), err)
		}
	}
	return nil
}

func errorIf(holds bool, err error) error {
	if holds {
		return err
	}
	return nil
}

// done says that what the session makes was published: should it be gone later, that is damage.
func (s *Session) done(ctx context.Context) {
	if err := s.put(ctx, doneSuffix); err != nil {
		s.r.log.Debug("the session does not say that it is done", "error", err)
	}
}

// Leave ends the signs of life and leaves the session: what it uses is protected for another day.
func (s *Session) Leave() {
	if s != nil {
		s.stop()
		s.alive.Wait()
	}
}

// End ends the session. It publishes nothing from now on, and nothing of what it used is protected any more.
func (s *Session) End(ctx context.Context) error {
	if s == nil {
		return nil
	}
	s.Leave()
	var signs []int
	for n := max(s.sign-signsKept, 1); n <= s.sign; n++ {
		signs = append(signs, n)
	}
	return s.r.endSession(ctx, s.Info.ID, signs)
}

// endSession deletes a session's objects: the announcement last but for the word that it was given up, which whoever
// relied on the session then looks for.
func (r *Repository) endSession(ctx context.Context, id SessionID, signs []int) error {
	var errs []error
	for _, n := range signs {
		errs = append(errs, r.store.Delete(ctx, id.key(signSuffix(n))))
	}
	for _, suffix := range []string{doneSuffix, begunSuffix, givenUpSuffix} {
		errs = append(errs, r.store.Delete(ctx, id.key(suffix)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("end session: %w", err)
	}
	return nil
}

// listedSession is a session as prune finds it.
type listedSession struct {
	id    SessionID
	info  *SessionInfo // nil: its announcement is gone
	signs []int        // numbers of its signs of life
	last  time.Time    // when the last sign of life came, by the store's clock
	done  bool
}

var sessionKey = regexp.MustCompile(`^sessions/([0-9a-f]{16})\.(begun|done|givenup|[0-9a-f]{8})$`)

// sessions lists all sessions and reads what they announced. Where that cannot be read, the rest comes with an error.
func (r *Repository) sessions(ctx context.Context) ([]*listedSession, error) {
	var all []*listedSession
	for o, err := range r.store.List(ctx, sessionsPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list sessions: %w", err)
		}
		match := sessionKey.FindStringSubmatch(o.Key)
		if match == nil {
			continue
		}
		var id SessionID
		if err := id.UnmarshalText([]byte(match[1])); err != nil {
			continue
		}
		if len(all) == 0 || all[len(all)-1].id != id {
			all = append(all, &listedSession{id: id})
		}
		all[len(all)-1].add(match[2], o.Modified)
	}
	var bad []error
	for _, s := range all {
		bad = append(bad, r.readSession(ctx, s))
	}
	return all, errors.Join(bad...)
}

func (s *listedSession) add(suffix string, modified time.Time) {
	switch "." + suffix {
	case begunSuffix:
	case doneSuffix:
		s.done = true
	case givenUpSuffix:
		return // it is no sign of life
	default:
		n, _ := strconv.ParseUint(suffix, 16, 32)
		s.signs = append(s.signs, int(n))
	}
	if modified.After(s.last) {
		s.last = modified
	}
}

// readSession reads the announcement, or what the word that the session was given up repeats of it. One that was ended
// meanwhile has neither. That a session is done is believed only if it can be read, too.
func (r *Repository) readSession(ctx context.Context, s *listedSession) (err error) {
	if s.done {
		if _, err = r.sessionInfo(ctx, s.id.key(doneSuffix)); err != nil && !errors.Is(err, store.ErrNotExist) {
			return err
		}
	}
	s.info, err = r.sessionInfo(ctx, s.id.key(begunSuffix))
	if errors.Is(err, store.ErrNotExist) {
		s.info, err = r.sessionInfo(ctx, s.id.key(givenUpSuffix))
	}
	if errors.Is(err, store.ErrNotExist) {
		return nil
	}
	return err
}

func (r *Repository) sessionInfo(ctx context.Context, key string) (*SessionInfo, error) {
	info := &SessionInfo{}
	if _, err := r.getDocument(ctx, key, sessionKind, info); err != nil {
		return nil, err
	}
	if id, _, _ := strings.Cut(path.Base(key), "."); info.ID.String() != id {
		return nil, corrupt(key, "it describes session %s", info.ID)
	}
	return info, nil
}

// making lists the backups that are being made, or were when their writers died.
func (r *Repository) making(ctx context.Context) (map[BackupName]bool, error) {
	sessions, err := r.sessions(ctx)
	making := map[BackupName]bool{}
	for _, s := range sessions {
		if s.info != nil && !s.done {
			addAll(making, s.info.Makes)
		}
	}
	return making, err
}

// putGivenUp says that a session is given up: whoever works in it finds out before it promises anything.
func (r *Repository) putGivenUp(ctx context.Context, info *SessionInfo) error {
	s := &Session{Info: *info, r: r}
	if err := s.put(ctx, givenUpSuffix); err != nil && !errors.Is(err, store.ErrExist) {
		return fmt.Errorf("give up session %s: %w", info.ID, err)
	}
	return nil
}
