package ingest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// Types of messages that the server sends in answer to BASE_BACKUP (protocol-message-formats in the manual).
const (
	msgCommandComplete  = 'C'
	msgCopyData         = 'd'
	msgCopyDone         = 'c'
	msgCopyOutResponse  = 'H'
	msgDataRow          = 'D'
	msgErrorResponse    = 'E'
	msgNoticeResponse   = 'N'
	msgParameterStatus  = 'S'
	msgReadyForQuery    = 'Z'
	msgRowDescription   = 'T'
	maxMessageBytes     = 1 << 20 // of any message but CopyData, which is never held whole
	messageHeaderBytes  = 5
	messageBufferBytes  = 1 << 20
	maxBaseBackupOutput = 1 << 30 // of a CopyData message: PostgreSQL allocates no more
)

// messages reads the server's messages without holding one whole. pgconn would allocate and copy each, which costs a
// base backup two fifths of its speed.
type messages struct {
	r      *bufio.Reader
	left   int // bytes of the current message's body that have not been read
	notice func(*pgconn.Notice)
}

func newMessages(r io.Reader, notice func(*pgconn.Notice)) *messages {
	return &messages{r: bufio.NewReaderSize(r, messageBufferBytes), notice: notice}
}

// next passes over what is left of the current message and returns the type of the next one. Messages that the server
// may send at any time are dealt with here; its ErrorResponse is a *pgconn.PgError.
func (m *messages) next() (byte, error) {
	for {
		kind, err := m.header()
		if err != nil {
			return 0, err
		}
		switch kind {
		case msgNoticeResponse:
			err = m.passNotice()
		case msgParameterStatus:
		case msgErrorResponse:
			return 0, m.errorResponse()
		default:
			return kind, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

func (m *messages) header() (byte, error) {
	if _, err := m.r.Discard(m.left); err != nil {
		return 0, lost(err)
	}
	header, err := m.r.Peek(messageHeaderBytes)
	if err != nil {
		return 0, lost(err)
	}
	kind, length := header[0], int64(binary.BigEndian.Uint32(header[1:]))-4
	limit := int64(maxMessageBytes)
	if kind == msgCopyData {
		limit = maxBaseBackupOutput
	}
	if length < 0 || length > limit {
		return 0, fmt.Errorf("message %q of %d bytes", kind, length)
	}
	m.left = int(length)
	_, err = m.r.Discard(messageHeaderBytes)
	return kind, err
}

// errLost is the end of the stream where more must come: the server, or the network, is gone.
var errLost = errors.New("the server closed the connection unexpectedly")

// lost is what an error of the connection itself means.
func lost(err error) error {
	var pgErr *pgconn.PgError
	switch {
	case err == nil, errors.As(err, &pgErr): // the server said why
		return err
	case err == io.EOF, err == io.ErrUnexpectedEOF:
		return errLost
	}
	return fmt.Errorf("%w: %w", errLost, err)
}

// body reads what is left of the current message.
func (m *messages) body() ([]byte, error) {
	if m.left > maxMessageBytes {
		return nil, fmt.Errorf("message of %d bytes", m.left)
	}
	b := make([]byte, m.left)
	_, err := io.ReadFull(m.r, b)
	m.left = 0
	return b, lost(err)
}

// read takes at most len(p) bytes of the current message's body.
func (m *messages) read(p []byte) (int, error) {
	n, err := m.r.Read(p[:min(len(p), m.left)])
	m.left -= n
	return n, lost(err)
}

func (m *messages) passNotice() error {
	b, err := m.body()
	if err != nil {
		return err
	}
	var notice pgproto3.NoticeResponse
	if err := notice.Decode(b); err != nil {
		return fmt.Errorf("decode NoticeResponse: %w", err)
	}
	m.notice((*pgconn.Notice)(pgconn.ErrorResponseToPgError((*pgproto3.ErrorResponse)(&notice))))
	return nil
}

func (m *messages) errorResponse() error {
	b, err := m.body()
	if err != nil {
		return err
	}
	var response pgproto3.ErrorResponse
	if err := response.Decode(b); err != nil {
		return fmt.Errorf("decode ErrorResponse: %w", err)
	}
	return pgconn.ErrorResponseToPgError(&response)
}

// expect reads the next message's header, which must be of that type.
func (m *messages) expect(kind byte) error {
	got, err := m.next()
	if err == nil && got != kind {
		err = fmt.Errorf("message %q where %q belongs", got, kind)
	}
	return err
}

// rows reads a result set of that many columns, to its CommandComplete. A NULL is a nil value.
func (m *messages) rows(columns int) (rows [][][]byte, err error) {
	if err := m.expect(msgRowDescription); err != nil {
		return nil, err
	}
	for {
		kind, err := m.next()
		if err != nil {
			return nil, err
		}
		switch kind {
		case msgCommandComplete:
			return rows, nil
		case msgDataRow:
		default:
			return nil, fmt.Errorf("message %q among rows", kind)
		}
		row, err := m.row(columns)
		if err != nil {
			return nil, err
		}
		rows = append(rows, row)
	}
}

func (m *messages) row(columns int) ([][]byte, error) {
	b, err := m.body()
	if err != nil {
		return nil, err
	}
	var row pgproto3.DataRow
	if err := row.Decode(b); err != nil {
		return nil, fmt.Errorf("decode DataRow: %w", err)
	}
	if len(row.Values) < columns {
		return nil, errors.New("row with too few columns")
	}
	return row.Values, nil
}
