// Package fusefs shows backups as file systems: read-only, to be looked at (the browser), and writable, to run PostgreSQL
// on (the overlay). It is the only room that speaks FUSE, by go-fuse.
//
// # The browser
//
// Browse mounts a repository: clusters, backups, their files, WAL. It builds on go-fuse's fs package. See browse.go. All its open files
// are of one repo.ReadAhead, which reads on for who reads from front to back.
//
// # The overlay
//
// Lay makes the bare tree of a backup in the target directory: real directories and links, and for each file that does
// not lie in the backup's tree itself a placeholder, sparse, of the right size, with an extended attribute that names the
// lower file and a limit. MountOverlay mounts over the same directory and serves it; Hydrate fills the holes, Prefetch some before they are wanted; when no
// placeholder is left, the directory beneath is an ordinary one. The types to know:
//
//   - Overlay: the mount; names.go, attr.go, dir.go and io.go answer the kernel's requests, on go-fuse's RawFileSystem.
//   - node: an inode that the kernel knows, pinned by an O_PATH descriptor; hard links share one.
//   - file: a regular file's content; all that decides which byte comes from where is in file.go, beside.go and holes.go.
//   - handles: who has it open, and whether the kernel serves it by itself (passthrough).
//   - nodes.limit: how many inodes there are descriptors for; descriptors.go has the kernel forget some.
//   - branch: a part of the tree that leaves the mount as one when it is whole; leave.go takes it out.
//
// Invariants:
//
//   - Below the limit, a hole of the backing file is the lower's bytes; all else is the backing file's. The disk is the only
//     record: a daemon that is killed loses nothing that a process killed would not.
//   - A hole that became data stays data. Nothing punches holes while there is a limit, but for a write that failed: what it
//     did not write is made holes again before anybody looks. A fill writes only into what it finds, under the lock, to be
//     a hole still. fallocate(2) below the limit is refused, for ext4 may write zeros around
//     what is written into an unwritten extent.
//   - What the hydrator is writing around the page cache counts as a hole until all of it is written: who reads it reads the lower, who
//     changes it waits. What fails is made holes again. See beside.go.
//   - Filling leaves a file's modification time as it was, also for those who ask meanwhile. A daemon that is killed over it leaves a newer one.
//   - Blocks given and not written (fiemap: unwritten) are no dependable holes. A power cut leaves some; they are made holes when
//     a placeholder is first used.
//   - A block is never data in part: what a write leaves of a block gets the lower's bytes first. An aligned write reads
//     nothing.
//   - The limit falls only, and falls before the file is cut. A power cut between the two leaves zeros where bytes were
//     being cut off, never bytes that come back.
//   - An attribute goes only after what filled the holes is on disk. Until then the file may well be passthrough: whether a
//     hole is left is one question, whether the disk knows is another.
//   - Passthrough is for files without holes, and never beside a cached handle of the same inode: the kernel answers EIO to
//     such an open.
//   - What a closed branch holds is whole, no handle of it is cached, and the kernel may remember nothing of it: it may change
//     without the mount. Nothing with holes comes into a branch from another.
//   - What the repository cannot give, or what it gives and cannot be verified, is EIO, and nothing else.
//   - Nobody here waits for an answer of the own mount but on a thread that holds nothing open: see apart.
//
// Locks, in the order in which they are taken: Overlay.mount, Overlay.life; file.beside.writing, which is held while the disk writes; handles.mu, file.load, file.content; file.lowerMu with none of
// these held. branch.mu, branches.mu, nodes.mu, dirHandles.mu, traffic.mu, hydrator.mu, rate.mu and faults.mu are leaves. mount is never taken by what answers
// the kernel: whoever holds it waits for the kernel, which may be waiting for an answer. dirHandle.mu is taken before nodes.mu. Only
// lowerMu is held while the repository is read, by those who want the same lower file.
//
// What is not promised: extended attributes, O_TMPFILE, FALLOC_FL_PUNCH_HOLE and its like on placeholders, SEEK_HOLE
// (all is data), a shared mapping (ENODEV) by a handle of a placeholder that has become whole while others had it open.
// copy_file_range(2) from a handle that is older than its branch's leaving sees no more than was there then: the kernel looks at the
// length that it remembers of the mount's inode. read(2), fstat(2) and lseek(2) do not. syncfs(2) on the mount does not reach us;
// OverlayOptions.SyncBefore stands in for PostgreSQL's use of it.
package fusefs
