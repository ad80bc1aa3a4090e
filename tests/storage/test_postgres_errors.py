"""What an error of Postgres becomes, and what no error or URL that people see ever shows."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from urllib.parse import urlsplit

import psycopg
import pytest
from sqlalchemy import text

from shardbook.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ShardbookError,
    UnavailableError,
)
from shardbook_server.storage.database import Database, is_postgres
from shardbook_server.storage.urls import shown_url
from tests.conftest import MakeDatabases
from tests.databases import opened


@pytest.fixture(scope="module")
def url(make_databases: MakeDatabases) -> str:
    """A migrated Postgres that no test of this module changes."""
    return make_databases("postgres").new()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """The same, opened; no connection may be left in use."""
    with opened(url) as database:
        yield database


@pytest.mark.parametrize(
    ("state", "error", "reason"),
    [
        ("40001", UnavailableError, "DATABASE_CONFLICT"),
        ("40P01", UnavailableError, "DATABASE_CONFLICT"),
        ("23505", UnavailableError, "DATABASE_CONFLICT"),
        ("23503", UnavailableError, "DATABASE_CONFLICT"),
        ("53100", ResourceExhaustedError, "STORAGE_FULL"),
        ("53200", UnavailableError, "DATABASE_BUSY"),
        ("53300", UnavailableError, "DATABASE_BUSY"),
        ("55P03", UnavailableError, "DATABASE_BUSY"),
        ("57014", UnavailableError, "DATABASE_BUSY"),
        ("57P01", UnavailableError, "DATABASE_UNAVAILABLE"),
        ("57P03", UnavailableError, "DATABASE_UNAVAILABLE"),
        ("08006", UnavailableError, "DATABASE_UNAVAILABLE"),
        ("25006", UnavailableError, "DATABASE_UNAVAILABLE"),
        ("58030", UnavailableError, "DATABASE_UNAVAILABLE"),
        ("25P04", UnavailableError, "DATABASE_UNAVAILABLE"),
        ("26000", FailedPreconditionError, "PREPARED_STATEMENTS"),
        ("42P05", FailedPreconditionError, "PREPARED_STATEMENTS"),
        ("42P01", FailedPreconditionError, "SCHEMA_STALE"),
        ("42703", FailedPreconditionError, "SCHEMA_STALE"),
        ("28P01", FailedPreconditionError, "DATABASE_REFUSED"),
        ("3D000", FailedPreconditionError, "DATABASE_REFUSED"),
        ("XX001", InternalError, "DATABASE_DAMAGED"),
        ("22003", InternalError, "INTERNAL"),
    ],
)
def test_errors_of_the_server_become_ours(
    database: Database, state: str, error: type[ShardbookError], reason: str
) -> None:
    """By SQLSTATE, through the real driver; what can be tried again says so, and a transaction is never left open."""
    raising = text(
        f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{state}', MESSAGE = 'two' || chr(10) || 'lines'; END $$"
    )
    with pytest.raises(ShardbookError) as caught, database.write() as connection:
        connection.execute(raising)
    assert (error, reason) == (type(caught.value), caught.value.reason)
    assert (caught.value.retry_delay_s is not None) is (error is UnavailableError)
    assert error is InternalError or "\n" not in caught.value.message
    database.ping()


def test_a_transaction_that_idled_too_long_can_be_made_again(database: Database) -> None:
    """A server that was stopped in one, with its machine for example, finds its connection closed."""

    def idle() -> None:
        with database.write() as connection:
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = '50ms'"))
            time.sleep(0.5)
            connection.execute(text("SELECT 1"))

    with pytest.raises(UnavailableError) as caught:
        idle()
    assert "DATABASE_UNAVAILABLE" == caught.value.reason
    assert caught.value.retry_delay_s is not None
    database.ping()


def test_a_database_that_does_not_exist_is_told_by_name(url: str) -> None:
    """And so is a user: what the server says is what its owner needs."""
    absent = urlsplit(url)._replace(path="/absent").geturl()
    with opened(absent) as database, pytest.raises(UnavailableError, match='"absent" does not exist'):
        database.ping()


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """``[postgres]`` is an extra: the message is the command that installs it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(FailedPreconditionError, match=r"pip install 'shardbook\[postgres\]'") as caught:
        Database("postgresql://ada:hunter2@127.0.0.1/shardbook")
    assert "MISSING_PACKAGE" == caught.value.reason
    assert "hunter2" not in caught.value.message


