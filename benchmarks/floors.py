"""The floor of durable registrations: the drivers alone, inserting the same rows in the same groups.

A table like ``registrations`` without its foreign keys, one statement and one commit a group, nothing read, nothing
checked, no lock taken. Postgres gets a connection for each replica, which takes that replica's groups in order.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import TracebackType

import psycopg

from shardbook.core.extents import Extents, encode_extents

#: A staged registration: checkpoint, rank, structure, explicit, bytes, extents, volatile.
Row = tuple[int, int, int, int, int, bytes, bytes]

_COLUMNS = "checkpoint_id, rank, structure_id, explicit, size_bytes, extents, volatile"
_EXTENTS = encode_extents(Extents())
_SIZE_BYTES = 123_456_789


def _rows(size: int, checkpoint: int, ranks: Iterator[int]) -> list[Row]:
    return [(checkpoint, next(ranks), 4711 + at, 0, _SIZE_BYTES, _EXTENTS, b"") for at in range(size)]


class RawPostgres:
    """psycopg alone on a database of Shardbook's.

    Args:
        url: The database.
        replicas: How many replicas it is the floor of.
    """

    def __init__(self, url: str, replicas: int) -> None:
        self._table = f"floor_of_{replicas}"
        self._connections = [psycopg.connect(url) for _ in range(replicas)]
        first = self._connections[0]
        first.execute(f"CREATE TABLE IF NOT EXISTS {self._table} (LIKE registrations INCLUDING ALL)")
        first.commit()
        for connection in self._connections:
            connection.execute("SET synchronous_commit = on")
            connection.commit()
        self._insert = (
            f"INSERT INTO {self._table} ({_COLUMNS}) SELECT * FROM unnest(%b::bigint[], %b::int[], %b::bigint[], "
            "%b::smallint[], %b::bigint[], %b::bytea[], %b::bytea[])"
        )

    def insert(self, groups: Sequence[Sequence[int]]) -> float:
        """Inserts each replica's groups; returns the seconds from the first to the last commit."""
        lanes: list[list[list[list[object]]]] = []
        for replica, sizes in enumerate(groups):
            ranks = count()
            lanes.append([[list(column) for column in zip(*_rows(n, replica, ranks), strict=True)] for n in sizes])
        with ThreadPoolExecutor(len(self._connections)) as pool:
            began_s = time.perf_counter()
            list(pool.map(self._run, self._connections, lanes))
            took_s = time.perf_counter() - began_s
        self._connections[0].execute(f"TRUNCATE {self._table}")
        self._connections[0].commit()
        return took_s

    def _run(self, connection: psycopg.Connection, batches: Sequence[list[list[object]]]) -> None:
        for columns in batches:
            connection.execute(self._insert.encode(), columns)
            connection.commit()

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._connections:
            connection.close()

    def __enter__(self) -> RawPostgres:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class RawSqlite:
    """sqlite3 alone on a file of its own, set up as Shardbook sets its database up."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for pragma in ("page_size=16384", "journal_mode=WAL", "synchronous=FULL", "cache_size=-32768"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(
            "CREATE TABLE registrations (checkpoint_id INTEGER NOT NULL, rank INTEGER NOT NULL, "
            "structure_id INTEGER NOT NULL, explicit INTEGER NOT NULL, size_bytes INTEGER NOT NULL, "
            "extents BLOB NOT NULL, volatile BLOB NOT NULL, PRIMARY KEY (checkpoint_id, rank)) STRICT, WITHOUT ROWID"
        )

    def insert(self, groups: Sequence[Sequence[int]]) -> float:
        """Inserts the groups of the one server; returns the seconds from the first to the last commit."""
        (sizes,) = groups
        ranks = count()
        batches = [_rows(size, 0, ranks) for size in sizes]
        statement = f"INSERT INTO registrations ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        began_s = time.perf_counter()
        for rows in batches:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(statement, rows)
            self._connection.execute("COMMIT")
        took_s = time.perf_counter() - began_s
        self._connection.execute("DELETE FROM registrations")
        return took_s

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def __enter__(self) -> RawSqlite:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def sync_s(folder: Path, rounds: int = 50) -> float:
    """Returns the median seconds of a 4 KiB write and fdatasync in a folder: what one durable commit waits for."""
    path, times = folder / "sync-probe", []
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, 4096)
        os.fsync(descriptor)
        for _ in range(rounds):
            began_s = time.perf_counter()
            os.pwrite(descriptor, os.urandom(4096), 0)
            os.fdatasync(descriptor)
            times.append(time.perf_counter() - began_s)
    finally:
        os.close(descriptor)
        path.unlink()
    return statistics.median(times)


def file_system(folder: Path) -> str:
    """Returns the kind of file system a folder is on, as the kernel names it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return max(above)[1]


def durability(url: str) -> str:
    """Returns what a Postgres says of its own durability."""
    with psycopg.connect(url) as connection:
        connection.execute("SET synchronous_commit = on")
        names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method")
        said = {name: connection.execute(f"SHOW {name}").fetchone() for name in names}
    return ", ".join(f"{name}={row[0]}" for name, row in said.items() if row is not None)
