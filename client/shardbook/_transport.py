"""Makes one call: deadline, token, retries, errors, and the share of a save that the call is charged to."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeVar, cast

import grpc
from google.protobuf.message import Message

from shardbook._address import ServerAddress
from shardbook._channel import Connection, connections
from shardbook._retry import Backoff, is_retryable
from shardbook._status import error_from_rpc
from shardbook.breaker import GuardedCall, SaveBudget, is_outage
from shardbook.errors import DeadlineExceededError, ShardbookError, UnavailableError

Q = TypeVar("Q")
R = TypeVar("R")

_LOG = logging.getLogger(__name__)

_BACKOFF: Final = Backoff()
#: While a patient call is out, the server is asked after this time, and then this often, whether it is alive, seconds.
_FIRST_LOOK_S: Final = 1.0
LOOK_EVERY_S: Final = 2.0
_LEAST_LOOK_S: Final = 0.25
_LEAST_TIMEOUT_S: Final = 0.001
#: Seconds for which a server that gives no sign of life is tried again, unless told otherwise: a restart takes less.
OUTAGE_S: Final = 10.0
#: Silence after which it is logged, seconds.
_TELL_AFTER_S: Final = 2.0
#: A last try of less than this proves nothing by its silence, seconds.
_SHORT_TRY_S: Final = 2.0


@dataclass(frozen=True)
class Rpc(Generic[Q, R]):
    """A call of the API.

    Attributes:
        name: Its name in the proto file.
        on: Returns it on a connection.
    """

    name: str
    on: Callable[[Connection], grpc.UnaryUnaryMultiCallable[Q, R]]


@dataclass(frozen=True)
class StreamRpc(Generic[Q, R]):
    """A call whose reply is a stream; the attributes are those of ``Rpc``."""

    name: str
    on: Callable[[Connection], grpc.UnaryStreamMultiCallable[Q, R]]


class _Silence:
    """How long one call has met nobody at the other end; says so once to whoever looks at the log."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._since_s: float | None = None
        self._told = False

    def end_s(self, error: ShardbookError) -> float:
        """Returns when to give up after one more failure, by ``time.monotonic``; never where it was an answer."""
        # A server that answers says when to come back; without that, nobody was there.
        if self._transport.budget is not None or not isinstance(error, UnavailableError) or error.retry_delay_s:
            self._since_s = None
            return math.inf
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
        elif not self._told and now_s - self._since_s > _TELL_AFTER_S:
            self._told = True
            left_s = self._since_s + self._transport.outage_s - now_s
            _LOG.warning("no Shardbook server answers at %s; trying for %.0f s more", self._transport.address, left_s)
        return self._since_s + self._transport.outage_s


class _Look:
    """Asks whether the server lives while a patient call is out; an outage there is raised, as one of the call."""

    def __init__(
        self,
        transport: Transport,
        is_alive: Callable[[Transport, float], object],
        guarded: GuardedCall | None,
        silence_s: float,
        every_s: float,
        least_s: float,
    ) -> None:
        self._transport = replace(transport.unguarded(), on_retry=None if guarded is None else guarded.failed)
        self._is_alive = is_alive
        self._guarded = guarded
        every_s = max(_LEAST_LOOK_S, min(every_s, silence_s / 4))
        self.every_s = max(every_s, least_s)
        self.first_s = max(min(_FIRST_LOOK_S, every_s), least_s)
        self._limit_s = max(_LEAST_LOOK_S, silence_s - every_s)  # a look that may take no time tells nothing

    def __call__(self) -> None:
        try:
            self._is_alive(self._transport, self._limit_s)
        except ShardbookError as error:
            if is_outage(error):
                raise
        if self._guarded is not None:
            self._guarded.alive()


