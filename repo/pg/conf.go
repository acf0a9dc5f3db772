package pg

import "strings"

var confEscapes = strings.NewReplacer("'", "''", `\`, `\\`, "\n", `\n`)

// QuoteConf makes s a string literal of postgresql.conf: guc-file.l reads two quotes as one, a backslash with what
// follows, and no line break. A NUL has no spelling there; s must not hold one.
func QuoteConf(s string) string {
	return "'" + confEscapes.Replace(s) + "'"
}
