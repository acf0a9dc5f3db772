// Command pgthaw backs up PostgreSQL and opens any backup as a writable data directory in about a second.
//
// This room is wiring: flags, configuration, output, exit codes, signals. What a second front end would need lies in
// the rooms behind it.
//
//   - main.go runs one command under the signals; app.go lists the commands, one file each.
//   - args.go lets flags stand anywhere on the command line; config.go fills in what neither flag nor environment set.
//   - exit.go is the one table from error to exit code and hint; nothing else decides about either.
//   - memory.go keeps what this user has seen of repositories; asseen.go says which command minds.
//   - output.go and progress.go write: results to stdout, all else to stderr.
//   - spawn.go starts the two daemons, of mount and of overlay, and waits until they answer.
//
// docs/cli.md is the reference; a test compares it with the commands.
package main
