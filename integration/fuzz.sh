#!/bin/sh
# fuzz.sh TIME: runs every fuzz test of every package for TIME each, and goes on to the next after a failure.
set -u
time=${1:-30s}
status=0
for package in $(go list ./... | grep -v '/integration$'); do
  for name in $(go test -list '^Fuzz' "$package" | grep '^Fuzz'); do
    echo "== $package $name"
    go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" -fuzzminimizetime 10x "$package" || status=1
  done
done
exit $status
