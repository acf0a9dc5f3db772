package main

import (
	"testing"
	"time"
)

func TestParseDuration(t *testing.T) {
	for s, want := range map[string]time.Duration{"14d": 14 * 24 * time.Hour, "2w": 14 * 24 * time.Hour, "36h": 36 * time.Hour,
		"90min": 90 * time.Minute, "10s": 10 * time.Second, "0": 0, "0d": 0} {
		if got, err := parseDuration(s); err != nil || got != want {
			t.Errorf("%s is %s, %v, want %s", s, got, err, want)
		}
	}
	for _, s := range []string{"", "d", "14", "14 d", "14m", "1y", "-1d", "+1d", "1.5d", "14D", "99999999999999999999d", "70000w", "1d2h", "0x1d"} {
		if got, err := parseDuration(s); err == nil {
			t.Errorf("%q is %s", s, got)
		}
	}
}

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "8kB": 8192, "500MB": 500 << 20, "10GB": 10 << 30, "2TB": 2 << 40, "0MB": 0} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%s is %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "GB", "10", "10 GB", "10gb", "10G", "-1GB", "1.5GB", "1GBB", "2000000TB"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("%q is %d", s, got)
		}
	}
}
