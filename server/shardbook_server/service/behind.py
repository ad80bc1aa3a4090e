"""Commits that subscriptions have not come to yet: a watcher that is behind does not find its checkpoint pruned."""

from __future__ import annotations

from typing import Final

from shardbook_server.service.interest import Interest
from shardbook_server.storage import claims as claim_rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage.database import Connection
from shardbook_server.storage.events import EventKind
from shardbook_server.storage.runs import PartRow

#: How long a commit is kept for a subscription, from then on: while somebody works for it, and while nobody does, who
#: may never come back.
KEPT_BUSY_US: Final = 86_400_000_000
KEPT_IDLE_US: Final = claim_rows.HELD_WAITING_US
#: Latest events that are looked at, for whoever is behind by more.
_EVENTS: Final = 100_000


def find_behind(connection: Connection, part: PartRow, now_us: int) -> dict[int, tuple[str, ...]]:
    """Returns the commits of a part that subscriptions are about and have still to come to, with their names.

    Who deletes locks the checkpoints first, as for ``claims.find_held``: a claim moves its subscription's cursor in the
    transaction that locks its checkpoint.
    """
    _, head = event_rows.read_position(connection)
    behind = [
        (one, now_us - (KEPT_BUSY_US if is_busy else KEPT_IDLE_US), interest)
        for one, is_busy in claim_rows.find_behind(connection, head, now_us)
        if (interest := Interest.of(one.parent, one.filter)).admits(EventKind.COMMITTED, part.name)
    ]
    if not behind:
        return {}
    first = max(head - _EVENTS, min(one.cursor for one, _, _ in behind))
    commits = event_rows.read_commits(connection, part.id, first, min(since_us for _, since_us, _ in behind))
    found: dict[int, tuple[str, ...]] = {}
    for one, since_us, interest in behind:
        ids = [each.event.checkpoint_id for each in commits if each.cursor > one.cursor and each.time_us > since_us]
        for checkpoint_id in interest.meeting(connection, ids):
            found[checkpoint_id] = (*found.get(checkpoint_id, ()), one.name)
    return found


__all__ = ["KEPT_BUSY_US", "KEPT_IDLE_US", "find_behind"]
