package pagehash

import "github.com/klauspost/cpuid/v2"

var twoLanes = cpuid.CPU.Supports(cpuid.SHA, cpuid.SSSE3, cpuid.SSE4)

// blocks hashes n blocks at a into one, and n at b into two.
//
//go:noescape
func blocks(one, two *state, a, b *byte, n int)
