package recovery

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// neverWritten is a WAL file that no repository has: the history of the last timeline there can be.
const neverWritten = "FFFFFFFF.history"

// tryRestoreCommand runs restore_command as the server will run it, as its user, before anything is written: a repository,
// or a pgthaw, that this user cannot get at would otherwise show only when recovery stops.
func (j *job) tryRestoreCommand(ctx context.Context) error {
	if j.RestoreCommand == "" || !j.owner.foreign() || j.route.promoted() { // which has nothing to recover
		return nil
	}
	into := filepath.Join("/", neverWritten) // nothing is written there
	text := strings.NewReplacer("%f", neverWritten, "%p", into, "%%", "%").Replace(j.RestoreCommand)
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", text)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: j.owner.credential()}
	out, err := cmd.CombinedOutput()
	if err == nil || exited(err, 1) {
		return nil
	}
	return withHint(
		fmt.Errorf("%w: as user %s, restore_command fails: %w\n%s", ErrServer, j.owner.name, err, strings.TrimSpace(string(out))),
		fmt.Sprintf("Give that user access to the repository (chown -R %s), to its key if it has one, and to the pgthaw program, or run this command as that user.", j.owner.name))
}

func exited(err error, code int) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.ExitCode() == code
}

// WALFetchFailed is the exit code of "wal fetch" that makes recovery stop (xlogarchive.c: over 125).
const WALFetchFailed = 200

// tryOverlayRestoreCommand does not mind if the server's user has no access to the repository: the daemon brings the WAL.
func (j *job) tryOverlayRestoreCommand(ctx context.Context) error {
	err := j.tryRestoreCommand(ctx)
	if !exited(err, WALFetchFailed) {
		return err
	}
	j.Log.Warn("the server's user cannot read the repository: WAL comes through the overlay's daemon as long as it runs", "user", j.owner.name)
	return nil
}
