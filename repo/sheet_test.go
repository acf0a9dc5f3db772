package repo

import (
	"bytes"
	"strings"
	"testing"
)

func TestSheetKeyIsTypedIn(t *testing.T) {
	k, lines, err := NewSheetKey()
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(lines, "\n")
	for what, typed := range map[string]string{
		"as printed":      text + "\n",
		"in small":        strings.ToLower(text),
		"spaced":          "\n  " + strings.ReplaceAll(text, "  ", "\t ") + "\n\n",
		"with CR":         strings.ReplaceAll(text, "\n", "\r\n"),
		"groups together": strings.ReplaceAll(text, "   ", "."),
	} {
		if what == "groups together" {
			typed = ""
			for _, line := range lines {
				f := strings.Fields(line)
				typed += f[0] + " " + strings.Join(f[1:len(f)-1], "") + " " + f[len(f)-1] + "\n"
			}
		}
		keys, err := ParseKeys([]byte(typed))
		if err != nil || len(keys) != 1 || keys[0].public != k.public {
			t.Errorf("%s: %v, %v", what, keys, err)
		}
	}
}

// TestSheetKeyIsMistyped changes each character, leaves each out, and exchanges lines: the first line that is wrong is named.
func TestSheetKeyIsMistyped(t *testing.T) {
	_, lines, err := NewSheetKey()
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, lines []string, want string) {
		t.Helper()
		_, err := ParseKeys([]byte(strings.Join(lines, "\n")))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	for no, line := range lines {
		name := "line " + string(rune('1'+no)) + " "
		for i := range line {
			if line[i] == ' ' || no == 0 && i < len(typedBegin) {
				continue
			}
			other := byte('Q')
			if line[i] == other {
				other = 'P'
			}
			wrong := append([]string{}, lines...)
			wrong[no] = line[:i] + string(other) + line[i+1:]
			refused("changed to "+wrong[no], wrong, name)
			wrong[no] = line[:i] + line[i+1:]
			refused("left out, "+wrong[no], wrong, name)
		}
	}
	refused("exchanged", []string{lines[0], lines[2], lines[1]}, "line 2 ")
	refused("one line", lines[:1], "neither an age identity")
	refused("without the middle", []string{lines[0], lines[2]}, "line 2 ")
}

func FuzzTypedKey(f *testing.F) {
	_, lines, _ := NewSheetKey()
	f.Add([]byte(strings.Join(lines, "\n")))
	f.Add([]byte("AGE-S"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if !isTyped(b) {
			return
		}
		key, err := parseTyped(b)
		if err != nil {
			return
		}
		again, err := parseTyped([]byte(strings.Join(typedLines(strings.TrimSuffix(string(key), "\n")), "\n")))
		if err != nil || !bytes.Equal(again, key) {
			t.Errorf("%q is read as %q, and then as %q, %v", b, key, again, err)
		}
	})
}
