"""The schema: made by migrations only, and refused when it does not fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text

import shardbook_migrations
from shardbook.errors import FailedPreconditionError
from shardbook_server.storage import migrate, tables
from shardbook_server.storage.database import Database


def schema(connection: Connection) -> dict[str, str]:
    """Every table and index by name, as SQLite keeps it, without layout."""
    rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
    kept = {name: re.sub(r"\s+", " ", sql).replace('"', "").strip() for name, sql in rows}
    return {name: sql for name, sql in kept.items() if name != "alembic_version"}


def test_there_is_one_head_and_it_is_the_one_this_release_is_written_for() -> None:
    """Two heads would mean that two histories were merged by text only."""
    assert (migrate.HEAD,) == migrate.heads()


def test_the_model_equals_what_the_migrations_make(database: Database, tmp_path: Path) -> None:
    """Statement for statement, and by Alembic's own comparison."""
    other = Database(f"sqlite:///{tmp_path / 'model.db'}")
    with other.write() as connection:
        tables.metadata.create_all(connection)
        expected = schema(connection)
    other.close()
    with database.read() as connection:
        assert expected == schema(connection)
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert [] == compare_metadata(context, tables.metadata)


def test_up_down_and_up_again(url: str) -> None:
    """Downgrading to the base leaves nothing behind."""
    assert "0001" == migrate.upgrade(url)
    database = Database(url)
    with database.read() as connection:
        first = schema(connection)
    assert "base" == migrate.downgrade(url, "base")
    with database.read() as connection:
        assert {"sqlite_sequence"} >= set(schema(connection))
    assert "0001" == migrate.upgrade(url)
    with database.read() as connection:
        assert first == schema(connection)
    database.close()


def test_upgrading_again_changes_nothing(url: str) -> None:
    """Neither the epoch nor the data."""
    migrate.upgrade(url)
    database = Database(url)
    with database.read() as connection:
        before = connection.execute(text("SELECT * FROM catalog")).all()
    migrate.upgrade(url)
    with database.read() as connection:
        assert before == connection.execute(text("SELECT * FROM catalog")).all()
    database.close()
    assert 1 == len(before)


def test_every_database_has_its_own_epoch_and_key(tmp_path: Path) -> None:
    """Cursors and page tokens of one mean nothing to another."""
    found = set()
    for name in ("a", "b"):
        url = f"sqlite:///{tmp_path / name / 'shardbook.db'}"
        migrate.upgrade(url)
        database = Database(url)
        with database.read() as connection:
            found |= set(connection.execute(text("SELECT epoch, token_key FROM catalog")).one())
        database.close()
    assert 4 == len(found)


def test_two_migrators_at_once(url: str) -> None:
    """The second waits for the first, and finds nothing to do."""
    code = f"from shardbook_server.storage import migrate; print(migrate.upgrade({url!r}))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert ["0001\n"] * 3 == [process.communicate(timeout=60)[0] for process in started]
    assert "0001" == migrate.check(url)


def test_a_crash_in_the_middle_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of an upgrade is one transaction; a re-run starts anew."""

    def upgrade_and_crash(config: Config, revision: str) -> None:
        command.upgrade(config, revision)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # After the tables are made, before the transaction ends.
        patch.setattr(migrate, "command", SimpleNamespace(upgrade=upgrade_and_crash))
        with pytest.raises(KeyboardInterrupt):
            migrate.upgrade(url)
    database = Database(url)
    with database.read() as connection:
        assert {} == schema(connection)
    database.close()
    assert "0001" == migrate.upgrade(url)


def refusal(url: str) -> FailedPreconditionError:
    """The error of a schema that cannot be served."""
    with pytest.raises(FailedPreconditionError) as caught:
        migrate.check(url)
    return caught.value


def set_version(url: str, revision: str, oldest: str | None = None) -> None:
    """Makes a schema claim another revision."""
    database = Database(url)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
        if oldest is not None:
            connection.execute(text("UPDATE schema_compat SET oldest = :oldest"), {"oldest": oldest})
    database.close()


def test_a_stale_schema_is_refused_with_the_command_to_run(url: str) -> None:
    """Also when there is no database, or an empty one."""
    messages = [refusal(url)]
    database = Database(url)
    with database.write() as connection:
        connection.execute(text("CREATE TABLE something (id INTEGER)"))
    database.close()
    messages.append(refusal(url))
    migrate.upgrade(url)
    set_version(url, "0000")
    messages.append(refusal(url))
    assert ["SCHEMA_STALE"] * 3 == [error.reason for error in messages]
    assert all("run `shardbook-server db upgrade`" in error.message for error in messages)
    assert "the schema is at 0000, this release needs 0001" in messages[2].message


def test_a_newer_schema_is_served_as_long_as_it_says_so(url: str) -> None:
    """``schema_compat`` names the oldest server that may still serve: a rolling upgrade migrates first."""
    migrate.upgrade(url)
    set_version(url, "0002", oldest="0001")
    assert "0002" == migrate.check(url)
    set_version(url, "0003", oldest="0002")
    assert "SCHEMA_TOO_NEW" == refusal(url).reason
    assert "pip install --upgrade shardbook" in refusal(url).message
    with pytest.raises(FailedPreconditionError):
        migrate.upgrade(url)


def test_migrations_travel_with_the_package() -> None:
    """Alembic finds them beside the module, wherever that is installed."""
    names = {path.name for path in shardbook_migrations.LOCATION.rglob("*.*")}
    assert {"env.py", "script.py.mako", "0001_first.py", "py.typed"} <= names
