"""Decisions about plans: which rank drops what, by the ordered digests of the plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select, update

from shardbook_server.storage.blobs import DAY_US
from shardbook_server.storage.dialect import insert_ignore
from shardbook_server.storage.tables import save_plans


@dataclass(frozen=True)
class DecisionSegment:
    """A stored decision, of consecutive ranks.

    Attributes:
        payload: As ``shardbook.core.decisions`` packs it.
        last_used_day: Day since the epoch on which it was last known to be in use.
    """

    payload: bytes
    last_used_day: int


def find_segment(connection: Connection, project_id: int, digest: bytes, first_rank: int) -> DecisionSegment | None:
    """Returns the part of a decision that begins with ``first_rank``; None when nobody has decided yet."""
    where = (
        save_plans.c.project_id == project_id,
        save_plans.c.digest == digest,
        save_plans.c.first_rank == first_rank,
    )
    row = connection.execute(select(save_plans.c.payload, save_plans.c.last_used_day).where(*where)).first()
    return None if row is None else DecisionSegment(*row)


def insert_decision(
    connection: Connection, project_id: int, digest: bytes, now_us: int, *, segments: Sequence[tuple[int, bytes]]
) -> None:
    """Stores a whole decision, by first rank; one that exists stays as it is."""
    rows = [
        {
            "project_id": project_id,
            "digest": digest,
            "first_rank": first_rank,
            "last_used_day": now_us // DAY_US,
            "payload": payload,
        }
        for first_rank, payload in segments
    ]
    connection.execute(insert_ignore(connection, save_plans), rows)


def touch(connection: Connection, project_id: int, digest: bytes, now_us: int) -> None:
    """Remembers that a decision is in use."""
    where = (save_plans.c.project_id == project_id, save_plans.c.digest == digest)
    connection.execute(update(save_plans).where(*where).values(last_used_day=now_us // DAY_US))
