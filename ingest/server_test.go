package ingest

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestParseUnit(t *testing.T) {
	for _, c := range []struct {
		s    string
		want int64
		ok   bool
	}{
		{"16MB", 16 << 20, true},
		{"1GB", 1 << 30, true},
		{"1min", int64(time.Minute), true},
		{"2500ms", int64(2500 * time.Millisecond), true},
		{"1d", 24 * int64(time.Hour), true},
		{"0", 0, true},
		{"16", 0, false},
		{"-1MB", 0, false},
		{"MB", 0, false},
		{"1 MB", 0, false},
		{"1MBs", 0, false},
	} {
		got, err := parseUnit(c.s)
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("parseUnit(%q) = %d, %v", c.s, got, err)
		}
	}
}

func TestReadSegmentSize(t *testing.T) {
	for s, want := range map[string]uint32{"1MB": 1 << 20, "16MB": 16 << 20, "1GB": 1 << 30, "3MB": 0, "2GB": 0, "512kB": 0, "": 0} {
		got, err := readSegmentSize(s)
		if uint32(got) != want || (err == nil) != (want != 0) {
			t.Errorf("readSegmentSize(%q) = %d, %v", s, got, err)
		}
	}
}

func TestReplyInterval(t *testing.T) {
	for s, want := range map[string]time.Duration{"0": 10 * time.Second, "1min": 10 * time.Second, "5s": 2500 * time.Millisecond} {
		if got, err := replyInterval(s); got != want || err != nil {
			t.Errorf("replyInterval(%q) = %s, %v", s, got, err)
		}
	}
}

func TestReplicationConfig(t *testing.T) {
	t.Setenv("PGPASSFILE", "/dev/null")
	for _, s := range []string{
		"host=h port=5433 user=u dbname=mine",
		"postgres://u@h:5433/mine",
		"postgresql://u@h:5433?dbname=mine",
		"postgres://u@h:5433/mine?application_name=other",
		"postgres://u@h:5433",
		"postgres://u@h:5433/?",
		"postgres://u@/mine?host=h&port=5433&",
	} {
		c, err := replicationConfig(s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		if c.Host != "h" || c.Port != 5433 || c.User != "u" || c.Database != "replication" || c.RuntimeParams["replication"] != "true" {
			t.Errorf("%s: %s:%d user %s database %s, %v", s, c.Host, c.Port, c.User, c.Database, c.RuntimeParams)
		}
		if name := c.RuntimeParams["application_name"]; (name == "other") != strings.Contains(s, "other") {
			t.Errorf("%s: application_name %q", s, name)
		}
	}
}

func TestConfigErrorsKeepSecrets(t *testing.T) {
	for _, s := range []string{"postgres://u:sesame@h:x/", "host=h password=sesame port=x", "postgres://u:sesame@h/%zz", "password='sesame"} {
		if _, err := replicationConfig(s); err == nil || strings.Contains(err.Error(), "sesame") {
			t.Errorf("%s: %v", s, err)
		}
	}
}

// wantRefused checks for an ErrRefused whose text and hint hold the given words.
func wantRefused(t *testing.T, err error, text, hint string) {
	t.Helper()
	var hinted *Error
	if !errors.Is(err, ErrRefused) || !errors.As(err, &hinted) {
		t.Errorf("got %v, want a refusal", err)
		return
	}
	if !strings.Contains(err.Error(), text) || !strings.Contains(hinted.Hint(), hint) {
		t.Errorf("got %q with hint %q; want %q with %q", err, hinted.Hint(), text, hint)
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	bin := oldest(t)
	try := func(conn string) error {
		r := newRepository(t)
		_, err := Backup(t.Context(), r, BackupOptions{Cluster: "main", ConnString: conn})
		for _, below := range []string{"packs", "backups"} {
			if left := objects(t, r, below); left != nil {
				t.Errorf("left behind: %q", left)
			}
		}
		return err
	}
	wantRefused(t, try("host=/nonexistent user=x"), "connect to PostgreSQL", "server running")

	s := initServer(t, bin)
	s.configure("wal_level = minimal", "max_wal_senders = 0")
	s.start()
	wantRefused(t, try(s.connString()), "max_wal_senders", "max_wal_senders")

	s = initServer(t, bin)
	s.configure("max_wal_senders = 1")
	s.start()
	wantRefused(t, try(s.connString()), "max_wal_senders is 1", "at least 2")

	s = initServer(t, bin)
	s.configure("max_wal_senders = 2")
	s.start()
	s.sql("create role nobody login", "create role copier login replication")
	as := func(user string) string { return strings.Replace(s.connString(), "user=postgres", "user="+user, 1) }
	wantRefused(t, try(as("nobody")), "replication", "REPLICATION")
	wantRefused(t, try(as("stranger")), "stranger", "pg_hba.conf")
	other, err := connect(t.Context(), s.connString(), discard)
	if err != nil {
		t.Fatal(err)
	}
	defer other.close(t.Context())
	wantRefused(t, try(s.connString()), "max_wal_senders", "two free WAL senders")
}
