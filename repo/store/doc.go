// Package store keeps a repository's bytes: immutable objects under slash-separated keys, on one of several media behind
// one interface. It knows nothing of what the bytes are.
//
// To know first: [Store], whose comment is the contract every medium keeps, and [Open], which chooses the medium by a
// URL's scheme. [File] is a directory of this machine, [Mem] a map for tests. The suite in suite_test.go holds every
// medium to the contract.
//
// What callers may rest on, whatever crashes: an object that can be read or listed is whole, it never changes, and after
// Put returned nil or ErrExist it stays.
//
// Locks: none is held over I/O, and none is taken while another is held.
package store
