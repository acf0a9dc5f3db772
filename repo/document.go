package repo

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"

	sha256 "github.com/minio/sha256-simd"
)

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

// putDocument puts v, a struct that embeds document, sealed. The store's errors.
func (r *Repository) putDocument(ctx context.Context, key string, v any) error {
	text, err := marshalDocument(v)
	if err != nil {
		return err
	}
	return r.store.Put(ctx, key, r.sealDocument(key, text))
}

// getDocument reads into v what putDocument put, and returns its text. The store's errors.
func (r *Repository) getDocument(ctx context.Context, key, kind string, v any) (text []byte, err error) {
	object, err := r.get(ctx, key, 0, -1)
	if err != nil {
		return nil, err
	}
	if text, err = r.openDocument(key, object); err != nil {
		return nil, err
	}
	return text, unmarshalDocument(key, text, kind, v)
}

// sealDocument makes the object of a cluster's or backup's document.
func (r *Repository) sealDocument(key string, text []byte) []byte {
	if r.seals.master == nil {
		return text
	}
	salt := newSalt()
	object := append(r.seals.header(kindDocument, [8]byte{}, salt), text...)
	return r.seals.object(kindDocument, key, salt).seal(object, objectHeaderSize)
}

// openDocument returns the document that sealDocument made an object of.
func (r *Repository) openDocument(key string, object []byte) ([]byte, error) {
	if r.seals.master == nil {
		return object, nil
	}
	salt, err := r.seals.checkHeader(key, object, kindDocument)
	if err != nil {
		return nil, err
	}
	return r.seals.object(kindDocument, key, salt).open(object[objectHeaderSize:], objectHeaderSize)
}
