"""The one way from the event loop to a service: everything that may block runs in a bounded thread pool.

Three lanes: ``read`` uses any thread; ``write`` lets as many calls through at a time as the database has writers (one
on SQLite), so that writers waiting for each other never take the readers' threads; ``heavy`` has a few threads of its
own, because a large checkpoint takes seconds to assemble. All belong to the event loop's thread.

A call whose client has gone or whose deadline has passed is dropped if it has not begun; once begun it runs to its
end, whoever is still there to hear of it. So a cancelled commit is whole or absent.

Every service call may be made again: reads change nothing, and writes are idempotent by their natural key. So one that
lost its connection to the database, perhaps at the very commit, or got into the way of another replica's transaction,
is made again here, and its caller gets the one true answer instead of a doubt.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast

import structlog

from shardbook.errors import ResourceExhaustedError, UnavailableError
from shardbook_server.failpoints import Failpoints
from shardbook_server.rpc.call import NO_CALL, Call, current_call
from shardbook_server.storage.deadline import statements_until

P = ParamSpec("P")
T = TypeVar("T")

#: Told to clients that met a full queue, seconds.
BUSY_RETRY_S: Final = 0.25
#: Why a call is made again at once, and how often: a connection that was lost is replaced, a conflict is over.
_AGAIN_REASONS: Final = frozenset({"DATABASE_UNAVAILABLE", "DATABASE_CONFLICT"})
_AGAIN_COUNT: Final = 2
_AGAIN_PAUSE_S: Final = 0.02

_log = structlog.get_logger(__name__)


class Bridge:
    """Runs service calls in threads.

    Args:
        threads: Threads of the read and write lanes.
        heavy_threads: Threads of the heavy lane; the database keeps a connection for each of these and of those.
        writers: Calls of the write lane in progress at a time.
        queue_limit: Calls that may be waiting or running before further ones are refused.
        failpoints: Faults to inject around writes.
    """

    def __init__(
        self, *, threads: int, heavy_threads: int, writers: int, queue_limit: int, failpoints: Failpoints
    ) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shardbook-call")
        self._heavy = ThreadPoolExecutor(heavy_threads, thread_name_prefix="shardbook-heavy")
        self._writers = asyncio.Semaphore(writers)
        self._queue_limit = queue_limit
        self._pending_count = 0
        self._failpoints = failpoints
        self._running: set[asyncio.Task[Any]] = set()
        self._shared: dict[tuple[str, Hashable], asyncio.Task[Any]] = {}
        self._closed = False

    @property
    def pending_count(self) -> int:
        """Calls that are queued or running."""
        return self._pending_count

    async def read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a service call that writes nothing.

        Raises:
            ResourceExhaustedError: Too many calls are queued.
            DeadlineExceededError: The deadline passed before its turn came.
        """
        with self._admitted():
            return await self._in(self._pool, _Job(lambda: call(*args, **kwargs), current_call()))

    async def read_shared(self, key: Hashable, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a read once for all callers that ask with the same key at the same time.

        For thousands that were woken by the same event. The answer may have been read before a caller asked, so
        this is not for what has to see the caller's own last write.
        """
        return await self._share(self._pool, ("read", key), _Job(lambda: call(*args, **kwargs), NO_CALL))

    async def look(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a read of the server's own, such as the poller's, outside admission and deadlines."""
        return await self._in(self._pool, _Job(lambda: call(*args, **kwargs), NO_CALL))

    async def write(self, name: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a service call that writes, in the write lane.

        Args:
            name: The call's name in ``failpoints.POINTS``.
            call: The service's method.
            *args: Passed on.
            **kwargs: Passed on.

        Raises:
            ResourceExhaustedError: Too many calls are queued.
            DeadlineExceededError: The deadline passed before its turn came.
        """
        with self._admitted():
            job = _Job(self._with_failpoints(name, lambda: call(*args, **kwargs)), current_call())
            try:
                return await asyncio.shield(self._spawn(self._write(job)))
            except asyncio.CancelledError:
                job.abandon()
                raise

    async def write_own(self, name: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a write that belongs to no single call, such as a batch, outside admission and deadlines."""
        job = _Job(self._with_failpoints(name, lambda: call(*args, **kwargs)), NO_CALL)
        return await asyncio.shield(self._spawn(self._write(job)))

    async def heavy(self, name: str, key: Hashable, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a service call that may compute for seconds; callers with the same key share one run and its answer.

        Only good news is shared with those who came after a run began: what it lacked may be there by now, so a
        failure is asked for anew, once for all of them. The run belongs to all who share it, so it has no deadline and
        outlives every caller.

        Args:
            name: As for ``write``.
            key: Equal for calls that do the same.
            call: The service's method.
            *args: Passed on.
            **kwargs: Passed on.

        Raises:
            ResourceExhaustedError: Too many calls are queued.
        """
        job = _Job(self._with_failpoints(name, lambda: call(*args, **kwargs)), NO_CALL)
        return await self._share(self._heavy, (name, key), job)

    async def stream(self, call: Callable[P, Iterator[T]], *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        """Yields what a service call yields, each step a call of the read lane; nothing is read ahead."""
        items = await self.read(call, *args, **kwargs)
        while (item := await self._step(items)) is not _END:
            yield cast("T", item)

    async def close(self) -> None:
        """Lets what has begun end, refuses what comes, and ends the threads."""
        self._closed = True
        while self._running:
            await asyncio.wait(self._running)
        # Beside the loop: a read whose caller has gone may still wait for the database, and the loop must not.
        for pool in (self._pool, self._heavy):
            await asyncio.to_thread(pool.shutdown)

    async def _step(self, items: Iterator[Any]) -> Any:
        with self._admitted():
            # Never again: a generator that has failed has ended, and would pass for one that is complete.
            return await self._in(self._pool, _Job(lambda: next(items, _END), current_call(), again=False))

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._closed:
            raise UnavailableError("the server is shutting down", reason="DRAINING", retry_delay_s=BUSY_RETRY_S)
        if self._pending_count >= self._queue_limit:
            raise ResourceExhaustedError(
                f"{self._pending_count} calls are queued, the limit is {self._queue_limit}: try again",
                reason="SERVER_BUSY",
                retry_delay_s=BUSY_RETRY_S,
            )
        self._pending_count += 1
        try:
            yield
        finally:
            self._pending_count -= 1

    def _with_failpoints(self, name: str, call: Callable[[], T]) -> Callable[[], T]:
        if not self._failpoints:
            return call

        def run() -> T:
            self._failpoints.hit(f"{name}.before_db")
            result = call()
            self._failpoints.hit(f"{name}.after_db")
            return result

        return run

    async def _share(self, pool: ThreadPoolExecutor, key: tuple[str, Hashable], job: _Job[T]) -> T:
        current_call().check_time()
        # Who joins holds neither a thread nor a place in the queue, so a whole world may.
        joined = self._shared.get(key)
        if joined is not None and not joined.done():
            try:
                result: T = await asyncio.shield(joined)
            except Exception:  # noqa: BLE001 - whatever it was, it may not be so any more
                # It began before this caller asked: what it lacked may have come since. Ask anew, below.
                _log.debug("a shared call failed for one who joined it late", name=key[0])
            else:
                return result
        task = self._shared.get(key)
        if task is None or task.done():
            task = self._shared[key] = self._spawn(self._admit_and_run(pool, job))
            task.add_done_callback(lambda ended: self._unshare(key, ended))
        again: T = await asyncio.shield(task)
        return again

    async def _admit_and_run(self, pool: ThreadPoolExecutor, job: _Job[T]) -> T:
        with self._admitted():
            return await self._in(pool, job)

    def _unshare(self, key: tuple[str, Hashable], ended: asyncio.Task[Any]) -> None:
        if self._shared.get(key) is ended:
            del self._shared[key]

    async def _write(self, job: _Job[T]) -> T:
        async with self._writers:
            return await self._in(self._pool, job)

    async def _in(self, pool: ThreadPoolExecutor, job: _Job[T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, job.run)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Starts work that goes on when its caller is cancelled; ``close`` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        # Asked for here because the caller may be gone, and asyncio warns of errors that nobody asked for.
        if not task.cancelled():
            task.exception()


#: Ends a stream: StopIteration cannot pass through a future.
_END: Final = object()


def _drop() -> Any:
    raise _Dropped


class _Dropped(Exception):  # noqa: N818 - never seen: whoever would see it is gone
    """The caller went away before its turn came."""


class _Job(Generic[T]):
    """Work for a thread, in the context of the task that asked for it; ``again`` says that it may be done again."""

    __slots__ = ("_again", "_begun", "_call", "_context", "_work")

    def __init__(self, work: Callable[[], T], call: Call, *, again: bool = True) -> None:
        self._again = again
        self._work = work
        self._call = call
        self._context = contextvars.copy_context()
        self._begun = False

    def run(self) -> T:
        """Does the work, unless nobody waits for it any more."""
        self._begun = True
        self._call.check_time()
        return self._context.run(self._within_time)

    def abandon(self) -> None:
        """Lets go of the work, and of all that it holds, unless it has begun; on the event loop."""
        if not self._begun:
            self._work = _drop

    def _within_time(self) -> T:
        with statements_until(self._call.deadline_s):
            for pause_s in (_AGAIN_PAUSE_S * at for at in range(1, _AGAIN_COUNT + 1) if self._again):
                try:
                    return self._work()
                except UnavailableError as error:
                    if error.reason not in _AGAIN_REASONS or self._call.remaining_s() < pause_s:
                        raise
                    _log.info("a call is made again", reason=error.reason, method=self._call.method)
                    time.sleep(random.uniform(pause_s / 2, pause_s))
            return self._work()
