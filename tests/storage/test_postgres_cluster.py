"""Postgres as a server that somebody runs: it crashes, fails over, is set up wrongly, and waits for its standbys."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text

from shardbook.errors import FailedPreconditionError, UnavailableError
from shardbook_server.app import prepare_database
from shardbook_server.storage import migrate
from shardbook_server.storage.database import Database, PostgresOptions
from tests.behaviour.rpc.api import settings_in, wait_until
from tests.databases import opened
from tests.postgres import Cluster, free_port
from tests.storage.asides import Aside, await_waiting

CURSOR = text("SELECT cursor FROM catalog")
INCREMENT = text("UPDATE catalog SET cursor = cursor + 1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server that the tests of this module may hurt; each of them leaves it alive."""
    cluster = Cluster({"deadlock_timeout": "50ms"})
    migrate.upgrade(cluster.url)
    yield cluster
    cluster.remove()


@pytest.fixture
def database(cluster: Cluster) -> Iterator[Database]:
    """Its database; no connection may be left in use."""
    with opened(cluster.url) as database:
        yield database


def set_for_all(cluster: Cluster, name: str, value: str) -> None:
    """Changes a setting of the whole server, and waits until it counts; an empty value takes it back."""
    statement = sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value))
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        connection.execute(statement)
        connection.execute("SELECT pg_reload_conf()")
        wait_until(lambda: value == connection.execute(sql.SQL("SHOW {}").format(sql.Identifier(name))).fetchone()[0])  # type: ignore[index]
        # Whether commits wait for standbys is said by the checkpointer, which may read its settings later than we do.
        connection.execute("CHECKPOINT")


def increment(database: Database) -> int:
    """Writes; returns what it wrote."""
    with database.write() as connection:
        connection.execute(INCREMENT)
        return int(connection.execute(CURSOR).scalar_one())


# ---------------------------------------------------------------- one server


def test_a_deadlock_is_a_conflict_to_try_again(database: Database) -> None:
    """Postgres ends one of the two; that one hears DATABASE_CONFLICT, which the edge tries again by itself."""
    with database.write() as connection:
        connection.execute(text("INSERT INTO projects (name) VALUES ('a'), ('b')"))
    barrier = threading.Barrier(2)

    def hold(first: str, second: str) -> None:
        with database.write() as connection:
            for name in (first, second):
                connection.execute(text("UPDATE projects SET name = name WHERE name = :name"), {"name": name})
                if name == first:
                    barrier.wait(10)

    failures = []
    for one in [Aside(lambda: hold("a", "b")), Aside(lambda: hold("b", "a"))]:
        try:
            one.result()
        except UnavailableError as error:
            failures.append(error)
    assert ["DATABASE_CONFLICT"] == [error.reason for error in failures]
    assert failures[0].retry_delay_s


@pytest.fixture
def hanging_commits(cluster: Cluster) -> Iterator[None]:
    """Commits wait for a standby that does not exist."""
    set_for_all(cluster, "synchronous_standby_names", "nobody")
    yield
    set_for_all(cluster, "synchronous_standby_names", "")


def test_a_commit_is_never_ended_by_a_time_limit(cluster: Cluster, hanging_commits: None) -> None:
    """Statements have 0.1 s here, the commit has what it takes: one cut short would say no to what may be durable."""
    with opened(cluster.url, postgres=PostgresOptions(statement_timeout_s=0.1)) as database:
        with database.read() as connection:
            before = connection.execute(CURSOR).scalar_one()
        writer = Aside(lambda: increment(database))
        await_waiting(database, "SyncRep")
        time.sleep(0.3)
        assert not writer.ended
        set_for_all(cluster, "synchronous_standby_names", "")
        assert before + 1 == writer.result()
        with database.read() as connection:
            assert before + 1 == connection.execute(CURSOR).scalar_one()


def test_a_commit_waits_for_standbys_when_the_settings_say_so(cluster: Cluster, hanging_commits: None) -> None:
    """With ``local`` it does not: the mode is that of the settings."""
    with opened(cluster.url, postgres=PostgresOptions(synchronous_commit="local")) as database:
        increment(database)


