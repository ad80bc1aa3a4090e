"""Policies; checkpoints that are deleted, brought back and purged; whose data is lost, and with whom it is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, delete, func, insert, or_, select, update

from shardbook_server.storage.checkpoints import (
    COMMITTED,
    DATA_MISSING,
    DELETED,
    EXPIRED,
    FILES_GOING,
    FILES_GONE,
    OPEN,
    PURGED,
)
from shardbook_server.storage.lists import slices
from shardbook_server.storage.retention_tables import holds, retention_policies
from shardbook_server.storage.tables import (
    IS_LIVE,
    IS_STAGED,
    LOCATION_START,
    OTHER_LOCATION_START,
    SAVE_TIME,
    checkpoints,
    descriptions,
    extent_segments,
    labels,
    locations,
    metrics,
    rank_stats,
)

#: Characters of a location that the index has.
_START_CHARS = 256


@dataclass(frozen=True)
class JudgedRow:
    """What a policy is told of a checkpoint's own row.

    ``time_us`` is by the database's clock, but for what was recorded after the fact: there only its writer's is known.
    """

    id: int
    session: int
    incarnation: bytes
    step: int
    attempt: int
    time_us: int
    state: int
    live: int
    flags: int


@dataclass(frozen=True)
class PolicyRow:
    """A stored policy; ``part`` is empty when it is the run's."""

    part: str
    policy: str
    update_time_us: int


def read_judged(connection: Connection, part_id: int) -> list[JudgedRow]:
    """Returns what a part has that is open or committed, in no order."""
    own = checkpoints.c
    key: list[ColumnElement[Any]] = [own.id, own.session, own.incarnation, own.step, own.attempt]
    time_us = case((own.recovered == 1, SAVE_TIME), else_=own.create_time_us)
    columns = [*key, time_us, own.state, own.live, own.flags]
    where = (checkpoints.c.part_id == part_id, checkpoints.c.state.in_((OPEN, COMMITTED)))
    return [JudgedRow(*list(row)) for row in connection.execute(select(*columns).where(*where))]


def mark_deleted(connection: Connection, ids: Sequence[int], now_us: int, purge_time_us: int, *, files: bool) -> None:
    """Turns committed checkpoints DELETED; with ``files`` their data files are going."""
    values: dict[str, Any] = {"state": DELETED, "live": 0, "delete_time_us": now_us, "purge_time_us": purge_time_us}
    if files:
        values["flags"] = checkpoints.c.flags.op("|")(FILES_GOING)
    for some in slices(sorted(ids)):
        where = (checkpoints.c.id.in_(some), checkpoints.c.state == COMMITTED)
        connection.execute(update(checkpoints).where(*where).values(**values))


def mark_undeleted(connection: Connection, checkpoint_id: int, *, live: bool) -> None:
    """Turns a deleted checkpoint COMMITTED again."""
    values = {"state": COMMITTED, "live": int(live), "delete_time_us": None, "purge_time_us": None}
    connection.execute(update(checkpoints).where(checkpoints.c.id == checkpoint_id).values(**values))


def set_flags(connection: Connection, checkpoint_id: int, flags: int) -> None:
    """Sets the bits of a checkpoint."""
    connection.execute(update(checkpoints).where(checkpoints.c.id == checkpoint_id).values(flags=flags))


def newest_live(connection: Connection, part_id: int, *, whole: bool) -> int | None:
    """Returns the live checkpoint of a part with the highest session and step; None when there is none.

    With ``whole`` of those alone whose data is not known to be lost.
    """
    where = [checkpoints.c.part_id == part_id, IS_LIVE]
    if whole:
        where.append(checkpoints.c.flags.op("&")(DATA_MISSING) == 0)
    order = (checkpoints.c.session.desc(), SAVE_TIME.desc())
    if connection.scalar(select(func.max(checkpoints.c.session)).where(*where)) != 0:
        # Only what was saved offline has no order but time.
        order = (checkpoints.c.session.desc(), checkpoints.c.step.desc())
    return connection.scalar(select(checkpoints.c.id).where(*where).order_by(*order, checkpoints.c.id.desc()).limit(1))


def newest_deleted(connection: Connection, part_id: int, step: int, session: int | None) -> int | None:
    """Returns the checkpoint of a step, and session, that was deleted last; None when none was."""
    where = [checkpoints.c.part_id == part_id, checkpoints.c.step == step, checkpoints.c.state == DELETED]
    if session is not None:
        where.append(checkpoints.c.session == session)
    order = (checkpoints.c.delete_time_us.desc(), checkpoints.c.id.desc())
    return connection.scalar(select(checkpoints.c.id).where(*where).order_by(*order).limit(1))


