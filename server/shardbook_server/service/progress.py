"""How far attempts have come: numbers for pollers, names for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shardbook.core import limits
from shardbook.errors import NotFoundError
from shardbook_server.service.attempts import row_key
from shardbook_server.service.closing import failure_of
from shardbook_server.service.types import AttemptKey
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
        """Keeps no state of its own."""
        self._database = database

    def counts(self, checkpoint_ids: Sequence[int]) -> Mapping[int, AttemptCounts]:
        """Returns the numbers of many attempts by three grouped statements; unknown ids are left out."""
        with self._database.read() as connection:
            return _counts(connection, checkpoint_rows.find_by_ids(connection, checkpoint_ids))

    def progress(self, key: AttemptKey) -> Progress:
        """Returns how far one attempt has come, with the ranks that are missing.

        Raises:
            NotFoundError: No rank of the attempt has spoken yet.
        """
        with self._database.read() as connection:
            row = find_attempt(connection, key)
            counts = _counts(connection, {row.id: row})[row.id]
            missing: tuple[RankHost, ...] = ()
            if row.staged:
                missing, _ = missing_ranks(connection, row)
        return Progress(row.id, counts, missing, failure_of(row))


def find_attempt(connection: Connection, key: AttemptKey) -> CheckpointRow:
    """Returns the row of an attempt; raises NotFoundError."""
    part = run_rows.find_parts(connection, [key.part_name]).get(key.part_name)
    if part is not None:
        natural = row_key(part.id, key)
        row = checkpoint_rows.find_checkpoints(connection, [natural]).get(natural)
        if row is not None:
            return row
    raise NotFoundError(f"no rank has planned or registered for {key.checkpoint_name.ref} yet")


def missing_ranks(connection: Connection, row: CheckpointRow) -> tuple[tuple[RankHost, ...], int]:
    """Returns the lowest ranks that are not registered, at most ``limits.MAX_NAMED_RANKS``, and how many there are."""
    there = np.zeros(row.registration_count, dtype=np.bool_)
    there[registration_rows.read_ranks(connection, row.id)] = True
    absent = np.flatnonzero(~there)
    named = absent[: limits.MAX_NAMED_RANKS].tolist()
    hosts = plan_rows.read_hosts(connection, row.id, named)
    return tuple(RankHost(rank, hosts.get(rank, "")) for rank in named), len(absent)


def _counts(connection: Connection, rows: Mapping[int, CheckpointRow]) -> dict[int, AttemptCounts]:
    staged = [checkpoint_id for checkpoint_id, row in rows.items() if row.staged]
    planned = plan_rows.count_plans(connection, staged)
    registered = registration_rows.count_registrations(connection, staged)
    counts: dict[int, AttemptCounts] = {}
    for checkpoint_id, row in rows.items():
        state = CheckpointState(row.state)
        if state is CheckpointState.DELETED:
            # Who waits for the commit is told of that: it was one.
            state = CheckpointState.COMMITTED
        whole = row.registration_count if state is CheckpointState.COMMITTED else 0
        counts[checkpoint_id] = AttemptCounts(
            state,
            planned.get(checkpoint_id, 0),
            registered.get(checkpoint_id, whole),
            row.world_size,
            row.registration_count,
        )
    return counts
