"""The database: transactions, the run lock, and the driver's errors made ours."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from sqlalchemy import Connection, Engine, RootTransaction, exc, select
from sqlalchemy.pool import QueuePool

from shardbook.core.names import RunName
from shardbook.errors import InvalidArgumentError
from shardbook_server.observer import SILENT, Observer
from shardbook_server.storage.backend import Backend, Clock, Sizes, system_clock
from shardbook_server.storage.failures import translate
from shardbook_server.storage.postgres import PostgresBackend, PostgresOptions
from shardbook_server.storage.sqlite import SqliteBackend
from shardbook_server.storage.urls import is_postgres, shown_url

#: The transaction that writes of the current call are part of; None where each has its own.
_joined: Final[ContextVar[tuple[Database, Connection] | None]] = ContextVar("shardbook_transaction", default=None)


class Database:
    """One database, shared by every service of a process. Thread-safe."""

    def __init__(
        self,
        url: str,
        *,
        connections: int = 4,
        clock: Clock | None = None,
        postgres: PostgresOptions | None = None,
        observer: Observer = SILENT,
    ) -> None:
        """Opens connections on first use.

        Args:
            url: ``sqlite:////absolute/path`` or ``postgresql://...``.
            connections: Connections, and so threads that use them at a time, at most; SQLite's writer is one more.
            clock: Stands in for the database's clock, in tests.
            postgres: How to speak to a Postgres.
            observer: Told how long connections and commits are waited for.

        Raises:
            InvalidArgumentError: The URL names no database that can be served; the reason is in the message.
        """
        self.url = url
        self._observer = observer
        if is_postgres(url):
            options = PostgresOptions() if postgres is None else postgres
            self.backend: Backend = PostgresBackend(url, connections=connections, clock=clock, options=options)
        elif url.startswith("sqlite:"):
            self.backend = SqliteBackend(url, connections=connections, clock=clock)
        else:
            raise InvalidArgumentError(
                f"{shown_url(url)!r} is no database that Shardbook can serve: write sqlite:////absolute/path or "
                "postgresql://user@host/database",
                field="database_url",
            )

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yields a connection in one read transaction: everything it reads is of one moment.

        Raises:
            ShardbookError: The database failed; already translated.
        """
        with self._transaction(self.backend.readers) as connection:
            self.backend.prepare(connection, writes=False)
            yield connection

    @contextmanager
    def write(self, runs: Iterable[RunName] = (), *, exclusive: bool = True, lock: str = "") -> Iterator[Connection]:
        """Yields a connection in one write transaction that commits when the block ends without an error.

        Within ``transaction`` it is part of that one, and commits with it.

        Each statement sees what was committed before it. An error at the commit itself may mean either: what is
        written has to be fit to be written again.

        Args:
            runs: Runs to lock, before anything is read. Content-addressed writes need none.
            exclusive: False when the writes may go on beside other such writes to the same runs (plans and
                registrations), True for those that must be alone (sessions, commits).
            lock: A lock of another name to take, for writes that belong to no run.

        Raises:
            ShardbookError: The database failed; already translated.
        """
        outer = _joined.get()
        if outer is not None and outer[0] is self:
            self._lock(outer[1], runs, exclusive=exclusive, lock=lock)
            yield outer[1]
            return
        with self._transaction(self.backend.writer) as connection:
            self.backend.prepare(connection, writes=True)
            self._lock(connection, runs, exclusive=exclusive, lock=lock)
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Yields a connection in a write transaction that every ``write`` of this thread within the block is part of.

        They commit together when the block ends, or not at all: an error of one must not be passed over. Each takes its
        locks as it begins.

        Raises:
            ShardbookError: The database failed; already translated.
        """
        with self.write() as connection:
            token = _joined.set((self, connection))
            try:
                yield connection
            finally:
                _joined.reset(token)

    def _lock(self, connection: Connection, runs: Iterable[RunName], *, exclusive: bool, lock: str) -> None:
        self.backend.lock_runs(connection, sorted(set(runs)), exclusive=exclusive)
        if lock:
            self.backend.lock(connection, lock)

    def now_us(self, connection: Connection) -> int:
        """Returns the database's time, microseconds since the epoch."""
        return self.backend.now_us(connection)

    def ping(self) -> None:
        """Asks the database for a sign of life.

        Raises:
            ShardbookError: It gave none.
        """
        with self.read() as connection:
            connection.execute(select(1)).scalar_one()

    def sizes(self, connection: Connection) -> Sizes:
        """Returns what the database takes on its disk."""
        return self.backend.sizes(connection)

    def checked_out(self) -> int:
        """Returns how many connections are in use; tests assert that none is left behind."""
        return sum(pool.checkedout() for pool in self._pools())

    def sever(self) -> None:
        """Ends what is running, from another thread: for a server that has to end, whatever its database does.

        What was being committed may be durable or not; whoever waited hears of a lost connection.
        """
        self.backend.sever()

    def close(self) -> None:
        """Closes every connection; the database may be used again afterwards."""
        self.backend.readers.dispose()
        self.backend.writer.dispose()

    def _commit(self, transaction: RootTransaction) -> None:
        began_s = time.perf_counter()
        transaction.commit()
        self._observer.transaction_committed(time.perf_counter() - began_s)

    def _pools(self) -> set[QueuePool]:
        engines = (self.backend.readers, self.backend.writer)
        return {engine.pool for engine in engines if isinstance(engine.pool, QueuePool)}

    @contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Connection]:
        asked_s = time.perf_counter()
        try:
            with engine.connect() as connection:
                self._observer.connection_taken(time.perf_counter() - asked_s)
                with connection.begin() as transaction:
                    yield connection
                    if engine is self.backend.writer:
                        self._commit(transaction)
        except exc.SQLAlchemyError as error:
            raise translate(error, self.backend) from error


__all__ = ["Clock", "Connection", "Database", "PostgresOptions", "is_postgres", "system_clock"]