def find_sharing(
    connection: Connection, checkpoint_id: int, prefix: str, places: Sequence[str], limit: int
) -> list[int]:
    """Returns other checkpoints at some locations that can be loaded, are being or may yet be written, or brought back.

    With a prefix, the directory of an attempt, those alone that may have files in it.
    """
    own = checkpoints.c
    is_left = and_(own.state == DELETED, own.flags.op("&")(FILES_GOING | FILES_GONE | PURGED) == 0)
    # The writers of an expired one may come back while nobody has superseded it.
    usable = or_(own.state.in_((OPEN, COMMITTED)), and_(own.state == EXPIRED, IS_STAGED), is_left)
    found: list[int] = []
    for some in slices(sorted(set(places))):
        starts = sorted({one[:_START_CHARS] for one in some})
        where = [own.id != checkpoint_id, usable]
        if prefix:
            # Not LIKE, which on SQLite takes a and A for the same. Whose directory ours lies in may have files in it.
            parents = [str(one) for one in PurePosixPath(prefix).parents if str(one) != "."]
            is_below = func.substr(own.prefix, 1, len(prefix) + 1) == f"{prefix}/"
            where.append(or_(own.prefix.in_((prefix, "", *parents)), is_below))
        statement = select(checkpoints.c.id).where(*where).order_by(checkpoints.c.id).limit(limit)
        found += connection.scalars(statement.where(LOCATION_START.in_(starts), checkpoints.c.location.in_(some)))
        others = statement.join(locations, locations.c.checkpoint_id == checkpoints.c.id)
        found += connection.scalars(others.where(OTHER_LOCATION_START.in_(starts), locations.c.location.in_(some)))
    return sorted(set(found))[:limit]


# ------------------------------------------------------------------ policies


def find_policies(connection: Connection, run_id: int) -> dict[str, PolicyRow]:
    """Returns the policies of a run by part; the run's own under the empty name."""
    columns = (retention_policies.c.part, retention_policies.c.policy, retention_policies.c.update_time_us)
    rows = connection.execute(select(*columns).where(retention_policies.c.run_id == run_id))
    return {row.part: PolicyRow(*row) for row in rows}


def put_policy(connection: Connection, run_id: int, row: PolicyRow | None, part: str) -> None:
    """Stores a policy, or removes it. The run's lock keeps others away."""
    where = (retention_policies.c.run_id == run_id, retention_policies.c.part == part)
    connection.execute(delete(retention_policies).where(*where))
    if row is not None:
        connection.execute(insert(retention_policies).values(run_id=run_id, **vars(row)))


# ------------------------------------------------------------------ purge


def find_purgeable(connection: Connection, now_us: int, after_id: int, limit: int) -> list[tuple[int, int]]:
    """Returns (id, part id) of deleted checkpoints whose time is over.

    Those whose files are going are left alone until they are gone: what is known of them is the list of the files.
    """
    going = checkpoints.c.flags.op("&")(FILES_GOING | FILES_GONE)
    where = (checkpoints.c.purge_time_us <= now_us, checkpoints.c.id > after_id, going != FILES_GOING)
    statement = select(checkpoints.c.id, checkpoints.c.part_id).where(*where).order_by(checkpoints.c.id).limit(limit)
    return [(checkpoint_id, part_id) for checkpoint_id, part_id in connection.execute(statement)]


def kept_bytes(connection: Connection, checkpoint_id: int) -> int:
    """Returns the bytes of the extents that are kept of a checkpoint."""
    size = func.coalesce(func.sum(func.length(extent_segments.c.payload)), 0)
    return int(connection.scalar(select(size).where(extent_segments.c.checkpoint_id == checkpoint_id)) or 0)


def purge(connection: Connection, checkpoint_id: int, flags: int) -> None:
    """Drops what is known of a deleted checkpoint. Its row stays: no number is handed out twice."""
    for table in (extent_segments, labels, metrics, descriptions, rank_stats, holds, locations):
        connection.execute(delete(table).where(table.c.checkpoint_id == checkpoint_id))
    values = {"structure_id": None, "purge_time_us": None, "metadata_header": b"", "flags": flags | PURGED}
    connection.execute(update(checkpoints).where(checkpoints.c.id == checkpoint_id).values(**values))
