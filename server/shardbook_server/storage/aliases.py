"""Aliases: names of checkpoints that can be moved. ``latest`` is in ``parts``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, insert, select, tuple_, update

from shardbook_server.storage.checkpoints import DATA_MISSING
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import IS_LIVE, aliases, checkpoints, metrics

#: Which value of a metric is best; numbers as in ``shardbook.v1.Alias.Direction``.
BY_HAND: Final = 0
SMALLEST: Final = 1
LARGEST: Final = 2


@dataclass(frozen=True)
class AliasRow:
    """An alias of a part.

    Attributes:
        part_id: Key of the part.
        name: Never ``latest``.
        checkpoint_id: What it means; None when a metric's best is none yet.
        metric: What it follows; empty for one that is set by hand.
        direction: See above.
        protected: It is not moved or deleted without force.
        update_time_us: When it was last set or moved.
    """

    part_id: int
    name: str
    checkpoint_id: int | None
    metric: str
    direction: int
    protected: bool
    update_time_us: int


def find_alias(connection: Connection, part_id: int, name: str) -> AliasRow | None:
    """Returns an alias of a part; None when there is none."""
    row = connection.execute(select(aliases).where(aliases.c.part_id == part_id, aliases.c.name == name)).one_or_none()
    return None if row is None else _alias(row)


def find_following(connection: Connection, part_id: int) -> list[AliasRow]:
    """Returns the aliases of a part that follow a metric, by name."""
    where = (aliases.c.part_id == part_id, aliases.c.direction != BY_HAND)
    return [_alias(row) for row in connection.execute(select(aliases).where(*where).order_by(aliases.c.name))]


def page_of_aliases(
    connection: Connection, part_ids: Sequence[int], after: tuple[int, str] | None, count: int
) -> list[AliasRow]:
    """Returns aliases of parts behind ``after``, by (part id, name)."""
    statement = select(aliases).order_by(aliases.c.part_id, aliases.c.name).limit(count)
    if after is not None:
        statement = statement.where(tuple_(aliases.c.part_id, aliases.c.name) > tuple_(*after))
    found: list[AliasRow] = []
    for some in slices(sorted(part_ids)):
        found += map(_alias, connection.execute(statement.where(aliases.c.part_id.in_(some))))
        if len(found) >= count:
            break
    return found[:count]


def find_meaning(connection: Connection, checkpoint_id: int) -> list[AliasRow]:
    """Returns the aliases that mean a checkpoint, by name; without ``latest``."""
    statement = select(aliases).where(aliases.c.checkpoint_id == checkpoint_id).order_by(aliases.c.name)
    return [_alias(row) for row in connection.execute(statement)]


def put_alias(connection: Connection, row: AliasRow) -> None:
    """Makes an alias, or replaces the one of that name. The run's lock keeps others away."""
    values = {**vars(row), "protected": int(row.protected)}
    where = (aliases.c.part_id == row.part_id, aliases.c.name == row.name)
    if connection.execute(update(aliases).where(*where).values(**values)).rowcount == 0:
        connection.execute(insert(aliases).values(**values))


def delete_alias(connection: Connection, part_id: int, name: str) -> None:
    """Removes an alias."""
    connection.execute(delete(aliases).where(aliases.c.part_id == part_id, aliases.c.name == name))


def best_checkpoint(connection: Connection, part_id: int, metric: str, direction: int) -> int | None:
    """Returns the live checkpoint of a part with the best value, the newest of several; None when none has one.

    Walks the part's values from the best one on, past those that a later session superseded, and those whose data is
    lost.
    """
    value, checkpoint_id = metrics.c.value, metrics.c.checkpoint_id
    order = (value.desc(), checkpoint_id.desc()) if direction == LARGEST else (value, checkpoint_id)
    is_whole = checkpoints.c.flags.op("&")(DATA_MISSING) == 0
    where = (metrics.c.part_id == part_id, metrics.c.name == metric, IS_LIVE, is_whole)
    statement = select(checkpoint_id, value).join(checkpoints, checkpoints.c.id == checkpoint_id).where(*where)
    first = connection.execute(statement.order_by(*order).limit(1)).one_or_none()
    if first is None or direction == LARGEST:
        return None if first is None else first[0]
    # Of equal values the newest: the walk above met the oldest.
    newest: int | None = connection.scalar(
        statement.with_only_columns(checkpoint_id).where(value == first[1]).order_by(checkpoint_id.desc()).limit(1)
    )
    return newest


def _alias(row: Row[*tuple[Any, ...]]) -> AliasRow:
    part_id, name, checkpoint_id, metric, direction, protected, update_time_us = row
    return AliasRow(part_id, name, checkpoint_id, metric, direction, bool(protected), update_time_us)
