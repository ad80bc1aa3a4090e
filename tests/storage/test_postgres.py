"""Postgres as Shardbook uses it: what its locks, transactions and time limits do. Against the real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256

import pytest
from sqlalchemy import Connection, text

from shardbook.core.names import RunName
from shardbook.core.structure import BlobKind
from shardbook.errors import DeadlineExceededError, ShardbookError, UnavailableError
from shardbook_server.service.services import build_services
from shardbook_server.storage import blobs, events, registrations, runs
from shardbook_server.storage.blobs import NewBlob
from shardbook_server.storage.database import Database, PostgresOptions
from shardbook_server.storage.deadline import statements_until
from shardbook_server.storage.events import Event, EventKind
from tests.behaviour.service.saves import Job, Model, whole
from tests.conftest import MakeDatabases
from tests.databases import opened
from tests.storage.asides import Aside, await_waiting

RUN, OTHER_RUN = RunName("llm", "8b"), RunName("llm", "70b")
#: What a rank adds while its session is the current one: the condition and the insert in one statement.
_ADD = text(
    "INSERT INTO registrations SELECT checkpoint_id, 1, structure_id, explicit, size_bytes, extents, volatile "
    "FROM registrations, parts WHERE rank = 0 AND parts.session = :session"
)


@pytest.fixture
def url(make_databases: MakeDatabases) -> str:
    """A migrated Postgres of the test's own."""
    return make_databases("postgres").new()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """The same, opened; no connection may be left in use."""
    with opened(url, connections=6) as database:
        yield database


# ---------------------------------------------------------------- the run's lock


@dataclass(frozen=True)
class Race:
    """An attempt of session 1 of which one rank registered, when session 2 takes over."""

    database: Database
    checkpoint_id: int
    part_id: int

    def add(self, connection: Connection) -> int:
        """Registers the straggler, if its session is the current one; returns how many rows that added."""
        return connection.execute(_ADD, {"session": 1}).rowcount

    def supersede(self, connection: Connection) -> int:
        """Makes session 2 the current one; returns how many registrations it counts after that."""
        runs.set_session(connection, self.part_id, 2)
        return self._count(connection)

    def count(self) -> int:
        """Returns how many registrations there are in the end."""
        with self.database.read() as connection:
            return self._count(connection)

    def _count(self, connection: Connection) -> int:
        return registrations.count_registrations(connection, [self.checkpoint_id])[self.checkpoint_id]


@pytest.fixture
def race(database: Database) -> Race:
    """Two ranks, one of which is late."""
    job = Job(build_services(database, lease_ttl_s=60), Model(2))
    job.start()
    [answer] = job.register(1, whole(job.model)[:1])
    with database.read() as connection:
        [part] = runs.find_parts(connection, [job.key(1).part_name]).values()
    return Race(database, answer.checkpoint_id, part.id)


def test_without_the_lock_a_straggler_slips_in_beside_a_count(race: Race) -> None:
    """Why there is a lock: a statement's own condition is judged by what was committed when it began.

    Session 2 counts one registration, and later there are two.
    """
    with race.database.write() as straggler:
        assert 1 == race.add(straggler)
        with race.database.write() as later:
            assert 1 == race.supersede(later)
    assert 2 == race.count()


def test_with_the_lock_a_session_waits_for_stragglers_and_counts_them(race: Race) -> None:
    """The straggler is first: it counts."""

    def supersede() -> int:
        with race.database.write([RUN]) as later:
            return race.supersede(later)

    with race.database.write([RUN], exclusive=False) as straggler:
        assert 1 == race.add(straggler)
        later = Aside(supersede)
        await_waiting(race.database, "advisory")
    assert 2 == later.result() == race.count()


def test_with_the_lock_a_straggler_waits_for_a_session_and_is_fenced(race: Race) -> None:
    """The session is first: the straggler's next statement sees it."""

    def add() -> int:
        with race.database.write([RUN], exclusive=False) as straggler:
            return race.add(straggler)

    with race.database.write([RUN]) as later:
        assert 1 == race.supersede(later)
        straggler = Aside(add)
        await_waiting(race.database, "advisory")
    assert 0 == straggler.result()
    assert 1 == race.count()


def test_ranks_register_side_by_side_and_a_commit_waits_for_them(database: Database) -> None:
    """Shared locks of one run do not wait for each other; exclusive ones wait, those of other runs do not."""

    def commit() -> None:
        with database.write([RUN]):
            pass

    with database.write([RUN], exclusive=False), database.write([RUN, OTHER_RUN], exclusive=False):
        alone = Aside(commit)
        await_waiting(database, "advisory")
        with database.write([RunName("llm", "1b")]):
            pass
        assert not alone.ended
    alone.result()


def test_locks_of_several_runs_are_taken_in_one_order(database: Database) -> None:
    """Batches name runs as their entries came: no two of them wait for each other in a circle."""

    runs_of_both = [RunName("llm", f"{at}") for at in range(200)]

    def lock(wanted: list[RunName]) -> None:
        for _ in range(20):
            with database.write(wanted):
                pass

    for one in [Aside(lambda order=order: lock(runs_of_both[::order])) for order in (1, -1)]:  # type: ignore[misc]
        one.result()


