"""Commits that subscriptions have not come to yet: a watcher that is behind does not find its checkpoint pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import structlog

from shardbook.errors import ShardbookError
from shardbook_server.service.interest import Interest
from shardbook_server.storage import claims as claim_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage.claims import SubscriptionRow
from shardbook_server.storage.database import Connection
from shardbook_server.storage.events import EventKind, StoredEvent
from shardbook_server.storage.runs import PartRow

#: How long a commit is kept for a subscription, from then on: while somebody works for it, and while nobody does, who
#: may never come back.
KEPT_BUSY_US: Final = 86_400_000_000
KEPT_IDLE_US: Final = claim_rows.HELD_WAITING_US
#: Latest events that are looked at, for whoever is behind by more.
_EVENTS: Final = 100_000
#: Subscriptions named for a commit.
_NAMED: Final = 3
#: Different interests that are judged; those of further ones count as being about everything.
_JUDGED: Final = 100

_log = structlog.get_logger(__name__)

#: Subscriptions that are behind, each with the time after which commits are kept for it.
_Behind = list[tuple[SubscriptionRow, int]]


def find_behind(connection: Connection, parts: Sequence[PartRow], now_us: int) -> dict[int, tuple[str, ...]]:
    """Returns the commits of some parts that subscriptions are about and have still to come to, with who they are.

    Of many subscriptions some are named, and the last word says how many more there are. One whose filter this release
    cannot read is taken to be about everything: to keep too much for a while harms nobody.

    Who deletes locks the checkpoints first, as for ``claims.find_held``: a claim moves its subscription's cursor in the
    transaction that locks its checkpoint.
    """
    _, head = event_rows.read_position(connection)
    behind: _Behind = [
        (one, now_us - (KEPT_BUSY_US if is_busy else KEPT_IDLE_US))
        for one, is_busy in claim_rows.find_behind(connection, head, now_us)
    ]
    if not behind:
        return {}
    first = max(head - _EVENTS, min(one.cursor for one, _ in behind))
    since_us = min(since_us for _, since_us in behind)
    commits = event_rows.read_commits(connection, [part.id for part in parts], first, since_us)
    if not commits:
        return {}
    names = _Names(commits)
    by_interest: dict[tuple[str, str], _Behind] = {}
    for one, since_us in behind:
        by_interest.setdefault((one.parent, one.filter), []).append((one, since_us))
    for number, ((parent, filter_text), some) in enumerate(by_interest.items()):
        wanted = _wanted(connection, parent, filter_text, parts, commits) if number < _JUDGED else None
        names.add(some, wanted)
    return names.found()


class _Names:
    """Who is behind each of some commits: a few names, and how many there are."""

    def __init__(self, commits: Sequence[StoredEvent]) -> None:
        self._ids = [one.event.checkpoint_id for one in commits]
        self._cursors = np.array([one.cursor for one in commits], np.int64)
        self._times_us = np.array([one.time_us for one in commits], np.int64)
        self._counts = np.zeros(len(commits), np.int64)
        self._named: list[list[str]] = [[] for _ in commits]

    def add(self, behind: _Behind, wanted: set[int] | None) -> None:
        """Adds subscriptions that are about some checkpoints; None for all."""
        about = np.array([wanted is None or one in wanted for one in self._ids], np.bool_)
        for one, since_us in behind:
            is_behind = about & (self._cursors > one.cursor) & (self._times_us > since_us)
            for at in np.flatnonzero(is_behind & (self._counts < _NAMED)).tolist():
                self._named[at].append(one.name)
            self._counts += is_behind

    def found(self) -> dict[int, tuple[str, ...]]:
        """Returns who they are, for people, by checkpoint."""
        found = {}
        for checkpoint_id, named, count in zip(self._ids, self._named, self._counts.tolist(), strict=True):
            if count:
                more = (f"{count - _NAMED} more watches (to come)",) if count > _NAMED else ()
                found[checkpoint_id] = (*(f"watch {name} (to come)" for name in sorted(named)), *more)
        return found


def _wanted(
    connection: Connection, parent: str, filter_text: str, parts: Sequence[PartRow], commits: Sequence[StoredEvent]
) -> set[int] | None:
    """Returns the checkpoints of some commits that a subscription is about; None for all."""
    try:
        interest = Interest.of(parent, filter_text)
    except ShardbookError as error:
        # Stored by a later release, perhaps, before it was taken back.
        _log.warning("a subscription cannot be read", parent=parent, filter=filter_text, error=str(error))
        return None
    about = {part.id for part in parts if interest.admits(EventKind.COMMITTED, part.name)}
    ids = [one.event.checkpoint_id for one in commits if one.event.part_id in about]
    return interest.meeting(connection, ids) if ids else set()
