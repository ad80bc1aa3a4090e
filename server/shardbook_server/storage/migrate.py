"""Brings a database's schema up to date, and refuses one that is not.

A schema says which is the oldest revision of the server that may still run beside it (``schema_compat``), so that
a rolling upgrade can migrate first and replace its servers one by one.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, select

import shardbook_migrations
from shardbook.errors import FailedPreconditionError
from shardbook_server.storage import sqlite, tables
from shardbook_server.storage.database import Database

#: Revision of the schema that this release is written for.
HEAD = "0001"
_UPGRADE = "shardbook-server db upgrade"


def upgrade(url: str, revision: str = "head") -> str:
    """Creates or upgrades the schema at ``url``; returns its revision.

    All of it is one transaction under the writer's lock: two of these at once follow each other, and one that is
    killed leaves the schema as it was. A new database file and its directory are made.

    Raises:
        FailedPreconditionError: The schema is newer than this release (reason ``SCHEMA_TOO_NEW``).
    """
    path = sqlite.database_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(Database(url, readers=1)) as database, database.write() as connection:
        current = _revision(connection)
        if current is not None and current > HEAD:
            raise _too_new(current)
        command.upgrade(_config(connection), revision)
        return _revision(connection) or ""


def downgrade(url: str, revision: str) -> str:
    """Takes the schema at ``url`` back to ``revision`` (``base`` drops everything); returns the revision it has."""
    with closing(Database(url, readers=1)) as database, database.write() as connection:
        command.downgrade(_config(connection), revision)
        return _revision(connection) or "base"


def check(url: str) -> str:
    """Returns the revision of a schema that this release can serve.

    Raises:
        FailedPreconditionError: It is stale (reason ``SCHEMA_STALE``), missing, or too new (``SCHEMA_TOO_NEW``); the
            message names the command to run.
    """
    path = sqlite.database_path(url)
    if not path.exists():
        raise _stale(f"there is no database at {path}")
    with closing(Database(url, readers=1)) as database, database.read() as connection:
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
    path = sqlite.database_path(url)
    if not path.exists():
        raise _stale(f"there is no database at {path}")
    with closing(Database(url, readers=1)) as database, database.read() as connection:
        return _revision(connection) or "base"


def heads() -> tuple[str, ...]:
    """Returns the last revisions of the migrations in this installation; one, or they have forked."""
    return tuple(ScriptDirectory.from_config(_config(None)).get_heads())


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
