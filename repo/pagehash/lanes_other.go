//go:build !amd64

package pagehash

const twoLanes = false

func blocks(_, _ *state, _, _ *byte, _ int) { panic("no lanes") }
