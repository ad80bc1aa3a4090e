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
#: Methods that are answered here; health and reflection have their own ways.
PREFIX: Final = "/shardbook.v1."

#: Ids of this process: drawing a random number for every call costs as much as the rest of this file.
_PROCESS_ID: Final = uuid.uuid4().hex[:12]
_NUMBERS: Final = itertools.count(1)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class _Malformed:
    """Stands for a request that did not parse."""


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
        watch = Watch(method, self._observer, self._access_log, streams=bool(handler.response_streaming))
        self._wrapped[method] = _wrap(method, handler, watch)
        return self._wrapped[method]


def _wrap(method: str, handler: Any, watch: Watch) -> grpc.RpcMethodHandler[Any, Any]:
    parse = _lenient(handler.request_deserializer)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            _stream(method, handler.unary_stream, watch), parse, handler.response_serializer
        )
    return grpc.unary_unary_rpc_method_handler(
        _unary(method, handler.unary_unary, watch), parse, handler.response_serializer
    )


def _unary(method: str, behaviour: Unary, watch: Watch) -> Unary:
    async def answer(request: Any, context: Context) -> Any:
        began_s = watch.begin()
        call = _begin(method, context)
        try:
            response = await behaviour(_parsed(request), context)
        except asyncio.CancelledError:
            watch.cancelled(call, began_s)
            raise
        except Exception as error:  # noqa: BLE001 - the one place where everything becomes a status
            await _abort(call, began_s, error, context, watch)
        else:
            watch.answered(call, began_s)
            return response

    return answer


def _stream(method: str, behaviour: Stream, watch: Watch) -> Stream:
    async def answer(request: Any, context: Context) -> AsyncIterator[Any]:
        began_s = watch.begin()
        call = _begin(method, context)
        try:
            async for response in behaviour(_parsed(request), context):
                sent_s = time.perf_counter()
                yield response
                # A client that takes its time does not make the call slow.
                call.waited_s += time.perf_counter() - sent_s
        except (asyncio.CancelledError, GeneratorExit):
            watch.cancelled(call, began_s)
            raise
        except Exception as error:  # noqa: BLE001 - as above
            await _abort(call, began_s, error, context, watch)
        else:
            watch.answered(call, began_s)

    return answer


def _begin(method: str, context: Context) -> Call:
    """Makes the call known to everything that its task calls."""
    remaining_s: float | None = context.time_remaining()
    deadline_s = math.inf if remaining_s is None else time.monotonic() + remaining_s
    call = Call(method, _request_id(context), deadline_s)
    set_current_call(call)
    context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
    return call


def _request_id(context: Context) -> str:
    """Returns the client's id when it is fit for a log line, else a new one."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return f"{_PROCESS_ID}-{next(_NUMBERS)}"


async def _abort(call: Call, began_s: float, error: Exception, context: Context, watch: Watch) -> None:
    if isinstance(error, ShardbookError) and not isinstance(error, InternalError):
        refusal = error
        watch.refused(call, began_s, refusal)
    else:
        refusal = InternalError(f"a bug in Shardbook: report the server's log of request {call.request_id}")
        watch.broken(call, began_s, refusal, error)
    status: Any = rpc_status.to_status(rich_status(refusal, call.request_id))
    await context.abort(status.code, status.details, (*status.trailing_metadata, (REQUEST_ID_KEY, call.request_id)))


def _lenient(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Returns a parser that never raises, so that bad bytes reach the handler's wrapper."""

    def parse_or_mark(payload: bytes) -> Any:
        try:
            return parse(payload) if parse is not None else payload
        except DecodeError:
            return _Malformed()

    return parse_or_mark


def _parsed(request: H) -> H:
    if isinstance(request, _Malformed):
        raise InvalidArgumentError("the request is no message of this call", reason="MALFORMED_REQUEST")
    return request
