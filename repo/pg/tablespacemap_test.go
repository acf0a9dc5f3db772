package pg

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestParseTablespaceMap(t *testing.T) {
	got, err := ParseTablespaceMap([]byte("16384 /mnt/a b\r\n\n4294967295 /c\\\n\\\\\\d\n"))
	want := []TablespaceMapping{{16384, "/mnt/a b"}, {4294967295, "/c\n\\d"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestParseTablespaceMapRefuses(t *testing.T) {
	for _, s := range []string{"1 /a", "1 /a\\\n", "\\", "1\n", "1 \n", " /a\n", "x /a\n", "0 /a\n", "4294967296 /a\n", "1 /\x00\n"} {
		if got, err := ParseTablespaceMap([]byte(s)); err == nil {
			t.Errorf("%q: %+v", s, got)
		}
	}
}

func FuzzParseTablespaceMap(f *testing.F) {
	f.Add([]byte("16384 /mnt/a b\r\n4294967295 /c\\\n\\\\\\d\n"))
	escape := strings.NewReplacer(`\`, `\\`, "\n", "\\\n", "\r", "\\\r") // do_pg_backup_start
	f.Fuzz(func(t *testing.T, b []byte) {
		var m []TablespaceMapping
		var err error
		withinMemory(t, len(b), func() { m, err = ParseTablespaceMap(b) })
		if err != nil {
			return
		}
		var s strings.Builder
		for _, l := range m {
			fmt.Fprintf(&s, "%d %s\n", l.OID, escape.Replace(l.Path))
		}
		if again, err := ParseTablespaceMap([]byte(s.String())); err != nil || !slices.Equal(again, m) {
			t.Errorf("%+v became %+v, %v", m, again, err)
		}
	})
}
