package recovery

import (
	"errors"
	"testing"
	"time"
)

func TestTargetKind(t *testing.T) {
	for _, c := range []struct {
		target Target
		want   targetKind
		err    error
	}{
		{Target{}, targetEnd, nil},
		{Target{LSN: 1, Action: "pause", Timeline: "0x1F"}, targetLSN, nil},
		{Target{Xid: 3, Exclusive: true}, targetXid, nil},
		{Target{Immediate: true, Timeline: "current"}, targetImmediate, nil},
		{Target{LSN: 1, Name: "x"}, 0, ErrUsage},
		{Target{Action: "stop"}, 0, ErrUsage},
		{Target{Timeline: "newest"}, 0, ErrUsage},
		{Target{Timeline: "0"}, 0, ErrUsage},
	} {
		got, err := c.target.kind()
		if !errors.Is(err, c.err) || err == nil && got != c.want {
			t.Errorf("%+v: %v, %v", c.target, got, err)
		}
	}
}

func TestRecoverySettings(t *testing.T) {
	at := time.Date(2026, 11, 20, 10, 0, 0, 123456000, time.FixedZone("", 3600))
	m := testManifest()
	for _, c := range []struct {
		target Target
		route  Route
		want   map[string]string
		last   string // a target that is set must come after those that are unset
	}{
		{Target{}, Route{Manifest: m, Timeline: 1},
			map[string]string{"recovery_target_timeline": "current", "recovery_target_action": "promote", "recovery_target": "", "recovery_target_xid": ""}, ""},
		{Target{Time: at, Exclusive: true, Action: "pause"}, Route{Manifest: m, Timeline: 3, gapAhead: true},
			map[string]string{"recovery_target_timeline": "3", "recovery_target_action": "pause", "recovery_target_inclusive": "off",
				"recovery_target_time": "2026-11-20 09:00:00.123456 UTC", "recovery_target_lsn": "", "recovery_prefetch": "off"}, "recovery_target_time"},
		{Target{Immediate: true}, Route{Manifest: m, Timeline: 1},
			map[string]string{"recovery_target": "immediate", "recovery_target_time": ""}, "recovery_target"},
	} {
		settings := recoverySettings(Options{Target: c.target, RestoreCommand: "fetch"}, c.route)
		got := make(map[string]string)
		for _, s := range settings {
			got[s.name] = s.value
		}
		c.want["restore_command"] = "fetch"
		for name, want := range c.want {
			if v, ok := got[name]; !ok || v != want {
				t.Errorf("%+v: %s is %q, want %q", c.target, name, v, want)
			}
		}
		if c.last != "" && settings[len(settings)-1].name != c.last {
			t.Errorf("%+v: last is %s", c.target, settings[len(settings)-1].name)
		}
	}
}

func TestParseHydration(t *testing.T) {
	for text, want := range map[string]hydration{
		"": {}, "auto": {}, "off": {off: true}, "50MB": {bytesPerSecond: 50 << 20}, "512kB/s": {bytesPerSecond: 512 << 10},
		"1 GB": {bytesPerSecond: 1 << 30}, "1000": {bytesPerSecond: 1000}, "7B": {bytesPerSecond: 7},
	} {
		got, err := parseHydration(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
		if again, err := parseHydration(got.String()); err != nil || again != want {
			t.Errorf("%q is %q: %+v, %v", text, got, again, err)
		}
	}
	for _, text := range []string{"fast", "-1MB", "0", "MB", "99999999999TB", "1.5MB"} {
		if got, err := parseHydration(text); !errors.Is(err, ErrUsage) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}
