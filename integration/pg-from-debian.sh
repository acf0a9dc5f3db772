#!/bin/sh
# pg-from-debian.sh MAJOR PREFIX: a PostgreSQL that this Debian release does not carry, out of the release that does,
# with every library it needs, under PREFIX/bin. The system's own packages and libc are not touched: a private apt state
# chooses and downloads, dpkg -x unpacks, patchelf points each binary at the libraries beside it.
# Needs root only to write PREFIX, and patchelf.
set -eu
major=$1 prefix=$2
case $major in
  15) suite=bookworm ;;
  17) suite=trixie ;;
  18) suite=forky ;;
  *) echo "pg-from-debian.sh: no Debian release is known to carry PostgreSQL $major" >&2; exit 1 ;;
esac
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
state=$(mktemp -d "${TMPDIR:-/tmp}/pg-from-debian.XXXXXX")
trap 'rm -rf "$state"' EXIT
mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/debs" "$state/none"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$state/sources.list"
: >"$state/status"
cat >"$state/apt.conf" <<C
Dir::Etc::sourcelist "$state/sources.list";
Dir::Etc::sourceparts "$state/none";
Dir::Etc::preferencesparts "$state/none";
Dir::State::lists "$state/lists";
Dir::Cache "$state/cache";
Dir::State::status "$state/status";
Acquire::Languages "none";
APT::Sandbox::User "root";
C

# Packages that apt would install with the server but that no PostgreSQL binary is linked with.
unused='perl|libperl|libc-l10n|libc-gconv|locales|systemd|libsystemd-shared|sysvinit|procps|libproc2|passwd|login|adduser|debconf|libdebconf|ucf|ssl-cert|openssl$|netbase|base-passwd|libc-bin|postgresql-common|postgresql-client-common|libpam-modules|sensible|libtext|libjson|libgdbm|libdb5|libsemanage|libsepol|libbz2|libllvm|libz3|tzdata|gcc-'
(
  export APT_CONFIG="$state/apt.conf"
  apt-get update -q >/dev/null
  packages=$(apt-get install -s -q --no-install-recommends "postgresql-$major" 2>/dev/null |
    awk '/^Inst/ { print $2 }' | grep -Ev "^($unused)")
  cd "$state/debs" && apt-get download -q $packages >/dev/null
)

mkdir -p "$prefix"
for deb in "$state"/debs/*.deb; do dpkg -x "$deb" "$prefix"; done
rm -rf "$prefix/usr/share/doc" "$prefix/usr/share/man" "$prefix/usr/share/locale" \
  "$prefix/usr/lib/postgresql/$major/lib/bitcode" "$prefix/usr/lib/postgresql/$major"/lib/llvmjit*

bin=$prefix/usr/lib/postgresql/$major/bin
loader=$(ls -d "$prefix"/usr/lib64/ld-linux-*.so.* "$prefix"/lib64/ld-linux-*.so.* \
  "$prefix"/usr/lib/*-linux-gnu/ld-linux-*.so.* "$prefix"/lib/ld-linux-*.so.* 2>/dev/null | head -n 1)
libraries=$(ls -d "$prefix"/usr/lib/*-linux-gnu "$prefix"/lib/*-linux-gnu 2>/dev/null | paste -sd:)
for file in "$bin"/*; do
  [ -f "$file" ] && [ ! -L "$file" ] && head -c 4 "$file" | grep -q ELF || continue
  patchelf --set-interpreter "$loader" --force-rpath --set-rpath "$libraries" "$file"
done
ln -sfn "$bin" "$prefix/bin" # last: a server that is half unpacked is not found
"$prefix/bin/postgres" --version >&2
