"""The schema: made by migrations only, and refused when it does not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

import shardbook_migrations
from shardbook.errors import FailedPreconditionError, InvalidArgumentError
from shardbook_server.service.services import build_services
from shardbook_server.storage import migrate, tables
from shardbook_server.storage.database import Database
from tests.behaviour.service.saves import Job, Model
from tests.databases import Databases, opened
from tests.storage.schemas import schema_at, schema_of, set_version


def test_there_is_one_head_and_it_is_the_one_this_release_is_written_for() -> None:
    """Two heads would mean that two histories were merged by text only."""
    assert (migrate.HEAD,) == migrate.heads()


def test_the_history_is_one_line_to_the_head() -> None:
    """Each revision with what it does, oldest first."""
    listed = migrate.history()
    assert ("0001", "The first schema.") == listed[0]
    assert migrate.HEAD == listed[-1][0]
    assert sorted(listed) == list(listed)


def test_every_revision_keeps_what_the_one_before_holds(databases: Databases) -> None:
    """Rule: down to the first revision and up again, with a committed checkpoint in place."""
    url = databases.new()
    with opened(url) as database:
        job = Job(build_services(database, lease_ttl_s=60), Model(2))
        job.start()
        job.save(1)
        before = job.services.catalog.list_checkpoints(f"{job.run}/parts/default").items
    for revision, _ in migrate.history()[::-1]:
        assert revision == migrate.downgrade(url, revision)
        assert migrate.HEAD == migrate.upgrade(url)
    with opened(url) as database:
        assert before == build_services(database).catalog.list_checkpoints(f"{job.run}/parts/default").items


# Of indexes on expressions SQLAlchemy reads nothing back from SQLite; the comparison of definitions has them.
@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
@pytest.mark.filterwarnings("ignore:autogenerate skipping metadata-specified expression-based index")
def test_the_model_equals_what_the_migrations_make(database: Database, url: str) -> None:
    """Definition for definition, with collations and identity columns, and by Alembic's own comparison."""
    with opened(url) as other, other.write() as connection:
        tables.metadata.create_all(connection)
        expected = schema_of(connection)
    with database.read() as connection:
        assert expected == schema_of(connection)
        options = {"compare_type": True, "compare_server_default": True}
        assert [] == compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)


def test_names_are_ordered_by_code_point_and_ids_are_the_database_s_own(databases: Databases) -> None:
    """Whatever the database's language is: pages and listings are the same on both."""
    with opened(databases.new()) as database, database.write() as connection:
        # Capitals, digits and marks: every language of a database orders them its own way.
        names = ["b", "a-b", "A", "B", "a", "a.b", "a_b", "1"]
        connection.execute(text("INSERT INTO projects (name) VALUES (:name)"), [{"name": name} for name in names])
        found = connection.scalars(text("SELECT name FROM projects ORDER BY name")).all()
        ids = connection.scalars(text("SELECT id FROM projects ORDER BY id")).all()
    assert sorted(names) == list(found)
    assert list(range(1, len(names) + 1)) == list(ids)


def test_up_down_and_up_again(url: str) -> None:
    """Downgrading to the base leaves nothing behind."""
    assert migrate.HEAD == migrate.upgrade(url)
    first = schema_at(url)
    assert "base" == migrate.downgrade(url, "base")
    assert {} == schema_at(url)
    assert "base" == migrate.current(url)
    assert migrate.HEAD == migrate.upgrade(url)
    assert first == schema_at(url)


def test_upgrading_again_changes_nothing(url: str) -> None:
    """Neither the epoch nor the data."""
    migrate.upgrade(url)
    with opened(url) as database:
        with database.read() as connection:
            before = connection.execute(text("SELECT * FROM catalog")).all()
        migrate.upgrade(url)
        with database.read() as connection:
            assert before == connection.execute(text("SELECT * FROM catalog")).all()
    assert 1 == len(before)


def test_every_database_has_its_own_epoch_and_key(databases: Databases) -> None:
    """Cursors and page tokens of one mean nothing to another."""
    found = set()
    for url in (databases.bare(), databases.bare()):
        migrate.upgrade(url)
        with opened(url) as database, database.read() as connection:
            found |= {bytes(one) for one in connection.execute(text("SELECT epoch, token_key FROM catalog")).one()}
    assert 4 == len(found)


def test_two_migrators_at_once(url: str) -> None:
    """The second waits for the first, and finds nothing to do; also when there was no schema."""
    code = f"from shardbook_server.storage import migrate; print(migrate.upgrade({url!r}))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [f"{migrate.HEAD}\n"] * 2 == [process.communicate(timeout=60)[0] for process in started]
    assert migrate.HEAD == migrate.check(url)


@pytest.mark.parametrize("revision", ["0000", "nonsense", "0001:base", ""])
def test_a_downgrade_to_what_is_no_revision_is_a_typed_error(url: str, revision: str) -> None:
    """It names the command that lists them, and changes nothing."""
    migrate.upgrade(url)
    with pytest.raises(InvalidArgumentError, match="shardbook-server db history") as caught:
        migrate.downgrade(url, revision)
    assert ["revision"] == [violation.field for violation in caught.value.violations]
    assert migrate.HEAD == migrate.check(url)


def refusal(url: str) -> FailedPreconditionError:
    """The error of a schema that cannot be served."""
    with pytest.raises(FailedPreconditionError) as caught:
        migrate.check(url)
    return caught.value


def test_a_stale_schema_is_refused_with_the_command_to_run(url: str) -> None:
    """Also when there is no database, or an empty one."""
    messages = [refusal(url)]
    with opened(url) as database, database.write() as connection:
        connection.execute(text("CREATE TABLE something (id INTEGER)"))
    messages.append(refusal(url))
    migrate.upgrade(url)
    set_version(url, "0000")
    messages.append(refusal(url))
    assert ["SCHEMA_STALE"] * 3 == [error.reason for error in messages]
    assert all("run `shardbook-server db upgrade`" in error.message for error in messages)
    assert f"the schema is at 0000, this release needs {migrate.HEAD}" in messages[2].message


def test_a_newer_schema_is_served_as_long_as_it_says_so(url: str) -> None:
    """``schema_compat`` names the oldest server that may still serve: a rolling upgrade migrates first."""
    migrate.upgrade(url)
    set_version(url, "9998", oldest=migrate.HEAD)
    assert "9998" == migrate.check(url)
    set_version(url, "9999", oldest="9998")
    assert "SCHEMA_TOO_NEW" == refusal(url).reason
    assert "pip install --upgrade shardbook" in refusal(url).message


def test_a_newer_schema_is_changed_by_its_own_release_only(url: str) -> None:
    """Neither up nor down: what it holds is not known here."""
    migrate.upgrade(url)
    set_version(url, "9999", oldest=migrate.HEAD)
    with pytest.raises(FailedPreconditionError) as up:
        migrate.upgrade(url)
    with pytest.raises(FailedPreconditionError) as down:
        migrate.downgrade(url, "base")
    assert ["SCHEMA_TOO_NEW"] * 2 == [up.value.reason, down.value.reason]
    assert "9999" == migrate.check(url)


def test_migrations_travel_with_the_package() -> None:
    """Alembic finds them beside the module, wherever that is installed."""
    names = {path.name for path in shardbook_migrations.LOCATION.rglob("*.*")}
    assert {"env.py", "script.py.mako", "0001_first.py", "py.typed"} <= names
