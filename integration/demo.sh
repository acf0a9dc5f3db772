#!/bin/bash
# A disaster and its end, in under three minutes: a throw-away PostgreSQL cluster is backed up and archived, loses a table to
# a DELETE without WHERE, and comes back as of the moment before, thawed and, to compare, restored in full.
#
#   DEMO_SCALE=150   pgbench scale: 150 is a cluster of about 2.3 GB; twice that is needed on disk for a moment
#   DEMO_DIR=/tmp    where the cluster, the repository and the copies are put, and taken away again
#   PGBIN=...        PostgreSQL's programs; default: the newest that is installed
#
# Needs root (the server runs as user postgres, the mount as root), PostgreSQL and fuse3: integration/setup.sh demo.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
scale=${DEMO_SCALE:-150}
parent=${DEMO_DIR:-/tmp}

fail() { echo "demo: error: $1" >&2; [ -z "${2:-}" ] || echo "HINT: $2" >&2; exit 1; }
step() { printf '\n== %s\n' "$*"; }
show() { printf '   $ %s\n' "$*"; }
now()  { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f", b - a }'; }

[ "$(id -u)" = 0 ] || fail "the demo must be run as root" "It starts PostgreSQL as user postgres in a directory of its own, and touches nothing else."
[ -x "$here/pgthaw" ] || fail "$here/pgthaw is not built" "Run make, or make demo."
command -v fusermount3 >/dev/null || fail "fuse3 is missing" "Run integration/setup.sh demo."
if [ -z "${PGBIN:-}" ]; then
  for d in /usr/lib/postgresql/*/bin; do [ -x "$d/pgbench" ] && [ -x "$d/postgres" ] && PGBIN=$d; done
fi
[ -n "${PGBIN:-}" ] || fail "no PostgreSQL is installed" "Run integration/setup.sh demo."
need=$((scale * 16 * 5 / 2 / 1024 + 2))
free=$(df --output=avail -BG "$parent" | tail -1 | tr -dc 0-9)
[ "$free" -ge "$need" ] || fail "$parent has $free GB free, and scale $scale needs $need" "Set DEMO_SCALE lower, or DEMO_DIR to a larger disk."

dir=$(mktemp -d "$parent/pgthaw-demo.XXXXXX")
port=54329
as_postgres() { (cd "$dir" && setpriv --reuid=postgres --regid=postgres --clear-groups env HOME="$dir" "$@"); }
sql() { as_postgres "$PGBIN/psql" -XAtq -v ON_ERROR_STOP=1 -h "$1" -p "$2" -d postgres -c "$3"; }

# Takes away everything that was made, however far it came; ctrl-C ends up here, too.
clean_up() {
  status=$?
  trap '' INT TERM
  set +e
  [ $status = 0 ] || { tail -n 5 "$dir"/*.log "$dir"/*/*.log >&2; } 2>/dev/null
  for data in source restored thawed; do
    [ -e "$dir/$data/postmaster.pid" ] && as_postgres "$PGBIN/pg_ctl" stop -s -m immediate -D "$dir/$data" >/dev/null 2>&1
  done
  mountpoint -q "$dir/thawed" && "$here/pgthaw" overlay discard "$dir/thawed" >/dev/null 2>&1
  mountpoint -q "$dir/thawed" && umount -l "$dir/thawed"
  rm -rf "$dir"
  exit $status
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

install -m 755 "$here/pgthaw" "$dir/pgthaw"
chmod 755 "$dir"
install -d -o postgres -g postgres -m 700 "$dir/source" "$dir/run" "$dir/repository" "$dir/config"
export PGTHAW_REPO=file://$dir/repository
export XDG_CONFIG_HOME=$dir/config  # the repository's key goes there, and away with the rest
pgthaw=$dir/pgthaw

step "A throw-away cluster with pgbench's tables at scale $scale ($("$PGBIN/postgres" --version))"
as_postgres "$PGBIN/initdb" -D "$dir/source" --auth=trust --no-sync >"$dir/initdb.log" 2>&1
cat >>"$dir/source/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$dir/run'
port = $port
max_wal_size = 4GB
shared_buffers = 256MB
CONF
# Loading needs no WAL yet: it is quicker without.
as_postgres "$PGBIN/pg_ctl" start -s -w -D "$dir/source" -l "$dir/run/server.log" -o "-c wal_level=minimal -c max_wal_senders=0 -c fsync=off"
as_postgres "$PGBIN/pgbench" -i -q -s "$scale" -h "$dir/run" -p "$port" postgres >"$dir/pgbench.log" 2>&1
sql "$dir/run" $port "CREATE TABLE orders AS SELECT g AS id, md5(g::text) AS item, g % 1000 AS price FROM generate_series(1, 300000) g"
as_postgres "$PGBIN/pg_ctl" stop -s -w -D "$dir/source"
sync -f "$dir"
cat >>"$dir/source/postgresql.conf" <<CONF
archive_mode = on
archive_command = '$pgthaw --repo $PGTHAW_REPO wal push demo "%p"'
CONF
as_postgres "$PGBIN/pg_ctl" start -s -w -D "$dir/source" -l "$dir/run/server.log"

