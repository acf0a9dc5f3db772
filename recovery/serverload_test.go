package recovery

import (
	"os/exec"
	"testing"
	"time"
)

func TestServerLoad(t *testing.T) {
	var l serverLoad
	at := time.Unix(1_700_000_000, 0)
	for i, c := range []struct {
		pid  int
		used time.Duration
		busy bool
	}{
		{1, time.Hour, false}, // before it was looked at
		{1, time.Hour + 10*time.Millisecond, false},
		{1, time.Hour + 30*time.Millisecond, true},
		{1, time.Hour + 10*time.Millisecond, false}, // a child went away meanwhile
		{2, 2 * time.Hour, false},
		{2, 2*time.Hour + 400*time.Millisecond, true},
	} {
		if got := l.note(at.Add(time.Duration(i)*loadEvery), c.pid, c.used); got != c.busy {
			t.Errorf("at %d: %v", i, got)
		}
	}
	if l.look(func() int { return 0 }) || l.pid != 0 {
		t.Error("a server that is not there is busy")
	}
}

// TestProcessorTime has a shell's child work, ends that and has another work: both count.
func TestProcessorTime(t *testing.T) {
	const each = 50 * time.Millisecond
	work := "sh -c 'while :; do :; done' & child=$!; read line; kill $child; wait $child; "
	cmd := exec.Command("sh", "-c", work+work)
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	for begun := time.Duration(0); begun <= each; begun += each {
		for deadline := time.Now().Add(time.Minute); processorTime(cmd.Process.Pid) < begun+each; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("only %v were used", processorTime(cmd.Process.Pid))
			}
		}
		if _, err := stdin.Write([]byte("\n")); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Log(err) // the shell's code is that of the child it ended
	}
	if got := processorTime(cmd.Process.Pid); got != 0 {
		t.Errorf("when all have ended: %v", got)
	}
}
