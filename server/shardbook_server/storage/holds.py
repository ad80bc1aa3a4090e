"""Holds: who needs which checkpoint until when. Those that ended are as good as gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from shardbook_server.storage.lists import slices
from shardbook_server.storage.retention_tables import holds


@dataclass(frozen=True)
class HoldRow:
    """Somebody's hold of a checkpoint."""

    holder: str
    create_time_us: int
    expire_time_us: int


def find_holds(connection: Connection, checkpoint_ids: Sequence[int], now_us: int) -> dict[int, list[HoldRow]]:
    """Returns the holds that last, by checkpoint and then by holder; those without any are left out."""
    found: dict[int, list[HoldRow]] = {}
    for some in slices(checkpoint_ids):
        where = (holds.c.checkpoint_id.in_(some), holds.c.expire_time_us > now_us)
        statement = select(holds).where(*where).order_by(holds.c.checkpoint_id, holds.c.holder)
        for checkpoint_id, *row in connection.execute(statement):
            found.setdefault(checkpoint_id, []).append(HoldRow(*row))
    return found


def put_hold(connection: Connection, checkpoint_id: int, row: HoldRow) -> None:
    """Makes a hold, or replaces the one of that holder. The run's lock keeps others away."""
    where = (holds.c.checkpoint_id == checkpoint_id, holds.c.holder == row.holder)
    if connection.execute(update(holds).where(*where).values(**vars(row))).rowcount == 0:
        connection.execute(insert(holds).values(checkpoint_id=checkpoint_id, **vars(row)))


def delete_hold(connection: Connection, checkpoint_id: int, holder: str) -> None:
    """Ends a hold; one that is not there is no error."""
    connection.execute(delete(holds).where(holds.c.checkpoint_id == checkpoint_id, holds.c.holder == holder))


def drop_ended(connection: Connection, checkpoint_id: int, now_us: int) -> None:
    """Forgets the holds of a checkpoint that have ended."""
    connection.execute(delete(holds).where(holds.c.checkpoint_id == checkpoint_id, holds.c.expire_time_us <= now_us))
