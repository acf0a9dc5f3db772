package pg

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// BackupLabel is a backup_label file. A .backup file of the archive begins with the same lines and is read too.
type BackupLabel struct {
	StartWAL   LSN    // redo of Checkpoint: replay begins here
	StartFile  string // the segment that holds StartWAL
	Checkpoint LSN    // the backup's starting checkpoint record
	Method     string // "streamed"
	From       string // "primary" or "standby"
	StartTime  string // in the server's log_timezone, as the server printed it
	Label      string
	Timeline   Timeline

	IncrementalFromLSN LSN      // zero unless the backup is incremental (17 and later)
	IncrementalFromTLI Timeline // likewise
}

// ParseBackupLabel reads the lines that xlogrecovery.c's read_backup_label reads. Lines it does not know are passed
// over; a line that comes twice (a label with a line break in it) is an error.
func ParseBackupLabel(b []byte) (BackupLabel, error) {
	l, err := parseBackupLabel(string(b))
	if err != nil {
		return BackupLabel{}, fmt.Errorf("backup_label: %w", err)
	}
	return l, nil
}

func parseBackupLabel(s string) (BackupLabel, error) {
	lines, err := labelLines(s)
	if err != nil {
		return BackupLabel{}, err
	}
	l := BackupLabel{
		Method:    lines["BACKUP METHOD"],
		From:      lines["BACKUP FROM"],
		StartTime: lines["START TIME"],
		Label:     lines["LABEL"],
	}
	if err := l.parseStart(lines["START WAL LOCATION"], lines["START TIMELINE"]); err != nil {
		return l, err
	}
	if l.Checkpoint, err = ParseLSN(lines["CHECKPOINT LOCATION"]); err != nil {
		return l, fmt.Errorf("checkpoint location: %w", err)
	}
	return l, l.parseIncremental(lines)
}

// labelLines splits "KEY: value" lines.
func labelLines(s string) (map[string]string, error) {
	lines := make(map[string]string)
	for line := range strings.Lines(s) {
		key, value, ok := strings.Cut(strings.TrimRight(line, "\r\n"), ": ")
		if !ok {
			continue
		}
		if _, twice := lines[key]; twice {
			return nil, fmt.Errorf("two lines of %q", key)
		}
		lines[key] = value
	}
	return lines, nil
}

// parseStart reads "0/2000028 (file 000000010000000000000002)" and checks the file's timeline against the
// START TIMELINE line, where there is one.
func (l *BackupLabel) parseStart(location, timeline string) (err error) {
	lsn, file, _ := strings.Cut(location, " (file ")
	var ok bool
	if l.StartFile, ok = strings.CutSuffix(file, ")"); !ok {
		return fmt.Errorf("start WAL location %q names no file", location)
	}
	if l.StartWAL, err = ParseLSN(lsn); err != nil {
		return fmt.Errorf("start WAL location: %w", err)
	}
	name, err := ParseWALName(l.StartFile)
	if err != nil || name.Kind != WALSegment {
		return fmt.Errorf("start WAL location: %q is no WAL segment", l.StartFile)
	}
	l.Timeline = name.Timeline
	if timeline != "" && timeline != name.Timeline.String() {
		return fmt.Errorf("start timeline %q is not that of %s", timeline, l.StartFile)
	}
	return nil
}

// parseIncremental reads the two lines of an incremental backup; they come together or not at all.
func (l *BackupLabel) parseIncremental(lines map[string]string) (err error) {
	lsn, hasLSN := lines["INCREMENTAL FROM LSN"]
	tli, hasTLI := lines["INCREMENTAL FROM TLI"]
	if hasLSN != hasTLI {
		return errors.New("incremental from an LSN without a timeline, or the reverse")
	}
	if !hasLSN {
		return nil
	}
	if l.IncrementalFromLSN, err = ParseLSN(lsn); err != nil {
		return fmt.Errorf("incremental from: %w", err)
	}
	t, err := strconv.ParseUint(tli, 10, 32)
	if err != nil {
		return fmt.Errorf("incremental from timeline %q", tli)
	}
	l.IncrementalFromTLI = Timeline(t)
	return nil
}
