package recovery

import (
	"bytes"
	"path"
	"path/filepath"
	"strings"

	"pgthaw/repo/pg"
)

// setting is a line of a configuration file.
type setting struct{ name, value string }

// The lines around what we append to a configuration file. Of a name that comes twice the last one counts
// (guc-file.l), so the block goes to the end, and takes an older one's place.
const (
	blockBegin = "# pgthaw: begin of managed settings; the next restore or thaw replaces them"
	blockEnd   = "# pgthaw: end of managed settings"
)

// withBlock returns conf with settings in a managed block at its end.
func withBlock(conf []byte, settings []setting) []byte {
	conf = withoutBlock(conf)
	if len(conf) > 0 && !bytes.HasSuffix(conf, []byte("\n")) {
		conf = append(conf, '\n')
	}
	conf = append(conf, blockBegin+"\n"...)
	for _, s := range settings {
		conf = append(conf, s.name+" = "+pg.QuoteConf(s.value)+"\n"...)
	}
	return append(conf, blockEnd+"\n"...)
}

// withoutBlock returns a copy of conf without managed blocks.
func withoutBlock(conf []byte) []byte {
	var out []byte
	inside := false
	for l := range bytes.Lines(conf) {
		switch text := string(bytes.TrimSpace(l)); {
		case text == blockBegin:
			inside = true
		case text == blockEnd && inside:
			inside = false
		case !inside:
			out = append(out, l...)
		}
	}
	return out
}

// confLine splits a line of a configuration file; name is lower case, and empty if the line sets nothing.
func confLine(text string) (name, value string) {
	text = strings.TrimSpace(text)
	end := strings.IndexAny(text, " \t=#'")
	if end <= 0 {
		return "", ""
	}
	name = strings.ToLower(text[:end])
	rest := strings.TrimLeft(text[end:], " \t")
	rest = strings.TrimLeft(strings.TrimPrefix(rest, "="), " \t")
	if strings.HasPrefix(rest, "'") {
		return name, unquoteConf(rest[1:])
	}
	value, _, _ = strings.Cut(rest, "#")
	return name, strings.TrimSpace(value)
}

// unquoteConf reads the rest of a string literal, as GUC_scanstr does; octal escapes are left as they are.
func unquoteConf(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\'' && i+1 < len(s) && s[i+1] == '\'':
			i++
			b.WriteByte('\'')
		case s[i] == '\'':
			return b.String()
		case s[i] == '\\' && i+1 < len(s):
			i++
			b.WriteByte(unescapeConf(s[i]))
		default:
			b.WriteByte(s[i])
		}
	}
	return b.String()
}

func unescapeConf(c byte) byte {
	if i := strings.IndexByte("bfnrt", c); i >= 0 {
		return "\b\f\n\r\t"[i]
	}
	return c
}

// confValue is what a file sets name to. Files that it includes are not looked into.
func confValue(conf []byte, name string) (value string, ok bool) {
	for l := range bytes.Lines(conf) {
		if n, v := confLine(string(l)); n == name {
			value, ok = v, true
		}
	}
	return value, ok
}

// outward are the settings that tie a data directory to files elsewhere on the host it came from.
var outward = map[string]bool{
	"data_directory": true, "hba_file": true, "ident_file": true, "external_pid_file": true,
}

// withoutOutward turns the lines that lead out of the data directory into comments: the settings of that kind, and
// includes of files that are not in the backup, as exists tells, which takes a path relative to the data directory.
func withoutOutward(conf []byte, exists func(path string) bool) []byte {
	var out []byte
	for l := range bytes.Lines(conf) {
		name, value := confLine(string(l))
		if outward[name] || lostInclude(name, value, exists) {
			out = append(out, "# pgthaw: leads out of the data directory: "...)
		}
		out = append(out, l...)
	}
	return out
}

func lostInclude(name, value string, exists func(string) bool) bool {
	if name != "include" && name != "include_dir" && name != "include_if_exists" {
		return false
	}
	return filepath.IsAbs(value) || !exists(path.Clean(value))
}
