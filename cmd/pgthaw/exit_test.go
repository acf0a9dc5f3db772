package main

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

	"pgthaw/ingest"
	"pgthaw/recovery"
	"pgthaw/repo"
)

func TestExitCodes(t *testing.T) {
	for err, want := range map[error]int{
		nil:                                 0,
		fmt.Errorf("x: %w", syscall.ENOENT): 1,
		fmt.Errorf("x: %w", syscall.ESTALE): 20,
		errors.New("x"):                     1,
		usage("x"):                          2,
		fmt.Errorf("at: %w", repo.ErrNoRepository):    10,
		&repo.FormatError{}:                           13,
		repo.ErrNoCluster:                             14,
		recovery.ErrTargetUnreachable:                 15,
		&repo.CorruptError{}:                          16,
		recovery.ErrTargetDir:                         17,
		ingest.ErrRefused:                             18,
		mountFailed(errors.New("x")):                  19,
		mountFailed(repo.ErrNoRepository):             10,
		repo.ErrRepositoryExists:                      21,
		repo.ErrWALConflict:                           24,
		errInterrupted:                                130,
		errors.Join(errors.New("x"), repo.ErrCorrupt): 16,
	} {
		if got := exitCode(err); got != want {
			t.Errorf("%v: exit code %d, want %d", err, got, want)
		}
	}
}

func TestExitCodesAreDistinctAndAscend(t *testing.T) {
	last := -1
	for _, e := range exits {
		if e.code <= last {
			t.Errorf("%d comes after %d", e.code, last)
		}
		last = e.code
	}
}

// PostgreSQL takes 1 to 125 from restore_command for the end of WAL, and over 125 from archive_command for a crash.
func TestAnswersToPostgreSQL(t *testing.T) {
	for _, tt := range []struct {
		command string
		err     error
		want    int
	}{
		{"wal fetch", nil, 0},
		{"wal fetch", fmt.Errorf("x: %w", repo.ErrNoWAL), 1},
		{"wal fetch", errors.New("x"), 200},
		{"wal fetch", usage("x"), 200},
		{"wal fetch", repo.ErrCorrupt, 200},
		{"wal fetch", repo.ErrNoRepository, 200},
		{"wal fetch", errInterrupted, 200},
		{"wal push", nil, 0},
		{"wal push", usage("x"), 2},
		{"wal push", repo.ErrWALConflict, 24},
		{"wal push", errInterrupted, 1},
	} {
		if got := answer(tt.command, tt.err); got != tt.want {
			t.Errorf("%s: %v: exit code %d, want %d", tt.command, tt.err, got, tt.want)
		}
	}
}
