"""How SQLite is set up, and where it refuses to work."""

from __future__ import annotations

import importlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from sqlalchemy import exc, text

from shardbook.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ShardbookError,
    UnavailableError,
)
from shardbook_server.storage import migrate, sqlite
from shardbook_server.storage.database import Database
from shardbook_server.storage.deadline import statements_until
from shardbook_server.storage.failures import translate
from shardbook_server.storage.sqlite import SqliteBackend
from tests.databases import opened

MOUNTS = """\
22 1 0:20 / / rw,relatime - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/nfs rw - nfs4 server:/export rw
31 22 0:41 / /mnt/lustre\\040fs rw - lustre mds@tcp:/fs rw
32 30 0:42 / /mnt/nfs/local rw - xfs /dev/sdb1 rw
33 22 0:43 / /mnt/s3 rw shared:1 master:2 - fuse.s3fs s3fs rw
34 22 0:44 / /mnt/ntfs rw - fuseblk /dev/sdc1 rw
35 22 0:45 / /mnt/over rw - ext4 /dev/sdd1 rw
36 35 0:46 / /mnt/over rw - cifs //host/share rw
garbage
37 22 0:47
"""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A migrated file in a directory of its own."""
    url = f"sqlite:///{tmp_path / 'shardbook.db'}"
    migrate.upgrade(url)
    with opened(url) as database:
        yield database


def test_a_read_ends_at_its_call_s_deadline(database: Database) -> None:
    """As Postgres's time limit has it; the connection is as good as before, for a call with time left and for none."""
    endless = text("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n")
    with (
        pytest.raises(DeadlineExceededError) as caught,
        statements_until(time.monotonic() + 0.05),
        database.read() as connection,
    ):
        connection.execute(endless)
    assert "STATEMENT_TIMEOUT" == caught.value.reason
    counted = text(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300000) SELECT count(*) FROM n"
    )
    with statements_until(time.monotonic() + 60), database.read() as connection:
        assert 300_000 == connection.scalar(counted)
    with database.read() as connection:
        assert 300_000 == connection.scalar(counted)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x/shardbook.db", None),
        ("/mnt/nfs/x/shardbook.db", "nfs4"),
        ("/mnt/nfs/local/shardbook.db", None),
        ("/mnt/nfsx/shardbook.db", None),
        ("/mnt/lustre fs/shardbook.db", "lustre"),
        ("/mnt/s3/shardbook.db", "fuse.s3fs"),
        ("/mnt/ntfs/shardbook.db", None),
        ("/mnt/over/shardbook.db", "cifs"),
    ],
)
def test_network_file_systems_are_recognised(path: str, kind: str | None) -> None:
    """By the mount that the path lies on: the longest, and of two on one point the later."""
    assert kind == sqlite.network_file_system(Path(path), MOUNTS)


def test_a_database_on_a_network_file_system_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's locks do not hold there, and databases get corrupted."""
    monkeypatch.setattr(sqlite, "_mount_table", lambda: MOUNTS)
    with pytest.raises(InvalidArgumentError, match=r"network file system \(nfs4\)") as caught:
        Database("sqlite:////mnt/nfs/shardbook.db")
    assert "NETWORK_FILE_SYSTEM" == caught.value.reason


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory",
        "mysql://x/y",
        "sqlite:////x?y=1",
        "sqlite:///rel.db",
    ],
)
def test_urls_that_cannot_be_served(url: str) -> None:
    """The message says what to write."""
    with pytest.raises(InvalidArgumentError, match="sqlite:////absolute/path") as caught:
        Database(url)
    assert ["database_url"] == [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("pragma", "expected"),
    [
        ("journal_mode", "wal"),
        ("synchronous", 2),
        ("foreign_keys", 1),
        ("page_size", 16_384),
        ("busy_timeout", 30_000),
        ("journal_size_limit", 64 << 20),
    ],
)
def test_connections_are_set_up(database: Database, pragma: str, expected: object) -> None:
    """Durable, with foreign keys, in pages that hold large rows."""
    for transaction in (database.read, database.write):
        with transaction() as connection:
            assert expected == connection.execute(text(f"PRAGMA {pragma}")).scalar_one()


