"""SQLite as Shardbook uses it: which library, how a connection is set up, where a database may lie, what it locks.

Python's driver opens transactions by itself, deferred, at the first write: two writers that both read first then lose
updates silently. So connections are opened with ``isolation_level=None`` and ``Database`` says BEGIN itself.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import QueuePool

from shardbook.core.mounts import network_type
from shardbook.core.names import RunName
from shardbook.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ShardbookError,
    UnavailableError,
)
from shardbook_server.storage import deadline
from shardbook_server.storage.backend import Clock, Sizes, system_clock

_log = logging.getLogger(__name__)

PAGE_SIZE_BYTES: Final = 16_384
_BUSY_TIMEOUT_MS: Final = 30_000
_JOURNAL_SIZE_LIMIT_BYTES: Final = 64 << 20
_CACHE_KIB: Final = 32 << 10
#: The last release whose WAL reset can corrupt a database that several processes write.
_LAST_UNSAFE: Final = (3, 51, 2)
#: Longest wait for a connection, seconds: for the writer that is the wait behind other writers.
_POOL_TIMEOUT_S: Final = 60.0
#: Primary result codes, https://www.sqlite.org/rescode.html.
_INTERRUPT = 9
_BUSY, _LOCKED, _READONLY, _IOERR, _CORRUPT, _FULL, _CANTOPEN, _NOTADB = 5, 6, 8, 10, 11, 13, 14, 26
#: A broken constraint; the extended code, which not every driver gives, and the library's own text say which.
_CONSTRAINT, _NO_SUCH_KEY = 19, "FOREIGN KEY"
_RETRY_S: Final = 0.5
#: Steps of SQLite's machine between two looks at the clock: some milliseconds.
_LOOK_EVERY_STEPS: Final = 200_000


class SqliteBackend:
    """One writer at a time on one machine, so the lock is BEGIN IMMEDIATE and the clock is the machine's.

    One connection writes, a pool of others reads; in the WAL, readers and the writer do not wait for each other.
    """

    single_writer = True
    connection_count = 0

    def __init__(self, url: str, *, connections: int, clock: Clock | None) -> None:
        """Opens connections on first use.

        Raises:
            InvalidArgumentError: The URL names no database that can be served; the reason is in the message.
        """
        self._path = database_path(url)
        self._clock = system_clock if clock is None else clock
        self.writer = _engine(connector(self._path, read_only=False), 1, "BEGIN IMMEDIATE")
        self.readers = _engine(connector(self._path, read_only=True), connections, "BEGIN")

    def prepare(self, connection: Connection, *, writes: bool) -> None:
        """Ends reads at the call's deadline: a filter may be a long one. Writes are short."""
        if writes:
            return
        driver: Any = connection.connection.driver_connection
        end_s = time.monotonic() + deadline.remaining_s()
        # What belongs to no call has all the time that it takes.
        is_late = (lambda: time.monotonic() > end_s) if math.isfinite(end_s) else None
        driver.set_progress_handler(is_late, _LOOK_EVERY_STEPS)

    def lock_runs(self, connection: Connection, runs: Sequence[RunName], *, exclusive: bool) -> None:
        """Nothing to do: the transaction began IMMEDIATE, and that is the lock on everything."""

    def lock(self, connection: Connection, name: str) -> None:
        """Nothing to do, as above."""

    def lock_schema(self, connection: Connection) -> None:
        """Nothing to do, as above."""

    def now_us(self, connection: Connection) -> int:  # noqa: ARG002
        """Returns this machine's time, microseconds since the epoch."""
        return self._clock()

    def missing(self) -> str | None:
        """Returns the path when there is no file."""
        return None if self._path.exists() else f"database at {self._path}"

    def create(self) -> None:
        """Makes the directory; the file comes with the first connection."""
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def check_durability(self) -> None:
        """Nothing to ask: every connection sets ``synchronous = FULL``."""

    def sever(self) -> None:
        """Nothing to do: statements are short, and other processes are waited for half a minute at most."""

    def sizes(self, connection: Connection) -> Sizes:  # noqa: ARG002
        """Returns the sizes of the two files."""
        return Sizes(_file_bytes(self._path), _file_bytes(self._path.with_name(self._path.name + "-wal")), None)

    def translate(self, error: BaseException) -> ShardbookError | None:
        """Returns the error of ours by SQLite's result code."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == _CONSTRAINT and str(error).startswith(_NO_SUCH_KEY):
            # Whoever refers to it found it, or kept in mind that it is there, and another process dropped it since.
            return UnavailableError(
                "what the write refers to has been dropped; try again",
                reason="DATABASE_CONFLICT",
                retry_delay_s=_RETRY_S,
            )
        if code == _INTERRUPT:
            return DeadlineExceededError("the database did not answer in time", reason="STATEMENT_TIMEOUT")
        if code == _FULL:
            return ResourceExhaustedError("the database's disk is full; free some space", reason="STORAGE_FULL")
        if code in (_BUSY, _LOCKED):
            return UnavailableError(
                "the database is busy with another process; try again", reason="DATABASE_BUSY", retry_delay_s=_RETRY_S
            )
        if code in (_READONLY, _IOERR, _CANTOPEN):
            return UnavailableError(
                f"the database cannot be read or written now: {error}",
                reason="DATABASE_UNAVAILABLE",
                retry_delay_s=2 * _RETRY_S,
            )
        if code in (_CORRUPT, _NOTADB):
            return InternalError(f"the database file is damaged: {error}", reason="DATABASE_DAMAGED")
        return None


def _file_bytes(path: Path) -> int:
    """The log comes and goes with its writers: a file that is not there has no size."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _engine(connect: Callable[[], Any], size: int, begin: str) -> Engine:
    engine = create_engine(
        "sqlite://",
        module=driver(),
        creator=connect,
        poolclass=QueuePool,
        pool_size=size,
        max_overflow=0,
        pool_timeout=_POOL_TIMEOUT_S,
        hide_parameters=True,
    )

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def driver() -> ModuleType:
    """Returns the DBAPI module with the newest SQLite: ``pysqlite3`` when it beats the system's, else ``sqlite3``."""
    chosen: ModuleType = sqlite3
    try:
        bundled = importlib.import_module("pysqlite3.dbapi2")
    except ImportError:
        bundled = None
    if bundled is not None and bundled.sqlite_version_info > sqlite3.sqlite_version_info:
        chosen = bundled
    version: tuple[int, ...] = chosen.__dict__["sqlite_version_info"]
    if version <= _LAST_UNSAFE:
        _log.warning(
            "SQLite %s can corrupt a database when its log is reset; install a newer one: pip install pysqlite3",
            ".".join(map(str, version)),
        )
    return chosen


