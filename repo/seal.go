package repo

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"
)

// Seals, as byte 6 of the object header names them.
const (
	sealPlain  = 0
	sealAESGCM = 1
)

// What keys are derived for.
const (
	objectKeyInfo = "pgthaw 1 object"
	digestKeyInfo = "pgthaw 1 digest key"
	configKeyInfo = "pgthaw 1 config"
	slotKeyInfo   = "pgthaw 1 key slot"
)

// masterKey is what all keys of an encrypted repository derive from; key slots hold it.
type masterKey [32]byte

func newMasterKey() (m masterKey) {
	rand.Read(m[:])
	return m
}

// derive makes the key for one use. HKDF fails only for lengths that no use here has.
func (m *masterKey) derive(salt []byte, info string) []byte {
	key, err := hkdf.Key(sha256.New, m[:], salt, info, 32)
	if err != nil {
		panic(err)
	}
	return key
}

// authenticate is what the repository document has to say of itself so that it is believed.
func (m *masterKey) authenticate(id [16]byte, c config) string {
	mac := hmac.New(sha256.New, m.derive(id[:], configKeyInfo))
	fmt.Fprintf(mac, "%d\n%s\n%s\n%s\n", c.Version, c.ID, c.CreatedAt.Format(time.RFC3339Nano), c.Encryption)
	return hex.EncodeToString(mac.Sum(nil))
}

// authenticateSlot is what a key slot has to say of itself.
func (m *masterKey) authenticateSlot(id [16]byte, s KeySlot) string {
	mac := hmac.New(sha256.New, m.derive(id[:], slotKeyInfo))
	for _, value := range []string{strconv.Itoa(s.Version), s.ID, s.Type, s.Label, s.Recipient, s.CreatedAt.Format(time.RFC3339Nano), string(s.Wrapped)} {
		mac.Write(appendString(nil, value))
	}
	return hex.EncodeToString(mac.Sum(nil))
}

// salt makes the keys of one object its own. Whoever encodes an object draws a new one, also when the same content is
// encoded again after a failed Put: then no nonce is used twice under one key.
type salt [16]byte

func newSalt() (s salt) {
	rand.Read(s[:]) // never fails: crypto/rand ends the program instead
	return s
}

// seals makes the sealers of one repository's objects.
//
// Format: docs/format.md, "Sealing".
type seals struct {
	master *masterKey // nil: the seal is plain
	id     [16]byte   // the repository's
}

// kind is the seal that the repository's object headers name.
func (s *seals) kind() byte {
	if s.master == nil {
		return sealPlain
	}
	return sealAESGCM
}

// header begins an object.
func (s *seals) header(kind byte, use [8]byte, salt salt) []byte {
	b := append(make([]byte, 0, objectHeaderSize), objectMagic...)
	b = append(b, kind, formatVersion, s.kind(), 0)
	return append(append(b, use[:]...), salt[:]...)
}

// object returns the sealer of one object. It derives the key, which takes some microseconds: a twentieth of
// what decoding a chunk does.
func (s *seals) object(kind byte, key string, salt salt) sealer {
	o := sealer{key: key, aead: plain{}}
	if s.master == nil {
		return o
	}
	block, err := aes.NewCipher(s.master.derive(salt[:], objectKeyInfo+string(kind)))
	if err != nil {
		panic(err)
	}
	if o.aead, err = cipher.NewGCM(block); err != nil {
		panic(err)
	}
	o.data = append(append(append(o.data, s.id[:]...), kind), key...)
	return o
}

// sealer seals and opens the parts of one object. Safe for concurrent use.
type sealer struct {
	key  string // of the object in the store
	aead cipher.AEAD
	data []byte // associated
}

// overhead is how many bytes a sealed part is longer.
func (o sealer) overhead() int { return o.aead.Overhead() }

func nonce(offset int64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 4, 12), uint64(offset))
}

// seal seals in place the last part of an object: the bytes from offset on.
func (o sealer) seal(object []byte, offset int) []byte {
	return o.aead.Seal(object[:offset], nonce(int64(offset)), object[offset:], o.data)
}

// open opens in place a part that lies at offset of the object.
func (o sealer) open(sealed []byte, offset int64) ([]byte, error) {
	b, err := o.aead.Open(sealed[:0], nonce(offset), sealed, o.data)
	if err != nil {
		return nil, &CorruptError{Object: o.key, Offset: offset, Length: int64(len(sealed)),
			Detail: "it does not open with the repository's key: other bytes than were written, or at another place"}
	}
	return b, nil
}

// plain is the seal of a repository that is not encrypted: none.
type plain struct{}

func (plain) NonceSize() int { return 12 }
func (plain) Overhead() int  { return 0 }

func (plain) Seal(dst, _, b, _ []byte) []byte { return append(dst, b...) }

func (plain) Open(dst, _, b, _ []byte) ([]byte, error) { return append(dst, b...), nil }
