package integration

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// pruned is what these tests read of repo prune --json.
type pruned struct {
	Backups []struct {
		Backup     string `json:"backup"`
		Keep       bool   `json:"keep"`
		Standalone bool   `json:"standalone"`
	} `json:"backups"`
	Collected []struct {
		Backup string `json:"backup"`
	} `json:"collected"`
	Packs struct {
		Packs int `json:"packs"`
	} `json:"packs"`
	WAL []struct {
		First string `json:"first"`
		Last  string `json:"last"`
		Files int    `json:"files"`
		Fate  string `json:"fate"`
	} `json:"wal"`
	WALSpared []struct {
		Reason string `json:"reason"`
	} `json:"wal_spared"`
}

func (p pruned) walFiles(fate string) (n int) {
	for _, r := range p.WAL {
		if r.Fate == fate {
			n += r.Files
		}
	}
	return n
}

// pruneSource is a cluster with five backups and a promotion after the third. Row i, and restore point "row i", came before
// backup i, the last row behind the last backup. Its servers are down.
type pruneSource struct {
	archived
	ids []string
	at  []time.Time // just after the backup before i
}

func newPruneSource(t *testing.T, p installation) *pruneSource {
	t.Helper()
	s := &pruneSource{archived: newArchived(t, p, smallSegments)}
	server, row := s.cluster, 0
	add := func() {
		server.SQL(fmt.Sprintf("CREATE TABLE IF NOT EXISTS rows (i int); INSERT INTO rows VALUES (%d)", row))
		server.SQL(fmt.Sprintf("SELECT pg_create_restore_point('row %d')", row))
		server.fillSegments(2)
		row++
	}
	for i := range 5 {
		if i == 3 {
			standby := s.Replica()
			standby.waitReplayed(s.cluster)
			s.Stop()
			standby.SQL("SELECT pg_promote()")
			server = standby
		}
		if s.at = append(s.at, time.Now()); i == 2 || i == 4 {
			time.Sleep(5 * time.Second) // a window that is to begin before this backup may begin so much late
		}
		add()
		s.backUpStandby(t, server)
	}
	add()
	server.waitArchived()
	server.Stop()
	for _, b := range s.backups(t) {
		s.ids = append(s.ids, b.ID)
	}
	return s
}

// aged gives a copy of the repository two days later: nothing in it waits for anything.
func (s *pruneSource) aged(t *testing.T) *pruneSource {
	t.Helper()
	dir := filepath.Join(tempDir(t), "repo")
	shell(t, "cp -a "+s.repo+" "+dir+" && find "+dir+" -type f -exec touch -d '2 days ago' {} +")
	c := *s
	c.repo = dir
	return &c
}

// window is --keep-window for a window that begins between the backup before i, and i, which is 2 or 4.
func (s *pruneSource) window(i int) string {
	return fmt.Sprintf("--keep-window=%ds", int(time.Since(s.at[i]).Seconds())) // whole seconds: it begins up to one later
}

// prune previews, which changes nothing, prunes, and prunes again, which finds nothing to do; then the repository is whole.
func (s *pruneSource) prune(t *testing.T, args ...string) (p pruned) {
	t.Helper()
	args = append([]string{"repo", "prune", "--json", "--grace", "0"}, args...)
	before := fmt.Sprint(objects(t, s.repo))
	var preview, again pruned
	s.pgthaw(t, args...).ok(t).into(t, &preview)
	if after := fmt.Sprint(objects(t, s.repo)); after != before {
		t.Errorf("a preview changed %s to %s", before, after)
	}
	s.pgthaw(t, append(args, "--yes")...).ok(t).into(t, &p)
	if p.walFiles("delete") != preview.walFiles("delete") || len(p.Collected) != len(preview.Collected) || len(p.WALSpared) > 0 {
		t.Errorf("the preview was %+v, and then %+v was done", preview, p)
	}
	s.pgthaw(t, append(args, "--yes")...).ok(t).into(t, &again)
	if again.walFiles("delete") > 0 || len(again.Collected) > 0 || again.Packs.Packs > 0 {
		t.Errorf("a second prune did %+v", again)
	}
	s.pgthaw(t, "repo", "check", "--read-data").ok(t)
	return p
}

