// Package repo is the repository: backups of PostgreSQL clusters and their WAL, as immutable objects in a store.
//
// Its format is docs/format.md; each type names its section there. The types to know:
//
//	Repository    an open repository; Init and Open make one
//	Manifest      what a backup says of itself; Backups, Manifest
//	Backup, File  a backup open for reading: a tree of Entries, files as io.ReaderAt; OpenBackup
//	ReadAhead     files read ahead of those who read them from front to back: AheadFile
//	Image         a backup as a server has left it that recovered from it; AddPatched, Keep, ImagesOf
//	BackupWriter  the writing side, inside WriteBackup, which publishes all or nothing
//	WALHead       a WAL file without its bytes; PutWAL, WAL, WALNames
//	Memory        what a host has seen of repositories; Losses, UnlistedWAL, Accept
//	Policy, Hold  what is kept; Prune, AddHold. retention.go decides about backups, walneeds.go about WAL: both are pure.
//	              repack.go has edition.go put smaller objects in the place of packs that are mostly dead
//	Key, KeySlot  what opens an encrypted repository, and what makes it open; Options.Keys, KeySlots
//
// What always holds:
//
//   - A backup refers to pieces that its writer wrote, or its prior backup refers to: what is dead stays dead, so that it can go.
//   - An object, once put, never changes. A backup exists when its manifest does, and all that it needs was durable before.
//   - In an encrypted repository nothing but store keys, key slots and the configuration leaves this room unsealed, and no nonce is
//     used twice under one key: an object's salt is drawn where its encoding begins (seal.go).
//   - No byte leaves this room before the digest that names it was compared. What cannot be verified is a *CorruptError.
//   - Opening a backup costs one manifest, a file one map, a page one range of one pack, however large the cluster is.
//   - Memory is bounded by the caches' sizes, the packs in hand and the listing of the largest directory, encoded; it does
//     not grow with the bytes of a cluster.
//
// On its way in, a file passes through three files of this package: writer.go takes its bytes and cuts them into windows of
// 16 pages; filejob.go has workers digest them, compare them with prior.go's view of the backup before, and place
// them; pack.go compresses chunks, seals them and fills packs, which are put beside. listing.go gathers the entries of its
// directory. On its way out it passes through tree.go, filemap.go and reader.go.
//
// Locks, in the order in which they may be taken: fileJob.mu, packer.mu, packWriters.mu; directory.mu, chunkIndex.mu,
// liveBytes.mu, pieceWalk.mu, ReadAhead.mu and cache.mu are leaves, and so is repacker.mu but for the Progress that is called under it. fileJob.mu is held while a chunk of loose pages, or the listing that the file
// completes, is compressed, packer.mu while a full pack waits for an upload to begin: that is what bounds memory. witness.mu
// is a leaf, held while the host's memory is changed: a file of some 200 bytes. No other lock is held over I/O.
package repo
