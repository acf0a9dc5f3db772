#!/bin/sh
# Installs what this machine lacks for one purpose, as root on Debian. What is there already is left alone.
#
#   setup.sh build    a Go toolchain
#   setup.sh check    build, make, and gcc for the race detector
#   setup.sh demo     PostgreSQL (any major), fuse3, and build
#   setup.sh test     PostgreSQL 15, 16, 17 and 18, fuse3, and check
#   setup.sh bench    demo, pgbackrest and fio
#   setup.sh suites   PostgreSQL 15 and its own test suites, fio, stress-ng, fuse3, and check
#
# PostgreSQL majors that this Debian does not carry go to ${PGTHAW_PG_PREFIX:-/opt}/pg<major>.
# No database cluster is made, started, stopped or dropped.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
prefix=${PGTHAW_PG_PREFIX:-/opt}
export DEBIAN_FRONTEND=noninteractive PATH="$PATH:/usr/sbin:/sbin:/usr/local/go/bin"

say() { echo "setup.sh: $*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }

# need_root says what is missing and stops unless we may install it.
need_root() {
  if [ "$(id -u)" = 0 ]; then say "installing $*"; return; fi
  say "error: $* is missing, and only root can install it"
  echo "HINT: Run $here/setup.sh as root once." >&2
  exit 1
}

# install_packages takes Debian package names. The lists are refreshed once per run.
install_packages() {
  need_root "$@"
  [ -n "${updated:-}" ] || apt-get update -q >/dev/null || say "warning: apt-get update was incomplete"
  updated=yes
  apt-get install -y -q --no-install-recommends "$@" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
}

# server MAJOR prints the bin directory of a PostgreSQL server that is there, and fails without one.
server() {
  for bin in "/usr/lib/postgresql/$1/bin" "$prefix/pg$1/bin"; do
    if [ -x "$bin/postgres" ]; then echo "$bin"; return; fi
  done
  return 1
}

in_debian() { apt-cache show "$1" >/dev/null 2>&1; }

# debian_server installs a server package without the cluster "main" that Debian would make and start with it.
debian_server() {
  install_packages postgresql-common
  conf=/etc/postgresql-common/createcluster.conf
  cp -p "$conf" "$conf.pgthaw"
  trap 'mv -f "$conf.pgthaw" "$conf"; rm -f "$log"' EXIT
  echo "create_main_cluster = false" >>"$conf"
  install_packages "$1"
  mv -f "$conf.pgthaw" "$conf"
  trap 'rm -f "$log"' EXIT
}

# postgres MAJOR: from this Debian; 16, which no Debian suite carries, from npm; others from another suite.
postgres() {
  server "$1" >/dev/null && return
  if in_debian "postgresql-$1"; then debian_server "postgresql-$1"; return; fi
  have patchelf || [ "$1" = 16 ] || install_packages patchelf
  need_root "PostgreSQL $1 in $prefix/pg$1"
  case $1 in
    16) have npm || install_packages nodejs npm
        "$here/pg-from-npm.sh" "$1" "$prefix/pg$1" ;;
    *)  "$here/pg-from-debian.sh" "$1" "$prefix/pg$1" ;;
  esac
}

# postgres_suites: those of the PostgreSQL 15 that Debian packages, in $prefix/pg15-suites.
postgres_suites() {
  [ -e "$prefix/pg15-suites/lib/regress.so" ] && return
  need_root "PostgreSQL's test suites in $prefix/pg15-suites"
  have bzip2 || install_packages bzip2
  "$here/pg-suites.sh" "$prefix/pg15-suites"
}

any_postgres() {
  for bin in /usr/lib/postgresql/*/bin; do
    [ -x "$bin/postgres" ] && [ -x "$bin/pgbench" ] && return
  done
  debian_server postgresql
}

# The servers refuse to run as root; tests and demo run them as this user.
postgres_user() {
  id postgres >/dev/null 2>&1 && return
  need_root "user postgres"
  have useradd || install_packages passwd
  useradd --system --user-group --home-dir /var/lib/postgresql --shell /bin/bash postgres
}

# Any user may open /dev/fuse where udev made it (mode 0666); where nothing did, as in containers, only root may.
fuse() {
  have fusermount3 || install_packages fuse3
  [ -c /dev/fuse ] || { say "error: there is no /dev/fuse"; exit 1; }
  [ "$(stat -c %a /dev/fuse)" = 666 ] || { need_root "access to /dev/fuse for every user"; chmod 0666 /dev/fuse; }
}

# go fetches the exact toolchain that go.mod names by itself (GOTOOLCHAIN=auto, Go 1.21 and later), so any such Go will do.
go_toolchain() {
  have go && return
  [ ! -r /etc/os-release ] || . /etc/os-release
  case ${VERSION_CODENAME:-} in
    bookworm) backports golang-go ;; # its own Go is 1.19, which cannot fetch another
    *) install_packages golang-go ca-certificates ;;
  esac
}

# backports installs from this release's backports suite, added for the purpose.
backports() {
  need_root "$1 from ${VERSION_CODENAME}-backports"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian ${VERSION_CODENAME}-backports main" \
    >/etc/apt/sources.list.d/pgthaw-backports.list
  updated=
  install_packages -t "${VERSION_CODENAME}-backports" "$1" ca-certificates
}

compiler() { have gcc && [ -e /usr/include/stdlib.h ] || install_packages gcc libc6-dev; }

check_tools() {
  go_toolchain
  have make || install_packages make
  compiler
}

log=$(mktemp "${TMPDIR:-/tmp}/pgthaw-setup.XXXXXX")
trap 'rm -f "$log"' EXIT
case ${1:-} in
  build) go_toolchain ;;
  check) check_tools ;;
  demo)  go_toolchain; any_postgres; fuse ;;
  test)  check_tools; postgres_user; for major in 15 16 17 18; do postgres $major; done; fuse ;;
  bench) go_toolchain; any_postgres; fuse
         have pgbackrest || install_packages pgbackrest
         have fio || install_packages fio ;;
  suites) check_tools; postgres_user; postgres 15; fuse; postgres_suites
         have prove && perl -MIPC::Run -e1 2>/dev/null || install_packages perl libipc-run-perl
         have fio || install_packages fio
         have stress-ng || install_packages stress-ng ;;
  *) echo "usage: setup.sh build|check|demo|test|bench|suites" >&2; exit 2 ;;
esac
