"""A database that the real migrations made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardbook_server.storage import migrate
from shardbook_server.storage.database import Database


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of a database that does not exist yet."""
    return f"sqlite:///{tmp_path / 'shardbook.db'}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A migrated database; no connection may be left in use."""
    migrate.upgrade(url)
    database = Database(url)
    yield database
    assert database.checked_out() == 0
    database.close()
