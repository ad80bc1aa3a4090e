"""Connections to Postgres: which are given up, and what their locks keep off. Against the real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import text

from shardbook.errors import UnavailableError
from shardbook_server.storage import tables
from shardbook_server.storage.database import Database
from shardbook_server.storage.dialect import lock_rows
from tests.conftest import MakeDatabases
from tests.databases import opened
from tests.storage.asides import Aside, await_waiting

_INCREMENT = text("UPDATE catalog SET cursor = cursor + 1")


@pytest.fixture
def database(make_databases: MakeDatabases) -> Iterator[Database]:
    """A migrated Postgres of the test's own; no connection may be left in use."""
    with opened(make_databases("postgres").new()) as database:
        yield database


def test_rows_that_are_locked_to_be_changed_may_be_referred_to(database: Database) -> None:
    """Their keys stay what they are, so nobody who adds a row that refers to one has to wait."""
    with database.write() as connection:
        connection.execute(text("INSERT INTO projects (name) VALUES ('held')"))
    with database.write() as holder:
        assert [1] == lock_rows(holder, tables.projects.c.id, [1])
        with database.write() as other:
            other.execute(text("SET LOCAL lock_timeout = '2s'"))
            other.execute(text("INSERT INTO runs (project_id, name, create_time_us) VALUES (1, 'r', 0)"))


def test_a_server_that_became_a_standby_is_left(database: Database) -> None:
    """A pool's connections may survive a failover: those that may not write any more must not be used again."""
    with database._transaction(database.backend.writer) as connection:
        connection.execute(text("SET SESSION default_transaction_read_only = on"))
    before = database.backend.connection_count
    with pytest.raises(UnavailableError) as caught, database.write() as connection:
        connection.execute(_INCREMENT)
    assert "DATABASE_UNAVAILABLE" == caught.value.reason
    # The bridge makes such a call again at once.
    with database.write() as connection:
        connection.execute(_INCREMENT)
    assert before + 1 == database.backend.connection_count


def test_what_waits_for_a_database_when_the_server_must_end_is_cut_off(database: Database) -> None:
    """Also a statement that Postgres never answers; and nothing new begins."""

    def sleep() -> None:
        with database.write() as connection:
            connection.execute(text("SELECT pg_sleep(60)"))

    stuck = Aside(sleep)
    with opened(database.url) as other:
        await_waiting(other, "PgSleep")
    database.sever()
    for refused in (stuck.result, database.ping):
        with pytest.raises(UnavailableError):
            refused()
