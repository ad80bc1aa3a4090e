"""The stream to the service on which a relay's calls travel: opened for the first call, and again for those that wait.

Every call on it is idempotent by its natural key. So one whose stream broke is sent again over the next one, with what
is left of its deadline, and its rank notices nothing. Where no stream can be opened for a second, calls end
UNAVAILABLE; from then on each ends so after one try, at once in most cases, until a try succeeds. A relay thus never
adds more than that second to what a rank's circuit breaker sees of an outage.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

from shardbook._retry import Backoff
from shardbook.core.limits import MAX_RELAYED_CALLS
from shardbook.errors import UnavailableError
from shardbook.relay.upstream import Upstream
from shardbook.v1 import relay_pb2 as pb
from shardbook.v1.relay_pb2_grpc import RelayServiceStub

#: How long calls wait for another stream when theirs broke, seconds.
PATIENCE_S: Final = 1.0
#: How long the opening of a stream may take, seconds.
_OPEN_S: Final = 2.0
#: How long a server that knows no relays is not asked again, seconds; it may be replaced by one that does.
UNKNOWN_S: Final = 60.0
#: Calls of one message, and bytes from which on it takes no further one.
_CALLS_AT_ONCE: Final = 64
_FULL_BYTES: Final = 256 << 10

_LOG = logging.getLogger(__name__)


class AwayError(Exception):
    """The service cannot be reached; ``code`` and ``details`` are what a call of its own would have ended with."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class NotRelayedError(Exception):
    """The server knows no relays: the call is to be passed on by itself."""


@dataclass(eq=False)
class _Pending:
    """A call that is not answered yet; ``deadline_s`` is on ``time.monotonic``'s clock."""

    call: pb.RelayedCall
    deadline_s: float
    answer: asyncio.Future[pb.RelayedAnswer]


