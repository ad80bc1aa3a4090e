"""What a database has to offer, so that everything above it is the same statements on each.

Two backends: ``sqlite.SqliteBackend`` and ``postgres.PostgresBackend``. What else differs between the dialects is in
``dialect``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection, Engine

from shardbook.core.names import RunName
from shardbook.errors import ShardbookError

#: Gives the time in microseconds since the epoch.
Clock = Callable[[], int]


def system_clock() -> int:
    """Returns this machine's time, microseconds since the epoch."""
    return time.time_ns() // 1000


@dataclass(frozen=True)
class Sizes:
    """What a database takes on its disk; None where its user may not know.

    Attributes:
        database_bytes: Without the log.
        wal_bytes: The write-ahead log as it lies on the disk.
        wal_written_bytes: All that was ever written to the log; a counter, of Postgres.
    """

    database_bytes: int
    wal_bytes: int | None
    wal_written_bytes: int | None


class Backend(Protocol):
    """Engines of one database, and the few things that each database does its own way. Thread-safe."""

    @property
    def readers(self) -> Engine:
        """Opens transactions that see one moment and refuse to write."""
        ...

    @property
    def writer(self) -> Engine:
        """Opens transactions in which ``lock_runs`` is the first statement."""
        ...

    @property
    def single_writer(self) -> bool:
        """True when write transactions follow each other, however many threads ask for one."""
        ...

    @property
    def connection_count(self) -> int:
        """Connections that were made so far, where each new one may lead to another copy of the data; else 0."""
        ...

    def prepare(self, connection: Connection, *, writes: bool) -> None:
        """Sets what holds for one transaction, before anything else is said in it."""
        ...

    def lock_runs(self, connection: Connection, runs: Sequence[RunName], *, exclusive: bool) -> None:
        """Keeps other writers off ``runs`` until the transaction ends; ``exclusive`` keeps off sharers too.

        Statements after it see what the transactions committed that held the lock before.
        """
        ...

    def lock(self, connection: Connection, name: str) -> None:
        """Keeps off others that take the lock of this name, until the transaction ends.

        For what belongs to no run: structures of a project, the reaper's round. Taken before any row is written.
        """
        ...

    def lock_schema(self, connection: Connection) -> None:
        """Keeps other migrators off until the transaction ends."""
        ...

    def now_us(self, connection: Connection) -> int:
        """Returns the database's time, microseconds since the epoch; moves on inside a transaction."""
        ...

    def missing(self) -> str | None:
        """Returns what is not there, for people, when there is no database to open; None when there is one."""
        ...

    def create(self) -> None:
        """Makes what ``missing`` misses, as far as that is this program's to make."""
        ...

    def check_durability(self) -> None:
        """Refuses a database that would lose what it has acknowledged.

        Raises:
            FailedPreconditionError: It would; reason ``NOT_DURABLE``.
        """
        ...

    def sever(self) -> None:
        """Ends what is running and lets nothing new begin: for a server that has to end, whatever its database does.

        Called from another thread than those that wait. What was being committed may be durable or not.
        """
        ...

    def sizes(self, connection: Connection) -> Sizes:
        """Returns what the database takes on its disk."""
        ...

    def translate(self, error: BaseException) -> ShardbookError | None:
        """Returns the error of ours for one of the driver's; None for one that is nobody's but a bug's."""
        ...
