"""Telling many watchers what happens, at the price of one.

One poller per process asks every 100 ms, while anybody watches, where the catalogue stands, and reads what is new once
for all. The last events are kept in memory; who is further behind reads them from the database, a page at a time, as
fast as the client takes them: nothing queues for a slow one. No database transaction is open while a client is sent to.
All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import structlog

from shardbook.errors import ResourceExhaustedError
from shardbook.v1 import events_pb2
from shardbook_server.rpc import events
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.call import current_call
from shardbook_server.rpc.waits import RETRY_S, draining
from shardbook_server.service.claiming import ClaimAnswer, ClaimRequest
from shardbook_server.service.events import EventView, News, Place, epoch_changed
from shardbook_server.service.interest import Interest
from shardbook_server.service.services import Services

#: Events kept in memory, and events read at a time.
KEPT: Final = 2_000
PAGE: Final = 200
#: Looks after which a stream knows better than its own first read: the first may have begun before it.
_LOOKS: Final = 2

_log = structlog.get_logger(__name__)


class Told:
    """An event with the message that all watchers get."""

    def __init__(self, view: EventView, epoch: bytes) -> None:
        self.view = view
        self._epoch = epoch

    @cached_property
    def message(self) -> events_pb2.Event:
        """The event as it is sent."""
        return events.event(self.view, self._epoch)


@dataclass(frozen=True)
class FeedLimits:
    """How a feed works.

    Attributes:
        watcher_count: Most streams, and calls that wait for a claim.
        interval_s: Time between looks.
        heartbeat_s: Time after which a stream on which nothing happens gives a sign of life.
    """

    watcher_count: int
    interval_s: float
    heartbeat_s: float


class Feed:
    """Who watches, and the poller.

    Args:
        services: Read through the bridge.
        bridge: The way to them.
        limits: See there.
    """

    def __init__(self, services: Services, bridge: Bridge, limits: FeedLimits) -> None:
        self._services = services
        self._bridge = bridge
        self._limits = limits
        self._count = 0
        self._draining = False
        #: Set, and replaced, when there are new events, and after every look.
        self._moved, self._looked = asyncio.Event(), asyncio.Event()
        self._poller: asyncio.Task[None] | None = None
        #: The last look failed; said once, not ten times a second.
        self._blind = False
        #: Looks that succeeded since the poller began; the catalogue's epoch and last event as the last one found them;
        #: the last event that was read, None before the first look.
        self._looks = 0
        self._epoch = b""
        self._seen = 0
        self._head: int | None = None
        self._kept: list[Told] = []

    @property
    def watcher_count(self) -> int:
        """Streams, and calls that wait for a claim, now."""
        return self._count

    async def watch(self, interest: Interest, cursor: str) -> AsyncIterator[events_pb2.WatchCheckpointsResponse]:
        """Yields what happens behind a cursor, and signs of life, for ever.

        Raises:
            ResourceExhaustedError: Too many watch.
            UnavailableError: The server is draining.
            InvalidArgumentError, EpochChangedError, CursorExpiredError: See ``EventService.open``.
        """
        with self._admitted():
            first = opened = self._looks
            place = await self._bridge.read(self._services.events.open, cursor)
            is_level, sent_s = False, time.monotonic()
            while True:
                self._check(place, opened)
                page = await self._behind(place)
                if page:
                    place, opened = Place(place.epoch, page[-1].view.cursor), self._looks
                told = await self._wanted(interest, page)
                is_first_level = not (page or is_level) and self._looks >= first + _LOOKS and place.cursor >= self._seen
                if told or is_first_level or time.monotonic() - sent_s >= self._limits.heartbeat_s:
                    yield events_pb2.WatchCheckpointsResponse(events=[one.message for one in told], cursor=str(place))
                    sent_s = time.monotonic()
                is_level |= is_first_level
                if not page:
                    left_s = sent_s + self._limits.heartbeat_s - time.monotonic()
                    await (self._until_moved(place.cursor, left_s) if is_level else self._until_looked(left_s))

    async def claim(self, request: ClaimRequest, wait_s: float) -> ClaimAnswer:
        """Claims a checkpoint; waits for one when there is none.

        Raises:
            ResourceExhaustedError: Too many watch.
            UnavailableError: The server is draining.
            AlreadyExistsError, CursorExpiredError: See ``ClaimService.claim``.
        """
        end_s = time.monotonic() + wait_s
        with self._admitted():
            while True:
                answer = await self._bridge.read(self._services.claims.peek, request)
                if answer is None:
                    answer = await self._bridge.write("claim", self._services.claims.claim, request)
                left_s = end_s - time.monotonic()
                if answer.claim is not None or left_s <= 0:
                    return answer
                pause_s = left_s if answer.again_s is None else min(left_s, answer.again_s)
                await self._until_moved(answer.cursor, pause_s)

    def drain(self) -> None:
        """Ends every stream and wait, and those to come, with UNAVAILABLE."""
        self._draining = True
        self._moved.set()
        self._looked.set()

    async def close(self) -> None:
        """Drains and ends the poller."""
        self.drain()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller])

    # ------------------------------------------------------------------ one watcher

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        self._check_drain()
        if self._count >= self._limits.watcher_count:
            raise ResourceExhaustedError(
                f"{self._count} watch, the limit is {self._limits.watcher_count}: try again later",
                reason="WATCHERS_FULL",
                retry_delay_s=10 * RETRY_S,
            )
        self._count += 1
        self._ensure_poller()
        try:
            yield
        finally:
            self._count -= 1

    def _check_drain(self) -> None:
        if self._draining:
            raise draining()

    def _check(self, place: Place, opened: int) -> None:
        """Refuses to go on behind an event that the catalogue does not have any more."""
        self._check_drain()
        if self._looks >= opened + _LOOKS and (place.epoch != self._epoch or place.cursor > self._seen):
            raise epoch_changed()

    async def _behind(self, place: Place) -> Sequence[Told]:
        """Returns the events behind a place, at most a page; none when it is level with the catalogue."""
        if self._head is None or self._epoch != place.epoch or place.cursor >= self._head:
            return ()
        if self._kept and self._kept[0].view.cursor <= place.cursor + 1:
            at = place.cursor + 1 - self._kept[0].view.cursor
            return self._kept[at : at + PAGE]
        news = await self._bridge.read(self._services.events.read, place, PAGE)
        return [Told(view, news.epoch) for view in news.events]

    async def _wanted(self, interest: Interest, page: Sequence[Told]) -> Sequence[Told]:
        told = [one for one in page if interest.admits(one.view.kind, one.view.part)]
        if interest.condition is None or not told:
            return told
        ids = tuple(sorted({one.view.checkpoint.checkpoint_id for one in told if one.view.checkpoint is not None}))
        # Of all who watch for the same, one asks.
        met = await self._bridge.read_shared((interest, ids), self._services.events.meeting, interest, ids)
        return [one for one in told if one.view.checkpoint is not None and one.view.checkpoint.checkpoint_id in met]

    async def _until_moved(self, cursor: int, wait_s: float) -> None:
        """Waits until there are events behind a cursor, or the time is up."""
        with self._waiting():
            async with asyncio.timeout(max(0.0, wait_s)):
                while self._head is None or self._head <= cursor:
                    self._check_drain()
                    await self._moved.wait()

    async def _until_looked(self, wait_s: float) -> None:
        """Waits until the poller has looked once more, or the time is up."""
        with self._waiting():
            async with asyncio.timeout(max(0.0, wait_s)):
                await self._looked.wait()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Ends a wait: what it took is no time of the call's own."""
        began_s = time.monotonic()
        try:
            yield
        except TimeoutError:
            pass
        finally:
            current_call().waited_s += time.monotonic() - began_s
        self._check_drain()

    # ------------------------------------------------------------------ the poller

    def _ensure_poller(self) -> None:
        if self._poller is None or self._poller.done():
            # What was known is old: nobody looked since.
            self._looks, self._head, self._kept = 0, None, []
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    async def _poll(self) -> None:
        """Looks until nobody watches any more; the next watcher starts it again."""
        while self._count:
            began_s = time.monotonic()
            is_behind = await self._look()
            if not is_behind:
                # So that looking takes a fifth of a thread at most, however slow the database is.
                await asyncio.sleep(max(self._limits.interval_s, 4 * (time.monotonic() - began_s)))

    async def _look(self) -> bool:
        """Looks once; returns True when there is more than was read."""
        try:
            news = await self._bridge.look(self._services.events.look, self._head, PAGE)
        except Exception as error:  # noqa: BLE001 - watching goes on while the database is away
            if not self._blind:
                _log.warning("cannot look for events", watchers=self._count, error=str(error))
            self._blind = True
            return False
        if self._blind:
            _log.info("can look for events again")
        self._blind = False
        self._take(news)
        return self._head is not None and self._head < self._seen

    def _take(self, news: News) -> None:
        before = (self._epoch, self._head)
        self._looks += 1
        if news.epoch != self._epoch or self._head is None or news.head < self._seen:
            self._kept = []
            self._epoch, self._head = news.epoch, news.head
        elif news.events:
            if news.events[0].cursor != self._head + 1:
                # It was away for so long that what it lacks was dropped.
                self._kept = []
            self._kept += [Told(view, news.epoch) for view in news.events]
            if len(self._kept) > 2 * KEPT:
                del self._kept[:-KEPT]
            self._head = news.events[-1].cursor
        elif news.head > self._head:
            self._kept, self._head = [], news.head
        self._seen = news.head
        self._looked.set()
        self._looked = asyncio.Event()
        if before != (self._epoch, self._head):
            self._moved.set()
            self._moved = asyncio.Event()


__all__ = ["Feed", "FeedLimits"]
