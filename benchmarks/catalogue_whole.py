"""A catalogue of many checkpoints that can be shown, compared and listed tensor by tensor: rows with real structures.

One checkpoint of each world size is saved in each project by real calls; the rows get what that commit stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from sqlalchemy import text

from benchmarks.catalogue_rows import MINUTE_US, Saved, store
from benchmarks.simulated import Ranks, connected, rank_payloads
from benchmarks.workload import Workload
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.urls import is_postgres

#: Tensors of every checkpoint.
TENSORS: Final = 21
#: First step of the checkpoints that are really saved.
REAL_STEP: Final = 1_000_000

#: What a checkpoint of a world size has from the one that was really saved.
_COPY: Final = """
UPDATE checkpoints
SET structure_id = (SELECT structure_id FROM checkpoints WHERE id = :real),
    explicit = (SELECT explicit FROM checkpoints WHERE id = :real),
    metadata_header = (SELECT metadata_header FROM checkpoints WHERE id = :real),
    size_bytes = (SELECT size_bytes FROM checkpoints WHERE id = :real),
    commit_time_us = create_time_us + :took
WHERE world_size = :world AND state = 2 AND structure_id IS NULL AND part_id IN (
    SELECT parts.id FROM parts JOIN runs ON runs.id = parts.run_id JOIN projects ON projects.id = runs.project_id
    WHERE projects.name = :project
)
"""
_COPY_EXTENTS: Final = """
INSERT INTO extent_segments (checkpoint_id, first_rank, payload)
SELECT checkpoints.id, extent_segments.first_rank, extent_segments.payload
FROM checkpoints JOIN extent_segments ON extent_segments.checkpoint_id = :real
WHERE checkpoints.structure_id = (SELECT structure_id FROM checkpoints WHERE id = :real) AND checkpoints.id <> :real
"""
_FAILURES: Final = "UPDATE checkpoints SET failure = 'rank 3 (node-0): write: no space left on device' WHERE state = 3"
#: A part's session is its highest, and @latest its newest live checkpoint.
_SESSIONS: Final = """
UPDATE parts SET session = highest, last_session = highest
FROM (SELECT part_id, max(session) AS highest FROM checkpoints GROUP BY part_id) AS of_part
WHERE of_part.part_id = parts.id
"""
_LATEST: Final = """
UPDATE parts SET latest_id = (
    SELECT id FROM checkpoints WHERE part_id = parts.id AND live = 1 ORDER BY session DESC, step DESC LIMIT 1
)
"""


def fill(database: Database, saves: Sequence[Saved]) -> None:
    """Adds rows of checkpoints, before any server runs: without structures yet."""
    store(database, saves)
    with database.write() as connection:
        for statement in (_FAILURES, _SESSIONS, _LATEST):
            connection.execute(text(statement))


def give_structures(database: Database, address: str, saves: Sequence[Saved]) -> dict[str, str]:
    """Saves a checkpoint of each world size in the first run of each project, and gives all rows what those have.

    Returns:
        By project, the run that was saved to, ``project/run``.
    """
    first = {one.project: one.run for one in reversed(saves)}
    worlds = sorted({one.world_size for one in saves})
    for project, run in first.items():
        for at, world in enumerate(worlds):
            step = REAL_STEP + 100 * at
            asyncio.run(_save(address, f"projects/{project}/runs/{run}", world, step))
            with database.write() as connection:
                _spread(connection, project, world, step)
    if is_postgres(database.url):
        with database.write() as connection:
            connection.execute(text("ANALYZE"))
    return {project: f"{project}/{run}" for project, run in first.items()}


def _spread(connection: Connection, project: str, world: int, step: int) -> None:
    find = "SELECT checkpoints.id FROM checkpoints JOIN parts ON parts.id = part_id JOIN runs ON runs.id = run_id "
    find += "JOIN projects ON projects.id = project_id WHERE projects.name = :project AND step = :step"
    real = connection.execute(text(find), {"project": project, "step": step}).scalar_one()
    values = {"real": real, "world": world, "project": project, "took": MINUTE_US}
    connection.execute(text(_COPY), values)
    connection.execute(text(_COPY_EXTENTS), {"real": real})


async def _save(address: str, run: str, world: int, step: int) -> None:
    async with connected(address) as channel:
        ranks = Ranks(channel, rank_payloads(Workload(world, TENSORS, world)), run)
        await ranks.start()
        await ranks.save(step)
