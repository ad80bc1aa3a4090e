"""Work on committed checkpoints, each by one of several watchers at a time, until it is done or has failed too often.

A subscription walks along the events; a watcher claims the next checkpoint that matches, for as long as its lease. What
is claimed stays on record until it is done: a lease that ends, or a failure, makes it due again. So a checkpoint is
worked on at least once, whoever is killed and whenever, and by nobody beside the holder of a lease.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from shardbook.core.names import CheckpointName
from shardbook.errors import AlreadyExistsError, ClaimLostError, NotFoundError
from shardbook_server.service import present
from shardbook_server.service.checks import prose
from shardbook_server.service.claiming import (
    MAX_FAILURE_CHARS,
    ClaimAnswer,
    ClaimRequest,
    ClaimView,
    FinishRequest,
    Outcome,
    SubscriptionView,
    check_claim_id,
    check_lease,
    subscription_name,
)
from shardbook_server.service.descriptions import described
from shardbook_server.service.events import Place, open_place, read_next
from shardbook_server.service.interest import Interest
from shardbook_server.service.pages import Tokens, page_count
from shardbook_server.service.views import Page
from shardbook_server.storage import checkpoints as checkpoint_rows
from shardbook_server.storage import claims as rows
from shardbook_server.storage import events as event_rows
from shardbook_server.storage import runs as run_rows
from shardbook_server.storage.claims import ClaimRow, ClaimState, SubscriptionRow
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.events import EventKind, StoredEvent

#: Claims that an answer lists.
LISTED_CLAIMS: Final = 1_000
#: Events looked at in one transaction, and due claims.
_EVENTS: Final = 500
_DUE: Final = 100
_LOST: Final = "its watcher was lost, or did not renew its claim"


class ClaimService:
    """Keeps subscriptions and their claims. Thread-safe."""

    def __init__(self, database: Database) -> None:
        """Keeps nothing but the key of the page tokens."""
        self._database = database
        self._tokens = Tokens(database)

    def peek(self, request: ClaimRequest) -> ClaimAnswer | None:
        """Returns the answer when there is nothing to claim, without writing; None when ``claim`` has to look.

        Raises:
            AlreadyExistsError: See ``claim``.
        """
        with self._database.read() as connection:
            found = rows.find_subscription(connection, subscription_name(request.subscription))
            if found is None:
                return None
            _check_same(found, request)
            now_us = self._database.now_us(connection)
            _, head = event_rows.read_position(connection)
            answer = self._nothing(connection, found, now_us)
            return answer if found.cursor >= head and answer.again_s != 0 else None

    def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claims the next checkpoint of a subscription, which is made when it is new.

        What is due again comes first, then what was committed next. The same request again gets the same checkpoint.

        Raises:
            AlreadyExistsError: The subscription is about something else (``SUBSCRIPTION_DIFFERS``).
            CursorExpiredError: Events that it has not come to yet are not kept any more.
            EpochChangedError, InvalidArgumentError: A new one cannot begin where it should.
        """
        with self._database.write(lock=request.subscription) as connection:
            now_us = self._database.now_us(connection)
            found = self._subscription(connection, request, now_us)
            for look in (_held, _due, _next):
                row = look(connection, found, request, now_us)
                if row is not None:
                    return ClaimAnswer(_view(connection, [row])[0])
            found = rows.find_subscription(connection, found.name) or found
            return self._nothing(connection, found, now_us)

    def renew(self, subscription: str, claim_id: bytes, lease_s: float) -> None:
        """Lets a claim last from now on; one whose lease has ended too, if nobody has taken it.

        Raises:
            ClaimLostError: Another watcher has the checkpoint, or it was deleted after the lease had ended.
        """
        name = subscription_name(subscription, "subscription")
        check_claim_id(claim_id)
        check_lease(lease_s)
        with self._database.write(lock=subscription) as connection:
            found = rows.find_subscription(connection, name)
            row = None if found is None else rows.find_by_id(connection, found.id, claim_id)
            if row is None or not checkpoint_rows.lock_committed(connection, [row.checkpoint_id], shared=True):
                raise _lost(subscription)
            due_us = self._database.now_us(connection) + round(lease_s * 1e6)
            rows.put_claim(connection, replace(row, due_time_us=max(row.due_time_us, due_us)))

    def finish(self, request: FinishRequest) -> ClaimState | None:
        """Ends a claim; returns where the work on the checkpoint stands, None when it is done.

        The same again changes nothing more.

        Raises:
            ClaimLostError: Another watcher has the checkpoint.
        """
        with self._database.write(lock=request.subscription) as connection:
            found = rows.find_subscription(connection, subscription_name(request.subscription))
            if found is None:
                raise _lost(request.subscription)
            row = _finished(connection, found, request)
            if row is None:
                return None
            if row.claim != request.claim_id:
                raise _lost(request.subscription)
            if row.state != ClaimState.RUNNING:
                return ClaimState(row.state)
            return self._end(connection, row, request)

    def get(self, name: str) -> SubscriptionView:
        """Returns a subscription with its claims; raises NotFoundError."""
        short = subscription_name(name)
        with self._database.read() as connection:
            found = rows.find_subscription(connection, short)
            if found is None:
                raise _unknown(name)
            epoch, head = event_rows.read_position(connection)
            views = _view(connection, rows.list_claims(connection, found.id, LISTED_CLAIMS))
        return _subscription_view(found, epoch, head, views)

    def list(self, *, page_size: int = 0, page_token: str = "") -> Page[SubscriptionView]:
        """Returns one page of subscriptions by name, without their claims.

        Raises:
            InvalidArgumentError: The page size or token is not valid.
        """
        listing = ("subscriptions",)
        count = page_count(page_size)
        position = self._tokens.read(listing, page_token)
        with self._database.read() as connection:
            epoch, head = event_rows.read_position(connection)
            found = rows.page_of_subscriptions(connection, "" if position is None else str(position[0]), count + 1)
        token = self._tokens.make(listing, (found[count - 1].name,)) if len(found) > count else ""
        return Page(tuple(_subscription_view(one, epoch, head, ()) for one in found[:count]), token)

    def delete(self, name: str) -> None:
        """Forgets a subscription; raises NotFoundError. Who works on one of its checkpoints loses the claim."""
        short = subscription_name(name)
        with self._database.write(lock=name) as connection:
            found = rows.find_subscription(connection, short)
            if found is None:
                raise _unknown(name)
            rows.delete_subscription(connection, found.id)

    def _subscription(self, connection: Connection, request: ClaimRequest, now_us: int) -> SubscriptionRow:
        name = subscription_name(request.subscription)
        found = rows.find_subscription(connection, name)
        if found is None:
            cursor = open_place(connection, request.cursor).cursor
            rows.insert_subscription(
                connection, name, parent=request.parent, filter_text=request.filter_text, cursor=cursor, now_us=now_us
            )
            found = rows.find_subscription(connection, name)
            assert found is not None  # noqa: S101 - just inserted
        _check_same(found, request)
        return found

    @staticmethod
    def _nothing(connection: Connection, found: SubscriptionRow, now_us: int) -> ClaimAnswer:
        due_us = rows.next_due(connection, found.id)
        return ClaimAnswer(None, found.cursor, None if due_us is None else max(0.0, (due_us - now_us) / 1e6))

    def _end(self, connection: Connection, row: ClaimRow, request: FinishRequest) -> ClaimState | None:
        now_us = self._database.now_us(connection)
        if request.outcome is Outcome.DONE:
            rows.drop_claim(connection, row)
            rows.count_done(connection, row.subscription_id)
            return None
        if request.outcome is Outcome.RELEASED:
            ended = replace(row, state=ClaimState.WAITING, due_time_us=now_us, attempt=row.attempt - 1)
        else:
            failure = prose(request.failure, MAX_FAILURE_CHARS)
            ended = replace(row, state=ClaimState.FAILED, due_time_us=now_us, failure=failure)
            if row.attempt < request.max_attempts:
                due_us = now_us + round(request.retry_delay_s * 1e6)
                ended = replace(ended, state=ClaimState.WAITING, due_time_us=due_us)
        rows.put_claim(connection, ended)
        return ClaimState(ended.state)


