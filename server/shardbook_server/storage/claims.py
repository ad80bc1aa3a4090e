"""Subscriptions, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, insert, or_, select, update

from shardbook_server.storage.event_tables import claims, subscriptions
from shardbook_server.storage.lists import slices

#: A checkpoint that waits to be tried again is held for so long after it was due: nobody may ever come.
HELD_WAITING_US: Final = 3_600_000_000


class ClaimState(IntEnum):
    """Where the work on a checkpoint stands; numbers as in ``shardbook.v1.Claim.State``."""

    RUNNING = 1
    WAITING = 2
    FAILED = 3


@dataclass(frozen=True)
class SubscriptionRow:
    """A subscription as stored; ``cursor`` is that of the last event that was looked at."""

    id: int
    name: str
    parent: str
    filter: str
    cursor: int
    done_count: int
    create_time_us: int


@dataclass(frozen=True)
class ClaimRow:
    """A claim as stored; see ``event_tables.claims``."""

    subscription_id: int
    checkpoint_id: int
    claim: bytes
    state: int
    attempt: int
    due_time_us: int
    holder: str
    failure: str


def find_subscription(connection: Connection, name: str) -> SubscriptionRow | None:
    """Returns a subscription; None when there is none."""
    row = connection.execute(select(subscriptions).where(subscriptions.c.name == name)).one_or_none()
    return None if row is None else SubscriptionRow(*row)


def page_of_subscriptions(connection: Connection, after: str, count: int) -> list[SubscriptionRow]:
    """Returns subscriptions by name behind ``after``."""
    statement = select(subscriptions).where(subscriptions.c.name > after).order_by(subscriptions.c.name).limit(count)
    return [SubscriptionRow(*row) for row in connection.execute(statement)]


def insert_subscription(
    connection: Connection, name: str, *, parent: str, filter_text: str, cursor: int, now_us: int
) -> None:
    """Makes a subscription. Its lock keeps others away."""
    values = {"name": name, "parent": parent, "filter": filter_text, "cursor": cursor}
    connection.execute(insert(subscriptions).values(**values, done_count=0, create_time_us=now_us))


def delete_subscription(connection: Connection, subscription_id: int) -> None:
    """Drops a subscription with its claims."""
    connection.execute(delete(claims).where(claims.c.subscription_id == subscription_id))
    connection.execute(delete(subscriptions).where(subscriptions.c.id == subscription_id))


def advance(connection: Connection, subscription_id: int, cursor: int) -> None:
    """Notes which event a subscription has come to."""
    connection.execute(update(subscriptions).where(subscriptions.c.id == subscription_id).values(cursor=cursor))


def count_done(connection: Connection, subscription_id: int) -> None:
    """Counts one checkpoint more as done."""
    done = subscriptions.c.done_count + 1
    connection.execute(update(subscriptions).where(subscriptions.c.id == subscription_id).values(done_count=done))


def put_claim(connection: Connection, row: ClaimRow) -> None:
    """Makes a claim, or replaces the one on the same checkpoint."""
    values = vars(row)
    if connection.execute(update(claims).where(_key(row)).values(**values)).rowcount == 0:
        connection.execute(insert(claims).values(**values))


def drop_claim(connection: Connection, row: ClaimRow) -> None:
    """Drops a claim."""
    connection.execute(delete(claims).where(_key(row)))


def find_claim(connection: Connection, subscription_id: int, checkpoint_id: int) -> ClaimRow | None:
    """Returns the claim on a checkpoint; None when there is none."""
    where = (claims.c.subscription_id == subscription_id, claims.c.checkpoint_id == checkpoint_id)
    return _one(connection.execute(select(claims).where(*where)).one_or_none())


def find_by_id(connection: Connection, subscription_id: int, claim: bytes) -> ClaimRow | None:
    """Returns the claim that has an id and runs; None when there is none."""
    running = and_(claims.c.subscription_id == subscription_id, claims.c.state == ClaimState.RUNNING)
    return _one(connection.execute(select(claims).where(running, claims.c.claim == claim)).one_or_none())


def find_claimed(connection: Connection, subscription_id: int, checkpoint_ids: Sequence[int]) -> set[int]:
    """Returns those of some checkpoints that have a claim, in whatever state."""
    found: set[int] = set()
    for some in slices(checkpoint_ids):
        where = (claims.c.subscription_id == subscription_id, claims.c.checkpoint_id.in_(some))
        found.update(connection.scalars(select(claims.c.checkpoint_id).where(*where)))
    return found


def find_due(connection: Connection, subscription_id: int, now_us: int, limit: int) -> list[ClaimRow]:
    """Returns claims whose lease has ended or that are to be tried again, those that wait longest first."""
    found: list[ClaimRow] = []
    for state in (ClaimState.RUNNING, ClaimState.WAITING):
        where = (*_in(subscription_id, state), claims.c.due_time_us <= now_us)
        rows = connection.execute(select(claims).where(*where).order_by(claims.c.due_time_us).limit(limit))
        found += [ClaimRow(*row) for row in rows]
    return sorted(found, key=lambda row: (row.due_time_us, row.checkpoint_id))[:limit]


def next_due(connection: Connection, subscription_id: int) -> int | None:
    """Returns when the next claim is due; None when none will be."""
    times = [
        connection.scalar(select(func.min(claims.c.due_time_us)).where(*_in(subscription_id, state)))
        for state in (ClaimState.RUNNING, ClaimState.WAITING)
    ]
    return min((time_us for time_us in times if time_us is not None), default=None)


def list_claims(connection: Connection, subscription_id: int, limit: int) -> list[ClaimRow]:
    """Returns the claims of a subscription, those on older checkpoints first."""
    statement = select(claims).where(claims.c.subscription_id == subscription_id).order_by(claims.c.checkpoint_id)
    return [ClaimRow(*row) for row in connection.execute(statement.limit(limit))]


def find_held(
    connection: Connection, checkpoint_ids: Sequence[int], now_us: int, *, lost_us: int = 0
) -> dict[int, list[str]]:
    """Returns those of some checkpoints that somebody works on, or will soon, with the subscriptions' names.

    They are not to be deleted. Who deletes locks them first: see ``checkpoints.lock_committed``.

    Args:
        connection: In a transaction.
        checkpoint_ids: Which.
        now_us: The database's time.
        lost_us: For how long one counts whose watcher was lost, from the end of its lease.
    """
    held: dict[int, list[str]] = {}
    for some in slices(checkpoint_ids):
        statement = (
            select(claims.c.checkpoint_id, subscriptions.c.name)
            .join(subscriptions, subscriptions.c.id == claims.c.subscription_id)
            .where(claims.c.checkpoint_id.in_(some), _is_worked_on(now_us, lost_us))
            .order_by(claims.c.checkpoint_id, subscriptions.c.name)
        )
        for checkpoint_id, name in connection.execute(statement):
            held.setdefault(checkpoint_id, []).append(name)
    return held


def find_behind(connection: Connection, head: int, now_us: int) -> list[tuple[SubscriptionRow, bool]]:
    """Returns the subscriptions that have not come to an event yet, and whether somebody works for them, or will soon.

    Args:
        connection: In a transaction.
        head: Cursor of the event.
        now_us: The database's time.
    """
    busy = select(claims.c.subscription_id).where(_is_worked_on(now_us))
    statement = select(subscriptions, subscriptions.c.id.in_(busy)).where(subscriptions.c.cursor < head)
    return [
        (SubscriptionRow(*row), bool(is_busy))
        for *row, is_busy in connection.execute(statement.order_by(subscriptions.c.name))
    ]


def drop_failed(connection: Connection, before_us: int) -> None:
    """Drops the records of what failed before a time."""
    connection.execute(delete(claims).where(claims.c.state == ClaimState.FAILED, claims.c.due_time_us < before_us))


def _is_worked_on(now_us: int, lost_us: int = 0) -> ColumnElement[bool]:
    runs = and_(claims.c.state == ClaimState.RUNNING, claims.c.due_time_us > now_us - lost_us)
    waits = and_(claims.c.state == ClaimState.WAITING, claims.c.due_time_us > now_us - HELD_WAITING_US)
    return or_(runs, waits)


def _key(row: ClaimRow) -> Any:
    return and_(claims.c.subscription_id == row.subscription_id, claims.c.checkpoint_id == row.checkpoint_id)


def _in(subscription_id: int, state: ClaimState) -> tuple[Any, Any]:
    return claims.c.subscription_id == subscription_id, claims.c.state == state


def _one(row: Row[*tuple[Any, ...]] | None) -> ClaimRow | None:
    return None if row is None else ClaimRow(*row)
