"""Waiting for an attempt to get further, in thousands of calls at the price of one.

One poller per process reads the numbers of all awaited attempts by one grouped query every 100 ms, and at once for
attempts that this process itself has just changed. Waiters cost a future each; their limit is apart from the limits
of the calls that they wait for, so a world of waiting ranks never keeps out the rank that they wait for.
All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import structlog

from shardbook.errors import ResourceExhaustedError, UnavailableError
from shardbook_server.rpc.call import current_call
from shardbook_server.service.views import AttemptCounts

Look = Callable[[Sequence[int]], Awaitable[Mapping[int, AttemptCounts]]]

#: Told to clients that met the limit or a draining server, seconds.
RETRY_S: Final = 0.5
#: Shortest time between two looks: a burst of small commits must not become a burst of queries.
_MIN_GAP_S: Final = 0.005

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Waiter:
    done: Callable[[AttemptCounts], bool]
    future: asyncio.Future[AttemptCounts]
    seen: AttemptCounts | None = None


class Waits:
    """Who waits for which attempt, and the poller.

    Args:
        look: Reads the numbers of many attempts.
        limit: Most waiters.
        interval_s: Time between looks.
    """

    def __init__(self, look: Look, *, limit: int, interval_s: float) -> None:
        self._look = look
        self._limit = limit
        self._interval_s = interval_s
        self._count = 0
        self._waiters: defaultdict[int, set[_Waiter]] = defaultdict(set)
        self._changed: set[int] = set()
        self._wake = asyncio.Event()
        self._draining = asyncio.Event()
        #: The last look failed; said once, not ten times a second.
        self._blind = False
        self._poller: asyncio.Task[None] | None = None

    @property
    def waiting_count(self) -> int:
        """Calls that wait now."""
        return self._count

    async def until(self, attempt: int, done: Callable[[AttemptCounts], bool], wait_s: float) -> AttemptCounts | None:
        """Returns the attempt's numbers once ``done`` says so, or as last seen when the time is up (None if never).

        Raises:
            ResourceExhaustedError: Too many calls wait.
            UnavailableError: The server is draining.
        """
        if wait_s <= 0:
            return None
        waiter = _Waiter(done, asyncio.get_running_loop().create_future())
        with self._admitted():
            self._waiters[attempt].add(waiter)
            self._ensure_poller()
            try:
                async with asyncio.timeout(wait_s):
                    return await waiter.future
            except TimeoutError:
                return waiter.seen
            finally:
                self._forget(attempt, waiter)

    async def pause(self, wait_s: float) -> None:
        """Waits for something that only time will tell, as a waiter like the others.

        Raises:
            ResourceExhaustedError: Too many calls wait.
            UnavailableError: The server is draining.
        """
        with self._admitted():
            try:
                async with asyncio.timeout(wait_s):
                    await self._draining.wait()
            except TimeoutError:
                return
            raise draining()

    def changed(self, attempts: Iterable[int]) -> None:
        """Says that this process has just changed attempts: their waiters are looked after at once."""
        self._changed.update(attempt for attempt in attempts if attempt in self._waiters)
        if self._changed:
            self._wake.set()

    def drain(self) -> None:
        """Ends every wait, and those to come, with UNAVAILABLE."""
        self._draining.set()
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.future.done():
                    waiter.future.set_exception(draining())

    async def close(self) -> None:
        """Drains and ends the poller."""
        self.drain()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.wait([self._poller])

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._draining.is_set():
            raise draining()
        if self._count >= self._limit:
            raise ResourceExhaustedError(
                f"{self._count} calls wait, the limit is {self._limit}: ask again without waiting",
                reason="WAITERS_FULL",
                retry_delay_s=RETRY_S,
            )
        self._count += 1
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._count -= 1
            current_call().waited_s += time.monotonic() - began_s

    def _forget(self, attempt: int, waiter: _Waiter) -> None:
        self._waiters[attempt].discard(waiter)
        if not self._waiters[attempt]:
            del self._waiters[attempt]

    def _ensure_poller(self) -> None:
        if self._poller is None or self._poller.done():
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    async def _poll(self) -> None:
        """Looks until nobody waits any more; the next waiter starts it again."""
        all_at = time.monotonic() + self._interval_s
        while self._waiters:
            await self._sleep_until(all_at)
            began = time.monotonic()
            if began >= all_at:
                attempts = list(self._waiters)
                all_at = began + self._interval_s
            else:
                attempts = [attempt for attempt in self._changed if attempt in self._waiters]
            self._changed.clear()
            self._wake.clear()
            if attempts:
                await self._look_at(attempts)
            # So that looking takes a fifth of a thread at most, however large the worlds are.
            await asyncio.sleep(max(_MIN_GAP_S, 4 * (time.monotonic() - began)))

    async def _sleep_until(self, moment: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, moment - time.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _look_at(self, attempts: Sequence[int]) -> None:
        try:
            found = await self._look(attempts)
        except Exception as error:  # noqa: BLE001 - waiting goes on while the database is away; calls end in time
            if not self._blind:
                _log.warning("cannot look at awaited checkpoints", count=len(attempts), error=str(error))
            self._blind = True
            return
        if self._blind:
            _log.info("can look at awaited checkpoints again")
        self._blind = False
        for attempt, counts in found.items():
            for waiter in self._waiters.get(attempt, ()):
                waiter.seen = counts
                if not waiter.future.done() and waiter.done(counts):
                    waiter.future.set_result(counts)


def draining() -> UnavailableError:
    """Returns what waits are told that a server that shuts down ends."""
    return UnavailableError("the server is shutting down: ask again", reason="DRAINING", retry_delay_s=RETRY_S)
