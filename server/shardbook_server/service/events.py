"""What happens in the catalogue, in order, from any place on.

A place is an epoch and a cursor. Cursors of one epoch have no gap, and appear in their order; another epoch means that
the database was put back, so that what was told since its backup may be told again, or never happened.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shardbook.core.names import PartName
from shardbook.errors import CursorExpiredError, EpochChangedError, InvalidArgumentError
from shardbook_server.service.descriptions import described
from shardbook_server.service.interest import Interest
from shardbook_server.service.views import CheckpointInfo
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import claims as claim_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.events import EventKind, StoredEvent

#: Names the oldest event that is kept.
START: Final = "start"
_CURSOR: Final = re.compile(r"([0-9a-f]{16})-([0-9]{1,19})")
_EPOCH_BYTES: Final = 8
#: Events dropped in one transaction.
_DROP_COUNT: Final = 1_000


@dataclass(frozen=True)
class EventView:
    """One fact of a checkpoint's life, or of an alias.

    Attributes:
        cursor: Its number.
        kind: What happened; LATEST_MOVED is told as ALIAS_MOVED.
        time_us: When.
        part: Where.
        checkpoint: What it happened to, as it is now; None for an alias that means none any more.
        alias: Name of the alias; empty for the other kinds.
    """

    cursor: int
    kind: EventKind
    time_us: int
    part: PartName
    checkpoint: CheckpointInfo | None
    alias: str


@dataclass(frozen=True)
class News:
    """What a look at the catalogue found.

    Attributes:
        epoch: Of the catalogue.
        head: Cursor of its last event.
        events: Those that were asked for, in order.
    """

    epoch: bytes
    head: int
    events: tuple[EventView, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a stream stands."""

    epoch: bytes
    cursor: int

    def __str__(self) -> str:
        return f"{self.epoch[:_EPOCH_BYTES].hex()}-{self.cursor}"


class EventService:
    """Reads events, and drops old ones. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps no state of its own."""
        self._database = database

    def open(self, text: str) -> Place:
        """Returns the place that a cursor names: ``start``, empty for now, or one that was told.

        Raises:
            InvalidArgumentError: It names none.
            EpochChangedError: It is one of another epoch.
            CursorExpiredError: Events behind it are not kept any more.
        """
        with self._database.read() as connection:
            return open_place(connection, text)

    def look(self, after: int | None, limit: int) -> News:
        """Returns events behind a cursor; None only asks where the catalogue stands.

        Events that are not kept any more are left out: the first one told may be later than the next.
        """
        with self._database.read() as connection:
            epoch, head = event_rows.read_position(connection)
            if after is None or head <= after:
                return News(epoch, head)
            return News(epoch, head, _views(connection, event_rows.read_after(connection, after, limit)))

    def read(self, place: Place, limit: int) -> News:
        """Returns events behind a place.

        Raises:
            EpochChangedError: It is one of another epoch.
            CursorExpiredError: Events behind it are not kept any more.
        """
        with self._database.read() as connection:
            epoch, head = event_rows.read_position(connection)
            if epoch != place.epoch:
                raise epoch_changed()
            stored = read_next(connection, place.cursor, head, limit)
            return News(epoch, head, _views(connection, stored))

    def meeting(self, interest: Interest, checkpoint_ids: Sequence[int]) -> set[int]:
        """Returns those of some checkpoints that meet an interest's condition."""
        with self._database.read() as connection:
            return interest.meeting(connection, checkpoint_ids)

    def drop_old(self, age_us: int) -> int:
        """Drops events, and records of failed work, older than ``age_us``; returns how many events.

        Raises:
            ShardbookError: The database failed; what was dropped until then is.
        """
        total = 0
        while True:
            with self._database.write(lock="events") as connection:
                before_us = self._database.now_us(connection) - age_us
                count = event_rows.drop_before(connection, before_us, _DROP_COUNT)
                claim_rows.drop_failed(connection, before_us)
            total += count
            if count < _DROP_COUNT:
                return total


def open_place(connection: Connection, text: str) -> Place:
    """Returns the place that a cursor names; raises as ``EventService.open``."""
    epoch, head = event_rows.read_position(connection)
    if not text:
        return Place(epoch, head)
    if text == START:
        oldest = event_rows.read_oldest(connection)
        return Place(epoch, head if oldest is None else oldest - 1)
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise InvalidArgumentError(
            f"{text[:80]!a} is no cursor: take one from an event, or write start",
            reason="INVALID_CURSOR",
            field="cursor",
        )
    place = Place(epoch, int(match[2]))
    # A cursor beyond the last event is one that a lost commit had.
    if str(place) != text or place.cursor > head:
        raise epoch_changed()
    read_next(connection, place.cursor, head, 1)
    return place


def read_next(connection: Connection, after: int, head: int, limit: int) -> list[StoredEvent]:
    """Returns events behind a cursor, none left out.

    Raises:
        CursorExpiredError: Some of them are not kept any more.
    """
    stored = event_rows.read_after(connection, after, limit) if after < head else []
    if after < head and (not stored or stored[0].cursor != after + 1):
        raise CursorExpiredError(
            f"events behind {after} are not kept any more: begin anew from `start`, the oldest there is, or from now",
            field="cursor",
        )
    return stored


def epoch_changed() -> EpochChangedError:
    """Returns the error for a cursor that means nothing any more."""
    return EpochChangedError(
        "the database was put back from a backup since this cursor was told: begin anew from `start`, the oldest event "
        "there is, or from now",
        field="cursor",
    )


def _views(connection: Connection, stored: Sequence[StoredEvent]) -> tuple[EventView, ...]:
    parts = run_rows.names_of_parts(connection, sorted({one.event.part_id for one in stored}))
    ids = sorted({one.event.checkpoint_id for one in stored} - {0})
    listed = checkpoint_rows.find_listed(connection, ids)
    infos = described(connection, [listed[one] for one in ids if one in listed])
    by_id = {info.checkpoint_id: info for info in infos}
    return tuple(
        EventView(
            one.cursor,
            EventKind.ALIAS_MOVED if one.event.kind is EventKind.LATEST_MOVED else one.event.kind,
            one.time_us,
            parts[one.event.part_id],
            by_id.get(one.event.checkpoint_id),
            "latest" if one.event.kind is EventKind.LATEST_MOVED else one.event.alias or "",
        )
        for one in stored
    )
