package integration

import (
	"testing"
	"time"
)

// pollInterval is short beside anything that is waited for, and costs nothing.
const pollInterval = 10 * time.Millisecond

// waitFor polls until cond holds, and fails the test when it does not within the limit.
func waitFor(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	if !poll(limit, cond) {
		t.Fatalf("waited %v in vain: %s", limit, what)
	}
}

// poll reports whether cond came to hold within the limit.
func poll(limit time.Duration, cond func() bool) bool { return pollEvery(pollInterval, limit, cond) }

// pollClosely is poll for what lasts less than its interval.
func pollClosely(limit time.Duration, cond func() bool) bool {
	return pollEvery(time.Millisecond/2, limit, cond)
}

func pollEvery(interval, limit time.Duration, cond func() bool) bool {
	deadline := time.After(limit)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			return cond()
		}
	}
	return true
}