def test_a_crash_costs_one_call_and_the_pool_recovers(cluster: Cluster, database: Database) -> None:
    """Every connection of the pool is dead: the first use may find that out, the next ones work."""
    in_use = [database.read() for _ in range(4)]
    for one in in_use:
        one.__enter__()
    for one in in_use:
        one.__exit__(None, None, None)
    acknowledged = increment(database)
    cluster.crash()
    with pytest.raises(UnavailableError) as away:
        database.ping()
    cluster.start()
    assert "DATABASE_UNAVAILABLE" == away.value.reason
    assert away.value.retry_delay_s
    assert 0 == database.checked_out()
    assert acknowledged + 1 == increment(database)
    cluster.crash()
    cluster.start()
    with pytest.raises(UnavailableError):
        increment(database)
    assert acknowledged + 2 == increment(database)


def test_a_crash_in_the_middle_of_a_transaction_takes_all_of_it_back(cluster: Cluster, database: Database) -> None:
    """The call hears UNAVAILABLE, its connection goes back, nothing of it is there."""
    before = increment(database)

    def write_over_a_crash() -> None:
        with database.write() as connection:
            connection.execute(INCREMENT)
            cluster.crash()
            connection.execute(INCREMENT)

    with pytest.raises(UnavailableError) as caught:
        write_over_a_crash()
    cluster.start()
    assert "DATABASE_UNAVAILABLE" == caught.value.reason
    assert 0 == database.checked_out()
    assert before + 1 == increment(database)


def test_a_connection_that_an_administrator_ends_is_replaced(database: Database) -> None:
    """One call says UNAVAILABLE, the next one has a new connection."""
    statement = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'shardbook%'")
    with pytest.raises(UnavailableError), database.read() as connection:
        connection.execute(statement)
    database.ping()


def test_a_server_that_would_lose_what_it_acknowledged_is_refused(tmp_path: Path) -> None:
    """``fsync = off``: the message says where to set it on."""
    cluster = Cluster({"fsync": "off"})
    try:
        migrate.upgrade(cluster.url)
        with pytest.raises(FailedPreconditionError, match=r"Set fsync=on in postgresql\.conf") as caught:
            prepare_database(settings_in(tmp_path, database_url=cluster.url))
    finally:
        cluster.remove()
    assert "NOT_DURABLE" == caught.value.reason


# ---------------------------------------------------------------- several hosts


def url_of(*ports: int) -> str:
    """URL of a cluster by its members' ports."""
    return f"postgresql://shardbook@{','.join(f'127.0.0.1:{port}' for port in ports)}/postgres"


def port_of(database: Database) -> int:
    """The member that a database is connected to."""
    with database.read() as connection:
        return int(connection.scalar(text("SHOW port")))


def test_a_dead_host_is_passed_over(cluster: Cluster) -> None:
    """Wherever it stands in the URL; a database whose hosts are all dead says so."""
    dead = free_port()
    for ports in ((dead, cluster.port), (cluster.port, dead)):
        with opened(url_of(*ports)) as database:
            assert cluster.port == port_of(database)
    with opened(url_of(dead, dead)) as database, pytest.raises(UnavailableError) as caught:
        database.ping()
    assert "DATABASE_UNAVAILABLE" == caught.value.reason


def test_a_standby_is_passed_over_until_it_is_promoted(cluster: Cluster) -> None:
    """With a synchronous standby, what was acknowledged survives the primary; servers find the new one themselves."""
    standby = Cluster(follows=cluster)
    try:
        with opened(url_of(standby.port, cluster.port)) as database:
            # No default of a session counts, only whether the member can write.
            assert cluster.port == port_of(database)
            set_for_all(cluster, "synchronous_standby_names", "standby")
            acknowledged = increment(database)
            cluster.crash()
            with pytest.raises(UnavailableError):
                increment(database)
            standby.promote()
            assert acknowledged + 1 == increment(database)
            assert standby.port == port_of(database)
    finally:
        standby.remove()
        cluster.start()
        set_for_all(cluster, "synchronous_standby_names", "")
