"""Brings a database's schema up to date, and refuses one that is not.

A schema says which is the oldest revision of the server that may still run beside it (``schema_compat``), so that
a rolling upgrade can migrate first and replace its servers one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, inspect, select

import shardbook_migrations
from shardbook.errors import FailedPreconditionError, InvalidArgumentError
from shardbook_server.storage import tables
from shardbook_server.storage.database import Database

#: Revision of the schema that this release is written for.
HEAD = "0010"
_UPGRADE = "shardbook-server db upgrade"


def upgrade(url: str, revision: str = "head") -> str:
    """Creates or upgrades the schema at ``url``; returns its revision.

    All of it is one transaction under a lock: two of these at once follow each other, and one that is killed leaves
    the schema as it was. A new SQLite file and its directory are made. On Postgres ``url`` leads to the server itself,
    not to a pooler, and no statement waits for more than a few seconds for what live servers hold.

    Raises:
        FailedPreconditionError: The schema is newer than this release (reason ``SCHEMA_TOO_NEW``).
        UnavailableError: The database is away, or servers held a table for too long; run it again.
    """
    with _migrating(url, create=True) as connection:
        command.upgrade(_config(connection), revision)
        return _revision(connection) or ""


def downgrade(url: str, revision: str) -> str:
    """Takes the schema at ``url`` back to ``revision`` (``base`` drops everything); returns the revision it has.

    Raises:
        FailedPreconditionError: There is no database, or it is newer than this release (reason ``SCHEMA_TOO_NEW``).
        InvalidArgumentError: The history has no such revision, or it is not an earlier one.
        UnavailableError: As for ``upgrade``.
    """
    # Alembic would also take the beginning of one, and steps and ranges.
    if revision not in {"base", *(known for known, _ in history())}:
        raise _no_target(f"{revision!r} is no revision")
    with _migrating(url, create=False) as connection:
        try:
            command.downgrade(_config(connection), revision)
        except CommandError as error:
            raise _no_target(str(error)) from error
        return _revision(connection) or "base"


def check(url: str) -> str:
    """Returns the revision of a schema that this release can serve.

    Raises:
        FailedPreconditionError: It is stale (reason ``SCHEMA_STALE``), missing, or too new (``SCHEMA_TOO_NEW``); the
            message names the command to run.
    """
    with _reading(url) as connection:
        current = _revision(connection)
        if current is None:
            raise _stale("the database has no schema")
        if current < HEAD:
            raise _stale(f"the schema is at {current}, this release needs {HEAD}")
        oldest = connection.execute(select(tables.schema_compat.c.oldest)).scalar_one()
        if oldest > HEAD:
            raise _too_new(current)
        return current


def current(url: str) -> str:
    """Returns the revision that the schema at ``url`` has; ``base`` when there is a database without one.

    Raises:
        FailedPreconditionError: There is no database.
    """
    with _reading(url) as connection:
        return _revision(connection) or "base"


def history() -> tuple[tuple[str, str], ...]:
    """Returns (revision, what it does) of every migration in this installation, oldest first."""
    scripts = ScriptDirectory.from_config(_config(None))
    return tuple((one.revision, one.doc) for one in reversed(list(scripts.walk_revisions())))


def heads() -> tuple[str, ...]:
    """Returns the last revisions of the migrations in this installation; one, or they have forked."""
    return tuple(ScriptDirectory.from_config(_config(None)).get_heads())


@contextmanager
def _migrating(url: str, *, create: bool) -> Iterator[Connection]:
    """Opens the one transaction in which a schema is changed, alone; of one that is newer nothing is known here."""
    with closing(Database(url, connections=1)) as database:
        if create:
            database.backend.create()
        elif (missing := database.backend.missing()) is not None:
            raise _stale(f"there is no {missing}")
        with database.write() as connection:
            database.backend.lock_schema(connection)
            current = _revision(connection)
            if current is not None and current > HEAD:
                raise _too_new(current)
            yield connection


@contextmanager
def _reading(url: str) -> Iterator[Connection]:
    with closing(Database(url, connections=1)) as database:
        missing = database.backend.missing()
        if missing is not None:
            raise _stale(f"there is no {missing}")
        with database.read() as connection:
            yield connection


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(shardbook_migrations.LOCATION)).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return MigrationContext.configure(connection).get_current_revision()


def _stale(what: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"{what}: run `{_UPGRADE}`", reason="SCHEMA_STALE")


def _too_new(current: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the schema is at {current} and this release serves up to {HEAD}: "
        "install the newer release with `pip install --upgrade shardbook`",
        reason="SCHEMA_TOO_NEW",
    )


def _no_target(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{what}: `shardbook-server db history` lists the revisions", field="revision")
