package main

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"pgthaw/fusefs"
	"pgthaw/ingest"
	"pgthaw/recovery"
	"pgthaw/repo"
)

// The exit codes that are named in code. Codes are added, never moved.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitKey         = 12
	exitDamaged     = 16
	exitMount       = 19
	exitInterrupted = 130

	exitNoSuchWAL = 1 // wal fetch: PostgreSQL may take this for the end of WAL
	exitStop      = recovery.WALFetchFailed
)

var errInterrupted = errors.New("interrupted")

// exit is a row of the table from error to exit code.
type exit struct {
	code    int
	meaning string
	is      func(error) bool // nil: no error of this version leads here
	hint    string           // next step, unless the error knows a better one
}

// exits is the table; the first row that matches an error is its code. docs/cli.md shows it, and a test compares them.
var exits = []exit{
	{exitDone, "done", nil, ""},
	{exitFailed, "failed, no code of its own", nil, ""},
	{exitUsage, "wrong usage", anyOf(recovery.ErrUsage, repo.ErrPlain, repo.ErrNoKeySlot, repo.ErrLastKey, repo.ErrSameRepository, repo.ErrNoHold, repo.ErrNotDamaged), "Try --help after the command."},
	{3, "done, but what stderr names was left out", nil, ""},
	{10, "no repository there", anyOf(repo.ErrNoRepository), `Check the URL, or make a repository with "pgthaw repo init".`},
	{11, "repository locked", anyOf(repo.ErrPruning), ""},
	{exitKey, "no key, a wrong key, or a key for a repository that is not encrypted", anyOf(repo.ErrNoKey, repo.ErrWrongKey, repo.ErrNotEncrypted), ""},
	{13, "format newer than this binary", isNewerFormat, "Use a pgthaw at least as new as the one that wrote it."},
	{14, "no such backup or cluster", anyOf(repo.ErrNoBackup, repo.ErrNoCluster), `"pgthaw list" shows what there is.`},
	{15, "recovery target out of reach: before the backup, after the WAL, in a gap, on another timeline",
		anyOf(recovery.ErrTargetUnreachable, repo.ErrNoWAL), `"pgthaw list" shows the recoverable window of each backup, "pgthaw wal list" the gaps.`},
	{exitDamaged, "repository damaged, or older than this host has seen it", anyOf(repo.ErrCorrupt, repo.ErrRolledBack), "What is damaged is named above; other backups may not use it. Nothing wrong was written."},
	{17, "directory not usable: not empty, another cluster's, in use by a server, or not a thawed one",
		anyOf(recovery.ErrTargetDir, recovery.ErrServerRunning, recovery.ErrNoOverlay, errFilled), ""},
	{18, "PostgreSQL refused, broke off or did not start: connection, version, settings", anyOf(ingest.ErrRefused, recovery.ErrServer), ""},
	{exitMount, "mount failed, lost, in use, or not there", isMountError, ""},
	{20, "store out of reach", isOutOfReach, "Nothing was changed. Try again when the repository's storage answers."},
	{21, "a repository exists there already", anyOf(repo.ErrRepositoryExists), "Nothing was changed. Use it, or choose another URL."},
	{22, "something that is not a repository is there", anyOf(repo.ErrNotEmpty), "Give a directory that is empty or does not exist yet."},
	{23, "the cluster's name belongs to another PostgreSQL cluster", anyOf(repo.ErrOtherCluster), "Give this PostgreSQL cluster a name of its own in the repository."},
	{24, "another WAL file of the same name is in the repository", anyOf(repo.ErrWALConflict),
		"Two servers archive under one cluster name, or one was restored and archives over its origin. Give one of them another name."},
	{exitInterrupted, "interrupted", anyOf(errInterrupted), ""},
}

func anyOf(targets ...error) func(error) bool {
	return func(err error) bool {
		for _, t := range targets {
			if errors.Is(err, t) {
				return true
			}
		}
		return false
	}
}

