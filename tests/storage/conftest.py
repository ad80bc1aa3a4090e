"""Databases of either kind, bare and migrated: whoever asks for one runs once on each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardbook_server.storage.database import Database
from tests.databases import Databases, opened


@pytest.fixture
def url(databases: Databases) -> str:
    """The URL of a database without a schema."""
    return databases.bare()


@pytest.fixture
def database(databases: Databases) -> Iterator[Database]:
    """A migrated database; no connection may be left in use."""
    with opened(databases.new(), connections=8) as database:
        yield database
