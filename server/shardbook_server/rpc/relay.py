"""RelayService: the calls of a host's ranks, over one stream.

A relayed call is answered by the ``UnaryMethod`` that answers the same call when it comes by itself: the same handler,
request id, deadline, numbers, log lines and refusals. What is spared is what gRPC does for a call of its own, and a
connection for each rank. All of it belongs to the event loop's thread.

Bounds: a stream has at most ``limits.MAX_RELAYED_CALLS`` calls in progress or answered and not sent; nothing further is
read from it until one of them is gone. All streams together have at most as many as the server takes of others; a call
beyond that is refused, as gRPC refuses one, because a call that is not read might be what those in progress wait for.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import grpc.aio
import structlog
from google.protobuf.message import Message

from shardbook.core.limits import MAX_RELAYED_CALLS
from shardbook.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError, ShardbookError
from shardbook.v1 import relay_pb2 as pb
from shardbook.v1.relay_pb2_grpc import RelayServiceServicer
from shardbook_server.rpc.call import Call, current_call
from shardbook_server.rpc.interceptors import EdgeInterceptor, RefusedError, UnaryMethod, parsed, request_id
from shardbook_server.rpc.registration import RegistrationHandlers
from shardbook_server.rpc.status import rich_status

Context = grpc.aio.ServicerContext[Any, Any]

#: Answers of one message: enough to share its cost, and few enough that none waits long for the others.
_ANSWERS_AT_ONCE: Final = 64
#: Told to relays whose calls found no room, seconds.
_ROOM_RETRY_S: Final = 0.5
_SERVICE: Final = "/shardbook.v1.RegistrationService/"
#: What may be relayed, by its field in RelayedCall and RelayedAnswer.
METHODS: Final = {
    "plan_save": "PlanSave",
    "register_shards": "RegisterShards",
    "get_checkpoint_progress": "GetCheckpointProgress",
    "report_failure": "ReportFailure",
}

_log = structlog.get_logger(__name__)


class RelayHandlers(RelayServiceServicer):
    """Answers streams of relays.

    Args:
        edge: What calls pass that come by themselves.
        registration: Their handlers.
        limit: Calls of all streams in progress.
    """

    def __init__(self, edge: EdgeInterceptor, registration: RegistrationHandlers, limit: int) -> None:
        self._calls = _Calls(
            {
                field: (_SERVICE + name, edge.unary(_SERVICE + name, getattr(registration, name)))
                for field, name in METHODS.items()
            },
            limit,
        )
        self._streams: set[_Stream] = set()
        self._draining = False

    async def Relay(
        self, request_iterator: AsyncIterator[pb.RelayRequest], context: Context
    ) -> AsyncIterator[pb.RelayResponse]:
        """Answers the calls of one stream until it ends, or the server drains."""
        # At once, so that the relay knows that somebody is here before there is an answer.
        await context.send_initial_metadata(())
        stream = _Stream(self._calls, context)
        self._streams.add(stream)
        if self._draining:
            stream.drain()
        try:
            async for response in stream.answers(request_iterator):
                yield response
        finally:
            self._streams.discard(stream)
            stream.cancel()

    def drain(self) -> None:
        """Reads no further; every stream ends once what it has read is answered."""
        self._draining = True
        for stream in self._streams:
            stream.drain()


class _Calls:
    """Answers relayed calls, of all streams."""

    def __init__(self, methods: Mapping[str, tuple[str, UnaryMethod]], limit: int) -> None:
        self._methods = methods
        self._limit = limit
        self._count = 0

    async def answer(self, relayed: pb.RelayedCall, context: Context) -> pb.RelayedAnswer:
        """Returns the answer to one call, whatever it is."""
        field = relayed.WhichOneof("call") or ""
        answer = pb.RelayedAnswer(id=relayed.id, request_id=request_id(relayed.request_id))
        if field not in self._methods:
            # Of a newer relay, or no call at all; it has no method to be counted for.
            unknown = InvalidArgumentError("there is no call in it that can be relayed", field="call")
            return _refused(answer, unknown)
        if self._count >= self._limit:
            full = f"{self._count} relayed calls are in progress, the limit is {self._limit}: try again"
            return _refused(answer, ResourceExhaustedError(full, reason="SERVER_BUSY", retry_delay_s=_ROOM_RETRY_S))
        name, method = self._methods[field]
        remaining_s = relayed.timeout.seconds + relayed.timeout.nanos / 1e9 if relayed.HasField("timeout") else math.inf
        call = Call(name, answer.request_id, time.monotonic() + remaining_s, authorization=relayed.authorization)
        self._count += 1
        try:
            async with asyncio.timeout(None if remaining_s == math.inf else remaining_s):
                response: Message = await method.answer(getattr(relayed, field), context, call)
        except RefusedError as refused:
            answer.status = refused.status.SerializeToString()
        except TimeoutError:
            return _refused(answer, DeadlineExceededError(f"the deadline of {name} passed"))
        else:
            getattr(answer, field).CopyFrom(response)
        finally:
            self._count -= 1
        return answer


def _refused(answer: pb.RelayedAnswer, error: ShardbookError) -> pb.RelayedAnswer:
    answer.status = rich_status(error, answer.request_id).SerializeToString()
    return answer


class _Stream:
    """One stream: a task reads it, a task answers each call, and ``answers`` is what to send."""

    def __init__(self, calls: _Calls, context: Context) -> None:
        self._calls = calls
        self._context = context
        self._room = asyncio.Semaphore(MAX_RELAYED_CALLS)
        self._tasks: dict[asyncio.Task[None], int] = {}
        self._by_id: dict[int, asyncio.Task[None]] = {}
        self._ready: deque[pb.RelayedAnswer] = deque()
        self._news = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def answers(self, requests: AsyncIterator[pb.RelayRequest]) -> AsyncIterator[pb.RelayResponse]:
        """Yields answers as they come, those that are there together in one message."""
        own = current_call()
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read(requests))
            self._reading.add_done_callback(lambda _: self._news.set())
        while True:
            self._news.clear()
            while self._ready:
                count = min(len(self._ready), _ANSWERS_AT_ONCE)
                yield pb.RelayResponse(answers=[self._ready.popleft() for _ in range(count)])
                for _ in range(count):
                    self._room.release()
            if self._reading.done() and not self._tasks and not self._ready:
                break
            began_s = time.perf_counter()
            await self._news.wait()
            # Waiting for others' calls is no time of the stream's own.
            own.waited_s += time.perf_counter() - began_s
        if not self._reading.cancelled():
            self._reading.result()

    def drain(self) -> None:
        """Reads no further."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(asyncio.sleep(0))
            self._reading.add_done_callback(lambda _: self._news.set())
        self._reading.cancel()

    def cancel(self) -> None:
        """Gives up whatever is in progress."""
        if self._reading is not None:
            self._reading.cancel()
        for task in self._tasks:
            task.cancel()

    async def _read(self, requests: AsyncIterator[pb.RelayRequest]) -> None:
        async for request in requests:
            try:
                calls = parsed(request).calls
            except InvalidArgumentError as error:
                await self._room.acquire()
                self._tell(_refused(pb.RelayedAnswer(request_id=request_id("")), error))
                continue
            for relayed in calls:
                if relayed.HasField("cancel"):
                    self._give_up(relayed.id)
                    continue
                await self._room.acquire()
                self._start(relayed)

    def _start(self, relayed: pb.RelayedCall) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(relayed))
        self._tasks[task] = relayed.id
        self._by_id[relayed.id] = task
        task.add_done_callback(self._ended)

    async def _answer(self, relayed: pb.RelayedCall) -> None:
        self._tell(await self._calls.answer(relayed, self._context))

    def _tell(self, answer: pb.RelayedAnswer) -> None:
        self._ready.append(answer)
        self._news.set()

    def _give_up(self, number: int) -> None:
        task = self._by_id.get(number)
        if task is not None:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        number = self._tasks.pop(task)
        if self._by_id.get(number) is task:
            del self._by_id[number]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("bug", method="Relay", exc_info=error)
        if task.cancelled() or error is not None:
            # Nobody is told of it, so its room is free at once.
            self._room.release()
        self._news.set()
