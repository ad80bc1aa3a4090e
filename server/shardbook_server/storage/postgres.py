"""Postgres as Shardbook uses it: how a connection is made, what it locks, what its errors mean.

Any number of stateless servers share one database. All state of a transaction is the transaction's own (advisory locks,
settings), so connections may come through pgbouncer in transaction mode.
"""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakSet

from sqlalchemy import Connection, ExceptionContext, TextClause, create_engine, event, func, select, text
from sqlalchemy.pool import QueuePool

from shardbook.core.names import RunName
from shardbook.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ShardbookError,
    UnavailableError,
)
from shardbook_server.storage import deadline
from shardbook_server.storage.backend import Clock, Sizes
from shardbook_server.storage.dialect import lock_key, lock_names

#: Longest wait for a connection of the pool, seconds.
_POOL_TIMEOUT_S: Final = 30.0
#: A connection is replaced after this long, so that a cluster's new members get their share, seconds.
_RECYCLE_S: Final = 1800
_RETRY_S: Final = 0.5
#: Longest wait of a migration for a lock that live servers hold: those behind it wait as long, seconds.
_SCHEMA_LOCK_S: Final = 5.0
#: What is left for the answer when a call's deadline bounds its statements, seconds.
_ANSWER_S: Final = 0.05
#: Parameters of libpq that are set unless the URL sets them: a dead peer is noticed in seconds, a standby is passed by.
_CONNECTION_DEFAULTS: Final = {
    "application_name": "shardbook-server",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "target_session_attrs": "read-write",
}
#: What ends a transaction, with its locks, whose server is frozen or whose machine is gone; times in
#: ms and s, as Postgres has them.
_HOLDER_LIMITS: Final = {
    "idle_in_transaction_session_timeout": "15000",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}


def _prepared(settings: Mapping[str, str]) -> TextClause:
    """Returns one statement, text that need not be made anew for each transaction; values are SQL."""
    holders = {name: f"'{value}'" for name, value in _HOLDER_LIMITS.items()}
    given = {"statement_timeout": ":statement_timeout"} | holders | dict(settings)
    return text("SELECT " + ", ".join(f"set_config('{name}', {value}, true)" for name, value in given.items()))


#: Begins a transaction that reads, in one journey to the database; ``statement_timeout`` in ms is added. A page takes
#: milliseconds; where a planner guesses too high, compiling it would take a hundred.
_BEGIN_READ: Final = "; ".join(
    [
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        *(f"SET LOCAL {name} = {value}" for name, value in ({"jit": "off"} | _HOLDER_LIMITS).items()),
        "SET LOCAL statement_timeout = ",
    ]
)
_BEFORE_WRITES: Final = _prepared({"synchronous_commit": ":synchronous_commit"})
_NOW_US: Final = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
#: Only members of pg_monitor may list the log's files; anybody may ask how far it has come.
_MAY_LIST_LOG: Final = text("SELECT has_function_privilege('pg_ls_waldir()', 'execute')")
_LOG_BYTES: Final = text("SELECT sum(size)::bigint FROM pg_ls_waldir()")
_SIZES: Final = text(
    "SELECT pg_database_size(current_database()), pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"
)
#: A batch waits for a run no longer than this: it is of many runs, and the others have nothing to do with that one.
_LOCK_SHARED: Final = text(
    "SELECT set_config('lock_timeout', '2s', true), pg_advisory_xact_lock_shared(key) "
    "FROM unnest(CAST(:keys AS bigint[])) AS key"
)

# SQLSTATE, https://www.postgresql.org/docs/current/errcodes-appendix.html; by class where a class says enough.
_CONFLICTS: Final = frozenset({"40001", "40P01", "23503", "23505"})
_TOO_BUSY: Final = frozenset({"53200", "53300", "53400"})
_AWAY: Final = frozenset({"25006", "25P03", "25P04", "57P01", "57P02", "57P03", "57P05", "58000", "58030"})
_READ_ONLY: Final = "25006"
_PREPARED_ELSEWHERE: Final = frozenset({"26000", "42P05"})
_NO_SCHEMA: Final = frozenset({"3F000", "42P01", "42703"})


@dataclass(frozen=True)
class PostgresOptions:
    """How a server speaks to Postgres.

    Attributes:
        synchronous_commit: When a commit counts: ``on``, or a mode that waits for more or less of the standbys.
        statement_timeout_s: Bound on a statement of no call's own, such as a batch's; a COMMIT is never cut short.
        prepared_statements: Let the driver prepare statements; off for poolers that cannot keep them.
    """

    synchronous_commit: str = "on"
    statement_timeout_s: float = 30.0
    prepared_statements: bool = True


