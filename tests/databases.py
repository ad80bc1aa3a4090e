"""Migrated databases of both kinds, for tests that run on each."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardbook_server.storage import migrate
from shardbook_server.storage.database import Database
from tests.postgres import Postgres

#: The kinds that a test of stored behaviour runs on.
KINDS = ("sqlite", "postgres")


class Databases:
    """Hands out databases of one kind, each of a test's own.

    Args:
        kind: One of ``KINDS``.
        folder: Where files may be made.
        postgres: The server; None for SQLite.
    """

    def __init__(self, kind: str, folder: Path, postgres: Postgres | None) -> None:
        self.kind = kind
        self._folder = folder
        self._postgres = postgres
        self._numbers = itertools.count(1)

    def new(self) -> str:
        """Returns the URL of an empty database with the schema that the real migrations make."""
        if self._postgres is None:
            template = self._folder / "template.db"
            if not template.exists():
                migrate.upgrade(f"sqlite:///{template}")
            path = self._next_path()
            shutil.copy(template, path)
            return f"sqlite:///{path}"
        return self._postgres.new_database(migrate.upgrade)

    def bare(self) -> str:
        """Returns the URL of a database without a schema; on SQLite there is no file yet."""
        if self._postgres is None:
            return f"sqlite:///{self._next_path()}"
        return self._postgres.new_database()

    def _next_path(self) -> Path:
        return self._folder / f"shardbook-{next(self._numbers)}.db"


@contextmanager
def opened(url: str, **options: Any) -> Iterator[Database]:
    """Opens a database until the block ends; no connection may be left in use then."""
    database = Database(url, **options)
    try:
        yield database
        assert 0 == database.checked_out()
    finally:
        database.close()