@dataclass(frozen=True)
class Transport:
    """How calls reach the server. Immutable and thread-safe; picklable unless it has a budget.

    Attributes:
        address: The server.
        token: Bearer token; None sends none.
        timeout_s: Deadline of calls that name none, seconds.
        budget: The save that unary calls are charged to; None charges nobody.
        outage_s: Seconds for which a server that gives no sign of life at all is tried again, however long a call
            may take that it answers; a budget has its own.
        backoff: Delays between attempts.
        meter: The save whose bytes are counted when ``budget`` is None.
        on_retry: Told of every try that failed and is made again.
    """

    address: ServerAddress
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 30.0
    budget: SaveBudget | None = field(default=None, repr=False, compare=False)
    outage_s: float = OUTAGE_S
    backoff: Backoff = field(default=_BACKOFF, repr=False, compare=False)
    meter: SaveBudget | None = field(default=None, repr=False, compare=False)
    on_retry: Callable[[ShardbookError], None] | None = field(default=None, repr=False, compare=False)

    def unguarded(self) -> Transport:
        """Returns the same transport without a budget; what it sends is counted all the same."""
        return replace(self, budget=None, meter=self.budget)

    def call(self, rpc: Rpc[Q, R], request: Q, *, deadline_s: float | None = None) -> R:
        """Returns the answer to ``request``, asking again until the deadline where that may help.

        Args:
            rpc: The call.
            request: Its request.
            deadline_s: Seconds for everything, retries included; a budget may allow less.

        Raises:
            ShardbookError: What the server answered, or that it did not.
        """
        limit_s = self.timeout_s if deadline_s is None else deadline_s
        with self._guard(rpc.name) as guarded:
            if guarded is not None:
                limit_s = min(limit_s, guarded.silence_s)

            def attempt(remaining_s: float) -> R:
                return self._attempt(rpc, request, remaining_s, guarded)

            return self._until_deadline(attempt, limit_s, guarded)

    def write(self, rpc: Rpc[Q, R], request: Q, *, deadline_s: float | None = None) -> R:
        """Returns the answer to a request that changes the catalogue, as ``call`` does.

        However often it has to be asked, it is one request to the server, by an id of its own: its answer is what the
        first try did, though that was never heard of.
        """
        cast("Any", request).request_id = str(uuid.uuid4())
        return self.call(rpc, request, deadline_s=deadline_s)

    def pages(self, rpc: Rpc[Q, R], request: Q, *, deadline_s: float | None = None) -> Iterator[R]:
        """Yields the pages of a listing; ``request`` is of the first one, and is used for the others.

        Args:
            rpc: A call with a ``page_token`` in its request and a ``next_page_token`` in its answer.
            request: Its request.
            deadline_s: As ``call`` has it, for each page.
        """
        following: Any = request
        while True:
            page = self.call(rpc, request, deadline_s=deadline_s)
            yield page
            following.page_token = cast("Any", page).next_page_token
            if not following.page_token:
                return

    def call_patiently(
        self,
        rpc: Rpc[Q, R],
        request: Q,
        *,
        limit_s: float,
        is_alive: Callable[[Transport, float], object],
        look_every_s: float = LOOK_EVERY_S,
        least_look_s: float = 0.0,
    ) -> R:
        """Returns the answer to a call that may be silent for long because it works or waits, not because it is lost.

        Args:
            rpc: The call.
            request: Its request.
            limit_s: Seconds for everything.
            is_alive: Makes another, quick call over the transport given, within the seconds given. Called every now
                and then while the answer is awaited; any answer to it, a refusal too, is a sign of life.
            look_every_s: How often, seconds; more often where the server may not be silent for that long.
            least_look_s: Never sooner and never more often than this, seconds: where thousands wait for the same, their
                looks must not keep the server from what they wait for. A connection that is lost is found by its pings.

        Raises:
            ShardbookError: What the server answered, or that it gave no sign of life.
        """
        with self._guard(rpc.name) as guarded:
            silence_s = guarded.silence_s if guarded is not None else self.timeout_s
            look = _Look(self, is_alive, guarded, silence_s, look_every_s, least_look_s)
            end_s = time.monotonic() + limit_s

            def wait_for(future: Any) -> R:
                pause_s = look.first_s
                while True:
                    try:
                        result: R = future.result(timeout=max(0.0, min(pause_s, end_s - time.monotonic())))
                    except grpc.FutureTimeoutError as error:
                        if time.monotonic() >= end_s:
                            raise self._too_late(rpc.name, limit_s) from error
                        look()
                        pause_s = look.every_s
                    else:
                        return result

            def attempt(remaining_s: float) -> R:
                future: Any = None
                try:
                    started = rpc.on(connections.get(self.address))
                    self._count(request)
                    future = started.future(request, timeout=remaining_s, metadata=self._metadata())
                    return wait_for(future)
                except grpc.RpcError as error:
                    raise self.typed(error, rpc.name) from error
                except ShardbookError:
                    if future is not None:  # nobody waits for it any more
                        future.cancel()
                    raise

            return self._until_deadline(attempt, limit_s, guarded)

    def collect(self, rpc: StreamRpc[Q, R], request: Q, *, deadline_s: float | None = None) -> list[R]:
        """Returns every message of a stream; one that breaks off is asked for again from its beginning.

        Raises:
            ShardbookError: What the server answered, or that it did not.
        """

        def attempt(remaining_s: float) -> list[R]:
            try:
                started = rpc.on(connections.get(self.address))
                self._count(request)
                return list(started(request, timeout=remaining_s, metadata=self._metadata()))
            except grpc.RpcError as error:
                raise self.typed(error, rpc.name) from error

        return self._until_deadline(attempt, self.timeout_s if deadline_s is None else deadline_s)

    def stream(self, rpc: StreamRpc[Q, R], request: Q) -> Any:
        """Begins a stream that has no deadline; what goes wrong comes as gRPC raises it, see ``typed``."""
        return rpc.on(connections.get(self.address))(request, metadata=self._metadata())

    def typed(self, error: grpc.RpcError, method: str) -> ShardbookError:
        """Returns the typed error for what gRPC raised."""
        return error_from_rpc(error, method=method, target=str(self.address))

    def _guard(self, method: str) -> AbstractContextManager[GuardedCall | None]:
        return self.budget.call(method) if self.budget is not None else nullcontext()

    def _until_deadline(
        self,
        attempt: Callable[[float], R],
        limit_s: float,
        guarded: GuardedCall | None = None,
    ) -> R:
        """Repeats ``attempt``; with ``guarded``, only while the server's silence stays within what it allows."""
        end_s = time.monotonic() + limit_s
        silence = _Silence(self)
        failure_count = 0
        last: ShardbookError | None = None
        while True:
            remaining_s = end_s - time.monotonic()
            try:
                return attempt(max(_LEAST_TIMEOUT_S, remaining_s))
            except DeadlineExceededError as error:
                # What went wrong all the time says more than that the last short try was cut off by the deadline.
                if last is not None and remaining_s < _SHORT_TRY_S:
                    raise last from error
                raise
            except ShardbookError as error:
                last = error
                failure_count += 1
                delay_s = self.backoff.delay_s(failure_count, error)
                # No sleep that the deadline would end: the caller learns what is wrong while it still has time.
                if not is_retryable(error) or time.monotonic() + delay_s >= min(end_s, silence.end_s(error)):
                    raise
                if guarded is not None:
                    guarded.failed(error)
                    if guarded.quiet_s + delay_s >= guarded.silence_s:
                        raise
                if self.on_retry is not None:
                    self.on_retry(error)
            connections.look_again(self.address)
            time.sleep(delay_s)

    def _attempt(self, rpc: Rpc[Q, R], request: Q, remaining_s: float, guarded: GuardedCall | None) -> R:
        try:
            started = rpc.on(connections.get(self.address))
            self._count(request)
            if guarded is None or guarded.linger_s <= guarded.silence_s:
                return started(request, timeout=remaining_s, metadata=self._metadata())
            future: Any = started.future(request, timeout=guarded.linger_s, metadata=self._metadata())
            return cast("R", self._wait_for_probe(future, remaining_s, guarded))
        except grpc.RpcError as error:
            raise self.typed(error, rpc.name) from error

    def _wait_for_probe(self, future: Any, remaining_s: float, guarded: GuardedCall) -> Any:
        """Waits for a probe as long as the save does; leaves it running and notes a late answer."""
        try:
            return future.result(timeout=remaining_s)
        except grpc.FutureTimeoutError as error:

            def note(done: Any) -> None:
                late = done.exception()
                if late is None or not is_outage(self.typed(late, guarded.method)):
                    guarded.answered()

            future.add_done_callback(note)
            raise self._too_late(guarded.method, remaining_s) from error

    def _too_late(self, method: str, waited_s: float) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"no answer to {method} from {self.address} within {waited_s:.1f} s; it may or may not have happened",
            metadata={"target": str(self.address), "method": method},
        )

    def _count(self, request: object) -> None:
        meter = self.budget or self.meter
        if meter is not None and isinstance(request, Message):
            meter.note_sent(request.ByteSize())

    def _metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token is not None else ()
