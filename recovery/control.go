package recovery

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The control socket is an abstract one, so that it leaves nothing behind and needs no directory: its name tells the
// data directory. A line of JSON asks, a line answers.
const (
	commandStatus  = "status"
	commandHydrate = "hydrate" // do not hold back any longer
	commandFinish  = "finish"  // hydrate without a limit; it also ends "off"
	commandStop    = "stop"    // take the mounts off and exit
)

type request struct {
	Command string `json:"command"`
}

type reply struct {
	Error  string        `json:"error,omitempty"`
	Busy   bool          `json:"busy,omitempty"` // the error is that the mount is in use
	Status OverlayStatus `json:"status"`
}

// controlTimeout bounds one question and its answer. Counting a million files takes seconds.
const controlTimeout = 30 * time.Second

// maxSocketName is less than sun_path's 108 bytes (unix(7)).
const maxSocketName = 100

// controlAddress is the socket of the overlay at dir, a canonical path.
func controlAddress(dir string) *net.UnixAddr {
	name := "pgthaw:" + dir
	if len(name) > maxSocketName {
		sum := sha256.Sum256([]byte(dir))
		name = "pgthaw:" + hex.EncodeToString(sum[:])
	}
	return &net.UnixAddr{Net: "unix", Name: "@" + name}
}

// errNoDaemon: nobody listens on the control socket.
var errNoDaemon = errors.New("no daemon serves it")

// ask puts one question to the daemon of the overlay at dir. One that is just ending hangs up: it is asked again until it
// answers or is gone. No question does harm twice.
func ask(ctx context.Context, dir, command string) (OverlayStatus, error) {
	deadline := time.Now().Add(endingLimit)
	for pause := newPause(); ; {
		s, err := askOnce(ctx, dir, command)
		if !hungUp(err) || time.Now().After(deadline) || pause.sleep(ctx) != nil {
			return s, err
		}
	}
}

// endingLimit is how long the kernel may take to end a process that was killed, all its threads and sockets.
const endingLimit = 5 * time.Second

func hungUp(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF)
}

func askOnce(ctx context.Context, dir, command string) (OverlayStatus, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", controlAddress(dir).Name)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return OverlayStatus{}, fmt.Errorf("%s: %w", dir, errNoDaemon)
	}
	if err != nil {
		return OverlayStatus{}, fmt.Errorf("ask the daemon of %s: %w", dir, err)
	}
	defer conn.Close()
	// Anybody may open a socket of any name: an ordinary user believes root and itself, root whoever runs a daemon.
	if os.Geteuid() != 0 && !trusted(conn.(*net.UnixConn)) {
		return OverlayStatus{}, fmt.Errorf("the control socket of %s is not its owner's", dir)
	}
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	conn.SetDeadline(time.Now().Add(controlTimeout))
	var r reply
	err = json.NewEncoder(conn).Encode(request{command})
	if err == nil {
		err = json.NewDecoder(conn).Decode(&r)
	}
	switch {
	case err != nil:
		return r.Status, fmt.Errorf("ask the daemon of %s: %w", dir, err)
	case r.Busy:
		return r.Status, fmt.Errorf("%s: %w", dir, syscall.EBUSY)
	case r.Error != "":
		return r.Status, fmt.Errorf("%s: %s", dir, r.Error)
	}
	return r.Status, nil
}

// listen opens the control socket.
func listen(dir string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", controlAddress(dir))
	if err != nil {
		return nil, fmt.Errorf("open the control socket of %s: %w", dir, err)
	}
	return l, nil
}

// serveControl answers until the listener is closed.
func serveControl(l *net.UnixListener, answer func(command string) reply) error {
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
		serveOne(conn, answer)
	}
}

// serveOne answers one question. Whoever asks wrongly, or hangs up, gets nothing.
func serveOne(conn *net.UnixConn, answer func(command string) reply) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(controlTimeout))
	if !trusted(conn) {
		return
	}
	var q request
	if err := json.NewDecoder(conn).Decode(&q); err != nil {
		return
	}
	_ = json.NewEncoder(conn).Encode(answer(q.Command))
}

// trusted holds for root and for the user that runs this.
func trusted(conn *net.UnixConn) bool {
	uid, err := peerUser(conn)
	return err == nil && (uid == 0 || uid == os.Geteuid())
}

// peerUser is who opened the other end of a connection.
func peerUser(conn *net.UnixConn) (uid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	var peerErr error
	err = raw.Control(func(fd uintptr) {
		peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, peerErr); err != nil {
		return 0, err
	}
	return int(peer.Uid), nil
}
