package repo

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"

	sha256 "github.com/minio/sha256-simd"
)

const formatVersion = 1

// Kinds of binary objects: byte 4 of the object header.
const (
	kindPack     = 'P'
	kindWAL      = 'W'
	kindPackList = 'L'
	kindDocument = 'D'
)

// Object header, at the start of every binary object.
//
//	0   4   "pgth"
//	4   1   kind
//	5   1   format version
//	6   1   seal: 0 plain, 1 AES-256-GCM
//	7   1   0
//	8   8   the kind's own
//	16  16  salt
const (
	objectMagic      = "pgth"
	objectHeaderSize = 32
)

// checkHeader refuses what is not an object of the kind that its key promises, and returns its salt.
func (s *seals) checkHeader(key string, b []byte, kind byte) (salt, error) {
	switch {
	case len(b) < objectHeaderSize || string(b[:4]) != objectMagic || b[4] != kind || b[7] != 0:
		return salt{}, corrupt(key, "it does not begin as an object of kind %q", kind)
	case b[5] > formatVersion:
		return salt{}, &FormatError{Object: key, Version: int(b[5])}
	case b[5] != formatVersion || b[6] != s.kind():
		return salt{}, corrupt(key, "format version %d, seal %d instead of %d", b[5], b[6], s.kind())
	case (kind == kindPackList || kind == kindDocument) && [8]byte(b[8:16]) != [8]byte{}:
		return salt{}, corrupt(key, "its header has bytes that are to be 0")
	}
	return salt(b[16:objectHeaderSize]), nil
}

// A document is a JSON object whose first members are kind and version and whose last line is a checksum of all the
// bytes before that line, as in PostgreSQL's backup_manifest.
type document struct {
	Kind    string `json:"kind"`
	Version int    `json:"version"`
}

const (
	checksumPrefix  = "  \"checksum\": \""
	checksumSuffix  = "\"\n}\n"
	checksumLineLen = len(checksumPrefix) + 2*sha256Size + len(checksumSuffix)
)

// marshalDocument writes v, a struct that embeds document, with its checksum.
func marshalDocument(v any) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	b = append(bytes.TrimSuffix(b, []byte("\n}")), ",\n"...)
	sum := sha256.Sum256(b)
	b = append(b, checksumPrefix...)
	b = hex.AppendEncode(b, sum[:])
	return append(b, checksumSuffix...), nil
}

// unmarshalDocument verifies the checksum of b and decodes it into v. kind is what the key promises.
func unmarshalDocument(key string, b []byte, kind string, v any) error {
	body := len(b) - checksumLineLen
	if body < 0 {
		return corrupt(key, "it is too short")
	}
	sum := sha256.Sum256(b[:body])
	if string(b[body:]) != checksumPrefix+hex.EncodeToString(sum[:])+checksumSuffix {
		return corrupt(key, "its checksum does not match")
	}
	var d document
	if err := json.Unmarshal(b, &d); err != nil {
		return corrupt(key, "%v", err)
	}
	if d.Kind != kind {
		return corrupt(key, "it is a %q, not a %q", d.Kind, kind)
	}
	if d.Version > formatVersion {
		return &FormatError{Object: key, Version: d.Version}
	}
	if err := json.Unmarshal(b, v); err != nil {
		return corrupt(key, "%v", err)
	}
	return nil
}
