#!/bin/sh
# Makes one major's golden files with a real server: initdb, a few transactions of every kind that ScanWAL tells apart,
# a base backup, a clean shutdown. Run as the server's user in an empty directory; psql and pg_basebackup may be newer
# than the server; pg_controldata must know its pg_control (15's does 16's).
# usage: make.sh MAJOR SERVER-BINDIR CLIENT-BINDIR CONTROLDATA-BINDIR
# leaves  pg_control.MAJOR  controldata.MAJOR  backup_label.MAJOR  backup_manifest.MAJOR.gz  wal.MAJOR.<segment name>.gz  facts.MAJOR
set -eu
major=$1 server=$2 client=$3 controldata=$4
dir=$PWD/cluster$major port=$((54800 + major))
"$server/initdb" -D "$dir" -U postgres -k --wal-segsize=1 --no-sync >/dev/null
cat >> "$dir/postgresql.conf" <<C
listen_addresses = ''
unix_socket_directories = '$PWD'
port = $port
max_prepared_transactions = 7
max_connections = 33
max_wal_senders = 5
max_locks_per_transaction = 77
max_worker_processes = 9
autovacuum = off
C
"$server/pg_ctl" -D "$dir" -w -l "$dir/log" start >/dev/null
trap '"$server/pg_ctl" -D "$dir" -m immediate stop >/dev/null 2>&1 || :' EXIT
sql() { "$client/psql" -h "$PWD" -p $port -U postgres -XAtq -v ON_ERROR_STOP=1 "$@"; }

"$client/pg_basebackup" -h "$PWD" -p $port -U postgres -D backup$major -X none -c fast -l "golden $major" 2>/dev/null
cp backup$major/backup_label backup_label.$major
gzip -9nc backup$major/backup_manifest > backup_manifest.$major.gz

sql -c 'SELECT pg_switch_wal()' >/dev/null
segment=$(sql -c 'SELECT pg_walfile_name(pg_current_wal_lsn() + 1)')
sql > facts.$major <<S
SET synchronous_commit = on;
CREATE TABLE t AS SELECT 1 AS a;
BEGIN; CREATE TABLE u (a int); SAVEPOINT s; CREATE TABLE v (a int); RELEASE s;
SELECT 'prepared ' || pg_current_xact_id();
PREPARE TRANSACTION 'to be committed';
BEGIN; CREATE TABLE w (a int); DROP TABLE t;
SELECT 'prepared ' || pg_current_xact_id();
PREPARE TRANSACTION 'to be aborted';
COMMIT PREPARED 'to be committed';
ROLLBACK PREPARED 'to be aborted';
SELECT 'restore_point ' || pg_create_restore_point('before the mistake');
INSERT INTO u SELECT generate_series(1, 2000);
BEGIN; DROP TABLE u, v;
SELECT 'prepared ' || pg_current_xact_id();
PREPARE TRANSACTION 'drops';
COMMIT PREPARED 'drops';
BEGIN; INSERT INTO t VALUES (2); ROLLBACK;
SELECT 'switched ' || pg_switch_wal();
S
gzip -9nc "$dir/pg_wal/$segment" > wal.$major.$segment.gz
"$server/pg_ctl" -D "$dir" -w -m fast stop >/dev/null
cp "$dir/global/pg_control" pg_control.$major
LC_ALL=C TZ=UTC "$controldata/pg_controldata" "$dir" | grep -v nonce > controldata.$major
