package ingest

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"pgthaw/repo/pg"
)

// wire is an answer to BASE_BACKUP that is being put together.
type wire struct {
	t testing.TB
	b []byte
}

func (w *wire) send(messages ...pgproto3.BackendMessage) {
	w.t.Helper()
	for _, m := range messages {
		var err error
		if w.b, err = m.Encode(w.b); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *wire) result(columns int, rows ...[][]byte) {
	w.send(&pgproto3.RowDescription{Fields: make([]pgproto3.FieldDescription, columns)})
	for _, row := range rows {
		w.send(&pgproto3.DataRow{Values: row})
	}
	w.send(&pgproto3.CommandComplete{CommandTag: []byte("SELECT")})
}

func (w *wire) copyData(kind byte, content string) {
	w.send(&pgproto3.CopyData{Data: append([]byte{kind}, content...)})
}

// content sends an archive in small messages, with what may come between any two.
func (w *wire) content(b []byte) {
	for len(b) > 0 {
		n := min(len(b), 1000)
		w.copyData(copyContent, string(b[:n]))
		b = b[n:]
		w.copyData(copyProgress, string(binary.BigEndian.AppendUint64(nil, 77)))
		w.send(&pgproto3.NoticeResponse{Severity: "WARNING", Message: "beware"}, &pgproto3.ParameterStatus{Name: "in_hot_standby", Value: "off"})
	}
	w.copyData(copyContent, "")
}

func tarFile(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(w, zeros{}, h.Size); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// exchange is the server's side of a small base backup with one tablespace.
func exchange(t testing.TB) []byte {
	w := &wire{t: t}
	w.result(2, [][]byte{[]byte("0/2000028"), []byte("3")})
	w.result(3, [][]byte{[]byte("16385"), []byte("/space"), []byte("9")}, [][]byte{nil, nil, []byte("100")})
	w.send(&pgproto3.CopyOutResponse{})
	w.copyData(copyArchive, "16385.tar\x00/space\x00")
	w.content(tarFile(t, tar.Header{Typeflag: tar.TypeDir, Name: "PG_15/", Mode: 0o700}, tar.Header{Name: "PG_15/5/1", Size: 900}))
	w.copyData(copyArchive, "base.tar\x00\x00")
	w.content(tarFile(t, tar.Header{Name: "backup_label", Size: 10}, tar.Header{Typeflag: tar.TypeSymlink, Name: "pg_tblspc/16385", Linkname: "/space"},
		tar.Header{Typeflag: tar.TypeDir, Name: "./pg_wal/archive_status/"}, tar.Header{Name: "global/pg_control", Size: 600}))
	w.copyData(copyManifest, "")
	w.content([]byte("the manifest"))
	w.send(&pgproto3.CopyDone{})
	w.result(2, [][]byte{[]byte("0/2000100"), []byte("3")})
	w.send(&pgproto3.CommandComplete{CommandTag: []byte("BASE_BACKUP")}, &pgproto3.ReadyForQuery{TxStatus: 'I'})
	return w.b
}

// received is all that a stream was found to hold.
type received struct {
	names    []string
	content  int64
	notices  int
	manifest []byte
	start    position
	stop     position
}

// decode reads the server's side of a base backup.
func decode(stream []byte) (got received, err error) {
	b := &baseBackup{m: newMessages(bytes.NewReader(stream), func(*pgconn.Notice) { got.notices++ })}
	if err := b.readStart(); err != nil {
		return got, err
	}
	got.start = b.start
	got.stop, err = b.receive(func(int) {}, func(r io.Reader, row tablespaceRow) error {
		root, _ := row.root()
		return walkArchive(r, func(h *tar.Header, content io.Reader) error {
			got.names = append(got.names, root+"/"+h.Name)
			n, err := io.Copy(io.Discard, content)
			got.content += n
			return err
		})
	}, func(r io.Reader) (err error) {
		got.manifest, err = io.ReadAll(r)
		return err
	})
	return got, err
}

func TestDecodeBaseBackup(t *testing.T) {
	got, err := decode(exchange(t))
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Join(got.names, " ")
	if want := "tablespaces/16385/PG_15 tablespaces/16385/PG_15/5/1 pgdata/backup_label pgdata/pg_tblspc/16385 " +
		"pgdata/pg_wal/archive_status pgdata/global/pg_control"; names != want {
		t.Errorf("got %s\nwant %s", names, want)
	}
	if got.content != 900+10+600 || string(got.manifest) != "the manifest" || got.notices == 0 {
		t.Errorf("%d bytes, manifest %q, %d notices", got.content, got.manifest, got.notices)
	}
	if got.start != (position{0x2000028, 3}) || got.stop != (position{0x2000100, 3}) {
		t.Errorf("from %v to %v", got.start, got.stop)
	}
}

// A stream that ends anywhere is an error that says so.
func TestDecodeCutShort(t *testing.T) {
	whole := exchange(t)
	for n := 0; n < len(whole); n += 7 {
		if _, err := decode(whole[:n]); !errors.Is(err, errLost) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
}

func TestDecodeServerError(t *testing.T) {
	w := &wire{t: t, b: exchange(t)}
	w.b = w.b[:bytes.LastIndex(w.b, []byte("the manifest"))+len("the manifest")]
	w.send(&pgproto3.CopyDone{}, &pgproto3.ErrorResponse{Severity: "ERROR", Code: stateDataCorrupted, Message: "checksum verification failure during base backup"})
	if _, err := decode(w.b); !isState(err, stateDataCorrupted) {
		t.Errorf("got %v", err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	start := func() *wire {
		w := &wire{t: t}
		w.result(2, [][]byte{[]byte("0/2000028"), []byte("1")})
		w.result(3, [][]byte{nil, nil, []byte("100")})
		w.send(&pgproto3.CopyOutResponse{})
		return w
	}
	base := func(headers ...tar.Header) func(w *wire) {
		return func(w *wire) {
			w.copyData(copyArchive, "base.tar\x00\x00")
			w.content(tarFile(t, headers...))
		}
	}
	for name, add := range map[string]func(w *wire){
		"content before a name":       func(w *wire) { w.copyData(copyContent, "x") },
		"unknown kind":                func(w *wire) { w.copyData('x', "") },
		"empty CopyData":              func(w *wire) { w.send(&pgproto3.CopyData{}) },
		"another archive":             func(w *wire) { w.copyData(copyArchive, "1.tar\x00/x\x00") },
		"name without an end":         func(w *wire) { w.copyData(copyArchive, "base.tar") },
		"manifest instead of archive": func(w *wire) { w.copyData(copyManifest, "") },
		"short progress report":       func(w *wire) { w.copyData(copyProgress, "abc") },
		"rows in the stream":          func(w *wire) { w.send(&pgproto3.DataRow{}) },
		"nothing":                     func(w *wire) { w.send(&pgproto3.CopyDone{}) },
		"absolute name":               base(tar.Header{Name: "/etc/passwd", Size: 1}),
		"name that leaves":            base(tar.Header{Name: "base/../../x", Size: 1}),
		"hard link":                   base(tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "b"}),
		"extended entry":              base(tar.Header{Name: "a", PAXRecords: map[string]string{"GOLANG.x": "y"}}),
		"no tar file":                 func(w *wire) { w.copyData(copyArchive, "base.tar\x00\x00"); w.content(bytes.Repeat([]byte("x"), 2048)) },
		"a second base.tar":           func(w *wire) { base()(w); base()(w) },
		"message of impossible size":  func(w *wire) { w.b = append(w.b, 'H', 0xff, 0xff, 0xff, 0xff) },
		"message of negative size":    func(w *wire) { w.b = append(w.b, 'H', 0, 0, 0, 3) },
	} {
		t.Run(name, func(t *testing.T) {
			w := start()
			add(w)
			if _, err := decode(w.b); err == nil || errors.Is(err, errLost) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// FuzzDecodeBaseBackup is for whatever a server, or what pretends to be one, may send.
func FuzzDecodeBaseBackup(f *testing.F) {
	whole := exchange(f)
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Fuzz(func(t *testing.T, stream []byte) {
		got, err := decode(stream)
		if err == nil && (got.start.timeline == 0 || got.stop.timeline == 0) {
			t.Errorf("took timeline 0")
		}
		for _, name := range got.names {
			if !filepath.IsLocal(name) || strings.Contains(name, "..") && filepath.Clean(name) != name {
				t.Errorf("took %q", name)
			}
		}
	})
}

// What is not the manifest's fails the backup, one way or the other.
func TestVerifyFiles(t *testing.T) {
	verify := func(files []pg.ManifestFile, sent []arrival) error {
		a := newArrivals()
		for _, f := range sent {
			if err := a.add(f); err != nil {
				return err
			}
		}
		for _, f := range files {
			if err := a.verify(f); err != nil {
				return err
			}
		}
		return a.verifyAll()
	}
	sent := func() []arrival { return []arrival{{"a", 5, 0x01020304}, {"b", 0, 0}} }
	files := func() []pg.ManifestFile {
		return []pg.ManifestFile{{Path: "a", Size: 5, Algorithm: "CRC32C", Checksum: "04030201"}, {Path: "b", Algorithm: "CRC32C", Checksum: "00000000"}}
	}
	if err := verify(files(), sent()); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(f *[]pg.ManifestFile, s *[]arrival){
		"checksum":      func(f *[]pg.ManifestFile, s *[]arrival) { (*s)[0].crc++ },
		"size":          func(f *[]pg.ManifestFile, s *[]arrival) { (*f)[0].Size++ },
		"path":          func(f *[]pg.ManifestFile, s *[]arrival) { (*f)[0].Path = "c" },
		"algorithm":     func(f *[]pg.ManifestFile, s *[]arrival) { (*f)[0].Algorithm = "NONE" },
		"not received":  func(f *[]pg.ManifestFile, s *[]arrival) { *s = (*s)[:1] },
		"sent twice":    func(f *[]pg.ManifestFile, s *[]arrival) { *s = append(*s, (*s)[0]) },
		"not announced": func(f *[]pg.ManifestFile, s *[]arrival) { *f = (*f)[:1] },
		"listed twice":  func(f *[]pg.ManifestFile, s *[]arrival) { *f = append(*f, (*f)[1]) },
	} {
		f, s := files(), sent()
		change(&f, &s)
		if err := verify(f, s); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestAssembler(t *testing.T) {
	const size = 1 << 20
	wal := make([]byte, 3*size+12345)
	for i := range wal {
		wal[i] = byte(i * 7 >> 8)
	}
	for _, step := range []int{1, 8192, 131072, size, 2*size + 5} {
		if step == 1 && testing.Short() {
			continue
		}
		a := newAssembler(size, 7)
		var got []byte
		next := uint64(7)
		for off := 0; off < len(wal); off += step {
			p := wal[off:min(off+step, len(wal))]
			err := a.add(pg.LSN(7*size+off), p, func(segno uint64, content []byte) error {
				if segno != next || len(content) != size {
					t.Errorf("segment %d of %d bytes, want %d", segno, len(content), next)
				}
				next++
				got = append(got, content...)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		segno, rest, ok := a.partial()
		got = append(got, rest...)
		if !ok || segno != 10 || len(rest) != size || !bytes.Equal(got[:len(wal)], wal) || len(bytes.Trim(got[len(wal):], "\x00")) > 0 {
			t.Errorf("steps of %d: wrong bytes", step)
		}
	}
}

func TestAssemblerRefuses(t *testing.T) {
	a := newAssembler(1<<20, 1)
	ignore := func(uint64, []byte) error { return nil }
	if _, _, ok := a.partial(); ok {
		t.Error("a partial segment of nothing")
	}
	if err := a.add(1<<20, make([]byte, 100), ignore); err != nil {
		t.Fatal(err)
	}
	for _, lsn := range []pg.LSN{1 << 20, 1<<20 + 99, 1<<20 + 101, 0} {
		if err := a.add(lsn, []byte("x"), ignore); err == nil {
			t.Errorf("took WAL of %s", lsn)
		}
	}
	fails := errors.New("no space")
	if err := a.add(1<<20+100, make([]byte, 1<<20), func(uint64, []byte) error { return fails }); !errors.Is(err, fails) {
		t.Errorf("got %v", err)
	}
}

func TestLabelRefused(t *testing.T) {
	if _, err := baseBackupCommand(BackupOptions{Label: "two\nlines"}); err == nil {
		t.Error("a label of two lines")
	}
	command, err := baseBackupCommand(BackupOptions{Label: "it's", MaxRate: 32, SlowCheckpoint: true, NoVerifyChecksums: true})
	want := "BASE_BACKUP (LABEL 'it''s', PROGRESS true, WAIT false, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C', VERIFY_CHECKSUMS false, MAX_RATE 32)"
	if err != nil || command != want {
		t.Errorf("got %s, %v\nwant %s", command, err, want)
	}
}