def _subscription_view(found: SubscriptionRow, epoch: bytes, head: int, views: Sequence[ClaimView]) -> SubscriptionView:
    return SubscriptionView(
        f"subscriptions/{found.name}",
        found.parent,
        found.filter,
        Place(epoch, found.cursor),
        max(0, head - found.cursor),
        found.done_count,
        tuple(views),
        found.create_time_us,
    )


def _check_same(found: SubscriptionRow, request: ClaimRequest) -> None:
    if (found.parent, found.filter) != (request.parent, request.filter_text):
        raise AlreadyExistsError(
            f"subscription {found.name} is about {found.parent}"
            + (f" with filter {found.filter}" if found.filter else "")
            + f": take another name, or forget it with `shardbook watch --name {found.name} --delete`",
            reason="SUBSCRIPTION_DIFFERS",
            field="subscription",
        )


def _held(connection: Connection, found: SubscriptionRow, request: ClaimRequest, now_us: int) -> ClaimRow | None:
    """Returns what the same request claimed when its answer was lost, for another lease; what is gone is forgotten."""
    row = rows.find_by_id(connection, found.id, request.claim_id)
    if row is None:
        return None
    if not checkpoint_rows.lock_committed(connection, [row.checkpoint_id], shared=True):
        rows.drop_claim(connection, row)
        return None
    return _put(connection, found.id, row.checkpoint_id, request, now_us, row.attempt, row.failure)