def test_every_table_is_strict(database: Database) -> None:
    """A text in an integer column is an error, as it is on other databases."""
    with database.read() as connection:
        statement = "SELECT name FROM pragma_table_list WHERE type = 'table' AND strict = 0 AND name NOT LIKE 'sqlite%'"
        loose = connection.execute(text(statement)).scalars().all()
    assert ["alembic_version"] == list(loose)


def test_the_newer_library_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled one when it beats the system's, else the system's."""
    versions = {(3, 99, 0): "pysqlite3.dbapi2", (3, 0, 0): "sqlite3"}
    for version, expected in versions.items():
        bundled = ModuleType("pysqlite3.dbapi2")
        bundled.__dict__.update({"sqlite_version_info": version, "sqlite_version": "x"})
        monkeypatch.setattr(importlib, "import_module", lambda _, module=bundled: module)
        assert expected == sqlite.driver().__name__


def test_an_old_library_is_warned_about(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Up to 3.51.2 a reset of the log can corrupt the database; the line says what to install."""

    def absent(_: str) -> None:
        raise ImportError

    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    with caplog.at_level(logging.WARNING):
        sqlite.driver()
    assert "pip install pysqlite3" in caplog.text


def backend() -> SqliteBackend:
    """One that opens nothing."""
    return SqliteBackend("sqlite:////nowhere/shardbook.db", connections=1, clock=None)


@pytest.mark.parametrize(
    ("code", "error", "reason"),
    [
        (5, UnavailableError, "DATABASE_BUSY"),
        (5 | 2 << 8, UnavailableError, "DATABASE_BUSY"),
        (10 | 3 << 8, UnavailableError, "DATABASE_UNAVAILABLE"),
        (11, InternalError, "DATABASE_DAMAGED"),
        (13, ResourceExhaustedError, "STORAGE_FULL"),
        (14, UnavailableError, "DATABASE_UNAVAILABLE"),
        (19, InternalError, "INTERNAL"),
    ],
)
def test_errors_of_the_driver_become_ours(code: int, error: type[ShardbookError], reason: str) -> None:
    """By SQLite's result code; what can be tried again says so."""
    original = Exception("message of the driver")
    original.__dict__["sqlite_errorcode"] = code
    translated = translate(
        exc.DBAPIError("SELECT 1", None, original), SqliteBackend("sqlite:////tmp/unused.db", connections=1, clock=None)
    )
    assert (error, reason) == (type(translated), reason and translated.reason)
    assert (translated.retry_delay_s is not None) is (error is UnavailableError)


def test_a_full_pool_is_unavailable() -> None:
    """Waiting for a connection has a limit."""
    assert "DATABASE_BUSY" == translate(exc.TimeoutError(), backend()).reason


def test_a_full_disk_is_told_and_reading_goes_on(database: Database) -> None:
    """RESOURCE_EXHAUSTED / STORAGE_FULL; nothing half-written."""
    with database.write() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
        connection.execute(text(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(ResourceExhaustedError) as caught, database.write() as connection:
        connection.execute(text("INSERT INTO projects (name) VALUES (:name)"), {"name": "x" * 1_000_000})
    assert "STORAGE_FULL" == caught.value.reason
    with database.read() as connection:
        assert 0 == connection.execute(text("SELECT count(*) FROM projects")).scalar_one()


def test_closing_leaves_one_file(database: Database) -> None:
    """The log is folded into the database, so that the file can be copied."""
    with database.write() as connection:
        connection.execute(text("UPDATE catalog SET cursor = 5"))
    with database.read() as connection:
        connection.execute(text("SELECT 1"))
    database.close()
    path = sqlite.database_path(database.url)
    assert [path.name] == [one.name for one in path.parent.iterdir()]


def test_the_module_that_is_used_has_the_fix() -> None:
    """Where the tests run, the library is newer than the last one that can corrupt."""
    assert SimpleNamespace(**sqlite.driver().__dict__).sqlite_version_info > (3, 51, 2)
