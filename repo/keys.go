package repo

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/ssh"

	"pgthaw/repo/store"
)

// Key is what a person or a machine keeps to open an encrypted repository, or the public part of it, which can only be
// given access.
type Key struct {
	slotType  string
	public    string // "": a passphrase
	recipient age.Recipient
	identity  age.Identity // nil: the public part
}

// Types of key slots.
const (
	slotPassphrase = "passphrase"
	slotX25519     = "x25519"
	slotSSH        = "ssh"
)

// scrypt's work factors, as powers of two: 16 takes 64 MiB of memory. A slot that asks for more than the second is
// refused, for anybody who can write to the store can make one.
const (
	scryptWork    = 16
	maxScryptWork = 18
)

// NewKey makes an age identity, and the text of the file that it is to be kept in, as age-keygen writes it.
func NewKey() (k Key, file []byte, err error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return Key{}, nil, err
	}
	text := fmt.Sprintf("# created: %s\n# public key: %s\n%s\n", time.Now().Format(time.RFC3339), id.Recipient(), id)
	return x25519Key(id), []byte(text), nil
}

// NewSheetKey makes one whose text is to be printed, and typed in by a person.
func NewSheetKey() (k Key, lines []string, err error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return Key{}, nil, err
	}
	return x25519Key(id), typedLines(id.String()), nil
}

func x25519Key(id *age.X25519Identity) Key {
	return Key{slotX25519, id.Recipient().String(), id.Recipient(), id}
}

// PassphraseKey is a key that a person remembers.
func PassphraseKey(passphrase string) (Key, error) {
	to, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		return Key{}, errors.New("the passphrase is empty")
	}
	from, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		return Key{}, errors.New("the passphrase is empty")
	}
	to.SetWorkFactor(scryptWork)
	from.SetMaxWorkFactor(maxScryptWork)
	return Key{slotPassphrase, "", to, from}, nil
}

// ParseKeys reads a key file: age identities, one SSH private key, or what a person typed in from a recovery sheet. Its
// errors tell nothing of what is in it.
func ParseKeys(file []byte) ([]Key, error) {
	if bytes.HasPrefix(bytes.TrimSpace(file), []byte("-----BEGIN")) {
		k, err := sshKey(file)
		return []Key{k}, err
	}
	if isTyped(file) {
		var err error
		if file, err = parseTyped(file); err != nil {
			return nil, err
		}
	}
	ids, err := age.ParseIdentities(bytes.NewReader(file))
	if err != nil {
		return nil, errors.New("neither an age identity file nor an SSH private key")
	}
	var keys []Key
	for _, id := range ids {
		x, ok := id.(*age.X25519Identity)
		if !ok {
			return nil, errors.New("an age identity of a kind that cannot open repositories: only AGE-SECRET-KEY-1 can")
		}
		keys = append(keys, x25519Key(x))
	}
	return keys, nil
}

func sshKey(file []byte) (Key, error) {
	signer, err := ssh.ParsePrivateKey(file)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return Key{}, errors.New("an SSH private key that is itself protected by a passphrase, which cannot be asked for in the background")
	}
	if err != nil {
		return Key{}, errors.New("not an SSH private key that can be read")
	}
	id, err := agessh.ParseIdentity(file)
	if err != nil {
		return Key{}, errors.New("an SSH private key that cannot open repositories: only Ed25519 and RSA of 2048 bits or more can")
	}
	k, err := ParseRecipient(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	k.identity = id
	return k, err
}

// ParseRecipient reads the public part of a key: age1..., or a line as authorized_keys has it.
func ParseRecipient(s string) (Key, error) {
	s = strings.TrimSpace(s)
	if strings.HasPrefix(s, "age1") {
		to, err := age.ParseX25519Recipient(s)
		if err != nil {
			return Key{}, fmt.Errorf("%q is not an age recipient", s)
		}
		return Key{slotType: slotX25519, public: to.String(), recipient: to}, nil
	}
	to, err := agessh.ParseRecipient(s)
	if err != nil {
		return Key{}, fmt.Errorf("%q is neither an age recipient nor an SSH public key (Ed25519, or RSA of 2048 bits or more)", s)
	}
	public, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s))
	if err != nil {
		return Key{}, err
	}
	return Key{slotType: slotSSH, public: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(public))), recipient: to}, nil
}

