"""The calls of CatalogService that follow what happens, and that share the work on it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration

from shardbook._channel import connections
from shardbook._patterns import listing_place
from shardbook._retry import may_pass
from shardbook._transport import Rpc, StreamRpc, Transport
from shardbook.core.limits import MAX_PAGE_SIZE
from shardbook.core.names import CheckpointName, RunName, check_segment
from shardbook.errors import InvalidArgumentError, ShardbookError, UnavailableError
from shardbook.events import CLAIM_STATES, EVERYTHING, KINDS, NOW, Claim, ClaimState, Event, EventKind, Subscription
from shardbook.v1 import events_pb2

WATCH_CHECKPOINTS = StreamRpc("WatchCheckpoints", lambda on: on.catalog.WatchCheckpoints)
CLAIM_CHECKPOINT = Rpc("ClaimCheckpoint", lambda on: on.catalog.ClaimCheckpoint)
RENEW_CLAIM = Rpc("RenewClaim", lambda on: on.catalog.RenewClaim)
FINISH_CLAIM = Rpc("FinishClaim", lambda on: on.catalog.FinishClaim)
GET_SUBSCRIPTION = Rpc("GetSubscription", lambda on: on.catalog.GetSubscription)
LIST_SUBSCRIPTIONS = Rpc("ListSubscriptions", lambda on: on.catalog.ListSubscriptions)
DELETE_SUBSCRIPTION = Rpc("DeleteSubscription", lambda on: on.catalog.DeleteSubscription)

#: A stream without a sign of life for so long is dead, whatever its connection says; servers send one every 10 s.
SILENCE_S: Final = 35.0

_LOG = logging.getLogger(__name__)


def watched(run: RunName | str, part: str | None, filter_text: str) -> tuple[str, str]:
    """Returns parent and filter of what is watched; raises InvalidArgumentError."""
    place, conditions = listing_place(run, part)
    return place, " AND ".join([*([filter_text] if filter_text.strip() else []), *conditions])


def cursor_of(since: str) -> str:
    """Returns a cursor as the API takes it, where ``now`` is empty."""
    return "" if since == NOW else since


class Watching:
    """Iterates over events, for ever; reconnects by itself and goes on where it was. For one thread.

    Close it, or use it in a ``with`` block, which any thread may do to end it.

    Attributes:
        cursor: Behind the last event that was handed out, and what was not asked for; empty before the first answer.
    """

    def __init__(
        self, transport: Transport, request: events_pb2.WatchCheckpointsRequest, *, until_now: bool, patience_s: float
    ) -> None:
        self._transport = transport
        self._request = request
        self._until_now = until_now
        self._patience_s = patience_s
        self._waiting: deque[Event] = deque()
        self._reached = ""
        self._is_level = self._was_answered = self._closed = False
        self._stream: Any = None
        self._dog = _Watchdog()
        self.cursor = ""

    def __iter__(self) -> Watching:
        return self

    def __next__(self) -> Event:
        """Returns the next event, when there is one.

        Raises:
            StopIteration: It was closed, or with ``until_now`` everything was told.
            EpochChangedError, CursorExpiredError: It has to begin anew.
            UnavailableError: No server answers: at first, or for longer than ``patience_s``.
        """
        while not self._waiting:
            self.cursor = self._reached or self.cursor
            if self._closed or (self._is_level and self._until_now):
                self.close()
                raise StopIteration
            self._read()
        event = self._waiting.popleft()
        self.cursor = event.cursor if self._waiting else self._reached
        return event

    def close(self) -> None:
        """Ends the iteration."""
        self._closed = True
        self._dog.close()
        if self._stream is not None:
            self._stream.cancel()

    def __enter__(self) -> Watching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        """Reads one message, over as many connections as it takes."""
        failure_count, failed_s = 0, math.inf
        while not self._closed:
            try:
                message = self._message()
            except ShardbookError as error:
                failure_count += 1
                failed_s = min(failed_s, time.monotonic())
                self._stream = None
                self._wait(error, failure_count, failed_s)
                continue
            self._was_answered = True
            self._reached = message.cursor
            self._request.cursor = message.cursor
            self._is_level = not message.events
            self._waiting.extend(map(Event.of, message.events))
            return

    def _message(self) -> events_pb2.WatchCheckpointsResponse:
        try:
            if self._stream is None:
                self._stream = self._transport.stream(WATCH_CHECKPOINTS, self._request)
            with self._dog.watching(self._stream):
                return next(self._stream)  # type: ignore[no-any-return]  # of gRPC
        except StopIteration:
            raise UnavailableError("the stream ended: asking again", retry_delay_s=0.1) from None
        except grpc.RpcError as error:
            raise self._transport.typed(error, WATCH_CHECKPOINTS.name) from error

    def _wait(self, error: ShardbookError, failure_count: int, failed_s: float) -> None:
        """Waits before another try; raises the error where none helps."""
        if self._closed:
            return
        patience_s = self._patience_s if self._was_answered else self._transport.outage_s
        if not may_pass(error):
            raise error
        delay_s = self._transport.backoff.delay_s(failure_count, error)
        if time.monotonic() + delay_s - failed_s > patience_s:
            raise error
        if failure_count == 1 and self._was_answered:
            _LOG.info("watching again: %s", error.message)
        connections.look_again(self._transport.address)
        time.sleep(delay_s)


class _Watchdog:
    """Cancels a stream on which its reader has waited for too long; a slow reader is none."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._since_s = math.inf
        self._stream: Any = None

    def watching(self, stream: Any) -> _Watchdog:
        """Returns the block in which a stream is waited for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shardbook-watch", daemon=True)
            self._thread.start()
        self._stream = stream
        return self

    def __enter__(self) -> None:
        self._since_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since_s = math.inf

    def close(self) -> None:
        """Ends it."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            if time.monotonic() - self._since_s > SILENCE_S:
                self._stream.cancel()


