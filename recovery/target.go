package recovery

import (
	"fmt"
	"strconv"
	"time"

	"pgthaw/repo/pg"
)

// Target is where recovery should end: at most one of the first five, else at the end of all WAL.
type Target struct {
	Time      time.Time
	LSN       pg.LSN
	Xid       uint32
	Name      string // of a restore point
	Immediate bool   // as soon as the backup is consistent

	Exclusive bool   // stop just before the target, not just after it
	Timeline  string // "", "latest", "current" or a number; "" is latest
	Action    string // "", "pause", "promote" or "shutdown"; "" is promote
}

// targetKind tells which of Target's first five fields is set.
type targetKind int

const (
	targetEnd targetKind = iota
	targetTime
	targetLSN
	targetXid
	targetName
	targetImmediate
)

// kind also refuses what contradicts itself.
func (t Target) kind() (targetKind, error) {
	kind, n := targetEnd, 0
	for k, set := range map[targetKind]bool{
		targetTime:      !t.Time.IsZero(),
		targetLSN:       t.LSN != 0,
		targetXid:       t.Xid != 0,
		targetName:      t.Name != "",
		targetImmediate: t.Immediate,
	} {
		if set {
			kind, n = k, n+1
		}
	}
	if n > 1 {
		return 0, fmt.Errorf("%w: more than one recovery target", ErrUsage)
	}
	return kind, t.validate()
}

func (t Target) validate() error {
	switch t.Action {
	case "", "pause", "promote", "shutdown":
	default:
		return fmt.Errorf("%w: recovery target action %q is none of pause, promote, shutdown", ErrUsage, t.Action)
	}
	switch t.Timeline {
	case "", "latest", "current":
		return nil
	}
	if n, err := strconv.ParseUint(t.Timeline, 0, 32); err != nil || n == 0 {
		return fmt.Errorf("%w: timeline %q is neither latest, current nor a number", ErrUsage, t.Timeline)
	}
	return nil
}

// action is Action with its default.
func (t Target) action() string {
	if t.Action == "" {
		return "promote"
	}
	return t.Action
}

// describe is for messages: "time 2026-11-20 10:00:00.5 UTC".
func (t Target) describe() string {
	switch kind, _ := t.kind(); kind {
	case targetTime:
		return "time " + formatTime(t.Time)
	case targetLSN:
		return "LSN " + t.LSN.String()
	case targetXid:
		return "transaction " + strconv.FormatUint(uint64(t.Xid), 10)
	case targetName:
		return "restore point " + strconv.Quote(t.Name)
	case targetImmediate:
		return "end of the backup"
	default:
		return "end of WAL"
	}
}

// formatTime spells a time with all the precision that PostgreSQL has; recovery_target_time reads it.
func formatTime(t time.Time) string {
	return t.UTC().Format("2006-01-02 15:04:05.999999") + " UTC"
}
