package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"pgthaw/repo"
	"pgthaw/repo/pg"
)

const (
	confFile  = "postgresql.conf"
	autoConf  = "postgresql.auto.conf"
	hbaFile   = "pg_hba.conf"
	identFile = "pg_ident.conf"
)

// recoverySignal asks for recovery to a target; standbySignal, which a standby's backup has, would win over it.
const (
	recoverySignal = "recovery.signal"
	standbySignal  = "standby.signal"
)

// confFiles are the configuration files of a backup; nil where the data directory had none.
type confFiles struct {
	main, auto, hba, ident []byte
	standby                []byte          // standbySignal
	includes               map[string]bool // paths in the data directory that postgresql.conf may include
	lostTLS                setting         // names a file without which the copy could not start; zero if there is none
}

// readConfFiles is for a copy whose server runs as o.
func readConfFiles(ctx context.Context, b *repo.Backup, o owner) (c confFiles, err error) {
	for name, to := range map[string]*[]byte{confFile: &c.main, autoConf: &c.auto, hbaFile: &c.hba, identFile: &c.ident, standbySignal: &c.standby} {
		if *to, err = readSmall(ctx, b, path.Join("pgdata", name)); err != nil {
			return c, err
		}
	}
	c.includes = make(map[string]bool)
	for l := range strings.Lines(string(c.main)) {
		if name, value := confLine(l); strings.HasPrefix(name, "include") && filepath.IsLocal(value) {
			_, err := b.Stat(ctx, path.Join("pgdata", value))
			c.includes[path.Clean(value)] = err == nil
		}
	}
	c.lostTLS, err = c.lostTLSFile(ctx, b, o)
	return c, err
}

