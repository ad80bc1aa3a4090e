"""What operators watch: sizes, staging, and how long running sessions have not committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shardbook_server.storage import vitals as vital_rows
from shardbook_server.storage.database import Database

#: Most running parts that are watched one by one: each is a time series of its own.
MAX_RUNNING_COUNT: Final = 500


@dataclass(frozen=True)
class RunningPart:
    """A part that a session is writing.

    Attributes:
        project: Its project.
        run: Its run, without the project.
        part: Its name.
        silent_s: Time since its session last moved ``latest`` by a commit, or since it started.
    """

    project: str
    run: str
    part: str
    silent_s: float


@dataclass(frozen=True)
class Vitals:
    """What one look at the database finds, None where it does not; sizes as in ``storage.backend.Sizes``."""

    database_bytes: int | None
    wal_bytes: int | None
    wal_written_bytes: int | None
    staging_rows: int | None
    running: tuple[RunningPart, ...]


class VitalsService:
    """Looks at the database as a whole. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps no state of its own."""
        self._database = database

    def measure(self) -> Vitals:
        """Returns how things are now: a few cheap statements, though not for every call.

        Raises:
            ShardbookError: The database cannot be read.
        """
        with self._database.read() as connection:
            now_us = self._database.now_us(connection)
            sizes = self._database.sizes(connection)
            staging_rows = vital_rows.count_staged(connection)
            rows = vital_rows.find_running(connection, MAX_RUNNING_COUNT)
        # A session that resumed from an older checkpoint counts from its own start.
        running = tuple(
            RunningPart(
                row.project,
                row.run,
                row.part,
                max(0.0, (now_us - max(row.start_time_us, row.latest_time_us or 0)) / 1e6),
            )
            for row in rows
        )
        return Vitals(sizes.database_bytes, sizes.wal_bytes, sizes.wal_written_bytes, staging_rows, running)
