package integration

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// mutant is a change to the product's source that the campaign has to notice.
type mutant struct{ name, file, from, to string }

// write is where an overlay answers what goes through it.
const write = "count, err := n.file.writeAt(n.file.open.descriptor(), data, int64(in.Offset))"

var mutants = []mutant{
	{"a write is lost", "fusefs/io.go", write, `if in.Offset%(5*8192) == 0 {
		return uint32(len(data)), fuse.OK
	}
	` + write},
	{"a write, and fsync, is answered seconds before it is done", "fusefs/io.go", write, `late, at := append([]byte(nil), data...), int64(in.Offset)
	go func() {
		_ = unix.Nanosleep(&unix.Timespec{Sec: 5}, nil)
		_, _ = n.file.writeAt(n.file.open.descriptor(), late, at)
	}()
	count, err := len(data), error(nil)`},
}

// TestCrashCampaignFindsFaults runs the campaign with products that have a fault, which it must find in a few cycles. Only in
// long campaigns: it takes minutes.
func TestCrashCampaignFindsFaults(t *testing.T) {
	if os.Getenv("PGTHAW_CRASH_ROUNDS") == "" {
		t.Skip("only in long campaigns: set PGTHAW_CRASH_ROUNDS")
	}
	found := regexp.MustCompile(`(?m)^.*(is lost|rows that nobody committed|sums differ| gives |pg_amcheck|pg_checksums|on a dead mount,|invalid page|PANIC: ).*$`)
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestCrashCampaign$", "-test.count=1", "-test.v")
			cmd.Env = append(os.Environ(), "PGTHAW_BINARY="+m.build(t), "PGTHAW_CRASH_ROUNDS=20", "PGTHAW_CRASH_DIR=")
			out, err := cmd.CombinedOutput()
			saw := found.FindString(string(out))
			if err == nil || saw == "" {
				t.Fatalf("the campaign does not find it: %v\n%s", err, out)
			}
			t.Logf("after %d kills: %s", strings.Count(string(out), " commits: "), strings.TrimSpace(saw))
		})
	}
}

// build builds pgthaw with the fault, which the tree never has.
func (m mutant) build(t *testing.T) string {
	t.Helper()
	file, err := filepath.Abs(filepath.Join("..", m.file))
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(source), m.from) != 1 {
		t.Fatalf("%s does not have, once, %s", m.file, m.from)
	}
	dir := tempDir(t)
	changed, overlay := filepath.Join(dir, "changed.go"), filepath.Join(dir, "overlay.json")
	text, err := json.Marshal(map[string]any{"Replace": map[string]string{file: changed}})
	if err == nil {
		err = os.WriteFile(changed, []byte(strings.Replace(string(source), m.from, m.to, 1)), 0o644)
	}
	if err == nil {
		err = os.WriteFile(overlay, text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "pgthaw")
	build := exec.Command("go", "build", "-buildvcs=false", "-overlay", overlay, "-o", binary, "pgthaw/cmd/pgthaw")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return binary
}
