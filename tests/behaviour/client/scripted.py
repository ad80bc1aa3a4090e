"""A real gRPC server on a real socket whose handlers a test writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from shardbook.v1 import catalog_pb2, events_pb2, lineage_pb2, metadata_pb2, registration_pb2, retention_pb2

Handler = Callable[[Any, grpc.ServicerContext], Any]

_FILES = (registration_pb2, metadata_pb2, catalog_pb2, retention_pb2)


def refuse(
    context: grpc.ServicerContext,
    status: grpc.StatusCode,
    reason: str,
    message: str = "no",
    *,
    domain: str = "shardbook",
    metadata: dict[str, str] | None = None,
    fields: Sequence[tuple[str, str]] = (),
    retry_delay_s: float | None = None,
) -> NoReturn:
    """Ends a call with a google.rpc.Status as the real server sends it."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {})]
    if fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=text) for field, text in fields
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if retry_delay_s is not None:
        delay = Duration(seconds=int(retry_delay_s), nanos=int(retry_delay_s % 1 * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    rich = status_pb2.Status(code=code_pb2.Code.Value(status.name), message=message, details=packed)
    context.abort_with_status(rpc_status.to_status(rich))


class ScriptedServer:
    """Answers with ``handlers`` by call name; other calls are UNIMPLEMENTED. Counts the calls it gets.

    Attributes:
        port: Port on 127.0.0.1.
        handlers: May be changed while the server runs.
        requests: (call, request, invocation metadata), in order of arrival.
    """

    def __init__(self, handlers: dict[str, Handler], port: int = 0) -> None:
        self.handlers = handlers
        self.requests: list[tuple[str, Any, dict[str, str | bytes]]] = []
        self._lock = threading.Lock()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=16), options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        for file in _FILES:
            for service in file.DESCRIPTOR.services_by_name.values():
                methods = {method.name: self._handler(method) for method in service.methods}
                self._server.add_generic_rpc_handlers(
                    (grpc.method_handlers_generic_handler(service.full_name, methods),)
                )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def target(self) -> str:
        """Address for a client."""
        return f"127.0.0.1:{self.port}"

    def count(self, call: str) -> int:
        """Number of times that a call arrived."""
        with self._lock:
            return sum(name == call for name, _, _ in self.requests)

    def of(self, call: str) -> list[Any]:
        """Requests of a call, in order."""
        with self._lock:
            return [request for name, request, _ in self.requests if name == call]

    def stop(self) -> None:
        """Ends every call and the server; returns when it is down."""
        self._server.stop(grace=None).wait(10)

    def _handler(self, method: Any) -> grpc.RpcMethodHandler[Any, Any]:
        module = next(file for file in (*_FILES, events_pb2, lineage_pb2) if hasattr(file, method.input_type.name))
        request_type = getattr(module, method.input_type.name)

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            self._note(method.name, request, context)
            return self._find(method.name, context)(request, context)

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self._note(method.name, request, context)
            yield from self._find(method.name, context)(request, context)

        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        return make(
            stream if method.server_streaming else unary,
            request_deserializer=request_type.FromString,
            response_serializer=lambda response: response.SerializeToString(),
        )

    def _find(self, name: str, context: grpc.ServicerContext) -> Handler:
        handler = self.handlers.get(name)
        if handler is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        return handler

    def _note(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        with self._lock:
            self.requests.append((name, request, dict(context.invocation_metadata())))


@contextmanager
def scripted_server(port: int = 0, **handlers: Handler) -> Iterator[ScriptedServer]:
    """Runs a ScriptedServer for the length of a block."""
    server = ScriptedServer(dict(handlers), port)
    try:
        yield server
    finally:
        server.stop()


def failing_first(count: int, fail: Callable[[grpc.ServicerContext], NoReturn], answer: Any) -> Handler:
    """Returns a handler that fails ``count`` times, then answers."""
    lock = threading.Lock()
    left = [count]

    def handle(_request: Any, context: grpc.ServicerContext) -> Any:
        with lock:
            left[0] -= 1
            failing = left[0] >= 0
        if failing:
            fail(context)
        return answer

    return handle


def answering(*answers: Any) -> Handler:
    """Returns a handler that gives the answers in turn, and the last one from then on: an answer may be lost."""
    lock = threading.Lock()
    left = list(answers)

    def handle(*_: Any) -> Any:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return handle


def unavailable(context: grpc.ServicerContext) -> NoReturn:
    """Fails as a server does that is shutting down."""
    refuse(context, grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", "draining")
