package repo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"pgthaw/repo/store"
)

// Outcome is what Repair did about a finding.
type Outcome string

const (
	// Repaired: what was damaged is whole again, byte for byte what it said.
	Repaired Outcome = "repaired"
	// Recorded: what is damaged cannot be had from the repository, and from now on no backup refers to it.
	Recorded Outcome = "recorded"
	// Removed: a WAL file that cannot be had from the repository has made room for itself to be pushed again.
	Removed Outcome = "removed"
	// Left: nothing was done.
	Left Outcome = "left"
)

// Remedy is a finding, what was done about it, and what the operator can do next.
type Remedy struct {
	Finding
	Outcome Outcome
	Next    string // a sentence or two; "": nothing
}

// Repair checks the repository and then mends of what is damaged all that the rest of it determines. It deletes nothing but
// objects that it has just read and found damaged, and writes what replaces one only after that is gone: an interruption leaves damage
// which a check finds and another Repair mends. Where nothing is damaged it changes nothing. found is called once for each finding.
//
// What follows from what: docs/format.md, "Damage".
func (r *Repository) Repair(ctx context.Context, o CheckOptions, found func(Remedy)) (Checked, error) {
	var all []Finding
	done, err := r.Check(ctx, o, func(f Finding) { all = append(all, f) })
	k := &repairer{r: r}
	defer func() { _ = k.session.End(context.WithoutCancel(ctx)) }() // what is left of it prune takes away
	for _, f := range all {
		m := Remedy{Finding: f, Outcome: Left, Next: nextBroken} // what was found until then is worth having
		if err == nil {
			if m, err = k.mend(ctx, f); err != nil {
				err = fmt.Errorf("repair %s: %w", f.Object, err)
			}
		}
		found(m)
	}
	return done, err
}

// repairer mends one finding after the other.
type repairer struct {
	r        *Repository
	session  *Session // once something is to be deleted
	isProven bool     // that the configuration is this repository's
}

const (
	nextBroken  = "The repair did not come to its end: run it again."
	nextNewer   = "A newer pgthaw wrote it: use that one."
	nextForeign = "Nothing in the repository has the digest that its config asks for: that may be the config of another repository. Put the right one back first. Nothing was recorded or removed."
	nextMedium  = "The storage did not give its bytes: look at the storage first, then run this again."
	nextAgain   = "Run it again: what was found is not so any more."
	nextPack    = "Nothing in the repository determines its bytes. From now on no backup refers to it: the next \"pgthaw backup\" stores anew what lies in it, and is whole. The backups named here stay as they are until retention takes them; a copy of them in another repository can be restored from there."
	nextMade    = "It is as its manifest says, so nothing else can be put in its place. The next \"pgthaw backup\" stores anew what it cannot compare."
	nextList    = "It does not follow from what can be read of the backup: something else of the backup is damaged, too. The next \"pgthaw backup\" stores everything anew, and is whole. Until retention takes this backup, prune reclaims nothing."
	nextCluster = "Neither a manifest nor a WAL file of the cluster says whose it is. Put it back from a copy of the repository's files: it never changes."
	nextOdd     = "No object of pgthaw has this key, so nothing is known about it. If nobody of yours needs it, delete it from the storage."
	nextWAL     = "\"pgthaw wal push\" it again, from the server's pg_wal or an archive, or \"pgthaw repo copy\" it back from another repository. Where nobody has it any more, make a backup: recovery goes on from that one."
	nextHistory = "\"pgthaw wal push\" it again, from a server's pg_wal or an archive, or \"pgthaw repo copy\" it back from another repository."
	nextKey     = "\"pgthaw repo key remove %s\" takes it away; then give its holder another one with \"pgthaw repo key add\"."
	nextSession = "Somebody may still work under it, so it stays. Once no backup, restore, thaw, copy or prune that began before %s runs anywhere, \"pgthaw repo give-up %s\" takes it away: backups and prune go on then."
	nextHold    = "It goes on holding the backup. \"pgthaw repo hold remove %s\" ends it; \"pgthaw repo hold add\" makes another."
	nextBackup  = "Nothing in the repository determines what it said. Put it back from a copy of the repository's files, or restore the backup from another repository. The next \"pgthaw backup\" does not depend on it; prune reclaims nothing while it is so, unless \"pgthaw repo give-up %s\" gives the backup up."
)