func isNewerFormat(err error) bool {
	var f *repo.FormatError
	return errors.As(err, &f)
}

var isMountError = anyOf(recovery.ErrLost, fusefs.ErrNoMount, fusefs.ErrOverlay, fusefs.ErrNoFUSE, fusefs.ErrFewFiles, syscall.EBUSY)

// isOutOfReach knows a network's errors and those of a network file system. (net.Error will not do: every errno is one.)
func isOutOfReach(err error) bool {
	var op *net.OpError
	var dns *net.DNSError
	return errors.As(err, &op) || errors.As(err, &dns) ||
		anyOf(repo.ErrOutOfReach, syscall.ESTALE, syscall.ENOTCONN, syscall.EHOSTDOWN, syscall.ETIMEDOUT)(err)
}

// failure is an error whose code or hint was decided where it arose: wrong usage, a mount, an answer from a daemon.
type failure struct {
	err  error
	code int
	hint string // "": the table's
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }
func (f *failure) Hint() string  { return f.hint }

// usage is wrong usage.
func usage(format string, args ...any) error {
	return &failure{err: fmt.Errorf(format, args...), code: exitUsage}
}

// mountFailed says that err kept a mount from coming up, unless err has a better code.
func mountFailed(err error) error {
	if err == nil || exitCode(err) != exitFailed {
		return err
	}
	return &failure{err: err, code: exitMount, hint: "It takes /dev/fuse and fuse3's fusermount3; root needs CAP_SYS_ADMIN, which containers are seldom given."}
}

// interrupted is an error that a signal caused. What it says of what is left behind must reach whoever sent the signal.
func interrupted(err error) error {
	f := &failure{err: fmt.Errorf("%w: %w", errInterrupted, err), code: exitInterrupted}
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		f.hint = h.Hint()
	}
	return f
}

// row finds an error's place in the table.
func row(err error) exit {
	code := exitFailed
	var f *failure
	if errors.As(err, &f) {
		code = f.code
	} else if err == nil {
		code = exitDone
	}
	for _, e := range exits {
		if e.code == code && code != exitFailed || code == exitFailed && e.is != nil && e.is(err) {
			return e
		}
	}
	return exit{code: code}
}

func exitCode(err error) int { return row(err).code }

// hintFor prefers what the error itself knows.
func hintFor(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) && h.Hint() != "" {
		return h.Hint()
	}
	for _, h := range hints {
		if errors.Is(err, h.is) {
			return h.hint
		}
	}
	return row(err).hint
}

// hints are those of single errors that share an exit code.
var hints = []struct {
	is   error
	hint string
}{
	{repo.ErrRolledBack, "If that is so on purpose, \"pgthaw repo accept\" takes what is there for the newest. Otherwise the storage serves an old state, or another: use it only once you know why."},
	{repo.ErrPlain, "Make another one: \"pgthaw repo init URL\"."},
	{repo.ErrSameRepository, "Make another one with \"pgthaw repo init\", and copy into that. A clone needs no pgthaw: copy the files."},
	{repo.ErrNoKeySlot, "\"pgthaw repo key list\" shows the ids."},
	{repo.ErrNoHold, "\"pgthaw repo hold list\" shows the ids."},
	{repo.ErrPruning, "The hold is there, and keeps the backup's bytes. When the prune has ended, \"pgthaw list\" shows whether the backup is still one."},
	{repo.ErrDeleted, "What is deleted stays deleted. \"pgthaw list\" shows what there is."},
	{repo.ErrLastKey, "Add another one first, with \"pgthaw repo key add\"."},
	{repo.ErrNoKey, "Put the key file there, or give --key-file FILE or --passphrase-file FILE, or set PGTHAW_KEY_FILE or PGTHAW_PASSPHRASE_FILE."},
	{repo.ErrWrongKey, "Give a key that this repository was made with, or that was added to it. Without one nobody can read it."},
	{repo.ErrNotEncrypted, "If it was made encrypted, somebody has replaced its configuration: do not use it. Otherwise leave the key away, or move the key file away."},
	{recovery.ErrLost, `"pgthaw overlay resume DIR" takes the directory up again; nothing that PostgreSQL had fsynced is lost.`},
	{recovery.ErrServerRunning, "Stop PostgreSQL there first, with pg_ctl stop -D DIR."},
	{fusefs.ErrOverlay, `"pgthaw overlay finish DIR" or "pgthaw overlay discard DIR" take it off.`},
	{syscall.EBUSY, "Somebody has a file open there, or works in it: fuser -vm DIR shows who."},
}

