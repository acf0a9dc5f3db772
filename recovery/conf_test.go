package recovery

import (
	"bytes"
	"testing"
)

func TestWithBlock(t *testing.T) {
	conf := []byte("port = 1\n")
	once := withBlock(conf, []setting{{"restore_command", `it's a\b`}})
	want := "port = 1\n" + blockBegin + "\nrestore_command = 'it''s a\\\\b'\n" + blockEnd + "\n"
	if string(once) != want {
		t.Errorf("got %q, want %q", once, want)
	}
	again := withBlock(append(once, "work_mem = '1MB'\n"...), []setting{{"port", "2"}})
	want = "port = 1\nwork_mem = '1MB'\n" + blockBegin + "\nport = '2'\n" + blockEnd + "\n"
	if string(again) != want {
		t.Errorf("got %q, want %q", again, want)
	}
	if v, _ := confValue(again, "port"); v != "2" {
		t.Errorf("port is %s", v)
	}
	if got := withBlock([]byte("a = 1"), nil); !bytes.HasPrefix(got, []byte("a = 1\n"+blockBegin)) {
		t.Errorf("a last line without its end: %q", got)
	}
}

func TestConfLine(t *testing.T) {
	for text, want := range map[string][2]string{
		"port = 5433":                         {"port", "5433"},
		"  Port 5433 # mine":                  {"port", "5433"},
		"port=5433#mine":                      {"port", "5433"},
		"#port = 5433":                        {"", ""},
		"":                                    {"", ""},
		"archive_command = 'cp ''%p'' \\'x' ": {"archive_command", "cp '%p' 'x"},
		"include_dir 'conf.d'":                {"include_dir", "conf.d"},
		"include'x.conf'":                     {"include", "x.conf"},
		"cron.database_name = 'a'":            {"cron.database_name", "a"},
		"a = 'never ends":                     {"a", "never ends"},
	} {
		if name, value := confLine(text); name != want[0] || value != want[1] {
			t.Errorf("%q: got %q, %q", text, name, value)
		}
	}
}

func TestWithoutOutward(t *testing.T) {
	const mark = "# pgthaw: leads out of the data directory: "
	conf := "data_directory = '/old'\nhba_file='/etc/hba'\ninclude_dir = 'conf.d'\ninclude 'gone.conf'\ninclude_if_exists '/etc/x'\nport = 1\n"
	want := mark + "data_directory = '/old'\n" + mark + "hba_file='/etc/hba'\ninclude_dir = 'conf.d'\n" + mark + "include 'gone.conf'\n" +
		mark + "include_if_exists '/etc/x'\nport = 1\n"
	if got := withoutOutward([]byte(conf), func(p string) bool { return p == "conf.d" }); string(got) != want {
		t.Errorf("got %s", got)
	}
}

// FuzzConf: whatever a backup's configuration holds, our block comes out of it whole, once, and last.
func FuzzConf(f *testing.F) {
	f.Add([]byte("port = 5432\n" + blockBegin + "\nport = '1'\n" + blockEnd + "\nx"))
	f.Add([]byte("a = 'it''s \\' \n\x00"))
	f.Fuzz(func(t *testing.T, conf []byte) {
		s := []setting{{"port", "7"}}
		once := withBlock(conf, s)
		if v, ok := confValue(once, "port"); !ok || v != "7" {
			t.Errorf("port is %q", v)
		}
		if twice := withBlock(once, s); !bytes.Equal(once, twice) {
			t.Errorf("%q became %q", once, twice)
		}
		withoutOutward(conf, func(string) bool { return false })
	})
}