// mend does what can be done about a finding. An error is one that has nothing to do with the finding: there is no point in going on.
func (k *repairer) mend(ctx context.Context, f Finding) (Remedy, error) {
	m := Remedy{Finding: f, Outcome: Left}
	var newer *FormatError
	var err error
	switch first, _, _ := strings.Cut(f.Object, "/"); {
	case f.Note:
	case errors.As(f.Err, &newer):
		m.Next = nextNewer
	case first == "keys":
		m.Next = fmt.Sprintf(nextKey, strings.TrimPrefix(f.Object, keySlotsPrefix))
	case first == "sessions":
		m.Next, err = k.sessionAdvice(ctx, f.Object)
	case first == "packs":
		err = k.pack(ctx, &m)
	case first == "wal":
		err = k.wal(ctx, &m)
	case first == "starts":
		err = k.start(ctx, &m)
	case first == "clusters":
		err = k.cluster(ctx, &m)
	case first == "backups":
		err = k.backup(ctx, &m)
	}
	var busy *RepairingError
	if errors.As(err, &busy) {
		m.Next, err = busy.Error()+". When that one has ended, run this again.", nil
	}
	return m, err
}

// pack records a damaged pack. Its bytes cannot be put in its place: what is still whole in it would be gone in between.
func (k *repairer) pack(ctx context.Context, m *Remedy) error {
	if m.Recorded {
		m.Outcome, m.Next = Recorded, nextPack
		return nil
	}
	if !errors.Is(m.Err, ErrCorrupt) && !errors.Is(m.Err, syscall.EIO) {
		m.Next = nextMedium
		return nil
	}
	ok, err := k.proven(ctx)
	if !ok || err != nil {
		m.Next = nextForeign
		return err
	}
	if err := k.r.recordDamage(ctx, m.Object, m.Err); err != nil {
		return err
	}
	m.Outcome, m.Next = Recorded, nextPack
	return nil
}

// backup looks at what lies beside a manifest, or is one.
func (k *repairer) backup(ctx context.Context, m *Remedy) error {
	name, suffix, ok := splitBackupKey(m.Object)
	switch {
	case ok && suffix == packListSuffix:
		return k.packList(ctx, m, name)
	case ok && holdSuffix.MatchString(suffix):
		m.Next = fmt.Sprintf(nextHold, holdSuffix.FindStringSubmatch(suffix)[1])
	default:
		m.Next = fmt.Sprintf(nextBackup, m.Object)
	}
	return nil
}

// sessionAdvice says when a session's object that cannot be read was put.
func (k *repairer) sessionAdvice(ctx context.Context, key string) (string, error) {
	for o, err := range k.r.store.List(ctx, key) {
		if err != nil {
			return "", err
		}
		return fmt.Sprintf(nextSession, o.Modified.Local().Format("2006-01-02 15:04:05"), key), nil
	}
	return nextAgain, nil
}

const repairOperation = "repair"

// RepairingError says that another repair may be about to delete what it found damaged: two could take what the first one mended for that.
type RepairingError struct{ By SessionInfo }

func (e *RepairingError) Error() string {
	return fmt.Sprintf("another repair was announced by process %d on %s at %s", e.By.PID, e.By.Host, e.By.StartedAt.Local().Format("2006-01-02 15:04:05"))
}

// alone makes sure, before anything is deleted, that no other repair does. Of two that begin at once each sees the other.
func (k *repairer) alone(ctx context.Context) error {
	if k.session != nil {
		return nil
	}
	s, err := k.r.announce(ctx, SessionInfo{Operation: repairOperation})
	if err != nil {
		return err
	}
	sessions, err := k.r.sessions(ctx)
	if errors.Is(err, ErrCorrupt) {
		err = nil // reported by the check
	}
	for _, other := range sessions {
		if err == nil && other.id != s.Info.ID && other.info != nil && other.info.Operation == repairOperation && !died(other.info, &s.Info) {
			err = &RepairingError{*other.info}
		}
	}
	if err != nil {
		return errors.Join(err, s.End(context.WithoutCancel(ctx)))
	}
	k.session = s
	return nil
}

// died tells whether a session's process was one of this host and is gone. One with the number of this process was here before.
func died(info, own *SessionInfo) bool {
	if info.Host != own.Host {
		return false
	}
	p, err := os.FindProcess(info.PID)
	return info.PID == own.PID || err != nil || errors.Is(p.Signal(syscall.Signal(0)), os.ErrProcessDone)
}

// replace puts an object where a damaged one is, or one is missing. whole reads what is there: nil if that is whole, ErrCorrupt if not.
// The damaged one goes first, for nothing is ever overwritten.
func (k *repairer) replace(ctx context.Context, key string, object []byte, whole func() error) error {
	if err := k.remove(ctx, key, whole); err != nil {
		return err
	}
	if err := k.r.store.Put(ctx, key, object); err != nil && !errors.Is(err, store.ErrExist) {
		return err
	}
	return whole()
}

// remove deletes a damaged object, if it is there, and still is not whole.
func (k *repairer) remove(ctx context.Context, key string, whole func() error) error {
	there, err := k.r.exists(ctx, key)
	if err != nil || !there {
		return err
	}
	if err := k.alone(ctx); err != nil {
		return err
	}
	if err := whole(); !errors.Is(err, ErrCorrupt) {
		return err // it is whole, or nobody knows
	}
	return k.r.store.Delete(ctx, key)
}
