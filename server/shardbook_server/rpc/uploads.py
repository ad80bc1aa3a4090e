"""Uploads of blobs: checked many at a time, and asked for once however many ranks name them.

Thousands of ranks name the same table in their first save. The first that is told that the server lacks it sends it;
the others' calls wait for that, so that content which ranks share travels once for each server.
All of it belongs to the event loop's thread; every service call goes through the bridge.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeVar

from shardbook.errors import InvalidArgumentError, ShardbookError
from shardbook_server.observer import SILENT, Observer
from shardbook_server.rpc.batcher import Batcher, BatchLimits
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.call import current_call
from shardbook_server.rpc.limits import ANSWER_S, CHECKS_AT_ONCE, UPLOADS_AT_ONCE, ByteBudget
from shardbook_server.service.blobs import NO_BLOBS, BlobService, CheckAsk, CheckedBlobs
from shardbook_server.service.lru import BoundedCache
from shardbook_server.service.types import BlobRef, BlobUpload

#: Blobs of which it is remembered that they have come.
RECENT_COUNT: Final = 1024
#: How long a rank that was asked for a blob may take before another one is asked, seconds.
SENDER_S: Final = 2.0


class _Answer(Protocol):
    """Answer of a write that may lack blobs."""

    @property
    def unknown(self) -> tuple[BlobRef, ...]: ...


A = TypeVar("A", bound=_Answer)
_Named = tuple[str, BlobRef]


@dataclass(eq=False)
class _Sender:
    """A call was told to send a blob; others wait for it.

    Attributes:
        until_s: When another one is asked, on ``time.monotonic``'s clock.
        waiting: Futures of those that wait.
    """

    until_s: float
    waiting: set[asyncio.Future[None]] = field(default_factory=set)


class Uploads:
    """Checks uploads, and knows which blobs are on their way.

    Args:
        blobs: The service that checks.
        bridge: The way to it.
        limits: Sizes of the queue before it.
        observer: Told of batches.
    """

    def __init__(self, blobs: BlobService, bridge: Bridge, limits: BatchLimits, *, observer: Observer = SILENT) -> None:
        self._blobs = blobs
        self._bridge = bridge
        few = replace(limits, batch_count=CHECKS_AT_ONCE)
        self.checks = Batcher("uploads", self._check_many, few, observer=observer)
        self._large = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self._large_bytes = ByteBudget("uploads", limits.queue_bytes)
        self._senders: dict[_Named, _Sender] = {}
        #: Blobs that came lately, with the number of their arrival.
        self._recent: BoundedCache[_Named, int] = BoundedCache(RECENT_COUNT)
        self._arrival_count = 0

    async def write(
        self, project: str, uploads: Sequence[BlobUpload], write: Callable[[CheckedBlobs], Awaitable[A]]
    ) -> A:
        """Checks a call's uploads and writes; while others send what is lacking it waits and writes again.

        Args:
            project: Where the blobs belong.
            uploads: Those of the call.
            write: Writes with what was found good; called again when more has come.

        Returns:
            The last answer. Its ``unknown`` names what this very call has to send, if anything.
        """
        while True:
            began_with = self._arrival_count
            checked = await self.check(project, uploads)
            lacking = [(project, ref) for ref in checked.lacking]
            if lacking and await self._others_send(lacking, began_with):
                continue  # a write would only have found out the same
            answer = await write(checked)
            self._arrived(project, checked)
            if not answer.unknown:
                return answer
            needed = [(project, ref) for ref in answer.unknown if ref not in checked.held]
            if await self._others_send(needed, began_with):
                continue
            own = [ref for _, ref in needed] if _is_in_a_hurry() else self._claim(needed)
            # Uploads that could not be checked were not kept: they have to come again, with what they lacked.
            unknown = tuple(sorted({*own, *checked.held}))
            return replace(answer, unknown=unknown)  # type: ignore[type-var] # answers are dataclasses

    async def check(self, project: str, uploads: Sequence[BlobUpload]) -> CheckedBlobs:
        """Checks the uploads of one call."""
        if not uploads:
            return NO_BLOBS
        ask = CheckAsk(project, tuple(uploads))
        size_bytes = sum(len(upload.payload) for upload in uploads)
        if _is_small(ask):
            # Together, so that the calls behind them go on together too and share one transaction.
            return await self.checks.submit(ask, size_bytes)
        with self._large_bytes.hold(size_bytes):
            async with self._large:
                return await self._bridge.read(self._blobs.check, ask.project, ask.uploads)

    async def close(self) -> None:
        """Checks what is queued; refuses what comes."""
        await self.checks.close()

    async def _check_many(self, asks: Sequence[CheckAsk]) -> Sequence[CheckedBlobs | ShardbookError]:
        return await self._bridge.look(self._blobs.check_batch, asks)

    async def _others_send(self, needed: Sequence[_Named], began_with: int) -> bool:
        """Waits for blobs that all are on their way from others; False when this call has to ask for some.

        Args:
            needed: The blobs.
            began_with: Arrivals before this call was checked: what has come since is there, without a wait.
        """
        if any((self._recent.get(name) or 0) > began_with for name in needed):
            return True
        now_s = time.monotonic()
        senders = [self._senders.get(name) for name in needed]
        on_their_way = [sender for sender in senders if sender is not None and sender.until_s > now_s]
        if len(on_their_way) < len(needed) or _is_in_a_hurry():
            return False
        await _wait_for(on_their_way)
        return True

    def _claim(self, needed: Iterable[_Named]) -> list[BlobRef]:
        """Returns what nobody else was asked for lately; from now on this call was."""
        now_s = time.monotonic()
        own = []
        for name in needed:
            sender = self._senders.get(name)
            if sender is None or sender.until_s <= now_s:
                # Out and in again: they are in order of their time.
                self._senders.pop(name, None)
                self._senders[name] = _Sender(now_s + SENDER_S, set() if sender is None else sender.waiting)
                own.append(name[1])
        return own

    def _arrived(self, project: str, checked: CheckedBlobs) -> None:
        """Wakes those who wait for blobs that were stored just now, and forgets senders that never sent."""
        for blob in checked.blobs:
            name = project, blob.ref
            self._arrival_count += 1
            self._recent.put(name, self._arrival_count)
            sender = self._senders.pop(name, None)
            for waiting in sender.waiting if sender is not None else ():
                if not waiting.done():
                    waiting.set_result(None)
        now_s = time.monotonic()
        # The first that may still send ends the search.
        while self._senders and next(iter(self._senders.values())).until_s + SENDER_S < now_s:
            del self._senders[next(iter(self._senders))]


async def _wait_for(senders: Sequence[_Sender]) -> None:
    """Waits until one of the blobs has come, or its sender has had its time."""
    began_s = time.monotonic()
    until_s = min(sender.until_s for sender in senders)
    until_s = min(until_s, began_s + max(0.0, current_call().remaining_s() - ANSWER_S))
    arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    for sender in senders:
        sender.waiting.add(arrival)
    try:
        async with asyncio.timeout(until_s - began_s):
            await arrival
    except TimeoutError:
        pass
    finally:
        for sender in senders:
            sender.waiting.discard(arrival)
        current_call().waited_s += time.monotonic() - began_s


def _is_in_a_hurry() -> bool:
    """True when the call's deadline leaves no time for waiting: to be asked for a blob is better than no answer."""
    return current_call().remaining_s() < 2 * ANSWER_S


def _is_small(ask: CheckAsk) -> bool:
    try:
        return ask.is_small
    except InvalidArgumentError:
        return True  # damaged: the check says so, with the field