// KeySlot lets the holder of one key open the repository.
//
// Format: docs/format.md, "Key slots".
type KeySlot struct {
	document
	ID        string    `json:"id"`
	Type      string    `json:"type"` // "passphrase", "x25519", "ssh"
	Label     string    `json:"label"`
	Recipient string    `json:"recipient"` // public; "" of a passphrase
	CreatedAt time.Time `json:"created_at"`
	Wrapped   []byte    `json:"wrapped"` // the master key, as an age file

	Authentication string `json:"authentication"` // by who has the master key

	// Foreign: somebody without the master key put the slot there, or changed it. Set by KeySlots.
	Foreign bool `json:"-"`
}

const (
	keySlotsPrefix = "keys/"
	keySlotKind    = "pgthaw key"
)

func (s KeySlot) key() string { return keySlotsPrefix + s.ID }

// newKeySlot wraps the master key for the holder of k.
func (s *seals) newKeySlot(k Key, label string) (KeySlot, error) {
	var id [8]byte
	rand.Read(id[:])
	var wrapped bytes.Buffer
	w, err := age.Encrypt(&wrapped, k.recipient)
	if err == nil {
		_, err = w.Write(s.master[:])
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return KeySlot{}, fmt.Errorf("wrap the repository's key: %w", err)
	}
	slot := KeySlot{document: document{keySlotKind, formatVersion}, ID: hex.EncodeToString(id[:]), Type: k.slotType, Label: label,
		Recipient: k.public, CreatedAt: time.Now().UTC().Truncate(time.Second), Wrapped: wrapped.Bytes()}
	slot.Authentication = s.master.authenticateSlot(s.id, slot)
	return slot, nil
}

// genuine tells whether the slot is as somebody wrote it who has the master key.
func (s *seals) genuine(slot KeySlot) bool {
	return s.master != nil && hmac.Equal([]byte(s.master.authenticateSlot(s.id, slot)), []byte(slot.Authentication))
}

// unwrap returns the master key if k is the slot's holder. ErrWrongKey: it is not.
func (s KeySlot) unwrap(k Key) (*masterKey, error) {
	if k.slotType != s.Type || k.identity == nil {
		return nil, ErrWrongKey
	}
	r, err := age.Decrypt(bytes.NewReader(s.Wrapped), k.identity)
	var other *age.NoIdentityMatchError
	if errors.As(err, &other) {
		return nil, ErrWrongKey
	}
	var b []byte
	if err == nil {
		b, err = io.ReadAll(io.LimitReader(r, int64(len(masterKey{})+1)))
	}
	if err == nil && len(b) != len(masterKey{}) {
		err = fmt.Errorf("a key of %d bytes", len(b))
	}
	if err != nil {
		return nil, corrupt(s.key(), "%v", err)
	}
	m := masterKey(b)
	return &m, nil
}

func putKeySlot(ctx context.Context, s store.Store, slot KeySlot) error {
	body, err := marshalDocument(slot)
	if err != nil {
		return err
	}
	if err := s.Put(ctx, slot.key(), body); err != nil {
		return fmt.Errorf("write key slot %s: %w", slot.ID, err)
	}
	return nil
}

// KeySlots lists the key slots by id. Where one cannot be read, the good ones come with an error.
func (r *Repository) KeySlots(ctx context.Context) ([]KeySlot, error) {
	var all []KeySlot
	var bad []error
	for o, err := range r.store.List(ctx, keySlotsPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list key slots: %w", err)
		}
		slot, err := r.keySlot(ctx, o.Key)
		switch {
		case errors.Is(err, store.ErrNotExist): // removed since it was listed
		case err != nil:
			bad = append(bad, err)
		default:
			slot.Foreign = !r.seals.genuine(slot)
			all = append(all, slot)
		}
	}
	return all, errors.Join(bad...)
}

func (r *Repository) keySlot(ctx context.Context, key string) (KeySlot, error) {
	b, err := r.get(ctx, key, 0, -1)
	if err != nil {
		return KeySlot{}, fmt.Errorf("read %s: %w", key, err)
	}
	return parseKeySlot(key, b)
}

func parseKeySlot(key string, b []byte) (KeySlot, error) {
	var s KeySlot
	if err := unmarshalDocument(key, b, keySlotKind, &s); err != nil {
		return KeySlot{}, err
	}
	if s.key() != key {
		return KeySlot{}, corrupt(key, "it describes key slot %s", s.ID)
	}
	return s, nil
}

