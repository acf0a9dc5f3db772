package recovery

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"pgthaw/repo"
)

// tlsFiles are the settings that name what a server with ssl = on cannot start without, and their defaults.
var tlsFiles = []setting{
	{"ssl_cert_file", "server.crt"}, {"ssl_key_file", "server.key"}, {"ssl_ca_file", ""}, {"ssl_crl_file", ""},
	{"ssl_crl_dir", ""}, {"ssl_dh_params_file", ""},
}

// lostTLSFile is the first of those that a copy, whose user is o, would not find; the zero setting if there is none.
func (c confFiles) lostTLSFile(ctx context.Context, b *repo.Backup, o owner) (setting, error) {
	if on, _ := c.value("ssl"); !isOn(on) {
		return setting{}, nil
	}
	for _, s := range tlsFiles {
		if v, ok := c.value(s.name); ok {
			s.value = v
		}
		if s.value == "" {
			continue
		}
		there, err := hasFile(ctx, b, o, s.value)
		if err != nil || !there {
			return s, err
		}
	}
	return setting{}, nil
}

// isOn reads a boolean setting (bool.c, parse_bool); what is none is not on.
func isOn(value string) bool {
	v := strings.ToLower(value)
	return v != "" && (strings.HasPrefix("true", v) || strings.HasPrefix("yes", v) || v == "on" || v == "1")
}

// hasFile tells whether a file can be read by o: on this host, or in the copy's data directory.
func hasFile(ctx context.Context, b *repo.Backup, o owner, name string) (bool, error) {
	if filepath.IsAbs(name) {
		return asUser(o, func() error { return unix.Access(name, unix.R_OK) }) == nil, nil
	}
	e, err := b.Stat(ctx, path.Join("pgdata", name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && e.Mode.Type() != fs.ModeSymlink, err
}

// checkLibraries refuses to start a server that cannot load what shared_preload_libraries names. Where libraries are
// looked for in other places than PostgreSQL's own, it does not know.
func (s *startPlan) checkLibraries(c confFiles, m *repo.Manifest) error {
	dir := libraryDir(s.postgres)
	if path, ok := c.value("dynamic_library_path"); dir == "" || ok && path != "$libdir" {
		return nil
	}
	var missing []string
	for name := range strings.SplitSeq(c.valueOr(m, "shared_preload_libraries", ""), ",") {
		name = strings.Trim(strings.TrimSpace(name), `"`)
		file := strings.TrimPrefix(name, "$libdir/")
		if !filepath.IsAbs(file) {
			file = filepath.Join(dir, file)
		}
		_, err := os.Stat(strings.TrimSuffix(file, ".so") + ".so")
		if name != "" && errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, name)
		}
	}
	if missing == nil {
		return nil
	}
	return withHint(fmt.Errorf("%w: shared_preload_libraries names %s, which PostgreSQL's %s does not have", ErrServer, strings.Join(missing, ", "), dir),
		"Install the extension's package here. Or leave out --start, set shared_preload_libraries in the copy's postgresql.auto.conf, and start it with pg_ctl.")
}

// libraryDir is $libdir of an installation, "" if it is in no known place: where PL/pgSQL is, which every server has.
func libraryDir(postgres string) string {
	if program, err := filepath.EvalSymlinks(postgres); err == nil {
		postgres = program
	}
	for _, place := range []string{"lib", "lib/postgresql", "lib64", "lib64/pgsql", "lib/pgsql"} {
		dir := filepath.Join(filepath.Dir(postgres), "..", place)
		if _, err := os.Stat(filepath.Join(dir, "plpgsql.so")); err == nil {
			return dir
		}
	}
	return ""
}
