"""What every call of ``shardbook.v1`` passes: a request id, its deadline, the mapping of errors, and its watch.

A ``ShardbookError`` becomes its status with details. Anything else, and ``InternalError``, is a bug: INTERNAL with a
request id and no more, the traceback goes to the log. A request that does not parse is INVALID_ARGUMENT, which gRPC by
itself answers UNKNOWN.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc_status import rpc_status

from shardbook.errors import InternalError, InvalidArgumentError, ShardbookError
from shardbook_server.observer import SILENT, Observer
from shardbook_server.rpc.call import Call, set_current_call
from shardbook_server.rpc.status import rich_status
from shardbook_server.rpc.watch import AccessLog, Watch

Context = grpc.aio.ServicerContext[Any, Any]
Unary = Callable[[Any, Context], Awaitable[Any]]
Stream = Callable[[Any, Context], AsyncIterator[Any]]
H = TypeVar("H")

#: Metadata key of the request id, in both directions.
REQUEST_ID_KEY: Final = "x-request-id"
#: Metadata key of the caller's credentials.
AUTHORIZATION_KEY: Final = "authorization"
_READ_KEYS: Final = frozenset((REQUEST_ID_KEY, AUTHORIZATION_KEY))
#: Methods that are answered here; health and reflection have their own ways.
PREFIX: Final = "/shardbook.v1."

#: Ids of this process: drawing a random number for every call costs as much as the rest of this file.
_PROCESS_ID: Final = uuid.uuid4().hex[:12]
_NUMBERS: Final = itertools.count(1)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


#: gRPC's own words for the ways to call; by (requests are streamed, answers are streamed).
_KINDS: Final = {(False, False): "unary", (False, True): "server_stream", (True, True): "bidi_stream"}


class _Malformed:
    """Stands for a request that did not parse."""


class RefusedError(Exception):
    """A call ends with a status; everybody who has to know has been told."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class UnaryMethod:
    """A method as it is answered whichever way a call came: its handler, and all that stands around it.

    Args:
        behaviour: The handler.
        watch: Told of every call.
    """

    __slots__ = ("_behaviour", "_watch")

    def __init__(self, behaviour: Unary, watch: Watch) -> None:
        self._behaviour = behaviour
        self._watch = watch

    async def answer(self, request: Any, context: Context, call: Call) -> Any:
        """Returns the handler's answer; from now on ``call`` is what the current task answers.

        Raises:
            RefusedError: The caller is to be told the status.
        """
        began_s = self._watch.begin()
        set_current_call(call)
        try:
            response = await self._behaviour(parsed(request), context)
        except asyncio.CancelledError:
            self._watch.cancelled(call, began_s)
            raise
        except Exception as error:  # the one place where everything becomes a status
            raise RefusedError(_refusal(call, began_s, error, self._watch)) from error
        self._watch.answered(call, began_s)
        return response


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of ``shardbook.v1``, once.

    Args:
        observer: Told of every call.
        access_log: Which calls get a log line.
    """

    def __init__(self, observer: Observer = SILENT, access_log: AccessLog = AccessLog.PROBLEMS) -> None:
        self._observer = observer
        self._access_log = access_log
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._unary: dict[str, UnaryMethod] = {}

    def unary(self, name: str, behaviour: Unary) -> UnaryMethod:
        """Returns the method of this full name, the same one for every way to it."""
        method = self._unary.get(name)
        if method is None:
            method = self._unary[name] = UnaryMethod(behaviour, self._watch(name, "unary"))
        return method

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the handler with its behaviour wrapped."""
        method = str(handler_call_details.method)
        wrapped = self._wrapped.get(method)
        if wrapped is not None:
            return wrapped
        handler: Any = await continuation(handler_call_details)
        if handler is None or not method.startswith(PREFIX):
            return handler  # type: ignore[no-any-return]  # handlers are untyped here
        self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        parse, serialize = lenient(handler.request_deserializer), handler.response_serializer
        kind = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
        if kind == "unary":
            return grpc.unary_unary_rpc_method_handler(
                _unary(method, self.unary(method, handler.unary_unary)), parse, serialize
            )
        watch = self._watch(method, kind)
        if kind == "server_stream":
            return grpc.unary_stream_rpc_method_handler(_stream(method, handler.unary_stream, watch), parse, serialize)
        return grpc.stream_stream_rpc_method_handler(_stream(method, handler.stream_stream, watch), parse, serialize)

    def _watch(self, method: str, kind: str) -> Watch:
        return Watch(method, self._observer, self._access_log, kind=kind)


def _unary(name: str, method: UnaryMethod) -> Unary:
    async def answer(request: Any, context: Context) -> Any:
        call = _begin(name, context)
        try:
            return await method.answer(request, context, call)
        except RefusedError as refused:
            await _abort(call, refused.status, context)

    return answer


def _stream(method: str, behaviour: Stream, watch: Watch) -> Stream:
    async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
        began_s = watch.begin()
        call = _begin(method, context)
        set_current_call(call)
        try:
            async for response in behaviour(parsed(request), context):
                sent_s = time.perf_counter()
                yield response
                # A client that takes its time does not make the call slow.
                call.waited_s += time.perf_counter() - sent_s
        except (asyncio.CancelledError, GeneratorExit):
            watch.cancelled(call, began_s)
            raise
        except Exception as error:  # noqa: BLE001 - as above
            await _abort(call, _refusal(call, began_s, error, watch), context)
        else:
            watch.answered(call, began_s)

    return answer


def _begin(method: str, context: Context) -> Call:
    """Returns what is known of a call that came by itself."""
    remaining_s: float | None = context.time_remaining()
    sent = {key: value for key, value in context.invocation_metadata() or () if key in _READ_KEYS}
    call = Call(
        method,
        request_id(sent.get(REQUEST_ID_KEY)),
        math.inf if remaining_s is None else time.monotonic() + remaining_s,
        authorization=str(sent.get(AUTHORIZATION_KEY, "")),
    )
    context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
    return call


def request_id(sent: object) -> str:
    """Returns the client's id when it is fit for a log line, else a new one."""
    if isinstance(sent, str) and _REQUEST_ID.fullmatch(sent):
        return sent
    return f"{_PROCESS_ID}-{next(_NUMBERS)}"


def _refusal(call: Call, began_s: float, error: Exception, watch: Watch) -> status_pb2.Status:
    if isinstance(error, ShardbookError) and not isinstance(error, InternalError):
        refusal = error
        watch.refused(call, began_s, refusal)
    else:
        refusal = InternalError(f"a bug in Shardbook: report the server's log of request {call.request_id}")
        watch.broken(call, began_s, refusal, error)
    return rich_status(refusal, call.request_id)


async def _abort(call: Call, status: status_pb2.Status, context: Context) -> None:
    as_sent: Any = rpc_status.to_status(status)
    trailing = (*as_sent.trailing_metadata, (REQUEST_ID_KEY, call.request_id))
    await context.abort(as_sent.code, as_sent.details, trailing)


def lenient(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Returns a parser that never raises, so that bad bytes reach the handler's wrapper."""

    def parse_or_mark(payload: bytes) -> Any:
        try:
            return parse(payload) if parse is not None else payload
        except DecodeError:
            return _Malformed()

    return parse_or_mark


def parsed(request: H) -> H:
    """Returns a request that a lenient parser read.

    Raises:
        InvalidArgumentError: It is none.
    """
    if isinstance(request, _Malformed):
        raise InvalidArgumentError("the request is no message of this call", reason="MALFORMED_REQUEST")
    return request