// unlock finds the master key with one of the keys. ErrNoKey: there is none; ErrWrongKey: they are others'. ErrCorrupt: nobody's
// key would do.
func (r *Repository) unlock(ctx context.Context, o Options) (*masterKey, error) {
	slots, bad := r.KeySlots(ctx)
	if bad != nil && !errors.Is(bad, ErrCorrupt) {
		return nil, bad
	}
	if len(slots) == 0 && bad == nil {
		return nil, corrupt(keySlotsPrefix, "no key slot is there, so no key opens the repository")
	}
	p, err := r.Place()
	if err != nil {
		return nil, err
	}
	p.Passphrase = slices.ContainsFunc(slots, func(s KeySlot) bool { return s.Type == slotPassphrase })
	keys, err := o.keys(p)
	if err != nil {
		return nil, err
	}
	for _, slot := range slots {
		for _, k := range keys {
			m, err := slot.unwrap(k)
			if err == nil {
				err = r.checkUnlocked(m, slot)
			}
			if err == nil {
				return m, nil
			}
			if !errors.Is(err, ErrWrongKey) {
				bad = errors.Join(bad, err)
			}
		}
	}
	if bad != nil {
		return nil, bad
	}
	return nil, fmt.Errorf("%s: %w: it opens none of the repository's %d key slots", r.url, ErrWrongKey, len(slots))
}

// keys are those of the options, or those that are found. ErrNoKey: there are none.
func (o Options) keys(p Place) (keys []Key, err error) {
	keys = o.Keys
	if len(keys) == 0 && o.FindKeys != nil {
		keys, err = o.FindKeys(p)
	}
	if err == nil && len(keys) == 0 {
		err = fmt.Errorf("%s: %w", p.URL, ErrNoKey)
	}
	return keys, err
}

// checkUnlocked holds what a slot gave for the master key against the configuration, and the slot against both.
func (r *Repository) checkUnlocked(m *masterKey, slot KeySlot) error {
	if !hmac.Equal([]byte(m.authenticate(r.seals.id, r.config)), []byte(r.config.Authentication)) {
		return corrupt(configKey, "it is not the one that belongs to the key in %s: one of them was changed or exchanged", slot.key())
	}
	if s := (seals{m, r.seals.id}); !s.genuine(slot) {
		return foreign(slot)
	}
	return nil
}

// foreign says of a slot that it is.
func foreign(slot KeySlot) error {
	return corrupt(slot.key(), "it was changed, or put there by somebody who has no key of this repository")
}

// AddKey lets the holder of k open the repository. No other object changes.
func (r *Repository) AddKey(ctx context.Context, k Key, label string) (KeySlot, error) {
	if r.seals.master == nil {
		return KeySlot{}, fmt.Errorf("%s: %w", r.url, ErrPlain)
	}
	slot, err := r.seals.newKeySlot(k, label)
	if err != nil {
		return KeySlot{}, err
	}
	return slot, putKeySlot(ctx, r.store, slot)
}

// RemoveKey takes a key slot away. ErrNoKeySlot: there is none of this id. ErrLastKey: no other is good, so nobody could
// open the repository any more.
func (r *Repository) RemoveKey(ctx context.Context, id string) error {
	if !keySlotID.MatchString(id) {
		return fmt.Errorf("%s: %w", id, ErrNoKeySlot)
	}
	key := keySlotsPrefix + id
	body, err := r.get(ctx, key, 0, -1)
	if errors.Is(err, store.ErrNotExist) {
		return fmt.Errorf("%s: %w", id, ErrNoKeySlot)
	}
	if err != nil {
		return fmt.Errorf("read key slot %s: %w", id, err)
	}
	if err := r.otherKey(ctx, id); err != nil {
		return err
	}
	if err := r.store.Delete(ctx, key); err != nil {
		return fmt.Errorf("remove key slot %s: %w", id, err)
	}
	// Somebody else may have removed the other one meanwhile: then both put theirs back.
	ctx = context.WithoutCancel(ctx)
	if err := r.otherKey(ctx, id); err != nil {
		return errors.Join(err, r.store.Put(ctx, key, body))
	}
	return nil
}

var keySlotID = regexp.MustCompile(`^[0-9a-f]{16}$`)

// otherKey says whether a slot besides this one lets somebody in.
func (r *Repository) otherKey(ctx context.Context, id string) error {
	slots, err := r.KeySlots(ctx)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	for _, s := range slots {
		if s.ID != id && !s.Foreign {
			return nil
		}
	}
	return fmt.Errorf("%s: %w", id, ErrLastKey)
}
