package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// suiteStates are the states in which a thawed directory is tested: with holes and never hydrated; hydrated, but served without
// passthrough, as user postgres has it; and hydrated meanwhile, so that the directory leaves the mount under the test.
var suiteStates = []struct {
	name    string
	by      invocation
	hydrate string
}{{"lazy", invocation{}, "off"}, {"hydrated", asPostgres, "auto"}, {"leaving", invocation{}, "8MB"}}

// onSuiteStates runs a test in a directory of a thawed copy on which a server runs, in each state. At the end that server's data
// are right, and so is the directory that finish leaves.
func onSuiteStates(t *testing.T, test func(t *testing.T, c suiteThaw)) {
	suites(t)
	p := postgresql(t, 15)
	for _, state := range suiteStates {
		t.Run(state.name, func(t *testing.T) {
			c := thawForSuite(t, p, state.by, state.hydrate)
			if state.name == "hydrated" {
				waitFor(t, hydrateLimit, "hydration", func() bool { return overlayStatus(t, c.by, c.data).State == "hydrated" })
			}
			c.cluster.pgbench("--client", "2", "--transactions", "100")
			test(t, c)
			st := overlayStatus(t, c.by, c.data)
			t.Logf("at last %+v", st)
			if want := map[string]string{"lazy": "hydrating"}[state.name]; !st.Mounted || want != "" && st.State != want {
				t.Errorf("it ran on a copy that is %+v", st)
			}
			c.pgbenchBalances()
			c.amcheck()
			c.Stop()
			c.by.run(t, "overlay", "finish", c.data).ok(t)
			awaitNoDaemon(t, c.data)
			checkNothingOfOurs(t, c.data)
			if left, _ := filepath.Glob(filepath.Join(c.data, "base/5/tmp-*")); len(left) > 0 {
				t.Errorf("left are %q", left)
			}
			for i := range suiteFiles { // no relations
				_ = os.Remove(suiteFile(c.data, i))
			}
			p.checksums(t, c.data)
		})
	}
}

// TestSuiteFio has fio write over files of the backup, and new ones, and verify what it wrote.
func TestSuiteFio(t *testing.T) {
	onSuiteStates(t, func(t *testing.T, c suiteThaw) {
		const fresh = -1 // no file of the backup
		for i, job := range []struct {
			name string
			args string
			file int
		}{
			{"pages", "--ioengine=psync --rw=randwrite --bs=8k", 0},
			{"synced pages", "--ioengine=psync --rw=randwrite --bs=8k --sync=dsync --number_ios=500", 1},
			{"unaligned", "--ioengine=psync --rw=randwrite --bsrange=512-48k --bs_unaligned=1", 2},
			{"sequential", "--ioengine=psync --rw=write --bs=1M --end_fsync=1", 3},
			{"mapped", "--ioengine=mmap --rw=randwrite --bs=4k --size=8M", 4},
			{"direct", "--ioengine=libaio --iodepth=16 --direct=1 --rw=randwrite --bs=8k", 5},
			{"threads", "--ioengine=psync --rw=randrw --bs=8k --numjobs=4 --size=4M --offset_increment=4M --thread", 6},
			{"vectors", "--ioengine=pvsync --rw=randwrite --bs=16k --fdatasync=32", 7},
			{"new pages", "--ioengine=psync --rw=randwrite --bs=8k --fallocate=none", fresh},
			{"new allocated", "--ioengine=psync --rw=randwrite --bs=8k --fallocate=posix", fresh},
			{"new mapped", "--ioengine=mmap --rw=randwrite --bs=4k", fresh},
			{"new direct", "--ioengine=libaio --iodepth=16 --direct=1 --rw=randwrite --bs=64k", fresh},
		} {
			name := suiteFile(c.data, job.file)
			fallocate := []string{"--fallocate=none"}
			if job.file == fresh {
				name, fallocate = suiteFile(c.data, 100+i), nil
			}
			args := append(strings.Fields(job.args), "--name=job", "--filename="+name, "--verify=crc32c", "--verify_fatal=1", "--verify_dump=0", "--randseed=17")
			if !strings.Contains(job.args, "--size") {
				args = append(args, "--size=16M")
			}
			out, err := suiteCommand(t, c.by, "/", nil, "fio", append(args, fallocate...)...)
			if err != nil && job.name == "mapped" && strings.Contains(out, "No such device") {
				t.Log("the file that fio maps has become whole meanwhile: see fusefs/doc.go")
			} else if err != nil || strings.Contains(out, "verify: bad") {
				t.Errorf("fio %s: %v\n%s", job.name, err, tail(out))
			}
			if out, err := suiteCommand(t, c.by, "/", nil, "rm", name); err != nil {
				t.Errorf("rm: %v: %s", err, out)
			}
		}
	})
}

// stressors are stress-ng's of file systems. Not here: what wants another file system, privileges or extended attributes, and
// what has nothing to do with the file system under it (bind-mount, binderfs, verity, xattr, procfs, dup, eventfd, fanotify, handle).
var stressors = strings.Fields(`access chdir chmod chown copy-file dentry dir dirdeep dirmany fallocate fcntl fiemap file-ioctl filename flock fpunch
	fsize fstat getdent hdd inotify io iomix lease link locka lockf lockofd mknod mmapfork msync open readahead rename revio seek sendfile splice symlink
	sync-file touch utime aio aiol io-uring`)

// stressFor is how long each stressor runs with two workers, in seconds.
const stressFor = 4

// TestSuiteStress runs stress-ng's file-system stressors, which verify what they do. One that fails has to fail natively too.
func TestSuiteStress(t *testing.T) {
	onSuiteStates(t, func(t *testing.T, c suiteThaw) {
		room, beside := filepath.Join(c.data, "base/5"), filepath.Join(c.dir, "native")
		if err := os.Mkdir(beside, 0o700); err != nil {
			t.Fatal(err)
		}
		ownedByPostgres(t, beside)
		succeeded := 0
		for _, name := range stressors {
			out, err := stress(t, c.by, name, room)
			if err == nil {
				succeeded++
				continue
			}
			nativeOut, nativeErr := stress(t, c.by, name, beside)
			if nativeErr == nil || nativeErr.Error() != err.Error() {
				t.Errorf("stress-ng %s: %v, natively %v\n%s\nnatively\n%s", name, err, nativeErr, tail(out), tail(nativeOut))
				continue
			}
			t.Logf("stress-ng %s: %v, natively as well: %s", name, err, tail(nativeOut))
		}
		t.Logf("%d of %d stressors succeed", succeeded, len(stressors))
		left, _ := filepath.Glob(filepath.Join(room, "stress-open-*")) // it may end between open and unlink
		for _, name := range left {
			if err := os.Remove(name); err != nil {
				t.Error(err)
			}
		}
	})
}

func stress(t *testing.T, v invocation, name, dir string) (string, error) {
	t.Helper()
	args := []string{"--" + name, "2", "--timeout", fmt.Sprint(stressFor), "--verify", "--temp-path", dir}
	if bytes := map[string]string{"hdd": "64m", "iomix": "64m", "fallocate": "16m", "fiemap": "16m", "readahead": "16m", "copy-file": "128m", "revio": "64m"}[name]; bytes != "" {
		args = append(args, "--"+name+"-bytes", bytes)
	}
	return suiteCommand(t, v, dir, nil, "stress-ng", args...)
}
