package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// imageJSON is what these tests read of a boot image in JSON.
type imageJSON struct {
	ID          string `json:"id"`
	Kind        string `json:"kind"`
	LSN         string `json:"lsn"`
	StartedBy   string `json:"started_by"`
	StoredBytes int64  `json:"stored_bytes"`
}

// booted is what they read of thaw --json, besides.
type booted struct {
	copied
	ReadyMS int64      `json:"ready_ms"`
	Image   *imageJSON `json:"boot_image"`
}

func (b booted) kind() string {
	if b.Image == nil {
		return ""
	}
	return b.Image.Kind
}

// backupWithImages backs up and makes both boot images.
func (a archived) backupWithImages(t *testing.T) (b listed, images []imageJSON) {
	t.Helper()
	var r struct {
		listed
		Images []imageJSON `json:"boot_images"`
	}
	a.pgthaw(t, "backup", "main", "--json", "--boot-image", "--bindir", a.bin, "--pg-connection", a.dsn("postgres")).ok(t).into(t, &r)
	return r.listed, r.Images
}

// thawTo thaws and starts, and has the test see what it wants of the server.
func (a archived) thawTo(t *testing.T, mapping func(string) []string, see func(*cluster), args ...string) booted {
	t.Helper()
	data := newTarget(t)
	var r booted
	args = append([]string{"--start", "--hydrate", "off"}, args...)
	if mapping != nil {
		args = append(args, mapping(data)...)
	}
	a.copyTo(t, invocation{}, "thaw", "latest", data, args...).ok(t).into(t, &r)
	c := r.server(t, a.installation, data)
	see(c)
	c.StopImmediate()
	pgthaw(t, "overlay", "discard", data).ok(t)
	return r
}

// TestBootImage makes boot images of a backup under load, on every major, and recovers from them to all kinds of targets: what comes of
// that is what the ledger says, and where that leaves room, what comes of the backup itself.
func TestBootImage(t *testing.T) {
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			a := newArchived(t, p, clusterOptions{checksums: true, pgbenchScale: 2, tablespaces: []string{"fast"}}, plainFor(p, 16)...)
			s := &thawSource{archived: a, l: startLedger(t, a.cluster, 2)}
			s.l.waitCommits(50)
			b, images := a.backupWithImages(t)
			if len(images) != 2 || images[0].Kind != "promoted" || images[1].Kind != "recovery" {
				t.Fatalf("images %+v, want both kinds", images)
			}
			s.l.waitCommits(50)
			m := s.l.Mark("here")
			a.cluster.pgbench("--client", "2", "--transactions", "200")
			s.l.waitCommits(50)
			s.l.Stop()
			a.Stop()
			s.testTargets(t, b, m)
			a.testListed(t, b, images)
		})
	}
}

func (s *thawSource) testTargets(t *testing.T, b listed, m moment) {
	l := s.l
	stop, err := parseLSN(b.StopLSN)
	if err != nil {
		t.Fatal(err)
	}
	least, most := l.atLSN(stop, true)
	picked := l.commits[m.n]
	from, to := l.atLSN(picked.after, true)
	all := len(l.commits)
	for _, target := range []struct {
		kind        string // of the image that is to be used
		args        []string
		least, most int
	}{
		{"promoted", []string{"--to-immediate"}, least, most},
		{"", []string{"--to-immediate", "--action", "pause"}, least, most},
		{"", []string{"--to-immediate", "--no-boot-image"}, least, most},
		{"recovery", nil, all, all},
		{"recovery", []string{"--to-name", m.name}, m.n, m.n},
		{"recovery", []string{"--to-name", m.name, "--action", "pause"}, m.n, m.n},
		{"recovery", []string{"--to", picked.at.Format("2006-01-02T15:04:05.000000Z")}, m.n + 1, m.n + 1},
		{"recovery", []string{"--to-xid", fmt.Sprint(picked.xid), "--exclusive"}, m.n, m.n},
		{"recovery", []string{"--to-lsn", picked.after.String()}, from, to},
	} {
		mapping := func(data string) []string { return s.mapping(strings.TrimSuffix(data, "/data"))[:2] }
		n := 0
		r := s.thawTo(t, mapping, func(c *cluster) {
			n = l.check(c, target.least, target.most)
			if !strings.Contains(strings.Join(target.args, " "), "pause") {
				c.amcheck()
			}
		}, target.args...)
		t.Logf("%q: image %q, ready after %d ms, %d commits", target.args, r.kind(), r.ReadyMS, n)
		if r.kind() != target.kind {
			t.Errorf("%q used image %q, want %q", target.args, r.kind(), target.kind)
		}
	}
}

// testListed: list and show say which PostgreSQL has started the backup.
func (a archived) testListed(t *testing.T, b listed, images []imageJSON) {
	for _, args := range [][]string{{"list", "main"}, {"show", "main", b.ID}} {
		out := a.pgthaw(t, args...).ok(t).stdout
		if n := strings.Count(strings.ToLower(out), "started by postgresql "+images[0].StartedBy); n != 2 {
			t.Errorf("%q speaks of %d images, want 2:\n%s", args, n, out)
		}
	}
	var shown struct {
		Images []imageJSON `json:"boot_images"`
	}
	a.pgthaw(t, "show", "main", b.ID, "--json").ok(t).into(t, &shown)
	got, _ := json.Marshal(shown.Images)
	want, _ := json.Marshal(images)
	if string(got) != string(want) {
		t.Errorf("show has %s, want %s", got, want)
	}
	a.pgthaw(t, "repo", "check", "--read-data").ok(t)
}
