package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"pgthaw/repo/store"
)

// Init makes a repository at the URL. It is encrypted if there are Keys or FindKeys: each key can open it then.
// ErrRepositoryExists: there is one already. ErrNotEmpty: something else is there.
//
// An Init that fails leaves nothing behind, unless its error is ErrPerhapsMade: then the keys must be kept. One that dies
// leaves key slots at most, which the next one takes away.
func Init(ctx context.Context, url string, o Options) (*Repository, error) {
	s, canonical, err := store.Open(ctx, url)
	if err != nil {
		return nil, err
	}
	return initStore(ctx, s, canonical, o)
}

func initStore(ctx context.Context, s store.Store, url string, o Options) (*Repository, error) {
	if err := vacant(ctx, s); err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	c, id := newConfig()
	seals := seals{id: id}
	if len(o.Keys) > 0 || o.FindKeys != nil {
		uid, err := store.Owner(s)
		if err != nil {
			return nil, err
		}
		if o.Keys, err = o.keys(Place{URL: url, ID: c.ID, UID: uid}); err != nil {
			return nil, err
		}
		m := newMasterKey()
		seals.master = &m
	}
	if err := seals.putRepository(ctx, s, c, o.Keys); err != nil {
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	r, err := openStore(ctx, s, url, o)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrPerhapsMade)
	}
	r.removeForeignSlots(ctx)
	return r, nil
}

// vacant says why no repository can be made in a store that holds something. Key slots alone are what an Init left that died,
// or has put that runs right now.
func vacant(ctx context.Context, s store.Store) error {
	for o, err := range s.List(ctx, "") {
		if err != nil {
			return err
		}
		if o.Key == configKey {
			return ErrRepositoryExists
		}
		left, err := isKeySlot(ctx, s, o.Key)
		if err != nil {
			return err
		}
		if left {
			continue
		}
		// Other keys of a repository sort before config: whether there is one is asked outright.
		if _, err := s.Get(ctx, configKey, 0, -1); err == nil {
			return ErrRepositoryExists
		}
		return ErrNotEmpty
	}
	return nil
}

// isKeySlot also holds for one that is gone by now.
func isKeySlot(ctx context.Context, s store.Store, key string) (bool, error) {
	id, ok := strings.CutPrefix(key, keySlotsPrefix)
	if !ok || !keySlotID.MatchString(id) {
		return false, nil
	}
	b, err := s.Get(ctx, key, 0, -1)
	if errors.Is(err, store.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	_, err = parseKeySlot(key, b)
	return err == nil, nil
}

// newConfig makes up a repository.
func newConfig() (c config, id [16]byte) {
	rand.Read(id[:])
	return config{document: document{configKind, formatVersion}, ID: hex.EncodeToString(id[:]), CreatedAt: time.Now().UTC().Truncate(time.Second)}, id
}

// putRepository puts a slot for each key, and then the configuration, with which the repository exists. After a failure the
// slots are taken back.
func (s *seals) putRepository(ctx context.Context, to store.Store, c config, keys []Key) (err error) {
	if s.master == nil {
		var key [keySize]byte
		rand.Read(key[:])
		c.Encryption, c.DigestKey = EncryptionNone, hex.EncodeToString(key[:])
	} else {
		c.Encryption = encryptionAESGCM
		c.Authentication = s.master.authenticate(s.id, c)
	}
	var slots []KeySlot
	defer func() {
		if err != nil && !errors.Is(err, ErrPerhapsMade) {
			err = errors.Join(err, deleteSlots(ctx, to, slots))
		}
	}()
	for _, k := range keys {
		slot, err := s.newKeySlot(k, "made with the repository")
		if err != nil {
			return err
		}
		slots = append(slots, slot)
		if err := putKeySlot(ctx, to, slot); err != nil {
			return err
		}
	}
	return putConfig(ctx, to, c)
}

// undoLimit bounds what is done after a failure, also one that is an interrupt.
const undoLimit = 10 * time.Second

// deleteSlots takes back what a failed Init put. Their ids are its own, so they are nobody else's.
func deleteSlots(ctx context.Context, s store.Store, slots []KeySlot) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	for _, slot := range slots {
		err = errors.Join(err, s.Delete(ctx, slot.key()))
	}
	return err
}

// putConfig makes the repository exist. ErrPerhapsMade: the store does not say whether it does.
func putConfig(ctx context.Context, s store.Store, c config) error {
	body, err := marshalDocument(c)
	if err != nil {
		return err
	}
	if err = s.Put(ctx, configKey, body); err == nil {
		return nil
	}
	err = fmt.Errorf("write repository configuration: %w", err)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	got, getErr := s.Get(ctx, configKey, 0, -1)
	switch {
	case getErr == nil && !bytes.Equal(got, body):
		return ErrRepositoryExists
	case getErr == nil && errors.Is(err, store.ErrExist):
		return nil // a store that tried twice met its own first attempt
	case errors.Is(getErr, store.ErrNotExist):
		return err
	default:
		return errors.Join(fmt.Errorf("%w: %w", err, ErrPerhapsMade), getErr)
	}
}

// removeForeignSlots takes away what others left that never made their repository here, and what those put who are about to
// learn that this one exists. Nobody else's slot is genuine, and no genuine one goes; so what cannot be removed harms nobody.
func (r *Repository) removeForeignSlots(ctx context.Context) {
	slots, err := r.KeySlots(ctx)
	for _, slot := range slots {
		if slot.Foreign {
			err = errors.Join(err, r.store.Delete(ctx, slot.key()))
		}
	}
	if err != nil {
		r.log.Warn("could not remove the key slots of a repository that was never made", "repository", r.url, "error", err)
	}
}