class PostgresBackend:
    """Transactions under READ COMMITTED, fenced by advisory locks; reads of one moment under REPEATABLE READ."""

    single_writer = False
    connection_count = 0

    def __init__(self, url: str, *, connections: int, clock: Clock | None, options: PostgresOptions) -> None:
        """Opens connections on first use.

        Raises:
            InvalidArgumentError: The URL is none that libpq can read.
            FailedPreconditionError: The driver is not installed.
        """
        self._clock = clock
        self._options = options
        self._open: WeakSet[Any] = WeakSet()
        self._guard = threading.Lock()
        self._severed = False
        self.writer = create_engine(
            "postgresql+psycopg://",
            creator=self._unless_severed(_connector(url, options)),
            poolclass=QueuePool,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=_POOL_TIMEOUT_S,
            pool_recycle=_RECYCLE_S,
            pool_use_lifo=True,
            use_native_hstore=False,
            isolation_level="READ COMMITTED",
            hide_parameters=True,
        )
        event.listen(self.writer, "connect", self._connected)
        event.listen(self.writer, "handle_error", _leave_standbys)
        # One pool for both: what differs is said when a transaction begins. Of those that read ``prepare`` says it,
        # along with their settings; the driver would send its own BEGIN first, and wait for the answer.
        self.readers = self.writer.execution_options(isolation_level="AUTOCOMMIT")

    def _connected(self, connection: Any, *_: object) -> None:
        self.connection_count += 1
        with self._guard:
            self._open.add(connection)

    def _unless_severed(self, connect: Callable[[], Any]) -> Callable[[], Any]:
        def guarded() -> Any:
            if self._severed:
                raise UnavailableError("the server is shutting down", reason="DRAINING", retry_delay_s=_RETRY_S)
            return connect()

        return guarded

    def sever(self) -> None:
        """Cuts every connection below its driver: a statement that Postgres never answers ends as a lost one does."""
        self._severed = True
        with self._guard:
            connections = [one for one in self._open if not one.closed]
        for one in connections:
            # A copy of the descriptor: closing it leaves the driver's own alone.
            with suppress(OSError), socket.socket(fileno=os.dup(one.fileno())) as cut:
                cut.shutdown(socket.SHUT_RDWR)

    def prepare(self, connection: Connection, *, writes: bool) -> None:
        """Begins a transaction that reads; bounds its statements, and says when the commit of one that writes counts.

        Postgres takes the time limit off before it commits, so it can end a statement, never a COMMIT.
        """
        left_s = deadline.remaining_s() - _ANSWER_S
        limit_s = min(self._options.statement_timeout_s, left_s if math.isfinite(left_s) else math.inf)
        limit_ms = max(1, round(limit_s * 1000))
        if writes:
            values = {"statement_timeout": str(limit_ms), "synchronous_commit": self._options.synchronous_commit}
            connection.execute(_BEFORE_WRITES, values)
        else:
            connection.exec_driver_sql(f"{_BEGIN_READ}{limit_ms}")

    def lock_runs(self, connection: Connection, runs: Sequence[RunName], *, exclusive: bool) -> None:
        """Takes the advisory locks of runs, in one order, as a statement of its own.

        Of its own, because a statement sees what was committed before it began: one that both waited for a lock and
        read would read what was there before the wait.
        """
        if runs:
            names = [f"run/{run}" for run in runs]
            if exclusive:
                lock_names(connection, names)
            else:
                connection.execute(_LOCK_SHARED, {"keys": sorted(map(lock_key, names))})

    def lock(self, connection: Connection, name: str) -> None:
        """Takes an advisory lock."""
        lock_names(connection, [name])

    def lock_schema(self, connection: Connection) -> None:
        """Waits for other migrators without a limit, then lets no statement wait for the locks of live servers."""
        connection.execute(select(func.set_config("statement_timeout", "0", True)))
        self.lock(connection, "schema")
        connection.execute(select(func.set_config("lock_timeout", f"{round(_SCHEMA_LOCK_S * 1000)}ms", True)))

    def now_us(self, connection: Connection) -> int:
        """Returns the database's time, microseconds since the epoch: servers' clocks may be hours apart."""
        if self._clock is not None:
            return self._clock()
        now_us: int = connection.execute(_NOW_US).scalar_one()
        return now_us

    def missing(self) -> str | None:
        """Returns None: whether there is a database is what connecting tells."""
        return None

    def create(self) -> None:
        """Nothing to do: a database of Postgres is made by its owner."""

    def check_durability(self) -> None:
        """Refuses ``fsync=off``."""
        with self.readers.begin() as connection:
            if connection.execute(text("SHOW fsync")).scalar_one() == "off":
                raise FailedPreconditionError(
                    "this Postgres runs with fsync=off: a crash would lose or tear checkpoints that were acknowledged. "
                    "Set fsync=on in postgresql.conf and reload it",
                    reason="NOT_DURABLE",
                    field="database_url",
                )

    def sizes(self, connection: Connection) -> Sizes:
        """Asks for this database's size, and for the whole cluster's log."""
        database_bytes, written_bytes = connection.execute(_SIZES).one()
        may_list = connection.execute(_MAY_LIST_LOG).scalar_one()
        return Sizes(database_bytes, connection.execute(_LOG_BYTES).scalar_one() if may_list else None, written_bytes)

    def translate(self, error: BaseException) -> ShardbookError | None:
        """Returns the error of ours by SQLSTATE; one without is a connection that was lost or never made."""
        state = getattr(error, "sqlstate", None)
        said = _said(error)
        if state is None:
            # By name, since the driver is an extra; a connection that took too long is a kind of its own below it.
            return _away(said) if any(kind.__name__ == "OperationalError" for kind in type(error).__mro__) else None
        if state == "53100":
            return ResourceExhaustedError("the database's disk is full; free some space", reason="STORAGE_FULL")
        if state == "57014":
            return _timed_out()
        if state in _CONFLICTS:
            return UnavailableError(
                f"two transactions got into each other's way; try again: {said}",
                reason="DATABASE_CONFLICT",
                retry_delay_s=_RETRY_S,
            )
        if state == "55P03":
            # Migrations, which live servers must not wait for, and batches of many runs say how long they wait.
            return UnavailableError(
                f"others held what is to be changed for too long, so nothing was changed; try again: {said}",
                reason="DATABASE_BUSY",
                retry_delay_s=_RETRY_S,
            )
        if state in _TOO_BUSY:
            return UnavailableError(
                f"the database is busy; try again: {said}", reason="DATABASE_BUSY", retry_delay_s=_RETRY_S
            )
        if state in _AWAY or state.startswith("08"):
            return _away(said)
        if state in _PREPARED_ELSEWHERE:
            return FailedPreconditionError(
                "a pooler between server and Postgres does not keep prepared statements: set "
                f"SHARDBOOK_POSTGRES_PREPARED_STATEMENTS=false ({said})",
                reason="PREPARED_STATEMENTS",
            )
        if state in _NO_SCHEMA:
            return FailedPreconditionError(
                f"the schema is not the one that this server was started on: run `shardbook-server db check` ({said})",
                reason="SCHEMA_STALE",
            )
        if state.startswith("28") or state == "3D000":
            return FailedPreconditionError(f"the database cannot be opened: {said}", reason="DATABASE_REFUSED")
        if state.startswith("XX"):
            return InternalError(f"the database is damaged: {said}", reason="DATABASE_DAMAGED")
        return None


