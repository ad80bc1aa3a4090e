"""Lineage: edges from older checkpoints to younger ones, and walks along them.

Whoever adds edges holds the lock of ``lock``: whether one closes a cycle is a question about all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Select,
    delete,
    func,
    insert,
    literal,
    literal_column,
    select,
    true,
    update,
)

from shardbook_server.storage.columns import Int64
from shardbook_server.storage.dialect import lock_names
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import checkpoints, lineage

#: Name of the lock, for transactions that begin with it.
LOCK: Final = "lineage"
#: Rows of a walk for each edge that is wanted: an edge that several ways lead to comes once for every distance.
_ROWS_PER_EDGE: Final = 4


@dataclass(frozen=True)
class Ends:
    """What an edge is, but for when it was recorded.

    Attributes:
        kind: Number of a ``LineageKind``.
        parent_id: The older end; None for what is not in the catalogue.
        child_id: The younger end; likewise.
        name: Of the end that is not in the catalogue; empty when both are.
    """

    kind: int
    parent_id: int | None
    child_id: int | None
    name: str = ""


@dataclass(frozen=True)
class EdgeRow:
    """An edge as stored; ``incarnation`` is None when it was added by hand."""

    id: int
    ends: Ends
    incarnation: bytes | None
    create_time_us: int


_COLUMNS = (
    lineage.c.id,
    lineage.c.kind,
    lineage.c.parent_id,
    lineage.c.child_id,
    lineage.c.name,
    lineage.c.incarnation,
    lineage.c.create_time_us,
)


def lock(connection: Connection) -> None:
    """Keeps off others that add edges, until the transaction ends."""
    lock_names(connection, [LOCK])


def find_edge(connection: Connection, ends: Ends) -> EdgeRow | None:
    """Returns the edge with these ends; None when there is none."""
    row = connection.execute(select(*_COLUMNS).where(*_same(ends)).limit(1)).one_or_none()
    return None if row is None else _edge(row)


def insert_edge(connection: Connection, ends: Ends, incarnation: bytes | None, now_us: int) -> EdgeRow:
    """Adds an edge that is not there, and closes no cycle."""
    values = {**vars(ends), "incarnation": incarnation, "create_time_us": now_us}
    edge_id = connection.execute(insert(lineage).values(**values).returning(lineage.c.id)).scalar_one()
    return EdgeRow(edge_id, ends, incarnation, now_us)


def delete_edge(connection: Connection, ends: Ends) -> bool:
    """Removes an edge; returns whether it was there."""
    return connection.execute(delete(lineage).where(*_same(ends))).rowcount > 0


def link(connection: Connection, edge_id: int, parent_id: int) -> None:
    """Makes the older end of an edge, of which only the name was known, a checkpoint."""
    connection.execute(update(lineage).where(lineage.c.id == edge_id).values(parent_id=parent_id, name=""))


def count_edges(connection: Connection, column: str, checkpoint_id: int, kind: int) -> int:
    """Returns how many edges of a kind have a checkpoint as their ``parent_id`` or ``child_id``."""
    where = (lineage.c[column] == checkpoint_id, lineage.c.kind == kind)
    return connection.scalar(select(func.count()).select_from(lineage).where(*where)) or 0


def find_named(connection: Connection, names: Sequence[str]) -> list[EdgeRow]:
    """Returns edges whose older end is known by one of some names alone."""
    where = (lineage.c.name.in_(names), lineage.c.name != literal_column("''"), lineage.c.parent_id.is_(None))
    return [_edge(row) for row in connection.execute(select(*_COLUMNS).where(*where).order_by(lineage.c.id))]


def is_told(connection: Connection, part_id: int, incarnation: bytes, ends: Ends) -> bool:
    """Returns True when a checkpoint of a part, by the same incarnation of its job, has told the same origin."""
    where = (
        lineage.c.incarnation == incarnation,
        lineage.c.kind == ends.kind,
        lineage.c.name == ends.name,
        _is(lineage.c.parent_id, ends.parent_id),
        checkpoints.c.part_id == part_id,
    )
    statement = select(lineage.c.id).join(checkpoints, checkpoints.c.id == lineage.c.child_id).where(*where)
    return connection.scalar(statement.limit(1)) is not None


def session_begin(connection: Connection, part_id: int, incarnation: bytes, step: int) -> int | None:
    """Returns the last checkpoint of an incarnation, up to a step, that has told where it comes from."""
    where = (
        lineage.c.incarnation == incarnation,
        checkpoints.c.part_id == part_id,
        checkpoints.c.step <= step,
    )
    statement = select(checkpoints.c.id).join(lineage, checkpoints.c.id == lineage.c.child_id).where(*where)
    return connection.scalar(statement.order_by(checkpoints.c.step.desc(), checkpoints.c.id.desc()).limit(1))


def page_of_edges(
    connection: Connection, checkpoint_id: int, *, up: bool, down: bool, after: int, count: int
) -> list[EdgeRow]:
    """Returns edges of a checkpoint itself behind ``after``, by id: to what it comes from, to what came of it."""
    found: list[EdgeRow] = []
    for column in ([lineage.c.child_id] if up else []) + ([lineage.c.parent_id] if down else []):
        where = (column == checkpoint_id, lineage.c.id > after)
        statement = select(*_COLUMNS).where(*where).order_by(lineage.c.id).limit(count)
        found += map(_edge, connection.execute(statement))
    return sorted(found, key=lambda edge: edge.id)[:count]


def ancestors(connection: Connection, checkpoint_id: int, limit: int) -> set[int]:
    """Returns a checkpoint and what it comes from, directly or not; at most ``limit`` + 1 of them."""
    up = select(literal(checkpoint_id, Int64).label("id")).cte("up", recursive=True)
    where = (lineage.c.child_id == up.c.id, lineage.c.parent_id.is_not(None))
    up = up.union(_from_each(connection, up, {"parent_id": lineage.c.parent_id}, where, limit + 1))
    return set(connection.scalars(select(up.c.id).limit(limit + 1)))


def walk(
    connection: Connection, checkpoint_id: int, *, up: bool, max_depth: int, limit: int
) -> tuple[list[tuple[EdgeRow, int]], bool]:
    """Returns the edges that lead up or down from a checkpoint, the nearest first, by one recursive statement.

    Args:
        connection: In a transaction.
        checkpoint_id: Where to begin.
        up: True for what it comes from, False for what came of it.
        max_depth: How far away an edge may be; its own are 1 away.
        limit: Most edges.

    Returns:
        Edges with how far away they are, and whether there are more.
    """
    near, far = (lineage.c.child_id, lineage.c.parent_id) if up else (lineage.c.parent_id, lineage.c.child_id)
    one = literal_column("1", Int64)
    walked = select(lineage.c.id, far.label("next_id"), one.label("depth")).where(near == checkpoint_id)
    found = walked.cte("walk", recursive=True)
    # Both databases go on only as far as rows are taken, the nearest first: the limit bounds the work.
    most = _ROWS_PER_EDGE * limit + 1
    # One further than asked, which says whether there is more.
    where = (near == found.c.next_id, found.c.depth <= max_depth)
    columns = {"id": lineage.c.id, "next_id": far}
    found = found.union(_from_each(connection, found, columns, where, most, found.c.depth + one))
    rows = connection.execute(select(found.c.id, found.c.depth).limit(most)).all()
    depths: dict[int, int] = {}
    for edge_id, depth in rows:
        depths[edge_id] = min(depth, depths.get(edge_id, depth))
    within = sorted((depth, edge_id) for edge_id, depth in depths.items() if depth <= max_depth)
    is_cut = len(rows) == most or len(within) < len(depths) or len(within) > limit
    shown = within[:limit]
    edges = _edges_by_id(connection, [edge_id for _, edge_id in shown])
    return [(edges[edge_id], depth) for depth, edge_id in shown], is_cut


def _from_each(
    connection: Connection,
    walked: CTE,
    columns: Mapping[str, ColumnElement[Any]],
    where: Sequence[ColumnElement[bool]],
    limit: int,
    *more: ColumnElement[Any],
) -> Select[Any]:
    """Returns one step of a walk: for each row so far its edges, found by their index.

    Postgres cannot know how large a walk becomes, and without fresh statistics would read the whole table in every
    step. So it is told to look up each row's edges by themselves; SQLite does that unasked, and knows no LATERAL.

    Args:
        connection: In a transaction.
        walked: The rows so far.
        columns: Of edges, by the names that they get.
        where: Which edges lead on from a row.
        limit: Most edges of one row.
        more: Columns that are made of the row.
    """
    edges = select(*(column.label(name) for name, column in columns.items())).where(*where)
    if connection.dialect.name != "postgresql":
        return edges.add_columns(*more)
    each = edges.correlate(walked).order_by(lineage.c.id).limit(limit).lateral("edge")
    return select(*(each.c[name] for name in columns), *more).select_from(walked).join(each, true())


def _edges_by_id(connection: Connection, ids: Sequence[int]) -> dict[int, EdgeRow]:
    found: dict[int, EdgeRow] = {}
    for some in slices(sorted(ids)):
        edges = map(_edge, connection.execute(select(*_COLUMNS).where(lineage.c.id.in_(some))))
        found |= {edge.id: edge for edge in edges}
    return found


def _same(ends: Ends) -> tuple[ColumnElement[bool], ...]:
    return (
        _is(lineage.c.parent_id, ends.parent_id),
        _is(lineage.c.child_id, ends.child_id),
        lineage.c.kind == ends.kind,
        lineage.c.name == ends.name,
    )


def _is(column: ColumnElement[Any], value: int | None) -> ColumnElement[bool]:
    return column.is_(None) if value is None else column == value


def _edge(row: Any) -> EdgeRow:
    edge_id, kind, parent_id, child_id, name, incarnation, create_time_us = row
    return EdgeRow(edge_id, Ends(kind, parent_id, child_id, name), incarnation, create_time_us)