def _due(connection: Connection, found: SubscriptionRow, request: ClaimRequest, now_us: int) -> ClaimRow | None:
    """Claims what is due again; what was lost too often has failed, and what is gone is forgotten."""
    for row in rows.find_due(connection, found.id, now_us, _DUE):
        if not checkpoint_rows.lock_committed(connection, [row.checkpoint_id], shared=True):
            rows.drop_claim(connection, row)
            continue
        failure = row.failure if row.state == ClaimState.WAITING else _LOST
        if row.attempt >= request.max_attempts:
            rows.put_claim(connection, replace(row, state=ClaimState.FAILED, due_time_us=now_us, failure=failure))
        else:
            return _put(connection, found.id, row.checkpoint_id, request, now_us, row.attempt + 1, failure)
    return None


def _next(connection: Connection, found: SubscriptionRow, request: ClaimRequest, now_us: int) -> ClaimRow | None:
    """Claims the next committed checkpoint that matches, among so many events."""
    _, head = event_rows.read_position(connection)
    stored = read_next(connection, found.cursor, head, _EVENTS)
    if not stored:
        return None
    for one in _matching(connection, found, stored):
        rows.advance(connection, found.id, one.cursor)
        if not checkpoint_rows.lock_committed(connection, [one.event.checkpoint_id], shared=True):
            continue  # deleted since
        return _put(connection, found.id, one.event.checkpoint_id, request, now_us, 1, "")
    rows.advance(connection, found.id, stored[-1].cursor)
    return None


def _matching(connection: Connection, found: SubscriptionRow, stored: Sequence[StoredEvent]) -> list[StoredEvent]:
    """Returns the commits among events that a subscription is about and nobody has claimed."""
    interest = Interest.of(found.parent, found.filter)
    commits = [one for one in stored if one.event.kind is EventKind.COMMITTED]
    parts = run_rows.names_of_parts(connection, sorted({one.event.part_id for one in commits}))
    commits = [one for one in commits if interest.admits(EventKind.COMMITTED, parts[one.event.part_id])]
    ids = [one.event.checkpoint_id for one in commits]
    wanted = interest.meeting(connection, ids) - rows.find_claimed(connection, found.id, ids)
    wanted &= checkpoint_rows.find_committed(connection, ids)
    return [one for one in commits if one.event.checkpoint_id in wanted]


def _put(
    connection: Connection,
    subscription_id: int,
    checkpoint_id: int,
    request: ClaimRequest,
    now_us: int,
    attempt: int,
    failure: str,
) -> ClaimRow:
    due_us = now_us + round(request.lease_s * 1e6)
    row = ClaimRow(
        subscription_id,
        checkpoint_id,
        request.claim_id,
        ClaimState.RUNNING,
        attempt,
        due_us,
        request.holder,
        failure,
    )
    rows.put_claim(connection, row)
    return row


def _finished(connection: Connection, found: SubscriptionRow, request: FinishRequest) -> ClaimRow | None:
    """Returns the claim that a request ends; None when it has been ended."""
    if not request.checkpoint:
        return rows.find_by_id(connection, found.id, request.claim_id)
    name = CheckpointName.parse(request.checkpoint, "checkpoint")
    return rows.find_claim(connection, found.id, present.resolve(connection, name))


def _view(connection: Connection, some: Sequence[ClaimRow]) -> list[ClaimView]:
    listed = checkpoint_rows.find_listed(connection, [row.checkpoint_id for row in some])
    infos = described(connection, [listed[row.checkpoint_id] for row in some])
    return [
        ClaimView(info, ClaimState(row.state), row.attempt, row.holder, row.due_time_us, row.failure)
        for row, info in zip(some, infos, strict=True)
    ]


def _lost(subscription: str) -> ClaimLostError:
    return ClaimLostError(
        f"the claim on {subscription} is lost: its lease ended and another watcher has the checkpoint, or the "
        "checkpoint or the subscription was deleted"
    )


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(f"{name} does not exist: `shardbook watch --name` makes a subscription with its first watcher")
