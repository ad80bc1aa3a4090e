"""``examine``: what may be wrong between this machine, the service and the storage. No torch is imported.

Every check says what it found, how bad that is, and what to type next.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from shardbook._disk_cache import DiskCache, cache_directory
from shardbook._trees import open_tree
from shardbook._version import __version__
from shardbook.client import Client
from shardbook.config import ClientConfig
from shardbook.errors import (
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ShardbookError,
    StorageError,
    UnauthenticatedError,
)
from shardbook.status import ServerInfo
from shardbook.stores import encodable

#: Clocks that differ by more make ages and leases confusing, seconds.
CLOCK_S: Final = 5.0
#: A call that takes longer is told, seconds.
SLOW_S: Final = 1.0
#: Packages that everything needs, and those of extras with what lacks without them.
_BASE: Final = ("grpcio", "protobuf", "numpy", "zstandard")
_EXTRAS: Final = {"torch": ("torch", "shardbook.dcp saves and loads"), "google-crc32c": ("checksum", "checksums")}
#: Loading untrusted bytes entries with releases before runs what they say (CVE-2026-24747).
_SAFE_TORCH: Final = (2, 10)


class Health(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    #: Something works less well than it might.
    WARN = "warn"
    #: Something does not work.
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: What was looked at: `python`, a package, `settings`, `server`, `token`, `clock`, `cache`, `store NAME`.
        health: `ok`, `warn` or `fail`.
        detail: What was found.
        next: What to type or set; empty when all is well.
    """

    check: str
    health: Health
    detail: str
    next: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns every attribute under its own name."""
        return {**vars(self), "health": self.health.value}


def examine(
    *, server: str | None = None, timeout_s: float = 5.0, environ: Mapping[str, str] | None = None
) -> Iterator[Finding]:
    """Checks interpreter, packages, settings, server, token, clock, cache and stores; changes nothing.

    Args:
        server: Address; the one that the settings name when None.
        timeout_s: Longest time that a call may take, seconds.
        environ: Environment to read settings from; the process's own when None.

    Yields:
        One finding a check, as it is made.
    """
    yield _python()
    yield from map(_package, _BASE)
    yield from map(_extra, _EXTRAS)
    try:
        config = ClientConfig.from_env(environ)
    except InvalidArgumentError as error:
        yield Finding("settings", Health.FAIL, error.message, "docs/SETTINGS.md lists the settings")
        return
    yield Finding("settings", Health.OK, f"mode {config.mode.value}, {len(config.stores.roots)} stores")
    yield from _of_server(server or config.server, config, timeout_s)
    yield _cache(config)
    for name, root in config.stores.roots.items():
        yield examine_store(name, root)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    is_old = sys.version_info < (3, 11)
    return Finding("python", Health.FAIL if is_old else Health.OK, found, "install Python 3.11 or newer" * is_old)


def _package(name: str) -> Finding:
    try:
        return Finding(name, Health.OK, version(name))
    except PackageNotFoundError:
        return Finding(name, Health.FAIL, "not installed", "pip install shardbook")


def _extra(name: str) -> Finding:
    extra, what = _EXTRAS[name]
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, Health.WARN, f"not installed: no {what}", f"pip install 'shardbook[{extra}]'")
    if name == "torch" and _numbers(found) < _SAFE_TORCH:
        return Finding(name, Health.WARN, f"{found}: loading is safe from 2.10 on", "pip install 'torch>=2.10'")
    return Finding(name, Health.OK, found)


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    digits = [re.sub("[^0-9]", "", part) for part in text.partition("+")[0].split(".")[:2]]
    return tuple(int(part or 0) for part in digits)


def _of_server(address: str | None, config: ClientConfig, timeout_s: float) -> Iterator[Finding]:
    if address is None:
        advice = "`shardbook-server serve` starts one; then set SHARDBOOK_SERVER to what it prints"
        yield Finding("server", Health.WARN, "none is named: saves stay in their directories", advice)
        return
    try:
        client = Client(address, token=config.token, timeout_s=timeout_s, outage_s=min(2.0, timeout_s))
        client.get_server_info()  # opens the connection
        began_s, asked = time.monotonic(), datetime.now(UTC)
        info = client.get_server_info()
        took_s = time.monotonic() - began_s
    except (UnauthenticatedError, PermissionDeniedError) as error:
        yield Finding("server", Health.OK, f"{address} answers")
        yield Finding("token", Health.FAIL, error.message, "set SHARDBOOK_TOKEN to a token that is valid")
        return
    except ShardbookError as error:
        if error.status == "UNIMPLEMENTED":
            yield Finding("server", Health.WARN, f"{address} is of an older release", "upgrade the server")
        else:
            yield Finding("server", Health.FAIL, error.message, f"is SHARDBOOK_SERVER={address} right, and is it up?")
        return
    yield _release(address, info, took_s)
    yield Finding("token", Health.OK, "none is set, and none is asked for" if config.token is None else "accepted")
    yield _clock(info, asked, took_s)


def _release(address: str, info: ServerInfo, took_s: float) -> Finding:
    told = f"{info.version} at {address} over {info.database}, answers in {took_s * 1e3:.1f} ms"
    if took_s > SLOW_S:
        return Finding("server", Health.WARN, told, "is the network between both slow? look at the server's /metrics")
    if _numbers(info.version) < _numbers(__version__):
        return Finding("server", Health.WARN, f"{told}; this is {__version__}", "upgrade the server before its clients")
    return Finding("server", Health.OK, told)


def _clock(info: ServerInfo, asked: datetime, took_s: float) -> Finding:
    ahead_s = (asked - info.time).total_seconds() + took_s / 2
    told = f"{abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} the database's"
    if abs(ahead_s) <= max(CLOCK_S, took_s):
        return Finding("clock", Health.OK, told)
    return Finding("clock", Health.WARN, told, "set the clock: `timedatectl` says whether it is synchronized")


def _cache(config: ClientConfig) -> Finding:
    """Where readers keep what the service answers: there already, or to be made in what is."""
    if not config.cache or not config.cache_bytes:
        return Finding("cache", Health.OK, "off: readers keep nothing")
    advice = "set SHARDBOOK_CACHE_DIR to a directory that can be written"
    chosen = cache_directory(config.cache_dir)
    if chosen is None:
        return Finding("cache", Health.WARN, "this user has no home: nothing is kept", advice)
    root = DiskCache(chosen, config.cache_bytes).root
    there = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    if os.access(there, os.W_OK | os.X_OK):
        return Finding("cache", Health.OK, f"{root} can be written")
    return Finding("cache", Health.WARN, f"{root} cannot be written: nothing is kept", advice)


def examine_store(name: str, root: str) -> Finding:
    """Looks whether the root of a store can be listed."""
    check, advice = f"store {name}", f"SHARDBOOK_STORES has {name}={root}: is it mounted, and may you read it?"
    try:
        count = len(open_tree(root).names(root))
    except (NotFoundError, InvalidArgumentError, PermissionDeniedError, StorageError) as error:
        return Finding(check, Health.FAIL, error.message, advice)
    except OSError as error:
        return Finding(check, Health.FAIL, encodable(f"{root}: {error}"), advice)
    return Finding(check, Health.OK, f"{root} can be listed, {count} names")


__all__ = ["Finding", "Health", "examine", "examine_store"]
