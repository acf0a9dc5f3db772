// Package pg holds PostgreSQL's nouns as pure functions on bytes: nothing here does I/O, keeps state or knows another
// room. It reads what servers of PostgreSQL 15 to 18 write on the usual, little-endian machines.
//
// To know first: [LSN] and [Timeline]; [WALName], a file name of pg_wal or an archive, and [SegmentSize], without which
// such a name is no place; [ControlFile], [BackupLabel] and [BackupManifest], the files that say what a backup is
// (of a million files, read the last with [ReadBackupManifest], not whole); [WALSummary], which recovery targets a WAL
// segment holds.
//
// The versions tell themselves apart: pg_control by its version (1300 for 15 and 16, 1700, 1800), WAL by its page magic
// (D110, D113, D116, D118), backup_manifest by its version (1, from 17 on 2).
//
// What a reader here refuses, PostgreSQL refuses too, or would have no way to write. Bytes come from outside: whatever
// they are, a reader returns a value or an error, does not panic, and needs memory in proportion to what it was given.
//
// Every reader follows one source file, named in its comment: timeline.c (history), xlogrecovery.c (backup_label,
// tablespace_map), pg_control.h, parse_manifest.c (backup_manifest), xlogreader.c and xlogrecord.h (WAL), guc-file.l
// (QuoteConf).
package pg
