"""The catalogue's events, its cursor, and what else belongs to the database as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from sqlalchemy import Connection, delete, func, insert, select, update

from shardbook_server.storage.event_tables import events
from shardbook_server.storage.lists import slices
from shardbook_server.storage.tables import catalog


class EventKind(IntEnum):
    """What happened to a checkpoint; numbers are stored."""

    COMMITTED = 1
    FAILED = 2
    EXPIRED = 3
    SUPERSEDED = 4
    LATEST_MOVED = 5
    ALIAS_MOVED = 6
    ALIAS_DELETED = 7
    DELETED = 8
    UNDELETED = 9
    DATA_LOST = 10
    DATA_FOUND = 11
    MOVED = 16


@dataclass(frozen=True)
class Event:
    """One fact of a checkpoint's life, or of an alias.

    Attributes:
        kind: What happened.
        part_id: Key of the part.
        checkpoint_id: Key of the checkpoint; 0 for an alias that means none any more.
        alias: Name of the alias that was moved or deleted; None for the other kinds.
    """

    kind: EventKind
    part_id: int
    checkpoint_id: int
    alias: str | None = None


@dataclass(frozen=True)
class StoredEvent:
    """An event with its place and time."""

    cursor: int
    time_us: int
    event: Event


def append(connection: Connection, news: Sequence[Event], now_us: int) -> None:
    """Adds events. Call it last in a transaction: it takes the row that every other such transaction wants.

    The one counter row is what makes cursors appear in order: a sequence would hand out a number that becomes
    visible after a later one, and whoever polls would miss it.
    """
    if not news:
        return
    bump = update(catalog).values(cursor=catalog.c.cursor + len(news)).returning(catalog.c.cursor)
    last = connection.execute(bump).scalar_one()
    rows = [
        {
            "cursor": last - len(news) + 1 + at,
            "time_us": now_us,
            "kind": int(new.kind),
            "part_id": new.part_id,
            "checkpoint_id": new.checkpoint_id,
            "alias": new.alias,
        }
        for at, new in enumerate(news)
    ]
    connection.execute(insert(events), rows)


def read_after(connection: Connection, cursor: int, limit: int) -> list[StoredEvent]:
    """Returns events behind ``cursor``, in order."""
    statement = select(events).where(events.c.cursor > cursor).order_by(events.c.cursor).limit(limit)
    return [
        StoredEvent(number, time_us, Event(EventKind(kind), part_id, checkpoint_id, alias))
        for number, time_us, kind, part_id, checkpoint_id, alias in connection.execute(statement)
    ]


def read_commits(connection: Connection, part_ids: Sequence[int], cursor: int, since_us: int) -> list[StoredEvent]:
    """Returns the commits of some parts behind ``cursor`` and after a time; looks at all that lies there."""
    found = []
    for some in slices(part_ids):
        of_parts = (events.c.part_id.in_(some), events.c.kind == int(EventKind.COMMITTED))
        where = (events.c.cursor > cursor, events.c.time_us > since_us, *of_parts)
        columns = (events.c.cursor, events.c.time_us, events.c.part_id, events.c.checkpoint_id)
        found += [
            StoredEvent(number, time_us, Event(EventKind.COMMITTED, part_id, checkpoint_id))
            for number, time_us, part_id, checkpoint_id in connection.execute(select(*columns).where(*where))
        ]
    return found


def read_position(connection: Connection) -> tuple[bytes, int]:
    """Returns the catalogue's epoch and its cursor, that of the last event."""
    epoch, cursor = connection.execute(select(catalog.c.epoch, catalog.c.cursor)).one()
    return epoch, cursor


def read_oldest(connection: Connection) -> int | None:
    """Returns the cursor of the oldest event that is kept; None when there is none."""
    oldest: int | None = connection.scalar(select(func.min(events.c.cursor)))
    return oldest


def drop_before(connection: Connection, before_us: int, limit: int) -> int:
    """Drops the oldest events, as far as they lie before a time; returns how many, at most ``limit``."""
    oldest = select(events.c.cursor, events.c.time_us).order_by(events.c.cursor).limit(limit)
    last, count = None, 0
    for cursor, time_us in connection.execute(oldest):
        # Never one behind another that stays: what is kept has no gap.
        if time_us >= before_us:
            break
        last, count = cursor, count + 1
    if last is not None:
        connection.execute(delete(events).where(events.c.cursor <= last))
    return count


def read_token_key(connection: Connection) -> bytes:
    """Returns the key that page tokens are signed with."""
    key: bytes = connection.execute(select(catalog.c.token_key)).scalar_one()
    return key


def read_reap_time(connection: Connection) -> int:
    """Returns when the reaper last ran; 0 before its first time."""
    time_us: int = connection.execute(select(catalog.c.reap_time_us)).scalar_one()
    return time_us


def write_reap_time(connection: Connection, now_us: int) -> None:
    """Remembers that the reaper runs."""
    connection.execute(update(catalog).values(reap_time_us=now_us))