# ---------------------------------------------------------------- passwords

PASSWORD = "hunter2"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ada:hunter2@db/shardbook", "postgresql://db/shardbook"),
        ("postgres://ada:hunter2@db", "postgres://db"),
        ("postgresql://ada:hunter2@h1:5432,h2:5433/x?target_session_attrs=any",
         "postgresql://h1:5432,h2:5433/x?target_session_attrs=any"),
        ("postgresql://ada:a#hunter2@db/x", "postgresql://db/x"),
        ("postgresql://ada:a?hunter2@db/x", "postgresql://db/x"),
        ("postgresql://ada:a:hunter2@db/x", "postgresql://db/x"),
        ("postgresql://ada:a/hunter2@db/x", "postgresql://..."),
        ("postgresql://ada:a@hunter2@db/x", "postgresql://..."),
        ("postgresql://ada:hunter2@[::1/x", "postgresql://[::1/x"),
        ("postgresql://db/x?user=ada&password=hunter2", "postgresql://db/x?user=ada"),
        ("postgresql://db/x?password=a@hunter2", "postgresql://..."),
        ("postgresql://db/x?sslmode=require&sslpassword=hunter2", "postgresql://db/x?sslmode=require"),
        ("postgresql://db/x?PASSWORD=hunter2", "postgresql://db/x"),
        ("mysql://ada:hunter2@db/x", "mysql://db/x"),
        ("host=db password=hunter2", "..."),
        ("ada:hunter2@db", "..."),
        ("shardbook.db", "shardbook.db"),
        ("sqlite:////data/a@b:c=d.db", "sqlite:////data/a@b:c=d.db"),
    ],
)  # fmt: skip
def test_urls_are_shown_without_their_secrets(url: str, shown: str) -> None:
    """Read as libpq reads them; one that cannot be read is not shown at all."""
    assert shown == shown_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:hunter2@127.0.0.1:1/shardbook",
        "postgresql://ada:hunter2@127.0.0.1:1,127.0.0.1:2/shardbook",
        "postgresql://127.0.0.1:1/shardbook?user=ada&password=hunter2",
        "postgresql://ada:a#hunter2@127.0.0.1:1/shardbook",
        "postgresql://ada:hunter2%zz@127.0.0.1:1/shardbook",
        "postgresql://ada:hunter2@[::1/shardbook",
        "postgresql://ada:hunter2@127.0.0.1:1/shardbook?nonsense=1",
        "postgresql://ada:hunter2@127.0.0.1:nonsense/shardbook",
        "postgresql://127.0.0.1:hunter2/x@127.0.0.1/shardbook",
        "postgresql://ada:a@hunter2@127.0.0.1:1:2/shardbook",
        "postgresql://127.0.0.1:1/shardbook?password=a@hunter2&x",
        "mysql://ada:hunter2@127.0.0.1/x",
    ],
)
def test_no_error_shows_a_password(url: str) -> None:
    """Neither its message nor the traceback that a log would have, whatever is wrong with the URL."""
    with pytest.raises((UnavailableError, InvalidArgumentError)) as caught, opened(url) as database:
        database.ping()
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in caught.value.message
    if is_postgres(url) and isinstance(caught.value, InvalidArgumentError):
        assert "postgresql://user@host:5432/name" in caught.value.message


def test_no_error_shows_what_a_statement_carried(database: Database) -> None:
    """Values of parameters are users' data: names of hosts and people, payloads."""
    with pytest.raises(ShardbookError) as caught, database.write() as connection:
        connection.execute(text("INSERT INTO absent VALUES (:value)"), {"value": PASSWORD})
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("kind", [psycopg.OperationalError, psycopg.errors.ConnectionTimeout])
def test_a_connection_that_is_never_made_is_no_bug(database: Database, kind: type[psycopg.Error]) -> None:
    """Rule: refused, lost or timed out: UNAVAILABLE, and the call is made again. Errors of libpq have no SQLSTATE."""
    error = database.backend.translate(kind("connection timeout expired"))
    assert isinstance(error, UnavailableError)
    assert "DATABASE_UNAVAILABLE" == error.reason
