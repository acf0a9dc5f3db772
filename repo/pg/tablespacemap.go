package pg

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// TablespaceMapping is a line of tablespace_map: where a tablespace's directory lay on the server.
type TablespaceMapping struct {
	OID  uint32
	Path string
}

// ParseTablespaceMap reads tablespace_map as xlogrecovery.c's read_tablespace_map does: "OID path" lines, in which a
// backslash makes the next character, a line break too, an ordinary one.
func ParseTablespaceMap(b []byte) ([]TablespaceMapping, error) {
	var mappings []TablespaceMapping
	var line strings.Builder
	escaped := false
	for _, c := range b {
		switch {
		case !escaped && c == '\\':
			escaped = true
			continue
		case escaped || c != '\n' && c != '\r':
			line.WriteByte(c)
		case line.Len() > 0:
			m, err := parseMapping(line.String())
			if err != nil {
				return nil, fmt.Errorf("tablespace_map: %w", err)
			}
			mappings = append(mappings, m)
			line.Reset()
		}
		escaped = false
	}
	if line.Len() > 0 || escaped {
		return nil, errors.New("tablespace_map: the last line does not end")
	}
	return mappings, nil
}

func parseMapping(line string) (TablespaceMapping, error) {
	oid, path, _ := strings.Cut(line, " ")
	v, err := strconv.ParseUint(oid, 10, 32)
	if err != nil || v == 0 || path == "" || strings.IndexByte(path, 0) >= 0 {
		return TablespaceMapping{}, fmt.Errorf("invalid line %q", line)
	}
	return TablespaceMapping{OID: uint32(v), Path: path}, nil
}