def test_locks_end_with_their_transaction(database: Database) -> None:
    """As a pooler in transaction mode needs it: the next one on the connection has none of them."""
    locks = text(
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database AND d.datname = current_database() "
        "WHERE locktype = 'advisory'"
    )
    with database.write([RUN], lock="reaper") as connection:
        assert 2 == connection.scalar(locks)
    with database.read() as connection:
        assert 0 == connection.scalar(locks)


# ---------------------------------------------------------------- transactions


def shown(connection: Connection, *names: str) -> list[str]:
    """Values of settings as they are in a transaction."""
    return [str(connection.scalar(text(f"SHOW {name}"))) for name in names]


def test_readers_see_one_moment_and_refuse_to_write(database: Database) -> None:
    """REPEATABLE READ, READ ONLY; writers judge what is committed now. On one pool, whoever had a connection before."""
    for _ in range(2):
        with database.read() as connection:
            assert ["repeatable read", "on"] == shown(connection, "transaction_isolation", "transaction_read_only")
        with database.write() as connection:
            assert ["read committed", "off"] == shown(connection, "transaction_isolation", "transaction_read_only")
    with pytest.raises(UnavailableError, match="read-only"), database.read() as connection:
        connection.execute(text("DELETE FROM events"))


def test_what_holds_for_a_reader_holds_for_nobody_after_it(database: Database) -> None:
    """It ends when its machine is gone, and compiles nothing; said as it begins, and over with it, errors or none."""
    names = ("jit", "statement_timeout", "idle_in_transaction_session_timeout", "tcp_keepalives_idle")
    with database.backend.writer.connect() as connection:
        outside = shown(connection, *names)
    for ends in ("SELECT 1", "SELECT 1 / 0"):
        with suppress(ShardbookError), database.read() as connection:
            assert ["off", "30s", "15s"] == shown(connection, *names)[:3]
            connection.execute(text(ends))
        with database.backend.writer.connect() as connection:
            assert outside == shown(connection, *names)
            assert "read committed" == shown(connection, "transaction_isolation")[0]


@pytest.mark.parametrize("mode", ["on", "remote_apply", "remote_write", "local"])
def test_a_commit_counts_when_the_settings_say(url: str, mode: str) -> None:
    """Whatever the database's owner has set: an acknowledged write is a durable one."""
    with opened(url) as admin, admin.write() as connection:
        connection.execute(text("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', "
                                "current_database()); END $$"))  # fmt: skip
    with opened(url, postgres=PostgresOptions(synchronous_commit=mode)) as database:
        with database.write() as connection:
            assert [mode] == shown(connection, "synchronous_commit")
        with database.read() as connection:
            assert ["off"] == shown(connection, "synchronous_commit")


def test_the_database_s_clock_moves_on_inside_a_transaction(database: Database) -> None:
    """Leases are measured on it; the time of a transaction's beginning would lag behind by its waits."""
    with database.read() as connection:
        first_us = database.now_us(connection)
        connection.execute(text("SELECT pg_sleep(0.02)"))
        assert 20_000 <= database.now_us(connection) - first_us < 10_000_000
    assert abs(first_us / 1e6 - time.time()) < 60


ROUNDS, ROWS = 15, 500


def in_unlike_orders(database: Database, store: Callable[[Connection, int, int], object]) -> None:
    """Two threads store the same rows at once, round after round; one of them from the end.

    Args:
        database: Where.
        store: Stores the rows of a round, in steps of 1 or -1.
    """
    barrier = threading.Barrier(2)

    def store_all(step: int) -> None:
        try:
            for number in range(ROUNDS):
                barrier.wait(30)
                with database.write([RUN], exclusive=False) as connection:
                    store(connection, number, step)
        except BaseException:
            # The other one need not wait for it.
            barrier.abort()
            raise

    for one in (Aside(lambda: store_all(1)), Aside(lambda: store_all(-1))):
        one.result()


def test_the_same_blobs_in_unlike_orders_do_not_deadlock(database: Database) -> None:
    """Ranks of one world bring the same structures at once: rows are added in one order, whatever the batch's."""
    with database.write() as connection:
        project_id = connection.scalar(text("INSERT INTO projects (name) VALUES ('p') RETURNING id"))

    def store(connection: Connection, number: int, step: int) -> None:
        digests = [sha256(f"{number} {at}".encode()).digest() for at in range(ROWS)]
        news = [NewBlob(BlobKind.TABLE, digest, None, b"x") for digest in digests]
        blobs.insert_blobs(connection, project_id, news[::step], 0)

    in_unlike_orders(database, store)
    with database.read() as connection:
        assert ROUNDS * ROWS == connection.scalar(text("SELECT count(*) FROM rank_structures"))


def test_the_same_registrations_in_unlike_orders_do_not_deadlock(race: Race) -> None:
    """A rank that tries again on another replica is in two batches at once; one of them adds it."""
    with race.database.read() as connection:
        [first] = registrations.read_registrations(connection, race.checkpoint_id)
    added: list[int] = []

    def store(connection: Connection, number: int, step: int) -> None:
        rows = [replace(first, rank=1 + number * ROWS + at) for at in range(ROWS)]
        added.append(len(registrations.insert_registrations(connection, rows[::step])))

    in_unlike_orders(race.database, store)
    assert 1 + ROUNDS * ROWS == 1 + sum(added) == race.count()