class WatchingCalls:
    """Follows what happens, and shares the work on it. Thread-safe."""

    _transport: Transport

    def watch(
        self,
        run: RunName | str = EVERYTHING,
        *,
        part: str | None = None,
        filter: str = "",  # noqa: A002 - its name in the API
        kinds: Iterable[EventKind | str] = (),
        since: str = NOW,
        until_now: bool = False,
        patience_s: float = math.inf,
    ) -> Watching:
        """Returns an iterator over what happens: each event once and in order, for as long as it is iterated.

        Servers may restart and connections break meanwhile. Nothing is asked before the first event is.

        Args:
            run: A run, or a pattern of runs: ``llm/*``.
            part: One part; None for all.
            filter: Which checkpoints, as in ``list_checkpoints``; judged when an event is read.
            kinds: Which events; none for all.
            since: ``now``, ``start`` for the oldest event that is kept, or the cursor of an event.
            until_now: End when everything that had happened has been told.
            patience_s: Seconds for which a server that has answered once may be away.

        Raises:
            InvalidArgumentError: A name or kind is none.
        """
        place, condition = watched(run, part, filter)
        request = events_pb2.WatchCheckpointsRequest(
            parent=place, filter=condition, kinds=[_number(kind) for kind in kinds], cursor=cursor_of(since)
        )
        return Watching(self._transport, request, until_now=until_now, patience_s=patience_s)

    def claim_checkpoint(
        self,
        subscription: str,
        claim_id: bytes,
        *,
        run: RunName | str = EVERYTHING,
        part: str | None = None,
        filter: str = "",  # noqa: A002 - its name in the API
        since: str = NOW,
        holder: str = "",
        lease_s: float = 120.0,
        max_attempts: int = 3,
        wait_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> Claim | None:
        """Claims the next committed checkpoint of a subscription, which is made when it is new; None when none is left.

        A checkpoint is claimed by one at a time until it is done, whoever dies meanwhile. See ``renew_claim`` and
        ``finish_claim``.

        Args:
            subscription: Its name.
            claim_id: 16 bytes of the caller's that no other claim has; the same again gets the same checkpoint.
            run: A run, or a pattern of runs; always the same for one subscription, as are ``part`` and ``filter``.
            part: One part; None for all.
            filter: Which checkpoints.
            since: Where a new subscription begins, as in ``watch``.
            holder: Who claims, for people.
            lease_s: How long the claim lasts without being renewed.
            max_attempts: Attempts at one checkpoint; one whose watchers were lost so often has failed.
            wait_s: How long to wait for one, at most 20 s.
            deadline_s: Seconds for the call beyond the wait.

        Raises:
            AlreadyExistsError: The subscription is about something else (``SUBSCRIPTION_DIFFERS``).
            CursorExpiredError: What it had not come to yet was dropped.
        """
        place, condition = watched(run, part, filter)
        request = events_pb2.ClaimCheckpointRequest(
            subscription=_subscription(subscription),
            parent=place,
            filter=condition,
            cursor=cursor_of(since),
            claim_id=claim_id,
            holder=holder,
            lease=_duration(lease_s),
            max_attempts=max_attempts,
            wait=_duration(wait_s),
        )
        limit_s = wait_s + (self._transport.timeout_s if deadline_s is None else deadline_s)
        response = self._transport.call(CLAIM_CHECKPOINT, request, deadline_s=limit_s)
        return Claim.of(response.claim) if response.HasField("claim") else None

    def renew_claim(
        self, subscription: str, claim_id: bytes, *, lease_s: float = 120.0, deadline_s: float | None = None
    ) -> None:
        """Lets a claim last for ``lease_s`` from now on; raises ClaimLostError when another watcher has it."""
        request = events_pb2.RenewClaimRequest(
            subscription=_subscription(subscription), claim_id=claim_id, lease=_duration(lease_s)
        )
        self._transport.call(RENEW_CLAIM, request, deadline_s=deadline_s)

    def finish_claim(
        self,
        subscription: str,
        claim_id: bytes,
        checkpoint: CheckpointName | str | None,
        outcome: str,
        *,
        failure: str = "",
        retry_delay_s: float = 0.0,
        max_attempts: int = 3,
        deadline_s: float | None = None,
    ) -> ClaimState:
        """Ends a claim; returns where the work stands: UNKNOWN when it is done.

        Args:
            subscription: Its name.
            claim_id: The claim's.
            checkpoint: The checkpoint; None to release whatever a claim has that was never heard of.
            outcome: ``done``, ``failed``, or ``released`` for another watcher, at no fault of the checkpoint.
            failure: Why it failed.
            retry_delay_s: When it is tried again after it failed, seconds.
            max_attempts: Attempts at one checkpoint.
            deadline_s: Seconds for the call.

        Raises:
            ClaimLostError: Another watcher has the checkpoint.
        """
        request = events_pb2.FinishClaimRequest(
            subscription=_subscription(subscription),
            claim_id=claim_id,
            checkpoint="" if checkpoint is None else str(checkpoint),
            outcome=events_pb2.FinishClaimRequest.Outcome.Value(f"OUTCOME_{outcome.upper()}"),  # type: ignore[arg-type]
            failure=failure,
            retry_delay=_duration(retry_delay_s),
            max_attempts=max_attempts,
        )
        response = self._transport.call(FINISH_CLAIM, request, deadline_s=deadline_s)
        return CLAIM_STATES.get(response.state, ClaimState.UNKNOWN)

    def get_subscription(self, name: str, *, deadline_s: float | None = None) -> Subscription:
        """Returns a subscription; raises NotFoundError."""
        request = events_pb2.GetSubscriptionRequest(name=_subscription(name))
        return Subscription.of(self._transport.call(GET_SUBSCRIPTION, request, deadline_s=deadline_s).subscription)

    def list_subscriptions(
        self, *, page_size: int = MAX_PAGE_SIZE, deadline_s: float | None = None
    ) -> Iterator[Subscription]:
        """Yields subscriptions by name, without their claims."""
        request = events_pb2.ListSubscriptionsRequest(page_size=page_size)
        for page in self._transport.pages(LIST_SUBSCRIPTIONS, request, deadline_s=deadline_s):
            yield from map(Subscription.of, page.subscriptions)

    def delete_subscription(self, name: str, *, deadline_s: float | None = None) -> None:
        """Forgets a subscription with its place and claims; raises NotFoundError."""
        request = events_pb2.DeleteSubscriptionRequest(name=_subscription(name))
        self._transport.write(DELETE_SUBSCRIPTION, request, deadline_s=deadline_s)


def _number(kind: EventKind | str) -> Any:
    number = KINDS.get(kind)  # type: ignore[arg-type]  # a text is equal to its kind
    if number is None:
        raise InvalidArgumentError(f"{str(kind)[:80]!a} is none of {', '.join(KINDS)}", field="kinds")
    return number


def _subscription(name: str) -> str:
    return f"subscriptions/{check_segment(name, 'subscription')}"


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration


__all__ = ["Watching", "WatchingCalls"]
