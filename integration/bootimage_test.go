package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// imageJSON is what these tests read of a boot image in JSON.
type imageJSON struct {
	ID          string `json:"id"`
	Kind        string `json:"kind"`
	LSN         string `json:"lsn"`
	Timeline    int    `json:"timeline"`
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
	t.Parallel()
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
	targets := []struct {
		kind        string // of the image that is to be used
		args        []string
		least, most int
	}{
		{"promoted", []string{"--to-immediate"}, least, most},
		{"recovery", nil, all, all},
		{"recovery", []string{"--to-name", m.name}, m.n, m.n},
		{"", []string{"--to-immediate", "--action", "pause"}, least, most},
		{"", []string{"--to-immediate", "--no-boot-image"}, least, most},
		{"recovery", []string{"--to-name", m.name, "--action", "pause"}, m.n, m.n},
		{"recovery", []string{"--to", picked.at.Format("2006-01-02T15:04:05.000000Z")}, m.n + 1, m.n + 1},
		{"recovery", []string{"--to-xid", fmt.Sprint(picked.xid), "--exclusive"}, m.n, m.n},
		{"recovery", []string{"--to-lsn", picked.after.String()}, from, to},
	}
	if s.major == 16 || s.major == 17 {
		targets = targets[:3]
	}
	for _, target := range targets {
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

// TestBootImageWithoutArchive: where nothing lies behind the backup, its promoted image is the end of WAL, too; no longer when there is
// WAL behind it.
func TestBootImageWithoutArchive(t *testing.T) {
	t.Parallel()
	c := newCluster(t, postgresql(t, 17), clusterOptions{})
	dir := postgresDir(t)
	a := archived{c, filepath.Join(dir, "repo")}
	a.pgthaw(t, "repo", "init").ok(t)
	c.SQL("CREATE TABLE seen AS SELECT 'before' AS x")
	a.backupWithImages(t)
	thaw := func(kind, rows string) {
		t.Helper()
		see := func(c *cluster) {
			if got := c.SQL("SELECT string_agg(x, ' ' ORDER BY x) FROM seen"); got != rows {
				t.Errorf("there are %q, want %q", got, rows)
			}
		}
		if r := a.thawTo(t, nil, see); r.kind() != kind {
			t.Errorf("thaw to the end of WAL used image %q, want %q", r.kind(), kind)
		}
	}
	thaw("promoted", "before")
	segment := c.SQL("INSERT INTO seen VALUES ('behind'); SELECT pg_walfile_name(pg_current_wal_lsn())")
	c.SQL("SELECT pg_switch_wal()")
	a.pgthaw(t, "wal", "push", "main", filepath.Join(c.data, "pg_wal", segment)).ok(t)
	thaw("", "before behind")
}

// imageMaker is a run of boot-image with a place for its temporary directory.
func (a archived) imageMaker(dir string, more ...string) []string {
	return append([]string{"--repo", a.repo, "--json", "boot-image", "main", "--bindir", a.bin, "--scratch", dir}, more...)
}

// madeImages runs boot-image to its end; it leaves nothing behind.
func (a archived) madeImages(t *testing.T, dir string, more ...string) (made []imageJSON) {
	t.Helper()
	var r struct {
		Made []imageJSON `json:"made"`
	}
	pgthaw(t, a.imageMaker(dir, more...)...).ok(t).into(t, &r)
	nothingLeft(t, dir)
	return r.Made
}

func nothingLeft(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("in %s are left %v (%v)", dir, left, err)
	}
	waitFor(t, stopLimit, "the end of all that works in "+dir, func() bool { return len(processesNaming(dir)) == 0 })
}

// TestBootImageLife: an image is brought forward, over a change of timeline, too; its maker is interrupted and killed; it is copied, damaged, pruned.
func TestBootImageLife(t *testing.T) {
	t.Parallel()
	p := postgresql(t, 16)
	a := newArchived(t, p, clusterOptions{pgbenchScale: 2})
	l := startLedger(t, a.cluster, 2)
	l.waitCommits(20)
	b := a.newest(t)
	l.waitCommits(20)
	early := l.Mark("early")
	dir := tempDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, end := range []syscall.Signal{syscall.SIGKILL, syscall.SIGINT} {
		a.endMaker(t, dir, end)
	}
	if made := a.madeImages(t, dir); len(made) != 1 || made[0].Kind != "promoted" {
		t.Fatalf("made %+v", made)
	}
	l.waitCommits(20)
	archivedCheckpoint(t, a.cluster)
	first := a.madeImages(t, dir)
	if len(first) != 1 || first[0].Kind != "recovery" {
		t.Fatalf("made %+v, want one to go on from", first)
	}
	if again := a.madeImages(t, dir); len(again) > 0 {
		t.Fatalf("made %+v again", again)
	}
	late := l.Mark("late")
	l.waitCommits(20)
	l.Stop()

	r := a.Replica() // archives under the same name once it is promoted
	want := a.SQL("SELECT pg_current_wal_lsn()")
	waitFor(t, time.Minute, "the standby to follow", func() bool {
		return r.SQL("SELECT pg_last_wal_replay_lsn() >= '"+want+"'") == "t"
	})
	a.Stop()
	r.SQL("SELECT pg_promote()")
	l.source = r
	l.write(2)
	l.waitCommits(20)
	l.Stop()

	archivedCheckpoint(t, r)
	r.Stop()
	second := a.madeImages(t, dir, "--refresh")
	if len(second) != 1 || second[0].Timeline != 2 || second[0].LSN == first[0].LSN {
		t.Fatalf("made %+v after %+v, want one on timeline 2", second, first)
	}
	all := len(l.commits)
	a.sees(t, l, "recovery", all)
	a.sees(t, l, "", early.n, "--to-name", "early", "--timeline", "1")
	a.sees(t, l, "recovery", late.n, "--to-name", "late", "--timeline", "1") // from the first one
	if again := a.madeImages(t, dir, "--refresh"); len(again) > 0 {
		t.Errorf("made %+v although nothing is new", again)
	}
	t.Run("damage", func(t *testing.T) { a.testDamagedImage(t, l, b) })
	t.Run("prune", func(t *testing.T) { a.testPrunedImages(t, l, r) })
}

// archivedCheckpoint makes a checkpoint, and waits until the WAL with it is archived.
func archivedCheckpoint(t *testing.T, c *cluster) {
	t.Helper()
	c.SQL("CHECKPOINT")
	segment := c.SQL("SELECT pg_walfile_name(pg_switch_wal())")
	waitFor(t, time.Minute, segment+" to be archived", func() bool {
		return c.SQL("SELECT last_archived_wal >= '"+segment+"' FROM pg_stat_archiver") == "t"
	})
}

// sees thaws to a target, by the way that is expected, and counts commits.
func (a archived) sees(t *testing.T, l *ledger, kind string, n int, args ...string) {
	t.Helper()
	r := a.thawTo(t, nil, func(c *cluster) { l.check(c, n, n) }, args...)
	t.Logf("%q: image %+v, ready after %d ms", args, r.Image, r.ReadyMS)
	if r.kind() != kind {
		t.Errorf("%q used image %q, want %q", args, r.kind(), kind)
	}
}

// endMaker ends a maker of images while its server runs. Killed, it leaves what the next one removes; but its server ends with it.
func (a archived) endMaker(t *testing.T, dir string, signal syscall.Signal) {
	t.Helper()
	maker := invocation{}.start(t, a.imageMaker(dir)...)
	running := func() bool { return len(processesNaming("postgres\x00-D\x00"+dir)) > 0 }
	waitFor(t, startLimit, "the maker's server", func() bool { return running() || maker.down() })
	code := maker.end(signal)
	waitFor(t, stopLimit, "the end of the maker's server", func() bool { return !running() })
	if signal == syscall.SIGINT {
		if code != 130 {
			t.Errorf("interrupted: exit code %d\n%s", code, maker.text())
		}
		nothingLeft(t, dir)
	}
	if images := a.imagesOf(t); len(images) > 0 {
		t.Errorf("%v left %+v", signal, images)
	}
}

func (a archived) imagesOf(t *testing.T) []imageJSON {
	t.Helper()
	var backups []struct {
		Images []imageJSON `json:"boot_images"`
	}
	a.pgthaw(t, "list", "main", "--json").ok(t).into(t, &backups)
	return backups[0].Images
}

// testDamagedImage: who thaws is told, and gets the backup.
func (a archived) testDamagedImage(t *testing.T, l *ledger, b listed) {
	copied := filepath.Join(tempDir(t), "repo")
	if out, err := exec.Command("cp", "-a", a.repo, copied).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	packs, err := filepath.Glob(filepath.Join(copied, "packs", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(filepath.Join(copied, "backups", "main", b.ID+".json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pack := range packs {
		info, err := os.Stat(pack)
		if err != nil {
			t.Fatal(err)
		}
		if info.ModTime().After(before.ModTime()) {
			if err := os.Truncate(pack, info.Size()/2); err != nil {
				t.Fatal(err)
			}
		}
	}
	data := newTarget(t)
	var r booted
	v := invocation{env: unseen(copied)}
	v.run(t, "--json", "thaw", "main", "latest", "--target", data, "--bindir", a.bin, "--start", "--hydrate", "off").exits(t, 0).into(t, &r)
	if r.Image != nil {
		t.Errorf("the damaged image %+v is used", r.Image)
	}
	c := r.server(t, a.installation, data)
	l.check(c, len(l.commits), len(l.commits))
	c.StopImmediate()
	pgthaw(t, "overlay", "discard", data).ok(t)
	v.run(t, "repo", "check", "--read-data").exits(t, 16)
}

// testPrunedImages: a backup's older image goes, and all of them with the backup; nothing else does.
func (a archived) testPrunedImages(t *testing.T, l *ledger, r *cluster) {
	if n := len(a.imagesOf(t)); n != 3 {
		t.Fatalf("%d images, want 3", n)
	}
	a.pgthaw(t, "repo", "prune", "--keep-last", "1", "--grace", "0s", "--yes").ok(t)
	if n := len(a.imagesOf(t)); n != 2 {
		t.Errorf("%d images after a prune, want 2", n)
	}
	a.pgthaw(t, "repo", "check", "--read-data").ok(t)
	a.sees(t, l, "recovery", len(l.commits))
	r.Start()
	a.pgthaw(t, "backup", "main", "--pg-connection", r.dsn("postgres")).ok(t)
	a.pgthaw(t, "repo", "prune", "--keep-last", "1", "--grace", "0s", "--yes").ok(t)
	if images := a.imagesOf(t); len(images) > 0 {
		t.Errorf("images %+v after their backup went", images)
	}
	a.pgthaw(t, "repo", "check", "--read-data").ok(t)
}

// TestBootImageTablespace: no server of ours replays the making of a tablespace, whose directory the original uses on this host.
func TestBootImageTablespace(t *testing.T) {
	t.Parallel()
	a := newArchived(t, postgresql(t, 17), clusterOptions{})
	a.backup(t)
	location := filepath.Join(a.dir, "late")
	if err := os.Mkdir(location, 0o700); err != nil {
		t.Fatal(err)
	}
	ownedByPostgres(t, location)
	a.SQL("CREATE TABLESPACE late LOCATION '" + location + "'")
	a.SQL("CREATE TABLE kept TABLESPACE late AS SELECT 42 AS answer")
	archivedCheckpoint(t, a.cluster)
	var r struct {
		Made      []imageJSON `json:"made"`
		NoForward string      `json:"no_forward"`
	}
	dir := tempDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	before := tree(t, location)
	pgthaw(t, a.imageMaker(dir)...).ok(t).into(t, &r)
	nothingLeft(t, dir)
	if len(r.Made) != 1 || r.Made[0].Kind != "promoted" || !strings.Contains(r.NoForward, location) {
		t.Errorf("made %+v, and %q; want the backup's end alone, because of %s", r.Made, r.NoForward, location)
	}
	sameTrees(t, tree(t, location), before)
}
