"""What differs between databases: the run lock, the clock, the upsert. Everything else is the same statements."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite

from shardbook.core.names import RunName

#: Gives the time in microseconds since the epoch.
Clock = Callable[[], int]


def system_clock() -> int:
    """Returns this machine's time, microseconds since the epoch."""
    return time.time_ns() // 1000


class SqliteDialect:
    """SQLite: one writer at a time on one machine, so the lock is BEGIN IMMEDIATE and the clock is the machine's."""

    def __init__(self, clock: Clock = system_clock) -> None:
        self._clock = clock

    def lock_runs(self, connection: Connection, runs: Iterable[RunName], *, exclusive: bool) -> None:
        """Keeps other writers off ``runs`` until the transaction ends; ``exclusive`` keeps off sharers too.

        Nothing to do here: the transaction began IMMEDIATE, and that is the lock on everything.
        """

    def now_us(self, connection: Connection) -> int:  # noqa: ARG002
        """Returns the database's time, microseconds since the epoch."""
        return self._clock()


def insert_ignore(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Returns an insert into ``table`` that leaves rows whose key exists alone."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()
