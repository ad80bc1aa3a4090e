"""Staging of registrations, and the segments they are folded into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, insert, select, tuple_

from shardbook_server.storage.dialect import insert_ignore
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import extent_segments, registrations


@dataclass(frozen=True)
class RegistrationRow:
    """What a rank wrote, while its attempt is open."""

    checkpoint_id: int
    rank: int
    structure_id: int
    explicit: int
    size_bytes: int
    extents: bytes
    volatile: bytes
    phases: bytes | None = None


def find_registrations(
    connection: Connection, keys: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], RegistrationRow]:
    """Returns the registrations that exist among (checkpoint id, rank)."""
    found: dict[tuple[int, int], RegistrationRow] = {}
    for some in slices(keys):
        where = tuple_(registrations.c.checkpoint_id, registrations.c.rank).in_(list(some))
        for row in connection.execute(select(registrations).where(where)):
            found[row.checkpoint_id, row.rank] = RegistrationRow(*row)
    return found


def insert_registrations(connection: Connection, rows: Sequence[RegistrationRow]) -> set[tuple[int, int]]:
    """Adds registrations, by (checkpoint, rank); returns the keys of those that are new. The others stay as they were.

    Sorted, so that two transactions which add the same rows wait for each other in one order only.
    """
    if not rows:
        return set()
    ordered = sorted(rows, key=lambda row: (row.checkpoint_id, row.rank))
    statement = insert_ignore(connection, registrations)
    returning = statement.returning(registrations.c.checkpoint_id, registrations.c.rank)
    return {
        (checkpoint_id, rank) for checkpoint_id, rank in connection.execute(returning, [vars(row) for row in ordered])
    }


def count_registrations(connection: Connection, checkpoint_ids: Sequence[int]) -> dict[int, int]:
    """Returns how many ranks registered, by checkpoint; checkpoints without any are left out."""
    counts: dict[int, int] = {}
    column = registrations.c.checkpoint_id
    for some in slices(checkpoint_ids):
        statement = select(column, func.count()).where(column.in_(some)).group_by(column)
        counts.update(connection.execute(statement).all())
    return counts


def read_ranks(connection: Connection, checkpoint_id: int) -> list[int]:
    """Returns the ranks of an attempt that registered, in order."""
    statement = select(registrations.c.rank).where(registrations.c.checkpoint_id == checkpoint_id)
    return list(connection.scalars(statement.order_by(registrations.c.rank)))


def read_measures(connection: Connection, checkpoint_id: int) -> list[tuple[int, int, bytes | None]]:
    """Returns rank, bytes and packed milliseconds of the ranks of an attempt that registered, in order."""
    columns = (registrations.c.rank, registrations.c.size_bytes, registrations.c.phases)
    statement = select(*columns).where(registrations.c.checkpoint_id == checkpoint_id)
    return [(rank, size, phases) for rank, size, phases in connection.execute(statement.order_by(registrations.c.rank))]


def read_registrations(connection: Connection, checkpoint_id: int) -> list[RegistrationRow]:
    """Returns the registrations of an attempt by rank."""
    statement = select(registrations).where(registrations.c.checkpoint_id == checkpoint_id)
    return [RegistrationRow(*row) for row in connection.execute(statement.order_by(registrations.c.rank))]


def delete_registrations(connection: Connection, checkpoint_ids: Sequence[int]) -> None:
    """Empties the staging of attempts that are closed."""
    for some in slices(sorted(checkpoint_ids)):
        connection.execute(delete(registrations).where(registrations.c.checkpoint_id.in_(some)))


def insert_segments(connection: Connection, checkpoint_id: int, segments: Sequence[tuple[int, bytes]]) -> None:
    """Stores the packed registrations of a committed checkpoint, given as (first rank, payload)."""
    rows = [
        {"checkpoint_id": checkpoint_id, "first_rank": first_rank, "payload": payload}
        for first_rank, payload in segments
    ]
    connection.execute(insert(extent_segments), rows)


def read_segments(
    connection: Connection, checkpoint_id: int, *, first_rank: int = 0, limit: int
) -> list[tuple[int, bytes]]:
    """Returns at most ``limit`` segments of a committed checkpoint from ``first_rank`` on."""
    columns = (extent_segments.c.first_rank, extent_segments.c.payload)
    where = (extent_segments.c.checkpoint_id == checkpoint_id, extent_segments.c.first_rank >= first_rank)
    statement = select(*columns).where(*where).order_by(extent_segments.c.first_rank).limit(limit)
    return [(first, payload) for first, payload in connection.execute(statement)]


def find_segments(connection: Connection, checkpoint_id: int, first_ranks: Sequence[int]) -> dict[int, bytes]:
    """Returns the segments of a committed checkpoint that begin with some ranks, as far as they are there."""
    found: dict[int, bytes] = {}
    columns = (extent_segments.c.first_rank, extent_segments.c.payload)
    for some in slices(first_ranks):
        where = (extent_segments.c.checkpoint_id == checkpoint_id, extent_segments.c.first_rank.in_(some))
        found.update(connection.execute(select(*columns).where(*where)).all())
    return found
