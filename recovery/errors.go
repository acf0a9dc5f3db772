package recovery

import "errors"

// What a caller acts on. The repository's errors come through as they are.
var (
	ErrTargetUnreachable = errors.New("recovery target out of reach")
	ErrTargetDir         = errors.New("target directory cannot be used")
	ErrServer            = errors.New("PostgreSQL did not start")
	ErrUsage             = errors.New("wrong usage")
	ErrLost              = errors.New("the overlay has lost its mount")
	ErrNoOverlay         = errors.New("not a directory that pgthaw thawed")
	ErrServerRunning     = errors.New("PostgreSQL is running there")
)

// hinted is an error with a sentence on the next step, which whoever prints the error finds through Hint.
type hinted struct {
	error
	hint string
}

func (h hinted) Hint() string  { return h.hint }
func (h hinted) Unwrap() error { return h.error }

func withHint(err error, hint string) error { return hinted{err, hint} }
