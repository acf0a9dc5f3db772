package ingest

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"pgthaw/repo/pg"
)

// recorded are the settings that go into a backup's manifest: what recovery of a copy depends on, and what tells
// where the files of a cluster lie that are not in its data directory. Some need pg_read_all_settings.
var recorded = []string{
	"archive_mode",
	"block_size",
	"config_file",
	"data_checksums",
	"data_directory",
	"data_directory_mode",
	"full_page_writes",
	"hba_file",
	"ident_file",
	"lc_messages",
	"max_connections",
	"max_locks_per_transaction",
	"max_prepared_transactions",
	"max_replication_slots",
	"max_wal_senders",
	"max_worker_processes",
	"port",
	"server_version",
	"server_version_num",
	"shared_preload_libraries",
	"synchronous_standby_names",
	"TimeZone",
	"track_commit_timestamp",
	"unix_socket_directories",
	"wal_level",
	"wal_segment_size",
	"wal_sender_timeout",
}

// show asks for one setting. A physical replication connection answers SHOW and no other SQL.
func (s *server) show(ctx context.Context, name string) (string, error) {
	results, err := s.conn.Exec(ctx, "SHOW "+name).ReadAll()
	if err != nil {
		return "", err
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 1 {
		return "", fmt.Errorf("SHOW %s: no single value", name)
	}
	return string(results[0].Rows[0][0]), nil
}

// readSettings fills s.settings. What this role may not see is left out and named in the log.
func (s *server) readSettings(ctx context.Context) error {
	s.settings = make(map[string]string, len(recorded))
	var hidden []string
	for _, name := range recorded {
		value, err := s.show(ctx, name)
		if isState(err, stateInsufficientRight) {
			hidden = append(hidden, name)
			continue
		}
		if err != nil {
			return serverError("read setting "+name, err)
		}
		s.settings[name] = value
	}
	if hidden != nil {
		s.log.Warn("settings are not visible to this role and are left out of the manifest; GRANT pg_read_all_settings lets it see them",
			"settings", strings.Join(hidden, ","))
	}
	return nil
}

// number reads a setting that is a plain number.
func (s *server) number(name string) (int, error) {
	n, err := strconv.Atoi(s.settings[name])
	if err != nil {
		return 0, fmt.Errorf("setting %s is %q, not a number", name, s.settings[name])
	}
	return n, nil
}

// units are those that SHOW prints (guc.c, unit_conversion table): bytes, or nanoseconds.
var units = map[string]int64{
	"B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40,
	"us": int64(time.Microsecond), "ms": int64(time.Millisecond), "s": int64(time.Second),
	"min": int64(time.Minute), "h": int64(time.Hour), "d": 24 * int64(time.Hour),
}

// parseUnit reads a setting with a unit, "16MB" or "1min", in bytes or nanoseconds. A bare 0 has none.
func parseUnit(s string) (int64, error) {
	digits := strings.TrimRight(s, "BkMGTusminhd")
	n, err := strconv.ParseInt(digits, 10, 32)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%q is not a number with a unit", s)
	}
	unit, known := units[s[len(digits):]]
	if !known && n != 0 {
		return 0, fmt.Errorf("%q has an unknown unit", s)
	}
	return n * unit, nil
}

// readSegmentSize is wal_segment_size.
func readSegmentSize(setting string) (pg.SegmentSize, error) {
	n, err := parseUnit(setting)
	if err != nil {
		return 0, fmt.Errorf("wal_segment_size: %w", err)
	}
	if size := pg.SegmentSize(n); n <= 1<<30 && size.Valid() {
		return size, nil
	}
	return 0, fmt.Errorf("wal_segment_size %q is not a power of two from 1 MB to 1 GB", setting)
}

// replyInterval is how often the server must hear from us: twice within its wal_sender_timeout, and every ten
// seconds, as pg_receivewal, for what it shows in pg_stat_replication.
func replyInterval(walSenderTimeout string) (time.Duration, error) {
	n, err := parseUnit(walSenderTimeout)
	if err != nil {
		return 0, fmt.Errorf("wal_sender_timeout: %w", err)
	}
	if n == 0 { // no limit
		return 10 * time.Second, nil
	}
	return min(time.Duration(n)/2, 10*time.Second), nil
}
