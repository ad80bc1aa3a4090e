"""What a checkpoint's name means, with all that is answered of it, in one statement.

Loaders ask for nothing else before their question can be answered, so these statements are made once: what the driver
runs costs less than making them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Select, bindparam

from shardbook.core.names import PartName
from shardbook_server.storage.checkpoints import LISTED, ListedCheckpoint, listed_of
from shardbook_server.storage.tables import IS_LIVE, checkpoints, parts, projects, runs

_NAMED: Select[*tuple[Any, ...]] = LISTED.where(
    projects.c.name == bindparam("project_name"),
    runs.c.name == bindparam("run_name"),
    parts.c.name == bindparam("part_name"),
)
_LATEST = _NAMED.where(checkpoints.c.id == parts.c.latest_id)
_LIVE = _NAMED.where(checkpoints.c.step == bindparam("live_step"), IS_LIVE)


def find_latest(connection: Connection, part: PartName) -> ListedCheckpoint | None:
    """Returns what ``latest`` of a part means; None when that is nothing."""
    return _find(connection, _LATEST, part)


def find_live(connection: Connection, part: PartName, step: int) -> ListedCheckpoint | None:
    """Returns the live committed checkpoint of a step; None when there is none."""
    return _find(connection, _LIVE, part, live_step=step)


def _find(
    connection: Connection, statement: Select[*tuple[Any, ...]], part: PartName, **values: int
) -> ListedCheckpoint | None:
    names = {"project_name": part.run.project, "run_name": part.run.run, "part_name": part.part}
    row = connection.execute(statement, names | values).one_or_none()
    return None if row is None else listed_of(row)
