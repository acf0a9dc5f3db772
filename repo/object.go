package repo

const formatVersion = 1

// Kinds of binary objects: byte 4 of the object header.
const (
	kindPack     = 'P'
	kindWAL      = 'W'
	kindPackList = 'L'
	kindDocument = 'D'
	kindEdition  = 'E'
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
