"""The newest attempts of a part, by the index that listings are ordered by."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, Select, and_, select

from shardbook_server.storage.checkpoints import COMMITTED
from shardbook_server.storage.tables import checkpoints

_ORDER = tuple(checkpoints.c[name] for name in ("session", "step", "attempt", "incarnation"))


def newest_committed(connection: Connection, part_id: int) -> list[int]:
    """Returns the newest committed attempts by (session, step): of numbered sessions, and of those made offline.

    Sessions and clocks are two orders: which of both was saved last, times must tell.
    """
    wanted: tuple[ColumnElement[bool], ...] = (checkpoints.c.session > 0, checkpoints.c.session == 0)
    committed = checkpoints.c.state == COMMITTED
    found: list[int] = []
    for one in wanted:
        found.extend(connection.scalars(_newest(part_id).where(and_(one, committed))))
    return found


def newest_attempt(connection: Connection, part_id: int) -> int | None:
    """Returns the newest attempt by (session, step), whatever became of it; None when nothing was ever saved."""
    return next(iter(connection.scalars(_newest(part_id))), None)


def _newest(part_id: int) -> Select[int]:
    where = checkpoints.c.part_id == part_id
    return select(checkpoints.c.id).where(where).order_by(*(column.desc() for column in _ORDER)).limit(1)
