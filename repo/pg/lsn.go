package pg

import (
	"fmt"
	"strconv"
	"strings"
)

// LSN is a place in the WAL: the number of bytes since its beginning. Zero is no place (InvalidXLogRecPtr).
type LSN uint64

// ParseLSN reads what pg_lsn reads: two hexadecimal halves of one to eight digits, "0/16B3748".
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	if !ok {
		return 0, fmt.Errorf("invalid LSN %q", s)
	}
	h, err1 := parseHex32(hi)
	l, err2 := parseHex32(lo)
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("invalid LSN %q", s)
	}
	return LSN(h)<<32 | LSN(l), nil
}

// parseHex32 reads one to eight hexadecimal digits and nothing else (no sign, no underscore, no 0x).
func parseHex32(s string) (uint32, error) {
	if len(s) > 8 {
		return 0, strconv.ErrRange
	}
	v, err := strconv.ParseUint(s, 16, 32)
	return uint32(v), err
}

// String gives the server's form, "0/16B3748".
func (l LSN) String() string {
	return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l))
}

// MarshalText is String, so that an LSN is text in JSON.
func (l LSN) MarshalText() ([]byte, error) {
	return []byte(l.String()), nil
}

// UnmarshalText is ParseLSN.
func (l *LSN) UnmarshalText(text []byte) error {
	v, err := ParseLSN(string(text))
	if err != nil {
		return err
	}
	*l = v
	return nil
}

// Timeline is a timeline ID. Zero is none; a new cluster is on 1.
type Timeline uint32

// String is decimal, as SQL functions and messages print it.
func (t Timeline) String() string {
	return strconv.FormatUint(uint64(t), 10)
}

// Hex is the eight digits of file names.
func (t Timeline) Hex() string {
	return fmt.Sprintf("%08X", uint32(t))
}
