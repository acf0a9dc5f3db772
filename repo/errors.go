package repo

import (
	"errors"
	"fmt"

	"pgthaw/repo/store"
)

// What a caller acts on. Anything else that comes out of this room is the store's own error.
var (
	ErrNoRepository     = errors.New("no repository")
	ErrRepositoryExists = errors.New("a repository exists already")
	ErrNotEmpty         = errors.New("holds something that is not a pgthaw repository")
	ErrNoCluster        = errors.New("no such cluster in the repository")
	ErrOtherCluster     = errors.New("this name belongs to another PostgreSQL cluster")
	ErrNoBackup         = errors.New("no such backup")
	ErrGivenUp          = errors.New("a prune gave this operation up, because no sign of life came from it for a day")
	ErrNoWAL            = errors.New("no such WAL file in the repository")
	ErrWALPruned        = errors.New("WAL that the backup needs was pruned")
	ErrWALConflict      = errors.New("another WAL file of the same name is in the repository")
	ErrCorrupt          = errors.New("repository damaged")
	ErrNoKey            = errors.New("the repository is encrypted, and no key is given")
	ErrWrongKey         = errors.New("wrong key")
	ErrPlain            = errors.New("the repository is not encrypted, and never will be")
	ErrNoKeySlot        = errors.New("no such key in the repository")
	ErrNoHold           = errors.New("no such hold in the repository")
	ErrPruning          = errors.New("a prune that began before may still delete the backup")
	ErrLastKey          = errors.New("the last key of the repository cannot be removed: nobody could open it any more")
	ErrRolledBack       = errors.New("the repository is older than this host has seen it")
	ErrSameRepository   = errors.New("both are one repository, or one is a clone of the other")
	ErrPerhapsMade      = errors.New("the repository may be there nevertheless")
	ErrNotEncrypted     = errors.New("there is a key for it, but the repository says that it is not encrypted")
)

// ErrOutOfReach: the repository was there, and is not any more. Nothing can be said to be absent from it.
var ErrOutOfReach = store.ErrOutOfReach

// ErrDeleted is an ErrNoBackup.
var ErrDeleted = fmt.Errorf("%w any more: it was deleted", ErrNoBackup)

// CorruptError says which object cannot be believed. Its errors.Is is ErrCorrupt.
type CorruptError struct {
	Object         string // key in the store
	Offset, Length int64  // bytes within the object; 0, 0: the object as a whole
	Detail         string
}

func (e *CorruptError) Error() string {
	if e.Length == 0 {
		return fmt.Sprintf("%s: %s is damaged: %s", ErrCorrupt, e.Object, e.Detail)
	}
	return fmt.Sprintf("%s: %s is damaged at %d+%d: %s", ErrCorrupt, e.Object, e.Offset, e.Length, e.Detail)
}

// Is makes every CorruptError an ErrCorrupt.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }

// FormatError says that an object was written by a newer pgthaw.
type FormatError struct {
	Object  string
	Version int
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("%s has format version %d; this pgthaw reads version %d", e.Object, e.Version, formatVersion)
}

func corrupt(object, format string, args ...any) error {
	return &CorruptError{Object: object, Detail: fmt.Sprintf(format, args...)}
}

// objectOf is the key of the object that cannot be believed, "" where an error is about none.
func objectOf(err error) string {
	var bad *CorruptError
	var newer *FormatError
	switch {
	case errors.As(err, &bad):
		return bad.Object
	case errors.As(err, &newer):
		return newer.Object
	}
	return ""
}