def _leave_standbys(context: ExceptionContext) -> None:
    """Gives up connections to a server that does not write any more: the next ones look for the one that does."""
    if getattr(context.original_exception, "sqlstate", None) == _READ_ONLY:
        context.is_disconnect = True


def _timed_out() -> ShardbookError:
    if math.isfinite(deadline.remaining_s()):
        return DeadlineExceededError("the database did not answer in time", reason="STATEMENT_TIMEOUT")
    # The time limit of no call's own: whoever waited for it may well have time left.
    return UnavailableError(
        "the database did not answer in time; try again", reason="DATABASE_BUSY", retry_delay_s=_RETRY_S
    )


def _said(error: BaseException) -> str:
    """Returns the driver's message on one line."""
    return " ".join(str(error).split())


def _away(said: str) -> UnavailableError:
    return UnavailableError(
        f"the database cannot be reached now: {said}",
        reason="DATABASE_UNAVAILABLE",
        retry_delay_s=2 * _RETRY_S,
    )


def _connector(url: str, options: PostgresOptions) -> Callable[[], Any]:
    """Returns a function that opens one connection; libpq reads the URL, so it may name several hosts."""
    try:
        import psycopg
        from psycopg import conninfo
    except ImportError as error:
        raise FailedPreconditionError(
            "Postgres needs its driver: pip install 'shardbook[postgres]'", reason="MISSING_PACKAGE"
        ) from error
    try:
        given = conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        # What libpq puts in quotes at the end may be the password, or the whole URL.
        why, quoted, _ = str(error).partition(': "')
        raise _unreadable(why if quoted else "it has a mistake") from None
    if not all(port.isdecimal() for port in str(given.get("port", "0")).split(",") if port):
        # It would be quoted when connecting, and may be the beginning of a password that has a slash.
        raise _unreadable("a port is not a number")
    threshold = 5 if options.prepared_statements else None
    # Later keywords win over the URL's own text, so only what it leaves out is added.
    defaults: dict[str, Any] = {name: value for name, value in _CONNECTION_DEFAULTS.items() if name not in given}

    def connect() -> Any:
        return psycopg.connect(url, prepare_threshold=threshold, **defaults)

    return connect


def _unreadable(why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the URL of the database cannot be read ({why}): write postgresql://user@host:5432/name, or "
        "postgresql://user@host1,host2/name for a cluster; in a password, %40 is an @ and %2F a slash",
        field="database_url",
    )
