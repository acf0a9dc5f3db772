// Package ingest brings PostgreSQL into a repository: base backups and WAL.
//
// [Backup] runs BASE_BACKUP over one replication connection and streams its WAL over a second one. Nothing is staged
// on disk: the archives are read where the socket's buffer has them (messages, copyOut, walkArchive) and handed to the
// repository's writer file by file (tree), which hashes and compresses beside it. [StreamWAL] follows a server over a
// physical replication slot. [PushWAL] is archive_command. All three put whole WAL segments, so whichever comes first
// stores one, and the others find the same bytes there.
//
// The types to know: server, a connection and what the server said of itself; receiver, which makes segments of a WAL
// stream (assembler) and answers the server; capture and stream, the receiver's two uses; tree, the backup's files.
//
// What always holds:
//
//   - A backup is returned only after every file's size and CRC-32C were found in the server's backup_manifest, no file
//     more and none less, and after all WAL up to its stop LSN is in the repository.
//   - The server is told that WAL is flushed only when the repository has it durably: whole segments. While it waits
//     for an answer it is told of none, for a fast shutdown would wait for the segment to fill.
//   - Memory: a window of chunks, the entries of one database's directory, one WAL segment, and 10 to 20 bytes of each file
//     received: what backup_manifest, which comes last and is not kept, is compared with.
//   - The directory of a cluster is only read, and by PushWAL alone.
//
// Protocol: the manual's "Streaming Replication Protocol"; PostgreSQL 15 and later frame BASE_BACKUP in the same way.
// In the tree, "pgdata" and "tablespaces/<oid>" lie side by side: docs/format.md, "Tree".
//
// There are no locks here. A backup's two goroutines share capture.stopLSN, which is atomic, and nothing else.
package ingest
