package repo

import "testing"

func TestHot(t *testing.T) {
	for name, want := range map[string]bool{
		"pgdata/base/5/1259":       true,
		"pgdata/base/5/1249.1":     true,
		"pgdata/base/5/16384":      false,
		"pgdata/base/5/16384_vm":   true,
		"pgdata/base/5/16384_fsm":  true,
		"pgdata/base/5/16384_init": false,
		"pgdata/global/1262":       true,
		"pgdata/pg_xact/0001":      false,
		"tablespaces/1/PG_15/5/99": false,
	} {
		if got := Hot(name, 1<<20); got != want {
			t.Errorf("Hot(%q) = %v", name, got)
		}
	}
	if !Hot("pgdata/pg_xact/0001", 8192) || Hot("pgdata/base/5/2613", 1<<30) {
		t.Error("the size does not count")
	}
}