def connector(path: Path, *, read_only: bool) -> Callable[[], Any]:
    """Returns a function that opens one connection to ``path``; ``read_only`` ones refuse to write."""
    module = driver()

    def connect() -> Any:
        connection = module.__dict__["connect"](
            str(path), isolation_level=None, check_same_thread=False, timeout=_BUSY_TIMEOUT_MS / 1000
        )
        # The page size counts only before the first table exists, and before the log is switched on.
        for pragma in (
            f"page_size = {PAGE_SIZE_BYTES}",
            f"busy_timeout = {_BUSY_TIMEOUT_MS}",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            f"journal_size_limit = {_JOURNAL_SIZE_LIMIT_BYTES}",
            f"cache_size = -{_CACHE_KIB}",
            f"query_only = {int(read_only)}",
        ):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    return connect


def database_path(url: str) -> Path:
    """Returns the file that a ``sqlite:///`` URL names, absolute.

    Raises:
        InvalidArgumentError: It names none, or one on a network file system.
    """
    prefix = "sqlite:///"
    name = url.removeprefix(prefix)
    # With three slashes the path would be relative, and the catalogue an empty one wherever the server was started.
    if not url.startswith(prefix) or not name.startswith("/") or "?" in name:
        raise InvalidArgumentError(
            f"{url!r} is no database that Shardbook can serve: write sqlite:////absolute/path, with four slashes",
            field="database_url",
        )
    path = Path(name)
    found = network_file_system(path, _mount_table())
    if found is not None:
        raise InvalidArgumentError(
            f"{path} lies on a network file system ({found}), where SQLite's locks do not hold and databases get "
            "corrupted: choose a local disk",
            reason="NETWORK_FILE_SYSTEM",
            field="database_url",
        )
    return path


def network_file_system(path: Path, mount_table: str) -> str | None:
    """Returns the type of the network file system that ``path`` lies on; None when it is local or not known.

    Args:
        path: Absolute path of a file that need not exist yet.
        mount_table: Content of ``/proc/self/mountinfo``.
    """
    return network_type(os.path.realpath(path), mount_table)


def _mount_table() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
