"""How far attempts have come: numbers for pollers, names for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shardbook.core import limits
from shardbook.errors import NotFoundError
from shardbook_server.service.attempts import row_key
from shardbook_server.service.types import AttemptKey, RankFailure
from shardbook_server.service.views import AttemptCounts, CheckpointState, Progress, RankHost
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import plans as plan_rows
from shardbook_server.storage import registrations as registration_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.checkpoints import CheckpointRow
from shardbook_server.storage.database import Connection, Database


class ProgressService:
    """Reads only. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def counts(self, checkpoint_ids: Sequence[int]) -> Mapping[int, AttemptCounts]:
        """Returns the numbers of many attempts by two or three grouped statements; unknown ids are left out."""
        with self._database.read() as connection:
            rows = checkpoint_rows.find_by_ids(connection, list(dict.fromkeys(checkpoint_ids)))
            return count_attempts(connection, list(rows.values()))

    def progress(self, key: AttemptKey) -> Progress:
        """Returns how far one attempt has come, with the ranks that are missing.

        Raises:
            NotFoundError: No rank of the attempt has spoken yet.
        """
        with self._database.read() as connection:
            part = run_rows.find_parts(connection, [key.part_name]).get(key.part_name)
            natural = None if part is None else row_key(part.id, key)
            rows = {} if natural is None else checkpoint_rows.find_checkpoints(connection, [natural])
            if not rows:
                raise NotFoundError(f"no rank of {key.checkpoint_name.ref} has spoken yet")
            row = next(iter(rows.values()))
            counts = count_attempts(connection, [row])[row.id]
            missing = missing_ranks(connection, row) if row.staged else ()
        return Progress(row.id, counts, missing, rank_failure(row))


def count_attempts(connection: Connection, rows: Sequence[CheckpointRow]) -> dict[int, AttemptCounts]:
    """Returns the numbers of attempts, by id."""
    staged = [row.id for row in rows if row.staged]
    planned = plan_rows.count_plans(connection, staged)
    registered = registration_rows.count_registrations(connection, staged)
    return {
        row.id: AttemptCounts(
            state=CheckpointState(row.state),
            planned_count=planned.get(row.id, 0),
            registered_count=(
                row.registration_count if row.state == CheckpointState.COMMITTED else registered.get(row.id, 0)
            ),
            world_size=row.world_size,
            registration_count=row.registration_count,
        )
        for row in rows
    }


def missing_ranks(connection: Connection, row: CheckpointRow) -> tuple[RankHost, ...]:
    """Returns the lowest ranks of an attempt that have not registered, at most ``limits.MAX_NAMED_RANKS``."""
    registered = np.zeros(row.registration_count, dtype=np.bool_)
    registered[registration_rows.read_ranks(connection, row.id)] = True
    ranks = np.flatnonzero(~registered)[: limits.MAX_NAMED_RANKS].tolist()
    hosts = plan_rows.read_hosts(connection, row.id, ranks)
    return tuple(RankHost(rank, hosts.get(rank, "")) for rank in ranks)


def rank_failure(row: CheckpointRow) -> RankFailure | None:
    """Returns what a rank reported; None when none did."""
    if row.failed_rank is None:
        return None
    return RankFailure(row.failed_rank, row.failed_host or "", row.failed_phase or "write", row.failure)
