// Package recovery turns a backup in the repository into a running PostgreSQL: it plans where recovery can end, lays or
// restores a data directory, writes its recovery settings, answers restore_command and starts the server.
//
// The nouns to know:
//
//   - [Target] is where recovery should end, in the words of PostgreSQL's recovery_target settings; [Plan] finds the backup
//     and the timeline that lead there, or says with [ErrTargetUnreachable] what can be reached instead.
//   - an archive (archive.go) is the cluster's WAL as the repository lists it; a walPath is the run of segments without a
//     gap that recovery of one backup would replay.
//   - a root is a directory that is made: the data directory, and one for each tablespace outside of it.
//   - a boot image ([repo.Image]) is a backup as PostgreSQL left it that recovered from it and shut down. [MakeImages] makes them,
//     in a scratch directory (makeimage.go, writeimage.go); a job takes one for its lower if recovery ends at the same
//     place from there (bootimage.go).
//   - an overlay is a data directory that [Thaw] laid and whose daemon, [Serve], mounts and fills; [Status], [Resume],
//     [Finish] and [Discard] speak to it over a control socket, or read what it left when it died.
//   - starting is the start of a server on an overlay: what it wants of the repository is recorded (startrecord.go), and read
//     beforehand at the next thaw. walAhead (walahead.go) reads WAL before recovery asks for it, has it ready as
//     files (walstage.go), and reads the pages that redo will read. All that is for speed only, and fails silently.
//
// Invariants. Nothing is written before every check has passed. [FetchWAL] says "no such file" only where PostgreSQL may
// take that for the end of WAL (xlogarchive.c). A directory that is not whole cannot start: a restore writes
// global/pg_control last, a thaw keeps PG_VERSION under .pgthaw until no file has a hole. A copy never archives, streams
// or waits for standbys as its original did: its settings come last in postgresql.auto.conf, where they win. What lies in a
// thawed directory may be the server's user's own invention: root deletes it with that user's rights.
//
// Locks: daemon.unmounting, held while mounts are taken off; then daemon.mu, held over no I/O. starting.mu and walAhead.mu are leaves.
package recovery
