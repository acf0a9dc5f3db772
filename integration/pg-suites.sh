#!/bin/sh
# pg-suites.sh PREFIX: the test suites of Debian's own PostgreSQL 15 under PREFIX: src/test, and lib with the modules that the tests load.
# They are of the installed server's version if the archive still has that, for the tests of another fail here and there.
# The system's own packages are not touched: a private apt state finds source and headers. Needs gcc, bzip2 and root.
set -eu
prefix=$1 major=15
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
security=${DEBIAN_SECURITY_MIRROR:-http://deb.debian.org/debian-security}
key=/usr/share/keyrings/debian-archive-keyring.gpg
state=$(mktemp -d "${TMPDIR:-/tmp}/pg-suites.XXXXXX")
trap 'rm -rf "$state"' EXIT
mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/none" "$state/dev" "$state/source"
for kind in deb deb-src; do
  echo "$kind [signed-by=$key] $mirror bookworm main"
  echo "$kind [signed-by=$key] $security bookworm-security main"
done >"$state/sources.list"
cat >"$state/apt.conf" <<C
Dir::Etc::sourcelist "$state/sources.list";
Dir::Etc::sourceparts "$state/none";
Dir::Etc::preferencesparts "$state/none";
Dir::State::lists "$state/lists";
Dir::Cache "$state/cache";
Acquire::Languages "none";
APT::Sandbox::User "root";
C
version=$(dpkg-query -W -f '${Version}' "postgresql-$major")
(
  export APT_CONFIG="$state/apt.conf"
  apt-get update -q >/dev/null
  cd "$state"
  apt-get source -q --download-only "postgresql-$major=$version" >/dev/null 2>&1 ||
    apt-get source -q --download-only "postgresql-$major" >/dev/null
  apt-get download -q "postgresql-server-dev-$major=$version" >/dev/null 2>&1 ||
    apt-get download -q "postgresql-server-dev-$major" >/dev/null
)
tar -xf "$state"/postgresql-*.orig.tar.* -C "$state/source" --strip-components=1
dpkg -x "$state"/postgresql-server-dev-*.deb "$state/dev"
rm -rf "$prefix/src" "$prefix/lib"
mkdir -p "$prefix/src" "$state/lib"
mv "$state/source/src/test" "$prefix/src/test"
gcc -O2 -fPIC -shared -I"$state/dev/usr/include/postgresql/$major/server" -o "$state/lib/regress.so" "$prefix/src/test/regress/regress.c"
for module in autoinc refint; do ln -s "/usr/lib/postgresql/$major/lib/$module.so" "$state/lib/"; done
mv "$state/lib" "$prefix/lib" # last: what is half there is not found
