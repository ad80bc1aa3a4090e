"""Fresh, migrated databases on the machine's own disk, where an fsync costs what it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from benchmarks.postgres import Cluster
from benchmarks.simulated import make_database, stored_bytes

#: What the servers' databases promise, for a report.
DURABILITY: Final = "SQLite WAL, synchronous=FULL; Postgres fsync=on, synchronous_commit=on"


@dataclass(frozen=True)
class Place:
    """A fresh, migrated database.

    Attributes:
        name: For the tables.
        database: A file of SQLite, or a URL.
    """

    name: str
    database: Path | str

    @property
    def url(self) -> str:
        """What SQLAlchemy calls it."""
        return self.database if isinstance(self.database, str) else f"sqlite:///{self.database}"

    def stored_bytes(self) -> int:
        """Returns what the database holds now: used pages on SQLite, all of the database's files on Postgres."""
        if isinstance(self.database, Path):
            return stored_bytes(self.database)
        with psycopg.connect(self.database) as connection:
            row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
            return int(row[0]) if row else 0


@contextmanager
def places(*, postgres: bool) -> Iterator[list[Place]]:
    """Yields a fresh SQLite database, and a fresh Postgres one where it is asked for; both on the machine's disk."""
    with tempfile.TemporaryDirectory(prefix="shardbook-place-") as folder:
        found = [Place("SQLite", Path(folder) / "shardbook.db")]
        cluster = None
        try:
            if postgres:
                cluster = Cluster(base=tempfile.gettempdir())
                found.append(Place("Postgres", cluster.url))
            for place in found:
                make_database(place.database)
            yield found
        finally:
            if cluster is not None:
                cluster.remove()
