package repo

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgthaw/repo/pg"
)

var update = flag.Bool("update", false, "write testdata/v1, testdata/v1enc and the examples in docs/format.md anew; only while version 1 is unreleased")

const (
	goldenDir        = "testdata/v1/repository"
	goldenEncrypted  = "testdata/v1enc/repository"
	goldenKeyFile    = "testdata/v1enc/key"
	goldenPassphrase = "only a test"
)

// goldenKey is the key of the encrypted golden repository, which opens with goldenPassphrase, too.
func goldenKey(t *testing.T) []Key {
	t.Helper()
	file, err := os.ReadFile(goldenKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := ParseKeys(file)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// TestGolden reads repositories that an earlier build wrote: every kind of object, every kind of content.
func TestGolden(t *testing.T) {
	p := passphraseKey(t, goldenPassphrase)
	if *update {
		writeGolden(t, goldenDir, nil)
		writeGolden(t, goldenEncrypted, append(goldenKey(t), p))
	}
	t.Run("plain", func(t *testing.T) { checkGolden(t, goldenDir, nil) })
	t.Run("encrypted", func(t *testing.T) { checkGolden(t, goldenEncrypted, goldenKey(t)) })
	t.Run("passphrase", func(t *testing.T) { checkGolden(t, goldenEncrypted, []Key{p}) })
}

func checkGolden(t *testing.T, dir string, keys []Key) {
	t.Helper()
	r, err := Open(t.Context(), dir, Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	checkClean(t, r)
	all, err := r.Backups(t.Context(), "main")
	if err != nil || len(all) != 2 {
		t.Fatalf("%d backups, %v", len(all), err)
	}
	if len(editionsAmong(packKeys(t, r.store))) == 0 {
		t.Error("there is no edition")
	}
	first, second := goldenFiles()
	checkFiles(t, r.OpenBackup(all[0]), first)
	checkFiles(t, r.OpenBackup(all[1]), second)
	got, err := r.WAL(t.Context(), "main", goldenWAL)
	if err != nil || string(got) != goldenHistory {
		t.Errorf("history file %q, %v", got, err)
	}
	if s, err := r.Start(t.Context(), "main"); err != nil || !reflect.DeepEqual(*s, goldenStart) {
		t.Errorf("start record %+v, %v", s, err)
	}
	checkGoldenDamage(t, r)
}

var goldenStart = StartRecord{Cluster: "main", Backup: "20260101T000000.000Z-0000", MadeAt: time.Unix(1_767_225_600, 0).UTC(),
	Reads: []Span{{"pgdata/base/5/2", 0, 2 * PageSize}, {"pgdata/base/5/1", 7 * PageSize, PageSize}}}

const goldenHistory = "1\t0/3000000\tno recovery target specified\n"

func goldenFiles() (first, second testFiles) {
	first = smallFiles()
	second = testFiles{"pgdata/empty": {}}
	for name, b := range first {
		second[name] = bytes.Clone(b)
	}
	copy(second["pgdata/base/5/2"][7*PageSize:], pagesOf(77, 1))
	return first, second
}

func writeGolden(t *testing.T, dir string, keys []Key) {
	t.Helper()
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	r, err := Init(t.Context(), dir, Options{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := r.BindCluster(t.Context(), "main", testSystemID, 16<<20); err != nil {
		t.Fatal(err)
	}
	first, second := goldenFiles()
	more := maps.Clone(first)
	more["pgdata/base/5/7"] = pagesOf(78, 300)
	deleted := writeTestBackup(t, r, more, nil)
	b := writeTestBackup(t, r, first, deleted)
	repackWithout(t, r, deleted.Manifest)
	writeTestBackup(t, r, second, b)
	err = r.PutWAL(t.Context(), "main", goldenWAL, []byte(goldenHistory))
	if err = errors.Join(err, os.RemoveAll(filepath.Join(dir, sessionsPrefix))); err != nil { // sessions name this host
		t.Fatal(err)
	}
	if err := r.PutStart(t.Context(), goldenStart); err != nil {
		t.Fatal(err)
	}
	if err := r.recordDamage(t.Context(), goldenDamaged.key(), errGoldenDamage); err != nil {
		t.Fatal(err)
	}
}

// goldenDamaged is recorded as damaged. No backup needs it.
var (
	goldenDamaged   = PackID{15: 1}
	errGoldenDamage = errors.New("it is missing")
)

func checkGoldenDamage(t *testing.T, r *Repository) {
	t.Helper()
	var d damage
	if _, err := r.getDocument(t.Context(), damagedKey(goldenDamaged.key()), damageKind, &d); err != nil || d.Object != goldenDamaged.key() || d.Found != errGoldenDamage.Error() {
		t.Errorf("%+v, %v", d, err)
	}
	if unusable, err := r.unusablePacks(t.Context()); err != nil || !unusable.has(goldenDamaged) {
		t.Errorf("%v, %v", unusable, err)
	}
}

// TestWorkedExample holds the example in docs/format.md against the golden repository.
func TestWorkedExample(t *testing.T) {
	const page, begin, end = "../docs/format.md", "<!-- example -->\n", "<!-- end of example -->\n"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	got, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no example", page)
	}
	want := workedExample(t)
	if *update {
		if err := os.WriteFile(page, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if got != want {
		t.Errorf("the example in %s is\n%s\nwant\n%s", page, got, want)
	}
}

// workedExample prints the decoded map of a changed file and the stored history file.
func workedExample(t *testing.T) string {
	t.Helper()
	r, err := Open(t.Context(), goldenDir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	all, err := r.Backups(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	var s strings.Builder
	fmt.Fprintf(&s, "The map of `pgdata/base/5/2`, 100 pages of which page 7 changed since the prior backup, as it lies in its piece:\n\n```\n%s```\n\n",
		hex.Dump(goldenMap(t.Context(), t, r.OpenBackup(all[1]))))
	fmt.Fprintf(&s, "The WAL object of a history file:\n\n```\n%s```\n\n", hex.Dump(goldenObject(t, goldenDir)))
	s.WriteString(encryptedExample(t))
	return s.String()
}

var goldenWAL = pg.WALName{Kind: pg.WALHistory, Timeline: 2}

func goldenObject(t *testing.T, dir string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, walKey("main", goldenWAL)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// encryptedExample prints the same history file in the encrypted repository, with all that it is encrypted with.
func encryptedExample(t *testing.T) string {
	t.Helper()
	r, err := Open(t.Context(), goldenEncrypted, Options{Keys: goldenKey(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	object, key := goldenObject(t, goldenEncrypted), walKey("main", goldenWAL)
	at := walHeaderSize
	var s strings.Builder
	fmt.Fprintf(&s, "The same in the encrypted repository, whose ID is %s and whose master key is\n%x, which the key in `%s` opens:\n\n```\n%s```\n\n",
		r.ID(), *r.seals.master, "repo/"+goldenKeyFile, hex.Dump(object))
	fmt.Fprintf(&s, "The object key is %x, the nonce of the head\n%x, the associated data are the 16 bytes of the repository's ID and the characters\n`W%s`.\n",
		r.seals.master.derive(object[16:32], objectKeyInfo+"W"), nonce(int64(at)), key)
	return s.String()
}

func goldenMap(ctx context.Context, t *testing.T, b *Backup) []byte {
	t.Helper()
	e, err := b.Stat(ctx, "pgdata/base/5/2")
	if err != nil {
		t.Fatal(err)
	}
	m, err := b.r.fileMap(ctx, e)
	if err != nil {
		t.Fatal(err)
	}
	return m.appendTo(nil)
}
