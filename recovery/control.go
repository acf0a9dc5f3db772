package recovery

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

// The control socket is an abstract one, so that it leaves nothing behind and needs no directory: its name tells the
// data directory. A line of JSON asks, a line answers.
const (
	commandStatus  = "status"
	commandHydrate = "hydrate" // do not hold back any longer
	commandFinish  = "finish"  // hydrate without a limit; it also ends "off"
	commandStop    = "stop"    // take the mounts off for good and exit: the directory is discarded
	commandWAL     = "wal"     // a file of WAL, whose bytes follow the answer
)

type request struct {
	Command string `json:"command"`
	Cluster string `json:"cluster,omitempty"` // of WAL
	WAL     string `json:"wal,omitempty"`     // its file's name
	Put     string `json:"put,omitempty"`     // the name in pg_wal that it may be given there, instead of its bytes
}

type reply struct {
	Error  string        `json:"error,omitempty"`
	Busy   bool          `json:"busy,omitempty"`   // the error is that the mount is in use
	Absent bool          `json:"absent,omitempty"` // the error is repo.ErrNoWAL
	Status OverlayStatus `json:"status,omitzero"`
	Bytes  int64         `json:"bytes,omitempty"` // of WAL
	Put    bool          `json:"put,omitempty"`   // it lies in pg_wal

	wal []byte // follows the line, if it does not lie in pg_wal
}

const (
	// controlTimeout bounds one question and its answer. Counting a million files takes seconds.
	controlTimeout = 30 * time.Second
	// walTimeout is more than the store's driver takes before it gives up.
	walTimeout = 15 * time.Minute
)

func (q request) timeout() time.Duration {
	if q.Command == commandWAL {
		return walTimeout
	}
	return controlTimeout
}

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

// ErrNoDaemon: nobody listens on the overlay's control socket.
var ErrNoDaemon = errors.New("no daemon serves it")

// ask puts one question to the daemon of the overlay at dir.
func ask(ctx context.Context, dir, command string) (OverlayStatus, error) {
	r, err := askFor(ctx, dir, request{Command: command})
	return r.Status, err
}

// askFor asks a daemon that is just ending, which hangs up, until it answers or is gone. No question does harm twice.
func askFor(ctx context.Context, dir string, q request) (reply, error) {
	deadline := time.Now().Add(endingLimit)
	for pause := newPause(); ; {
		r, err := askOnce(ctx, dir, q)
		if !hungUp(err) || time.Now().After(deadline) || pause.sleep(ctx) != nil {
			return r, err
		}
	}
}

// endingLimit is how long the kernel may take to end a process that was killed, all its threads and sockets.
const endingLimit = 5 * time.Second

func hungUp(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF)
}

func askOnce(ctx context.Context, dir string, q request) (r reply, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", controlAddress(dir).Name)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return r, fmt.Errorf("%s: %w", dir, ErrNoDaemon)
	}
	if err != nil {
		return r, fmt.Errorf("ask the daemon of %s: %w", dir, err)
	}
	defer conn.Close()
	// Anybody may open a socket of any name: an ordinary user believes root and itself, root whoever runs a daemon.
	if uid, err := peerUser(conn.(*net.UnixConn)); err != nil || os.Geteuid() != 0 && !trusted(uid) {
		return r, fmt.Errorf("the control socket of %s is not its owner's", dir)
	}
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	conn.SetDeadline(time.Now().Add(q.timeout()))
	if r, err = converse(conn, q); err != nil {
		return r, fmt.Errorf("ask the daemon of %s: %w", dir, err)
	}
	return r, r.failure(dir)
}

// converse sends a question and takes in all of the answer.
func converse(conn net.Conn, q request) (r reply, err error) {
	if err := json.NewEncoder(conn).Encode(q); err != nil {
		return r, err
	}
	answer := bufio.NewReader(conn)
	line, err := answer.ReadBytes('\n')
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(line, &r); err != nil || r.Bytes == 0 || r.Put {
		return r, err
	}
	if r.Bytes < 0 || r.Bytes > maxWALFile {
		return r, fmt.Errorf("an answer of %d bytes", r.Bytes)
	}
	r.wal = make([]byte, r.Bytes)
	_, err = io.ReadFull(answer, r.wal)
	return r, err
}

// maxQuestion is more bytes than any question has.
const maxQuestion = 4096

// maxWALFile is the largest segment PostgreSQL has (initdb --wal-segsize).
const maxWALFile = 1 << 30

// failure is what the daemon reported of the overlay at dir.
func (r reply) failure(dir string) error {
	switch {
	case r.Error == "":
		return nil
	case r.Busy:
		return fmt.Errorf("%s: %w", dir, syscall.EBUSY)
	case r.Absent:
		return fmt.Errorf("%s: %w", r.Error, repo.ErrNoWAL)
	default:
		return fmt.Errorf("%s: %s", dir, r.Error)
	}
}

// listen opens the control socket.
func listen(dir string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", controlAddress(dir))
	if err != nil {
		return nil, fmt.Errorf("open the control socket of %s: %w", dir, err)
	}
	return l, nil
}

// serveControl answers until the listener is closed. owner is the user whose data directory it is.
func serveControl(l *net.UnixListener, owner int, answer func(request) reply) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
		serving.Go(func() { serveOne(conn, owner, answer) })
	}
}

// serveOne answers one question. Whoever asks wrongly, or hangs up, gets nothing.
func serveOne(conn *net.UnixConn, owner int, answer func(request) reply) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(controlTimeout))
	uid, err := peerUser(conn)
	if err != nil {
		return
	}
	var q request
	if err := json.NewDecoder(io.LimitReader(conn, maxQuestion)).Decode(&q); err != nil {
		return
	}
	r := reply{Error: fmt.Sprintf("user %d may not ask for that", uid)}
	if trusted(uid) || uid == owner && q.Command == commandWAL {
		r = answer(q)
	}
	conn.SetDeadline(time.Now().Add(controlTimeout))
	if err := json.NewEncoder(conn).Encode(r); err == nil {
		_, _ = conn.Write(r.wal)
	}
}

// trusted holds for root and for the user that runs this.
func trusted(uid int) bool { return uid == 0 || uid == os.Geteuid() }

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
