package repo

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
)

// The key of a recovery sheet is an age identity in lines of five groups of five characters. At the end of each line stand
// four hexadecimal digits, the beginning of the SHA-256 of all characters of the key up to there: so a wrong character is
// found, and its line named, before the key is tried.
//
//	AGE-S  ECRET  -KEY-  1HF6F  WKFYV   1a5c

const (
	typedGroup  = 5
	typedGroups = 5 // in a line
	typedBegin  = "AGE-S"
)

// typedLines writes an age identity to be typed in.
func typedLines(identity string) (lines []string) {
	end := 0
	for line := range slices.Chunk([]byte(identity), typedGroup*typedGroups) {
		end += len(line)
		var b strings.Builder
		for group := range slices.Chunk(line, typedGroup) {
			fmt.Fprintf(&b, "%-*s  ", typedGroup, group)
		}
		lines = append(lines, fmt.Sprintf("%-*s %s", typedGroups*(typedGroup+2), b.String(), typedCheck(identity[:end])))
	}
	return lines
}

func typedCheck(key string) string {
	sum := sha256.Sum256([]byte(key))
	return fmt.Sprintf("%x", sum[:2])
}

// isTyped tells what was typed in from a file that a program wrote.
func isTyped(file []byte) bool {
	fields := bytes.Fields(file)
	return len(fields) > 0 && strings.EqualFold(string(fields[0]), typedBegin)
}

// parseTyped reads lines of typedLines, however they are spaced and in whichever case.
func parseTyped(file []byte) ([]byte, error) {
	key, n := "", 0
	for line := range strings.Lines(string(file)) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		n++
		last := len(fields) - 1
		key += strings.ToUpper(strings.Join(fields[:last], ""))
		if !strings.EqualFold(fields[last], typedCheck(key)) {
			return nil, fmt.Errorf("line %d of the recovery sheet's key is mistyped, or its four digits at the end are", n)
		}
	}
	return []byte(key + "\n"), nil
}
