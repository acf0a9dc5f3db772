package fusefs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestApart has threads of their own come and go, with timers: when such a thread gives its processor back, Go's runtime may have to wake
// the one that waits for these, by a descriptor. Without that the process would end, and could not even say why.
func TestApart(t *testing.T) {
	c := startChild(t, "apart", nil)
	if err := c.wait(); err != nil {
		t.Errorf("%v: %q", err, c.lines())
	}
}

func apartChild(_ context.Context, _ []string, ready func()) error {
	ready()
	secret, err := os.Open("/dev/null")
	if err != nil {
		return err
	}
	defer secret.Close()
	for range 300 {
		err = errors.Join(err, apart(-1, func() error { time.Sleep(50 * time.Microsecond); return closedHere(int(secret.Fd())) }),
			apart(int(secret.Fd()), func() error { return unix.Fstat(int(secret.Fd()), new(unix.Stat_t)) }))
	}
	return errors.Join(err, unix.Fstat(int(secret.Fd()), new(unix.Stat_t)))
}

// closedHere fails unless a descriptor and the standard streams are closed on this thread.
func closedHere(fd int) error {
	for _, fd := range []int{0, 1, 2, fd} {
		if err := unix.Fstat(fd, new(unix.Stat_t)); !errors.Is(err, unix.EBADF) {
			return fmt.Errorf("descriptor %d: %v", fd, err)
		}
	}
	return nil
}
