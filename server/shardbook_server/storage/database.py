"""The database: engines, transactions, the run lock, and the driver's errors made ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, exc
from sqlalchemy.pool import QueuePool

from shardbook.core.names import RunName
from shardbook_server.storage import sqlite
from shardbook_server.storage.dialect import Clock, SqliteDialect, system_clock
from shardbook_server.storage.failures import translate

#: Longest wait for a connection, seconds: for the writer that is the wait behind other writers.
_POOL_TIMEOUT_S = 60.0


class Database:
    """One database, shared by every service of a process. Thread-safe.

    One connection writes, a pool of others reads; in the WAL, readers and the writer do not wait for each other.
    """

    def __init__(self, url: str, *, readers: int = 4, clock: Clock = system_clock) -> None:
        """Opens connections on first use.

        Args:
            url: ``sqlite:////absolute/path``.
            readers: Reading connections, and so reading threads, at most.
            clock: Stands in for the database's clock, in tests.

        Raises:
            InvalidArgumentError: The URL names no database that can be served; the reason is in the message.
        """
        self.url = url
        path = sqlite.database_path(url)
        self._dialect = SqliteDialect(clock)
        self._writer = _engine(sqlite.connector(path, read_only=False), 1, "BEGIN IMMEDIATE")
        self._readers = _engine(sqlite.connector(path, read_only=True), readers, "BEGIN")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yields a connection in one read transaction: everything it reads is of one moment.

        Raises:
            ShardbookError: The database failed; already translated.
        """
        with _transaction(self._readers) as connection:
            yield connection

    @contextmanager
    def write(self, runs: Iterable[RunName] = (), *, exclusive: bool = True) -> Iterator[Connection]:
        """Yields a connection in one write transaction that commits when the block ends without an error.

        Args:
            runs: Runs to lock, before anything is read. Content-addressed writes need none.
            exclusive: False when the writes may go on beside other such writes to the same runs (plans and
                registrations), True for those that must be alone (sessions, commits).

        Raises:
            ShardbookError: The database failed; already translated.
        """
        with _transaction(self._writer) as connection:
            self._dialect.lock_runs(connection, sorted(set(runs)), exclusive=exclusive)
            yield connection

    def now_us(self, connection: Connection) -> int:
        """Returns the database's time, microseconds since the epoch."""
        return self._dialect.now_us(connection)

    def checked_out(self) -> int:
        """Returns how many connections are in use; tests assert that none is left behind."""
        pools = (self._writer.pool, self._readers.pool)
        return sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool))

    def close(self) -> None:
        """Closes every connection; the database may be used again afterwards."""
        self._readers.dispose()
        self._writer.dispose()


def _engine(connect: Callable[[], Any], size: int, begin: str) -> Engine:
    engine = create_engine(
        "sqlite://",
        module=sqlite.driver(),
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


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    try:
        with engine.begin() as connection:
            yield connection
    except exc.SQLAlchemyError as error:
        raise translate(error) from error


__all__ = ["Clock", "Connection", "Database", "system_clock"]