// answer is the exit code of a command that ended with err. Two commands answer PostgreSQL instead of a person.
func answer(command string, err error) int {
	code := exitCode(err)
	switch command {
	case "wal fetch":
		return fetchAnswer(err)
	case "wal push": // pgarch.c: an exit over 125 or a signal restarts the archiver
		if code > 125 {
			return exitFailed
		}
	}
	return code
}

// fetchAnswer says 1 only for what recovery may take for the end of WAL, and 200 for wrong usage too.
func fetchAnswer(err error) int {
	switch {
	case err == nil:
		return exitDone
	case errors.Is(err, repo.ErrNoWAL):
		return exitNoSuchWAL
	default:
		return exitStop
	}
}

// commandExits are the codes of each command besides 0, 1, 2 and 130, which all may give. Each command's help and
// docs/cli.md list them.
var commandExits = map[string][]int{
	"repo init":        {12, 20, 21, 22},
	"repo info":        {10, 12, 13, 16, 20},
	"repo check":       {10, 12, 13, 16, 20},
	"repo prune":       {10, 12, 13, 14, 16, 20},
	"repo hold add":    {10, 11, 12, 13, 14, 16, 20},
	"repo hold list":   {10, 12, 13, 14, 16, 20},
	"repo hold remove": {10, 12, 13, 16, 20},
	"repo accept":      {10, 12, 13, 16, 20},
	"repo give-up":     {10, 12, 13, 14, 16, 20},
	"repo copy":        {10, 12, 13, 14, 16, 20, 23, 24},
	"repo key list":    {10, 12, 13, 16, 20},
	"repo key add":     {10, 12, 13, 16, 20},
	"repo key remove":  {10, 12, 13, 16, 20},
	"repo key export":  {10, 12, 13, 16, 20},
	"backup":           {10, 12, 13, 16, 17, 18, 19, 20, 23, 24},
	"boot-image":       {10, 12, 13, 14, 15, 16, 17, 18, 19, 20},
	"list":             {10, 12, 13, 14, 16, 20},
	"show":             {10, 12, 13, 14, 16, 20},
	"mount":            {10, 12, 13, 16, 17, 19, 20},
	"umount":           {19},
	"thaw":             {10, 12, 13, 14, 15, 16, 17, 18, 19, 20},
	"restore":          {10, 12, 13, 14, 15, 16, 17, 18, 20},
	"overlay status":   {17},
	"overlay resume":   {10, 12, 13, 14, 16, 17, 19, 20},
	"overlay finish":   {16, 17, 18, 19, 20},
	"overlay discard":  {17, 19},
	"overlay serve":    {10, 12, 13, 14, 16, 17, 19, 20},
	"wal stream":       {10, 12, 13, 16, 18, 20, 23, 24},
	"wal push":         {10, 12, 13, 16, 20, 23, 24},
	"wal list":         {10, 12, 13, 14, 16, 20},
}

// exitCodes lists the codes of a command, "0, 1, 2, 21 and 130".
func exitCodes(command string) string {
	if command == "wal fetch" {
		return "0, 1 and 200"
	}
	codes := slices.Concat([]int{exitDone, exitFailed, exitUsage}, commandExits[command])
	if command != "wal push" {
		codes = append(codes, exitInterrupted)
	}
	var words []string
	for _, code := range codes {
		words = append(words, strconv.Itoa(code))
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " and " + words[last]
}