def test_a_sequence_would_lose_events(database: Database) -> None:
    """Why the cursor is a row: numbers of a sequence are handed out before their transactions are committed.

    A poller that has seen 2 never looks for 1 again.
    """
    with database.write() as connection:
        connection.execute(text("CREATE TABLE numbered (id bigserial)"))
    add, look = text("INSERT INTO numbered DEFAULT VALUES"), text("SELECT max(id) FROM numbered")
    with database.write() as slow:
        slow.execute(add)
        with database.write() as fast:
            fast.execute(add)
        with database.read() as poller:
            assert 2 == poller.scalar(look)
    with database.read() as poller:
        assert [1] == list(poller.scalars(text("SELECT id FROM numbered WHERE id < 2")))


def test_events_wait_for_each_other_so_that_none_is_lost(database: Database) -> None:
    """Whoever comes second waits for the row, and has the larger cursor; a poller never sees it alone."""

    def append() -> None:
        with database.write() as connection:
            events.append(connection, [Event(EventKind.COMMITTED, 2, 2)], 1)

    with database.write() as slow:
        events.append(slow, [Event(EventKind.COMMITTED, 1, 1)], 1)
        fast = Aside(append)
        await_waiting(database, "transactionid")
        with database.read() as poller:
            assert [] == events.read_after(poller, 0, 100)
    fast.result()
    with database.read() as poller:
        assert [(1, 1), (2, 2)] == [(one.cursor, one.event.part_id) for one in events.read_after(poller, 0, 100)]


def test_a_row_that_changed_since_it_was_read_is_a_conflict_to_try_again(database: Database) -> None:
    """A serialization error of Postgres: DATABASE_CONFLICT, which the edge tries again by itself."""
    serializable = database.backend.writer.execution_options(isolation_level="REPEATABLE READ")

    def read_then_write() -> None:
        with database._transaction(serializable) as connection:
            connection.execute(text("SELECT cursor FROM catalog"))
            with database.write() as other:
                other.execute(text("UPDATE catalog SET cursor = 1"))
            connection.execute(text("UPDATE catalog SET cursor = 2"))

    with pytest.raises(UnavailableError) as caught:
        read_then_write()
    assert "DATABASE_CONFLICT" == caught.value.reason
    assert caught.value.retry_delay_s


# ---------------------------------------------------------------- time limits


def test_statements_end_with_the_deadline_of_their_call(database: Database) -> None:
    """DEADLINE_EXCEEDED in time to be told; the next call on the connection has its own time."""
    began_s = time.monotonic()
    with pytest.raises(DeadlineExceededError) as caught, statements_until(began_s + 0.3), database.read() as connection:
        connection.execute(text("SELECT pg_sleep(20)"))
    assert "STATEMENT_TIMEOUT" == caught.value.reason
    assert 0.2 < time.monotonic() - began_s < 5
    with database.read() as connection:
        assert ["30s"] == shown(connection, "statement_timeout")
    with statements_until(time.monotonic() + 3600), database.write() as connection:
        assert ["30s"] == shown(connection, "statement_timeout")


def test_waiting_for_a_run_s_lock_ends_with_the_deadline_too(database: Database) -> None:
    """A call behind a long commit is told in time, and its place in the queue is free again."""
    with (
        database.write([RUN]),
        pytest.raises(DeadlineExceededError),
        statements_until(time.monotonic() + 0.2),
        database.write([RUN]),
    ):
        pass
    with database.write([RUN]):
        pass


def test_the_limit_of_a_batch_is_no_deadline_of_its_callers(url: str) -> None:
    """A statement of no call's own that takes too long: UNAVAILABLE, for whoever waited may have time left."""
    limited = PostgresOptions(statement_timeout_s=0.1)
    with opened(url, postgres=limited) as database:
        with pytest.raises(UnavailableError) as caught, database.write() as connection:
            connection.execute(text("SELECT pg_sleep(20)"))
        assert "DATABASE_BUSY" == caught.value.reason
        assert caught.value.retry_delay_s


# ---------------------------------------------------------------- connections


def test_there_are_as_many_connections_as_were_asked_for(url: str) -> None:
    """No more: replicas share what Postgres allows. Whoever comes next waits for one to come back."""
    with opened(url, connections=2) as database:
        with database.read(), database.write():
            third = Aside(database.ping)
            assert 2 == database.checked_out()
            time.sleep(0.1)
            assert not third.ended
        third.result()


def test_a_url_wins_over_what_is_set_for_all(url: str) -> None:
    """libpq's parameters: who is connected is told unless the URL tells it."""
    own = url + ("&" if "?" in url else "?") + "application_name=mine&target_session_attrs=any"
    for one, name in ((url, "shardbook-server"), (own, "mine")):
        with opened(one) as database, database.read() as connection:
            assert [name] == shown(connection, "application_name")
