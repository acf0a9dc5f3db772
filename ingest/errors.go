package ingest

import (
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"
)

// ErrRefused says that PostgreSQL refused, the connection, by its version or by its settings, or broke off.
var ErrRefused = errors.New("refused by PostgreSQL")

// Error is an error whose next step is known.
type Error struct {
	err     error
	hint    string
	refused bool
}

func (e *Error) Error() string { return e.err.Error() }

// Hint is a sentence that names the next step, in PostgreSQL's style.
func (e *Error) Hint() string { return e.hint }

// Unwrap gives the cause, and ErrRefused where it was the server that said no, or went away.
func (e *Error) Unwrap() []error {
	if e.refused {
		return []error{ErrRefused, e.err}
	}
	return []error{e.err}
}

// refuse is an ErrRefused found by looking at the server's settings.
func refuse(hint, format string, args ...any) error {
	return &Error{err: fmt.Errorf(format, args...), hint: hint, refused: true}
}

// SQLSTATEs that a hint is known for (errcodes.txt).
const (
	stateInvalidAuthorization = "28000" // no pg_hba.conf entry, no such role
	stateInvalidPassword      = "28P01"
	stateInsufficientRight    = "42501"
	stateTooManyConnections   = "53300" // max_wal_senders, max_connections
	stateConfigurationLimit   = "53400" // max_replication_slots
	stateUndefinedObject      = "42704" // no such slot
	stateObjectInUse          = "55006" // slot is active
	stateNotInPrerequisite    = "55000"
	stateCannotConnectNow     = "57P03"
	stateUndefinedFile        = "58P01" // WAL segment already removed
	stateDataCorrupted        = "XX001"
)

var hints = map[string]string{
	stateInvalidAuthorization: `pg_hba.conf needs a line that lets this role connect to the database "replication".`,
	stateInvalidPassword:      `Give the password in ~/.pgpass, with "replication" as its database, or in PGPASSWORD.`,
	stateInsufficientRight:    "The role must be a superuser or have REPLICATION: ALTER ROLE name REPLICATION.",
	stateTooManyConnections:   "A backup needs two free WAL senders: raise max_wal_senders, or end another replication connection.",
	stateConfigurationLimit:   "Raise max_replication_slots, or drop a slot that nobody uses.",
	stateObjectInUse:          "Another process streams from this slot; end it, or name another slot.",
	stateNotInPrerequisite:    "Look at wal_level and max_replication_slots, and in pg_replication_slots whether the slot has lost its WAL.",
	stateCannotConnectNow:     "Wait until the server accepts connections.",
	stateUndefinedFile:        "The server has removed WAL that was asked for; a replication slot keeps it. Make a new backup, for WAL is missing now.",
	stateDataCorrupted:        "Find the damaged relation (the server's log and pg_amcheck name it) and repair it, or back up as it is with --no-verify-checksums.",
}

// serverError wraps what came of a command to the server. Where the server itself answered with an error, it is
// ErrRefused with the hint that is known, else the server's own; where the server went away, with the place to look.
func serverError(attempted string, err error) error {
	err = fmt.Errorf("%s: %w", attempted, err)
	var pgErr *pgconn.PgError
	if errors.Is(err, errLost) {
		return &Error{err: err, hint: "The server's log says why, if it was not the network.", refused: true}
	}
	if !errors.As(err, &pgErr) {
		return err
	}
	hint := hints[pgErr.Code]
	if hint == "" {
		hint = pgErr.Hint
	}
	return &Error{err: err, hint: hint, refused: true}
}

// isState says whether err is the server's error of that SQLSTATE.
func isState(err error, state string) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == state
}
