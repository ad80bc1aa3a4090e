"""Group commit: small writes that arrive together share one transaction and one fsync.

While one batch is in the database the next one gathers. After a batch that several shared, the next gathers on for as
long again: under load that halves the number of transactions, and with them the work. A lone write is never held up.
Where the database takes several batches at a time, another begins beside the first only when it is full or when its
first entry has waited for long, behind a batch that waits for a lock, say: begun at once, batches would be as small as
they are many, and a transaction costs a server more than the rows in it.
One bad entry fails alone: the service answers a verdict for each.
All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from shardbook.errors import InternalError, ResourceExhaustedError, ShardbookError, UnavailableError
from shardbook_server.observer import SILENT, Observer
from shardbook_server.rpc.call import Call, current_call

E = TypeVar("E")
V = TypeVar("V")

#: Told to clients that met a full queue, seconds.
FULL_RETRY_S: Final = 0.25
#: Longest time that a batch gathers after the one before it, seconds.
LONGEST_PAUSE_S: Final = 0.02
#: How long an entry is queued before a batch of its own may begin beside those in the database, seconds.
PATIENCE_S: Final = 0.1


@dataclass(frozen=True)
class BatchLimits:
    """Sizes of a batch and of the queue before it.

    Attributes:
        batch_count: Most entries in one transaction.
        batch_bytes: Most bytes in one transaction; a single larger entry still goes, alone.
        queue_count: Most entries queued.
        queue_bytes: Most bytes queued.
    """

    batch_count: int
    batch_bytes: int
    queue_count: int
    queue_bytes: int


@dataclass(eq=False)
class _Waiting(Generic[E, V]):
    entry: E
    size_bytes: int
    call: Call
    verdict: asyncio.Future[V]
    since_s: float


class Batcher(Generic[E, V]):
    """Gathers entries and runs them batch by batch, in the order they came.

    Args:
        name: For messages: ``plans``, ``registrations``.
        run: Writes a batch durably and answers a verdict for each entry, in order.
        limits: Sizes.
        in_flight: Most batches in the database at a time.
        observer: Told the size of each batch.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[E]], Awaitable[Sequence[V | ShardbookError]]],
        limits: BatchLimits,
        *,
        in_flight: int = 1,
        observer: Observer = SILENT,
    ) -> None:
        self._name = name
        self._run = run
        self._limits = limits
        self._in_flight = in_flight
        self._observer = observer
        self._queue: deque[_Waiting[E, V]] = deque()
        self._queued_bytes = 0
        self._batches: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def queued_count(self) -> int:
        """Entries that are in no batch yet."""
        return len(self._queue)

    @property
    def oldest_age_s(self) -> float:
        """How long the first of them has been queued, seconds; 0 when there is none. May be asked from any thread."""
        try:
            return max(0.0, time.monotonic() - self._queue[0].since_s)
        except IndexError:
            return 0.0

    async def submit(self, entry: E, size_bytes: int) -> V:
        """Returns the entry's verdict once its batch is durable.

        A caller that is cancelled takes its entry out of the queue; in a running batch the entry stays.

        Raises:
            ResourceExhaustedError: The queue is full.
            DeadlineExceededError: The deadline passed before the entry's turn came.
            ShardbookError: The entry's own verdict, or the whole batch's.
        """
        self._admit(size_bytes)
        verdict: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(entry, size_bytes, current_call(), verdict, time.monotonic())
        self._queue.append(waiting)
        self._queued_bytes += size_bytes
        self._start()
        if len(self._queue) == 1 and self._in_flight > 1:
            asyncio.get_running_loop().call_later(PATIENCE_S, self._start)
        return await verdict

    async def close(self) -> None:
        """Refuses new entries and waits until every queued one has its verdict."""
        self._closed = True
        while self._batches:
            await asyncio.wait(self._batches)

    def _admit(self, size_bytes: int) -> None:
        if self._closed:
            raise UnavailableError("the server is shutting down", reason="DRAINING", retry_delay_s=FULL_RETRY_S)
        full = len(self._queue) >= self._limits.queue_count
        # An empty queue takes an entry of any size: what may be sent at all is limited elsewhere.
        if full or (self._queue and self._queued_bytes + size_bytes > self._limits.queue_bytes):
            raise ResourceExhaustedError(
                f"the queue of {self._name} is full: {len(self._queue)} entries, {self._queued_bytes} bytes; try again",
                reason="QUEUE_FULL",
                retry_delay_s=FULL_RETRY_S,
            )

    def _start(self) -> None:
        """Begins a batch when there is reason for one more in flight; it begins the next when it is done."""
        if self._queue and len(self._batches) < self._in_flight and (not self._batches or self._is_due()):
            task = asyncio.get_running_loop().create_task(self._run_batches())
            self._batches.add(task)
            task.add_done_callback(self._ended)

    def _is_due(self) -> bool:
        return (
            len(self._queue) >= self._limits.batch_count
            or self._queued_bytes >= self._limits.batch_bytes
            # A little less: a timer may go off that much too early.
            or self.oldest_age_s >= 0.9 * PATIENCE_S
        )

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        # An entry may have come between the last look at the queue and this.
        self._start()

    async def _run_batches(self) -> None:
        # One turn of the loop: whoever is about to submit joins the first batch.
        await asyncio.sleep(0)
        while batch := self._take():
            self._observer.batch(self._name, len(batch))
            began_s = time.monotonic()
            verdicts: Sequence[V | Exception]
            try:
                verdicts = await self._run([waiting.entry for waiting in batch])
            except Exception as error:  # noqa: BLE001 - every entry learns what became of its batch
                verdicts = [error] * len(batch)
            self._tell(batch, verdicts)
            if len(batch) > 1 and len(self._queue) < self._limits.batch_count and not self._closed:
                await asyncio.sleep(min(time.monotonic() - began_s, LONGEST_PAUSE_S))

    def _take(self) -> list[_Waiting[E, V]]:
        """Takes the next batch off the queue, without entries whose caller has gone or whose time is up."""
        batch: list[_Waiting[E, V]] = []
        size_bytes = 0
        while self._queue and len(batch) < self._limits.batch_count:
            waiting = self._queue[0]
            if batch and size_bytes + waiting.size_bytes > self._limits.batch_bytes:
                break
            self._queue.popleft()
            self._queued_bytes -= waiting.size_bytes
            if self._wanted(waiting):
                batch.append(waiting)
                size_bytes += waiting.size_bytes
        return batch

    @staticmethod
    def _wanted(waiting: _Waiting[E, V]) -> bool:
        if waiting.verdict.done():
            return False
        try:
            waiting.call.check_time()
        except ShardbookError as error:
            waiting.verdict.set_exception(error)
            return False
        return True

    def _tell(self, batch: Sequence[_Waiting[E, V]], verdicts: Sequence[V | Exception]) -> None:
        if len(verdicts) != len(batch):
            verdicts = [InternalError(f"{len(verdicts)} verdicts for {len(batch)} {self._name}")] * len(batch)
        for waiting, verdict in zip(batch, verdicts, strict=True):
            if waiting.verdict.done():
                continue
            if isinstance(verdict, Exception):
                waiting.verdict.set_exception(verdict)
            else:
                waiting.verdict.set_result(verdict)
