"""An upgrade of a database with data in place, cut short, contended, and taken back: by the release after this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from shardbook.errors import UnavailableError
from shardbook_server.service.services import build_services
from shardbook_server.service.types import OnLive
from shardbook_server.storage import migrate, postgres, tables
from shardbook_server.storage.database import Database
from tests.behaviour.rpc.api import wait_until
from tests.behaviour.service.saves import Job, Model, whole
from tests.conftest import MakeDatabases
from tests.databases import Databases, opened
from tests.storage.releases import HOLD, NEXT, THIS, become_next_release, start_upgrade, write_next_release
from tests.storage.schemas import schema_at


def saved(url: str) -> str:
    """Puts a committed checkpoint and an open one into a database."""
    with opened(url) as database:
        job = Job(build_services(database, lease_ttl_s=60), Model(2))
        job.start()
        job.save(1)
        job.register(2, whole(job.model)[:1])
    return url


def rows(url: str) -> dict[str, list[Any]]:
    """Every row that this release knows of, by table."""
    with opened(url) as database, database.read() as connection:
        return {
            table.name: sorted(map(repr, connection.execute(table.select()).all()))
            for table in tables.metadata.sorted_tables
            if table is not tables.schema_compat
        }


@pytest.fixture
def url(databases: Databases) -> str:
    """A database of this release, with data."""
    return saved(databases.new())


@pytest.fixture
def location(tmp_path: Path) -> Path:
    """Migrations of the release after this one."""
    return write_next_release(tmp_path)


@pytest.fixture
def next_release(location: Path) -> Iterator[None]:
    """This process is one of that release."""
    with pytest.MonkeyPatch.context() as patch:
        become_next_release(patch, location)
        yield


def test_data_in_place_are_kept_up_and_down(url: str, next_release: None) -> None:
    """The new column is filled; going back drops it and nothing else."""
    before, old_schema = rows(url), schema_at(url)
    assert NEXT == migrate.upgrade(url)
    assert before == rows(url)
    with opened(url) as database, database.read() as connection:
        notes = connection.scalars(text("SELECT note FROM checkpoints ORDER BY id")).all()
    assert ["from before"] * 2 == list(notes)
    assert migrate.HEAD == migrate.check(url)
    assert THIS == migrate.downgrade(url, THIS)
    assert (before, old_schema) == (rows(url), schema_at(url))


def test_a_server_of_the_release_before_writes_on(url: str, location: Path) -> None:
    """What the services of this release do fits the newer schema, as it says."""
    with opened(url) as database:
        job = Job(build_services(database, lease_ttl_s=60), Model(2))
        job.start(on_live=OnLive.TAKEOVER)
        job.save(3)
        process = start_upgrade(url, location)
        assert f"{NEXT}\n" == process.communicate(timeout=60)[0]
        # Over connections, and with prepared statements, of before.
        job.save(4)
        assert {1, 3, 4} == {
            one.step for one in job.services.catalog.list_checkpoints(f"{job.run}/parts/default").items
        }
    assert NEXT == migrate.check(url)


def test_a_killed_upgrade_leaves_nothing_and_a_second_one_ends(
    url: str, location: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL when the tables are changed already: all of an upgrade is one transaction."""
    before, old_schema = rows(url), schema_at(url)
    half_way = tmp_path / "half-way"
    with monkeypatch.context() as patch:
        patch.setenv(HOLD, str(half_way))
        process = start_upgrade(url, location)
    wait_until(half_way.exists, within_s=30)
    process.kill()
    process.communicate()
    assert (before, old_schema) == (rows(url), schema_at(url))
    assert THIS == migrate.check(url)
    assert f"{NEXT}\n" == start_upgrade(url, location).communicate(timeout=60)[0]
    assert before == rows(url)


def test_migrators_at_once(url: str, location: Path) -> None:
    """One does it, another of its release finds it done; one of the release before gives way, or came first."""
    before = rows(url)
    code = f"from shardbook_server.storage import migrate; migrate.upgrade({url!r})"
    older = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    newer = [start_upgrade(url, location) for _ in range(2)]
    assert [(f"{NEXT}\n", 0)] * 2 == [(one.communicate(timeout=60)[0], one.returncode) for one in newer]
    refused = older.communicate(timeout=60)[1]
    assert older.returncode == 0 or "pip install --upgrade shardbook" in refused
    assert (NEXT, before) == (migrate.check(url), rows(url))


@pytest.fixture
def busy(make_databases: MakeDatabases) -> Iterator[Database]:
    """A Postgres with data, some of which live servers are about to hold."""
    with opened(saved(make_databases("postgres").new())) as database:
        yield database


def test_an_upgrade_does_not_wait_long_for_live_servers(
    busy: Database, next_release: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a statement that waits for a table, everybody waits: it gives up, nothing is changed, a re-run ends."""
    monkeypatch.setattr(postgres, "_SCHEMA_LOCK_S", 0.2)
    with busy.read() as reader:
        reader.execute(text("SELECT count(*) FROM checkpoints"))
        with pytest.raises(UnavailableError, match=r"others held .* try again") as caught:
            migrate.upgrade(busy.url)
        assert "DATABASE_BUSY" == caught.value.reason
        assert THIS == migrate.current(busy.url)
    assert NEXT == migrate.upgrade(busy.url)


def test_migrations_wait_for_each_other_without_a_limit_and_for_servers_five_seconds(busy: Database) -> None:
    """A long one is never ended half-way by the time limit of ordinary statements."""
    with migrate._migrating(busy.url, create=False) as connection:
        limits = [connection.scalar(text(f"SHOW {name}")) for name in ("statement_timeout", "lock_timeout")]
    assert ["0", "5s"] == limits