// keeps fails the test unless just these backups are left; those whose number is negative with their own WAL only.
func (s *pruneSource) keeps(t *testing.T, p pruned, want ...int) {
	t.Helper()
	var got []int
	for i, b := range p.Backups {
		switch {
		case b.Standalone:
			got = append(got, -i)
		case b.Keep:
			got = append(got, i)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("kept are %v, want %v", got, want)
	}
	if left := s.backups(t); len(left) != len(want) {
		t.Errorf("%d backups are listed, want %d", len(left), len(want))
	}
}

// recovers fails the test unless a copy of a backup has all rows up to one.
func (s *pruneSource) recovers(t *testing.T, path, backup string, row int, args ...string) result {
	t.Helper()
	data := newTarget(t)
	var got copied
	r := s.copyTo(t, asPostgres, path, backup, data, append(args, "--start")...).ok(t)
	r.into(t, &got)
	c := got.server(t, s.installation, data)
	want := strings.TrimSuffix("0,1,2,3,4,5,"[:2*row+2], ",")
	if rows := c.SQL("SELECT string_agg(i::text, ',' ORDER BY i) FROM rows"); rows != want {
		t.Errorf("%s of %s %v has rows %s, want %s", path, backup, args, rows, want)
	}
	c.StopImmediate()
	discard(t, data)
	return r
}

func (s *pruneSource) reaches(t *testing.T, path string, row int) {
	t.Helper()
	s.recovers(t, path, "latest", row, "--to-name", fmt.Sprintf("row %d", row))
}

func TestPrune(t *testing.T) {
	t.Parallel()
	for _, p := range majors(t) {
		t.Run(p.String(), func(t *testing.T) {
			t.Parallel()
			s := newPruneSource(t, p)
			t.Run("standalone", s.testStandalone)
			if p.major != 15 {
				return
			}
			t.Run("last", s.testKeepLast)
			t.Run("window", s.testKeepWindow)
			t.Run("hold", s.testHold)
			t.Run("no rule", s.testNoRule)
			t.Run("grace", s.testGrace)
		})
	}
}

// testStandalone: a window that begins after the promotion, and older backups that are kept by number.
func (s *pruneSource) testStandalone(t *testing.T) {
	s = s.aged(t)
	p := s.prune(t, s.window(4), "--keep-last", "4")
	s.keeps(t, p, -1, -2, 3, 4)
	if p.walFiles("delete") < 4 {
		t.Errorf("%d WAL files went", p.walFiles("delete"))
	}
	for i, path := range paths {
		alone := s.ids[1+i]
		data := newTarget(t)
		s.copyTo(t, asPostgres, path, alone, data, "--to-name", "row 4").exits(t, 15)
		s.copyTo(t, asPostgres, path, alone, data, "--timeline", "2").exits(t, 15)
		absent(t, data)
		if r := s.recovers(t, path, alone, 1+i); !strings.Contains(r.stdout, `"standalone": true`) {
			t.Errorf("%s does not say that there is no WAL behind:\n%s", path, r.stdout)
		}
	}
	s.recovers(t, "restore", s.ids[1], 1, "--to-immediate")
	s.recovers(t, "restore", s.ids[3], 5)
	s.reaches(t, "thaw", 4)
	text := s.pgthaw(t, "list", "main").ok(t).stdout
	if got := strings.Count(text, "Recoverable to its own end only: "); got != 2 {
		t.Errorf("list shows %d backups without WAL behind:\n%s", got, text)
	}
	s.fetchRefused(t, s.repo, "main", p.gone(t), 200)
}

// gone is a WAL segment that was deleted, the last of the first timeline that was.
func (p pruned) gone(t *testing.T) (name string) {
	t.Helper()
	for _, r := range p.WAL {
		if r.Fate == "delete" && strings.HasPrefix(r.Last, "00000001") {
			name = r.Last[:24]
		}
	}
	if name == "" {
		t.Fatalf("nothing of timeline 1 went: %+v", p.WAL)
	}
	return name
}

func (s *pruneSource) testKeepLast(t *testing.T) {
	s = s.aged(t)
	p := s.prune(t, "--keep-last", "2")
	s.keeps(t, p, 3, 4)
	if len(p.Collected) != 3 || p.Packs.Packs == 0 {
		t.Errorf("collected are %v, with %d packs", p.Collected, p.Packs.Packs)
	}
	s.copyTo(t, asPostgres, "restore", s.ids[0], newTarget(t)).exits(t, 14)
	s.pgthaw(t, "repo", "hold", "add", "main", s.ids[0], "--reason", "late").exits(t, 14)
	s.recovers(t, "restore", s.ids[3], 5)
	s.recovers(t, "thaw", s.ids[4], 5)
	s.fetchRefused(t, s.repo, "main", p.gone(t), 200)
}

// testKeepWindow: the window begins before the promotion. All places in it can be reached.
func (s *pruneSource) testKeepWindow(t *testing.T) {
	s = s.aged(t)
	s.keeps(t, s.prune(t, s.window(2)), 1, 2, 3, 4)
	for row := 2; row <= 5; row++ {
		s.reaches(t, paths[row%2], row)
	}
	s.recovers(t, "restore", s.ids[1], 4, "--to-name", "row 4")
}

func (s *pruneSource) testHold(t *testing.T) {
	s = s.aged(t)
	var hold struct {
		ID string `json:"id"`
	}
	s.pgthaw(t, "repo", "hold", "add", "main", s.ids[1], "--reason", "audit", "--until", "2099-01-01 00:00", "--json").ok(t).into(t, &hold)
	s.keeps(t, s.prune(t, "--keep-daily", "1"), 1, 4)
	s.recovers(t, "restore", s.ids[1], 5)
	s.pgthaw(t, "repo", "hold", "remove", hold.ID).ok(t)
	s.keeps(t, s.prune(t, "--keep-weekly", "1"), 1)
	s.recovers(t, "thaw", "latest", 5)
}

// testNoRule: only WAL from before the first backup goes.
func (s *pruneSource) testNoRule(t *testing.T) {
	s = s.aged(t)
	p := s.prune(t)
	s.keeps(t, p, 0, 1, 2, 3, 4)
	if p.walFiles("delete") == 0 {
		t.Error("the first row's WAL stays")
	}
	s.recovers(t, "restore", s.ids[0], 5)
}

// testGrace: within the grace period the bytes of what is deleted stay, and so does the WAL.
func (s *pruneSource) testGrace(t *testing.T) {
	s = s.aged(t)
	var p pruned
	s.pgthaw(t, "repo", "prune", "--json", "--keep-last", "1", "--yes").ok(t).into(t, &p)
	s.keeps(t, p, 4)
	if len(p.Collected) > 0 || p.Packs.Packs > 0 || p.walFiles("later") == 0 {
		t.Errorf("within the grace period: %+v", p)
	}
	s.pgthaw(t, "repo", "check", "--maps").ok(t)
	shell(t, "find "+s.repo+" -type f -exec touch -d '2 days ago' {} +")
	s.pgthaw(t, "repo", "prune", "--json", "--yes").ok(t).into(t, &p)
	if len(p.Collected) != 4 || p.Packs.Packs == 0 || p.walFiles("delete") == 0 {
		t.Errorf("when the grace period is over: %+v", p)
	}
	s.pgthaw(t, "repo", "check", "--read-data").ok(t)
	s.recovers(t, "restore", "latest", 5)
}
