package repo

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"
)

// sshKeyFile is the file of a new SSH key.
func sshKeyFile(t *testing.T, private crypto.PrivateKey, passphrase string) []byte {
	t.Helper()
	block, err := ssh.MarshalPrivateKey(private, "")
	if passphrase != "" {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(private, "", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(block)
}

func TestKeysOpen(t *testing.T) {
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ageFile, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string][]byte{"x25519": ageFile, "ed25519": sshKeyFile(t, ed, ""), "rsa": sshKeyFile(t, rsaKey, "")} {
		t.Run(name, func(t *testing.T) {
			keys, err := ParseKeys(file)
			if err != nil {
				t.Fatal(err)
			}
			checkKeyOpens(t, keys[0])
			public, err := ParseRecipient(keys[0].public)
			if err != nil || public.public != keys[0].public || public.slotType != keys[0].slotType {
				t.Errorf("%q is read as %q, %v", keys[0].public, public.public, err)
			}
		})
	}
	t.Run("passphrase", func(t *testing.T) { checkKeyOpens(t, passphraseKey(t, "a b c")) })
}

// checkKeyOpens makes a repository with the key: it opens with that, and with no other and not without.
func checkKeyOpens(t *testing.T, k Key) {
	t.Helper()
	r := newTestRepository(t, k)
	for want, keys := range map[error][]Key{
		nil: {newTestKey(t), k}, ErrNoKey: nil, ErrWrongKey: {newTestKey(t), passphraseKey(t, "a b d")},
	} {
		again, err := Open(t.Context(), r.URL(), Options{Keys: keys})
		if !errors.Is(err, want) {
			t.Errorf("%d keys: %v, want %v", len(keys), err, want)
		}
		if err == nil {
			again.Close()
		}
	}
}

func TestKeyFilesRefused(t *testing.T) {
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	pq, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	_, good, _ := NewKey()
	secret := strings.TrimSpace(string(good[bytes.Index(good, []byte("AGE-SECRET")):]))
	for what, file := range map[string]string{
		"nothing":             "",
		"comments":            "# public key: age1xyz\n",
		"damaged identity":    strings.Replace(secret, "Q", "P", 1)[:len(secret)-1] + "\n",
		"other line":          secret + "\nhunter2\n",
		"protected SSH key":   string(sshKeyFile(t, ed, "hunter2")),
		"public key":          "ssh-ed25519 AAAA",
		"post-quantum":        pq.String() + "\n",
		"SSH key of no sort":  "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2\n-----END OPENSSH PRIVATE KEY-----\n",
		"passphrase by error": "hunter2\n",
	} {
		keys, err := ParseKeys([]byte(file))
		if err == nil {
			t.Errorf("%s is read as %d keys", what, len(keys))
		} else if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), secret[20:30]) {
			t.Errorf("%s: the error tells the secret: %v", what, err)
		}
	}
	if _, err := PassphraseKey(""); err == nil {
		t.Error("an empty passphrase is taken")
	}
}

// TestConfigIsAuthentic changes the repository document as one can who may write to the store: each is refused.
func TestConfigIsAuthentic(t *testing.T) {
	k := newTestKey(t)
	r := newTestRepository(t, k)
	root := strings.TrimPrefix(r.URL(), "file://")
	was := r.config
	for what, change := range map[string]struct {
		do   func(*config)
		want error
	}{
		"id":             {func(c *config) { c.ID = strings.Repeat("ab", 16) }, ErrCorrupt},
		"created_at":     {func(c *config) { c.CreatedAt = c.CreatedAt.AddDate(0, 0, 1) }, ErrCorrupt},
		"authentication": {func(c *config) { c.Authentication = "" }, ErrCorrupt},
		"encryption":     {func(c *config) { c.Encryption = "aes-128" }, ErrCorrupt},
		"digest key":     {func(c *config) { c.DigestKey = strings.Repeat("ab", 32) }, ErrCorrupt},
		"downgrade":      {func(c *config) { c.Encryption, c.DigestKey = EncryptionNone, strings.Repeat("ab", 32) }, ErrNotEncrypted},
	} {
		c := was
		change.do(&c)
		body, err := marshalDocument(c)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, filepath.Join(root, configKey), body)
		if _, err := Open(t.Context(), r.URL(), Options{Keys: []Key{k}}); !errors.Is(err, change.want) {
			t.Errorf("%s: %v, want %v", what, err, change.want)
		}
	}
	body, err := marshalDocument(was)
	if err != nil {
		t.Fatal(err)
	}
	exchange(t, filepath.Join(root, configKey), body)
}

// TestForeignSlots puts slots with other master keys, made for the same holder, beside the good one, which still opens,
// and in its place, which is damage.
func TestForeignSlots(t *testing.T) {
	k := newTestKey(t)
	r := newTestRepository(t, k)
	good, err := r.KeySlots(t.Context())
	if err != nil || len(good) != 1 {
		t.Fatalf("%v, %v", good, err)
	}
	var foreign []KeySlot
	for range 4 {
		m := newMasterKey()
		slot, err := (&seals{&m, r.seals.id}).newKeySlot(k, "")
		if err == nil {
			err = putKeySlot(t.Context(), r.store, slot)
		}
		if err != nil {
			t.Fatal(err)
		}
		foreign = append(foreign, slot)
	}
	again, err := Open(t.Context(), r.URL(), Options{Keys: []Key{k}})
	if err != nil {
		t.Fatalf("beside others: %v", err)
	}
	again.Close()
	root := strings.TrimPrefix(r.URL(), "file://")
	exchange(t, filepath.Join(root, foreign[0].key()), []byte("{}"))
	found := 0
	if _, err := r.Check(t.Context(), CheckOptions{}, func(Finding) { found++ }); err != nil || found != 4 {
		t.Errorf("a damaged slot and three foreign ones: %d findings, %v", found, err)
	}
	if err := r.store.Delete(t.Context(), good[0].key()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), r.URL(), Options{Keys: []Key{k}}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("in the place of the good one: %v", err)
	}
	for _, slot := range foreign {
		if err := r.store.Delete(t.Context(), slot.key()); err != nil {
			t.Fatal(err)
		}
	}
	if err := putKeySlot(t.Context(), r.store, good[0]); err != nil {
		t.Fatal(err)
	}
}

// TestRemoveKeysAtOnce has the holders of two keys remove each other's: one at least stays.
func TestRemoveKeysAtOnce(t *testing.T) {
	k := newTestKey(t)
	r := newTestRepository(t, k, newTestKey(t))
	for range 20 {
		slots, err := r.KeySlots(t.Context())
		if err != nil || len(slots) != 2 {
			t.Fatalf("%d slots, %v", len(slots), err)
		}
		var g sync.WaitGroup
		for _, s := range slots {
			g.Go(func() {
				if err := r.RemoveKey(t.Context(), s.ID); err != nil && !errors.Is(err, ErrLastKey) {
					t.Error(err)
				}
			})
		}
		g.Wait()
		left, err := r.KeySlots(t.Context())
		if err != nil || len(left) == 0 {
			t.Fatalf("%d slots left, %v", len(left), err)
		}
		for len(left) < 2 {
			slot, err := r.AddKey(t.Context(), k, "")
			if err != nil {
				t.Fatal(err)
			}
			left = append(left, slot)
		}
	}
}