class RelayStream:
    """Calls over one stream at a time. Belongs to the event loop's thread.

    Args:
        upstream: The connection.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._unsent: deque[int] = deque()
        self._given_up: deque[int] = deque()
        self._news = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._backoff = Backoff(first_s=0.1, cap_s=0.4)
        self._is_open = False
        self._is_away = False
        self._unknown_until_s = -math.inf
        self._closed: AwayError | None = None

    @property
    def takes_more(self) -> bool:
        """False while as many calls are in progress as a stream may have, or the server knows no relays."""
        return len(self._pending) < MAX_RELAYED_CALLS and time.monotonic() >= self._unknown_until_s

    async def ask(self, call: pb.RelayedCall, timeout_s: float | None) -> pb.RelayedAnswer:
        """Returns the answer to a call; its ``id`` is set here.

        Args:
            call: What is asked.
            timeout_s: What is left of its deadline, seconds; None when it has none.

        Raises:
            AwayError: The service cannot be reached.
            NotRelayedError: It knows no relays.
        """
        if self._closed is not None:
            raise self._closed
        number = call.id = next(self._numbers)
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        pending = _Pending(call, deadline_s, asyncio.get_running_loop().create_future())
        self._pending[number] = pending
        self._unsent.append(number)
        self._news.set()
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep())
        try:
            return await pending.answer
        except asyncio.CancelledError:
            # The rank has gone, or its deadline passed: nobody need go on waiting on its behalf.
            if self._is_open:
                self._given_up.append(number)
                self._news.set()
            raise
        finally:
            del self._pending[number]

    async def close(self) -> None:
        """Ends what is in progress, and what is to come, UNAVAILABLE."""
        self._closed = AwayError(grpc.StatusCode.UNAVAILABLE, "the relay is shutting down")
        self._fail(self._closed)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    async def _keep(self) -> None:
        """Keeps a stream for as long as it lasts, and opens another one while calls wait."""
        failure_count = 0
        broken_s = math.inf
        while True:
            try:
                error = await self._one_stream(look_again=failure_count > 0)
                worked = error is None
            except AwayError as away:
                error, worked = away, False
            if not self._pending:
                return
            failure_count = 1 if worked else failure_count + 1
            broken_s = time.monotonic() if worked else min(broken_s, time.monotonic())
            if error is not None and self._gives_up(error, broken_s):
                return
            await asyncio.sleep(self._backoff.delay_s(failure_count))

    def _gives_up(self, error: AwayError, broken_s: float) -> bool:
        """Ends all calls when waiting for another stream is no use any more."""
        if error.code is grpc.StatusCode.UNIMPLEMENTED:
            _LOG.warning("the server knows no relays: every call is passed on by itself")
            self._unknown_until_s = time.monotonic() + UNKNOWN_S
            self._fail(NotRelayedError())
            return True
        if not self._is_away and time.monotonic() < broken_s + PATIENCE_S:
            return False
        if not self._is_away:
            _LOG.warning("the service cannot be reached: %s", error.details)
        self._is_away = True
        self._fail(error)
        return True

    async def _one_stream(self, *, look_again: bool) -> AwayError | None:
        """Opens a stream and uses it until it ends; returns why it did, None when it was of use until then.

        Raises:
            AwayError: It could not be opened.
        """
        call: Any = None
        try:
            async with asyncio.timeout(_OPEN_S):
                channel = await self._upstream.channel(look_again=look_again)
                # The stubs' types are those of the synchronous stack.
                stub: Any = RelayServiceStub(channel)
                call = stub.Relay()
                await call.wait_for_connection()
        except TimeoutError:
            if call is not None:
                call.cancel()
            raise AwayError(grpc.StatusCode.UNAVAILABLE, f"no answer within {_OPEN_S:.0f} s") from None
        except UnavailableError as error:
            raise AwayError(grpc.StatusCode.UNAVAILABLE, error.message) from error
        except grpc.aio.AioRpcError as error:
            raise AwayError(error.code(), error.details() or "") from error
        if self._is_away:
            _LOG.warning("the service can be reached again")
        self._is_away = False
        return await self._exchange(call)

    async def _exchange(self, call: Any) -> AwayError | None:
        # What waits was sent over a stream that broke, or not at all.
        self._unsent = deque(self._pending)
        self._given_up.clear()
        self._is_open = True
        writing = asyncio.get_running_loop().create_task(self._write(call))
        opened_s, answered = time.monotonic(), False
        error = AwayError(grpc.StatusCode.UNAVAILABLE, "the server ended the stream")
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                for answer in response.answers:
                    answered = True
                    self._settle(answer)
        except grpc.aio.AioRpcError as failed:
            error = AwayError(failed.code(), failed.details() or "")
        finally:
            self._is_open = False
            writing.cancel()
            call.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        # One that ends at once and without an answer is as good as none; others only wait for long.
        return None if answered or time.monotonic() > opened_s + PATIENCE_S else error

    async def _write(self, call: Any) -> None:
        while True:
            while self._unsent or self._given_up:
                await call.write(self._message())
            self._news.clear()
            await self._news.wait()

    def _message(self) -> pb.RelayRequest:
        """Returns what has come up, as much as one message takes."""
        message = pb.RelayRequest()
        size_bytes = 0
        while self._unsent and len(message.calls) < _CALLS_AT_ONCE and size_bytes < _FULL_BYTES:
            pending = self._pending.get(self._unsent.popleft())
            if pending is None:
                continue
            if pending.deadline_s < math.inf:
                left_s = max(0.0, pending.deadline_s - time.monotonic())
                pending.call.timeout.FromNanoseconds(int(left_s * 1e9))
            message.calls.append(pending.call)
            size_bytes += pending.call.ByteSize()
        while self._given_up:
            message.calls.add(id=self._given_up.popleft(), cancel=pb.RelayedCancel())
        return message

    def _settle(self, answer: pb.RelayedAnswer) -> None:
        pending = self._pending.get(answer.id)
        if pending is not None and not pending.answer.done():
            pending.answer.set_result(answer)

    def _fail(self, error: Exception) -> None:
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(error)
