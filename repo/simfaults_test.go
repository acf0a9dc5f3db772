package repo

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"pgthaw/repo/store"
)

// simFault leaves a step of the protocol out: the store does not do, or does not tell, what that step is about.
type simFault struct {
	name  string
	fault func(h *simHandle) func(*simOp) (simReply, bool)
	still func(op *simOp) bool // before what a process stands still for days: chance alone comes to it too seldom
	kinds []simKind            // nil: simFaultKinds
}

// simHoldKinds have to do with holds. Who deletes by hand does not heed them.
var simHoldKinds = []simKind{simWriter, simPrune, simHold, simPrune, simHold}

// simFaultKinds have to do with the other faults: writers, prunes, of them one by hand.
var simFaultKinds = []simKind{simWriter, simPrune, simWriter, simWriter, simPrune, simPrune, simDeleter}

// TestCrashSimulationFindsFaults knocks steps of the protocol out: the simulation has to notice.
func TestCrashSimulationFindsFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("half a minute")
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for _, f := range simFaults {
		t.Run(f.name, func(t *testing.T) {
			const most = 5_000
			for seed := uint64(1); seed <= most; seed++ {
				if s := simulate(t, seed, &f, simStats{}); s.violation != nil {
					t.Logf("seed %d: %v", seed, s.violation)
					return
				}
			}
			t.Errorf("not found with %d seeds", most)
		})
	}
}

func isWriter(h *simHandle) bool { return strings.HasPrefix(h.name, simWriter.name) }
func isPrune(h *simHandle) bool  { return strings.HasPrefix(h.name, simPrune.name) }
func isHold(h *simHandle) bool   { return strings.HasPrefix(h.name, simHold.name) }

// when makes a fault of an answer that processes of one kind get.
func when(who func(*simHandle) bool, kind, suffix string, answer func(*simOp) (simReply, bool)) func(*simHandle) func(*simOp) (simReply, bool) {
	return func(h *simHandle) func(*simOp) (simReply, bool) {
		return func(op *simOp) (simReply, bool) {
			if who(h) && op.kind == kind && strings.HasSuffix(op.key, suffix) {
				return answer(op)
			}
			return simReply{}, false
		}
	}
}

// swallowed answers that something was done, absent that something is not there.
func swallowed(*simOp) (simReply, bool) { return simReply{}, true }
func absent(op *simOp) (simReply, bool) {
	return simReply{err: fmt.Errorf("get %s: %w", op.key, store.ErrNotExist)}, true
}

// inBackup makes a fault of an answer that writers get before or behind they put their manifest.
func inBackup(behind bool, suffix string, answer func(*simOp) (simReply, bool)) func(*simHandle) func(*simOp) (simReply, bool) {
	return func(h *simHandle) func(*simOp) (simReply, bool) {
		published := false
		return func(op *simOp) (simReply, bool) {
			if op.kind == opPut && (strings.HasSuffix(op.key, begunSuffix) || strings.HasSuffix(op.key, manifestSuffix)) {
				published = strings.HasSuffix(op.key, manifestSuffix)
			}
			if isWriter(h) && published == behind && op.kind == opGet && strings.HasSuffix(op.key, suffix) {
				return answer(op)
			}
			return simReply{}, false
		}
	}
}

// asks tells operations of a kind on certain objects.
func asks(kind, prefix, suffix string) func(*simOp) bool {
	return func(op *simOp) bool {
		return op.kind == kind && strings.HasPrefix(op.key, prefix) && strings.HasSuffix(op.key, suffix)
	}
}

var simFaults = []simFault{
	{name: "W1 left out", fault: when(isWriter, opPut, begunSuffix, swallowed)},
	{name: "W5 cleaned up after", fault: cleanUpAfterPublishing},
	{name: "P3 without the mark", fault: when(isPrune, opPut, deletedSuffix, func(op *simOp) (simReply, bool) {
		return simReply{}, bytes.Contains(op.body, []byte(byGiveUp))
	})},
	{name: "P4 without the sessions", fault: func(h *simHandle) func(*simOp) (simReply, bool) {
		lists := 0
		return func(op *simOp) (simReply, bool) {
			if isPrune(h) && op.kind == opList && op.key == packsRoot {
				lists++
			}
			return simReply{}, lists > 0 && op.kind == opList && op.key == sessionsPrefix
		}
	}},
	{name: "P4 with the sessions before the packs", fault: sessionsBeforePacks,
		still: func(op *simOp) bool { return isPrune(op.h) && asks(opList, packsRoot, "")(op) }},
	{name: "a hold without asking for the deletion", kinds: simHoldKinds, fault: when(isHold, opGet, deletedSuffix, absent)},
	{name: "P7 without the grace period", fault: when(isPrune, opList, packsRoot, func(op *simOp) (simReply, bool) {
		r := listedNow(op.h.s, packsRoot)
		for i := range r.page {
			r.page[i].Modified = time.Time{}
		}
		return r, true
	})},
	{name: "P9 without the new edition", fault: withoutPut},
	{name: "W2 left out", fault: inBackup(false, deletedSuffix, absent), still: func(op *simOp) bool {
		return isWriter(op.h) && asks(opPut, sessionsPrefix, begunSuffix)(op) || isPrune(op.h) && asks(opDelete, backupsRoot, manifestSuffix)(op)
	}},
	{name: "W6 without the word", fault: inBackup(true, givenUpSuffix, absent),
		still: func(op *simOp) bool { return isWriter(op.h) && asks(opPut, backupsRoot, manifestSuffix)(op) }},
	{name: "W6 without the deletion", fault: inBackup(true, deletedSuffix, absent),
		still: func(op *simOp) bool { return isWriter(op.h) && asks(opPut, backupsRoot, manifestSuffix)(op) }},
}

// listedNow is a listing of what is there.
func listedNow(s *simStore, prefix string) (r simReply) {
	for o := range (observer{s}).List(context.Background(), prefix) {
		r.page = append(r.page, o)
	}
	return r
}

// sessionsBeforePacks has the sessions of P4 be those that there were when the packs were listed.
func sessionsBeforePacks(h *simHandle) func(*simOp) (simReply, bool) {
	var before *simReply
	return func(op *simOp) (simReply, bool) {
		switch {
		case !isPrune(h) || op.kind != opList:
		case op.key == packsRoot:
			r := listedNow(h.s, sessionsPrefix)
			before = &r
		case op.key == sessionsPrefix && before != nil:
			r := *before
			before = nil
			return r, true
		}
		return simReply{}, false
	}
}

// cleanUpAfterPublishing deletes a backup's packs when the put of its manifest reports an error.
func cleanUpAfterPublishing(h *simHandle) func(*simOp) (simReply, bool) {
	published := false
	return func(op *simOp) (simReply, bool) {
		if !isWriter(h) {
			return simReply{}, false
		}
		if published && op.kind == opGet && strings.HasSuffix(op.key, givenUpSuffix) {
			published = false // the put reported none
		}
		if op.kind == opPut && strings.HasSuffix(op.key, manifestSuffix) {
			published = true
		} else if published && op.kind == opGet {
			published = false
			for _, key := range slices.Clone(h.s.keys) {
				if strings.HasPrefix(key, packsRoot) && h.wrote[key] {
					h.s.late = append(h.s.late, &simOp{h: h, kind: opDelete, key: key})
				}
			}
		}
		return simReply{}, false
	}
}