// readSmall returns the content of a file of the backup, nil if there is none.
func readSmall(ctx context.Context, b *repo.Backup, name string) ([]byte, error) {
	e, err := b.Stat(ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := b.Open(ctx, e)
	if err != nil {
		return nil, err
	}
	content := make([]byte, f.Size())
	if len(content) == 0 {
		return content, nil
	}
	_, err = f.ReadAt(content, 0)
	return content, err
}

// value is what the files say of a setting, postgresql.auto.conf before postgresql.conf.
func (c confFiles) value(name string) (string, bool) {
	if v, ok := confValue(c.auto, name); ok {
		return v, true
	}
	return confValue(c.main, name)
}

// valueOr is value, then what the manifest recorded of the running server, then def.
func (c confFiles) valueOr(m *repo.Manifest, name, def string) string {
	if v, ok := c.value(name); ok {
		return v
	}
	if v, ok := m.Settings[name]; ok {
		return v
	}
	return def
}

// configuration is what the copy's files will hold that differs from the backup's, by path in the data directory; nil
// for a file that the copy does not have.
type configuration map[string][]byte

// replaces tells whether a file of the backup stays out of the copy, or gives way to another.
func (c configuration) replaces(name string) bool {
	_, ok := c[name]
	return ok
}

// newConfiguration makes the files that let the copy recover, and keep to itself afterwards.
func newConfiguration(o Options, route Route, c confFiles, start *startPlan) configuration {
	settings := inertSettings(route.Manifest.PGVersionNum, c)
	settings = append(settings, hotStandbySettings(route.Manifest, c)...)
	settings = append(settings, recoverySettings(o, route)...)
	if start != nil {
		settings = append(settings, start.settings()...)
	}
	files := configuration{
		autoConf:       withBlock(withoutOutward(c.auto, func(string) bool { return true }), settings),
		recoverySignal: {},
	}
	if route.promoted() {
		files[recoverySignal] = nil
	}
	if c.standby != nil {
		files[standbySignal] = nil
	}
	if c.main == nil {
		files[confFile] = defaultConf(route.Manifest)
	} else if conf := withoutOutward(c.main, func(p string) bool { return c.includes[p] }); len(conf) != len(c.main) {
		files[confFile] = conf
	}
	if c.hba == nil {
		files[hbaFile] = []byte(defaultHBA)
	}
	if c.ident == nil {
		files[identFile] = []byte(defaultIdent)
	}
	return files
}

// inertSettings keep a copy from acting as its original: it must not archive over the original's WAL, clean up its
// archive, follow its primary, wait for its standbys or run its jobs.
func inertSettings(version int, c confFiles) []setting {
	s := []setting{
		{"archive_mode", "off"},
		{"archive_command", ""},
		{"archive_library", ""},
		{"archive_cleanup_command", ""},
		{"recovery_end_command", ""},
		{"primary_conninfo", ""},
		{"primary_slot_name", ""},
		{"synchronous_standby_names", ""},
		{"recovery_min_apply_delay", "0"},
		{"hot_standby", "on"},
		// The directory was synced when it was made (xlog.c's SyncDataDirectory would open every file).
		{"recovery_init_sync_method", "syncfs"},
	}
	if version >= 170000 {
		s = append(s, setting{"sync_replication_slots", "off"}, setting{"synchronized_standby_slots", ""})
	}
	if dir, ok := c.value("log_directory"); ok && filepath.IsAbs(dir) {
		s = append(s, setting{"log_directory", "log"})
	}
	if c.lostTLS.name != "" {
		s = append(s, setting{"ssl", "off"})
	}
	if libraries, _ := c.value("shared_preload_libraries"); strings.Contains(libraries, "pg_cron") {
		s = append(s, setting{"cron.launch_active_jobs", "off"})
	}
	return s
}

// hotStandbyDefaults are the settings that a hot standby needs at least as large as the server had them that wrote the
// WAL (CheckRequiredParameterValues), with PostgreSQL's defaults.
var hotStandbyDefaults = map[string]string{
	"max_connections":           "100",
	"max_locks_per_transaction": "64",
	"max_prepared_transactions": "0",
	"max_wal_senders":           "10",
	"max_worker_processes":      "8",
}

// hotStandbySettings are those that the server had from elsewhere than its files, such as its command line.
func hotStandbySettings(m *repo.Manifest, c confFiles) (s []setting) {
	for _, name := range slices.Sorted(maps.Keys(hotStandbyDefaults)) {
		recorded, ok := m.Settings[name]
		if !ok || c.main == nil {
			continue
		}
		have, ok := c.value(name)
		if !ok {
			have = hotStandbyDefaults[name]
		}
		if recorded != have {
			s = append(s, setting{name, recorded})
		}
	}
	return s
}

// recoverySettings say where the WAL comes from and where recovery ends. The target that counts comes last: PostgreSQL
// takes settings in order and refuses to unset one target while another is set (assign_recovery_target).
func recoverySettings(o Options, route Route) []setting {
	s := []setting{
		{"restore_command", o.RestoreCommand},
		{"recovery_target_timeline", timelineSetting(route)},
		{"recovery_target_action", o.Target.action()},
		{"recovery_target_inclusive", onOff(!o.Target.Exclusive)},
	}
	used := targetSetting(o.Target)
	for _, name := range []string{"recovery_target", "recovery_target_lsn", "recovery_target_name", "recovery_target_time", "recovery_target_xid"} {
		if name != used.name {
			s = append(s, setting{name, ""})
		}
	}
	if used.name == "" {
		return s
	}
	if route.gapAhead {
		// A prefetcher that comes to the gap before replay comes to the target would stop the server (xlogprefetcher.c).
		s = append(s, setting{"recovery_prefetch", "off"})
	}
	return append(s, used)
}

// timelineSetting names the timeline by number: "latest" is for PostgreSQL the newest that there is, whether or not it
// descends from the backup's. A number needs a history file, which the backup's own timeline may not have.
func timelineSetting(route Route) string {
	if route.Timeline == route.startTimeline() {
		return "current"
	}
	return route.Timeline.String()
}

func targetSetting(t Target) setting {
	switch kind, _ := t.kind(); kind {
	case targetTime:
		return setting{"recovery_target_time", formatTime(t.Time)}
	case targetLSN:
		return setting{"recovery_target_lsn", t.LSN.String()}
	case targetXid:
		return setting{"recovery_target_xid", strconv.FormatUint(uint64(t.Xid), 10)}
	case targetName:
		return setting{"recovery_target_name", t.Name}
	case targetImmediate:
		return setting{"recovery_target", "immediate"}
	default:
		return setting{}
	}
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// carried are the recorded settings that a copy without a configuration file of its own should run with. What concerns
// the original's host, network or replication stays behind.
var carried = []string{
	"shared_preload_libraries", "wal_level", "wal_log_hints", "track_commit_timestamp", "max_wal_size", "min_wal_size",
	"shared_buffers", "max_replication_slots", "max_logical_replication_workers", "max_parallel_workers",
	"lc_messages", "lc_monetary", "lc_numeric", "lc_time", "default_text_search_config", "TimeZone",
	"port",
}

// defaultConf is a postgresql.conf for a cluster that kept its own elsewhere, as Debian's do.
func defaultConf(m *repo.Manifest) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "# Written by pgthaw: the original was %s, outside of the data directory.\n", m.ConfigFile)
	b.WriteString("# These settings were in force when the backup was taken.\n")
	names := slices.Concat(slices.Sorted(maps.Keys(hotStandbyDefaults)), carried)
	for _, name := range names {
		if v, ok := m.Settings[name]; ok && !strings.ContainsRune(v, 0) {
			b.WriteString(name + " = " + pg.QuoteConf(v) + "\n")
		}
	}
	return []byte(b.String())
}

const defaultHBA = `# Written by pgthaw: the original lay outside of the data directory.
local   all          all                 peer
host    all          all  127.0.0.1/32   scram-sha-256
host    all          all  ::1/128        scram-sha-256
`

const defaultIdent = "# Written by pgthaw: the original lay outside of the data directory.\n"

// changedFiles are the paths that pg_verifybackup has to be told to ignore.
func (c configuration) changedFiles() []string {
	return slices.Sorted(maps.Keys(c))
}
