#!/usr/bin/env bash
# What the tests need and pip does not bring: pgbouncer, where it is missing and this user may install packages.
set -u
PATH=$PATH:/usr/sbin
command -v pgbouncer >/dev/null && exit 0
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo --non-interactive)
if command -v apt-get >/dev/null; then
  "${as_root[@]}" apt-get update --quiet &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends pgbouncer
fi
command -v pgbouncer >/dev/null && exit 0
echo "pgbouncer is missing and could not be installed: tests/behaviour/rpc/test_pgbouncer.py will fail without it" >&2
