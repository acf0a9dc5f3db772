package repo

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// simPieces are the pieces that a backup refers to, by pack.
type simPieces map[PackID][]Ref

// piecesOf finds them.
func piecesOf(ctx context.Context, b *Backup) (simPieces, error) {
	pieces, mu := simPieces{}, sync.Mutex{}
	err := newPieceWalk(b.r, func(_ byte, ref Ref) error {
		mu.Lock()
		defer mu.Unlock()
		pieces[ref.Pack] = append(pieces[ref.Pack], ref)
		return nil
	}).backup(ctx, b)
	return pieces, err
}

// needed tells whether a backup needs an object, which is about to be deleted. Of a pack it needs some of the pieces: another edition
// may hold them.
func (s *simulation) needed(b *simBackup, key string) bool {
	id, _, isPack := editionOfKey(key)
	if !isPack {
		return b.needs[key]
	}
	return b.needs[id.key()] && !s.holds(id, key, b.pieces[id])
}

// holds tells whether readers of a pack find the pieces when an object of it is deleted.
func (s *simulation) holds(id PackID, deleted string, pieces []Ref) bool {
	for no := 0; no <= maxEditions; no++ {
		key := id.editionKey(no)
		if key == deleted || s.object(key) == nil {
			continue
		}
		if no == 0 {
			return true
		}
		e, err := s.open(observer{s.simStore}).openEdition(s.ctx, id, no)
		if err != nil {
			s.violate("%s: %w", key, err)
			return false
		}
		return !slices.ContainsFunc(pieces, func(ref Ref) bool { _, ok := e.toc.find(ref.Offset); return !ok })
	}
	return false
}

// superfluous says what of a pack is left over beside its newest edition.
func (s *simulation) superfluous() error {
	there := map[PackID]string{}
	for _, key := range s.keys {
		if id, _, ok := editionOfKey(key); ok && strings.HasPrefix(key, packsRoot) && s.object(key) != nil {
			if other := there[id]; other != "" {
				return fmt.Errorf("both %s and %s are left", other, key)
			}
			there[id] = key
		}
	}
	return nil
}

// withoutPut is a fault: the put of an edition is reported done, and is not.
func withoutPut(h *simHandle) func(*simOp) (simReply, bool) {
	return func(op *simOp) (simReply, bool) {
		_, no, ok := editionOfKey(op.key)
		return simReply{}, isPrune(h) && op.kind == opPut && ok && no > 0
	}
}