step "A repository, encrypted, and a backup"
show "pgthaw repo init $PGTHAW_REPO"
as_postgres "$pgthaw" repo init "$PGTHAW_REPO" >/dev/null
show "pgthaw backup demo"
t=$(now)
as_postgres "$pgthaw" backup demo --pg-connection "host=$dir/run port=$port user=postgres dbname=postgres"
backup_s=$(since "$t")
as_postgres "$pgthaw" list

step "Five seconds of work"
as_postgres "$PGBIN/pgbench" -n -c 4 -T 5 -h "$dir/run" -p "$port" postgres | grep -E 'transactions actually|tps ='
want=$(sql "$dir/run" $port "SELECT count(*) || ' orders, ' || sum(price) || ' in total' FROM orders")
history=$(sql "$dir/run" $port "SELECT count(*) FROM pgbench_history")
marked=$(sql "$dir/run" $port "SELECT clock_timestamp()")
sleep 1
echo "   $marked: $want"

step "The mistake"
show "DELETE FROM orders;      -- no WHERE"
sql "$dir/run" $port "DELETE FROM orders"
echo "   $(sql "$dir/run" $port "SELECT clock_timestamp()"): $(sql "$dir/run" $port "SELECT count(*) FROM orders") orders"
switched=$(sql "$dir/run" $port "SELECT pg_walfile_name(pg_switch_wal())")
until [ "$(sql "$dir/run" $port "SELECT coalesce(last_archived_wal >= '$switched', false) FROM pg_stat_archiver")" = t ]; do
  sleep 0.2
  [ "$(sql "$dir/run" $port "SELECT failed_count < 3 FROM pg_stat_archiver")" = t ] || fail "archiving fails"
done

# field FILE NAME: a number or a text of a JSON document
field() { sed -n "s/^ *\"$2\": \"\\{0,1\\}\\([^\",]*\\)\"\\{0,1\\},\\{0,1\\}$/\\1/p" "$1" | head -1; }

# recover COMMAND: does it, checks what came back
recover() {
  show "pgthaw $1 demo latest --target $dir/$2 --to '$marked' --start"
  t=$(now)
  "$pgthaw" "$1" demo latest --target "$dir/$2" --to "$marked" --start --bindir "$PGBIN" --json >"$dir/$2.json"
  socket=$(field "$dir/$2.json" socket_dir)
  at=$(field "$dir/$2.json" port)
  got=$(sql "$socket" "$at" "SELECT count(*) || ' orders, ' || sum(price) || ' in total' FROM orders")
  counted_s=$(since "$t")
  echo "   $got"
  [ "$got" = "$want" ] || fail "the copy has $got; the original had $want"
  [ "$(sql "$socket" "$at" "SELECT count(*) FROM pgbench_history")" = "$history" ] || fail "the copy's history differs"
  as_postgres "$PGBIN/pg_ctl" stop -s -w -m fast -D "$dir/$2"
}

step "Thawed: the cluster as it was at $marked"
recover thaw thawed
thaw_s=$counted_s
"$pgthaw" overlay status "$dir/thawed"
# One that is whole by now is no overlay any more.
"$pgthaw" overlay discard "$dir/thawed" 2>/dev/null || rm -rf "$dir/thawed"

step "The same by a full restore"
recover restore restored

size=$(du -sb "$dir/source" | awk '{ printf "%.2f GB", $1 / 1e9 }')
stored=$(du -sb "$dir/repository" | awk '{ printf "%.2f GB", $1 / 1e9 }')
awk -v size="$size" -v backup="$backup_s" -v stored="$stored" -v thawed="$thaw_s" -v restored="$counted_s" \
    -v thaw="$(field "$dir/thawed.json" ready_ms)" -v restore="$(field "$dir/restored.json" ready_ms)" 'BEGIN {
  printf "\n  size of the cluster   %10s\n  backup                %8.1f s\n  stored, with the WAL  %10s\n", size, backup, stored
  printf "\n  %-30s %10s %14s %8s\n", "", "thaw", "full restore", "sooner"
  printf "  %-30s %8.2f s %12.2f s %7.0fx\n", "first query answered", thaw / 1000, restore / 1000, restore / thaw
  printf "  %-30s %8.2f s %12.2f s %7.0fx\n\n", "lost table back, rows counted", thawed, restored, restored / thawed }'
