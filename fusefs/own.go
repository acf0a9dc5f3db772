package fusefs

import (
	"os"

	"pgthaw/repo"
)

// Own tells what a file of a bare directory has of its own: the ranges in data. What is a hole below limit is that of the
// backup's file at base; "" is none. Nothing is mounted over the directory.
func Own(f *os.File) (base string, limit int64, data []repo.Range, err error) {
	fd := int(f.Fd())
	p, err := readPlaceholder(procPath(fd))
	if err != nil {
		return "", 0, nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return "", 0, nil, err
	}
	for pos := int64(0); pos < info.Size(); {
		hole, end, err := runAt(fd, pos, info.Size())
		if err != nil {
			return "", 0, nil, err
		}
		if !hole {
			data = append(data, repo.Range{From: pos, To: end})
		}
		pos = end
	}
	return p.path, p.limit, data, nil
}
