"""What ranks of a host talk to: a gRPC server on a Unix socket that takes every call, and answers none of them itself.

The calls that every rank makes in every save travel over the relay's stream. Everything else, and what is too large or
no message, is passed on by itself, as bytes: sessions, leases, commits, metadata, the catalogue, health.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc_status import rpc_status

from shardbook._address import ServerAddress
from shardbook._channel import MAX_REPLY_BYTES, MAX_REQUEST_BYTES
from shardbook.errors import InvalidArgumentError, UnavailableError
from shardbook.relay import listening
from shardbook.relay.stream import AwayError, NotRelayedError, RelayStream
from shardbook.relay.upstream import Context, Upstream
from shardbook.v1 import relay_pb2 as pb

_SERVICE: Final = "/shardbook.v1.RegistrationService/"
#: What is relayed, and its field in RelayedCall and RelayedAnswer.
RELAYED: Final = {
    f"{_SERVICE}PlanSave": "plan_save",
    f"{_SERVICE}RegisterShards": "register_shards",
    f"{_SERVICE}GetCheckpointProgress": "get_checkpoint_progress",
    f"{_SERVICE}ReportFailure": "report_failure",
}
#: Services whose calls stream both ways, which are not passed on.
_BOTH_WAYS: Final = ("/shardbook.v1.RelayService/", "/grpc.reflection.")
#: Larger requests are passed on by themselves: they would hold up everybody else's on the stream.
_MOST_BYTES: Final = 64 << 10
_REQUEST_ID_KEY: Final = "x-request-id"
_AUTHORIZATION_KEY: Final = "authorization"
#: How long what is in progress may take once a relay is to end, seconds.
DRAIN_S: Final = 5.0
#: How long ranks are given to read what they are told then, seconds.
_LAST_WORDS_S: Final = 1.0
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_REPLY_BYTES),
    # Ranks of a host arrive together, and gRPC cancels some at random where many wait to be picked up.
    ("grpc.server.max_pending_requests", 65_536),
    ("grpc.server.max_pending_requests_hard_limit", 65_536),
    # Clients ping a server every 40 s while calls wait.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
    ("grpc.so_reuseport", 0),
)


class Relay:
    """A relay in this process; belongs to the event loop that starts it.

    Args:
        server: Address of the service.
        listen: ``unix:///path``; made for this user alone.

    Raises:
        InvalidArgumentError: An address is none, or the service's is the relay's own.

    Attributes:
        address: As ranks use it.
    """

    def __init__(self, server: str, listen: str) -> None:
        upstream = ServerAddress.parse(server)
        self._path = listening.socket_path(listen)
        self.address = f"unix://{self._path}"
        if str(upstream) in (self.address, f"unix:{self._path}"):
            raise InvalidArgumentError(
                f"{upstream} is this relay's own address: pass --server with the server's", field="server"
            )
        self._upstream = Upstream(upstream)
        self._stream = RelayStream(self._upstream)
        self._server = grpc.aio.server(handlers=[_Handlers(self._upstream, self._stream)], options=_OPTIONS)

    async def start(self) -> None:
        """Listens.

        Raises:
            UnavailableError: It cannot.
        """
        listening.make_room(self._path)
        try:
            with listening.private_files():
                self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {self.address}", reason="ADDRESS_UNAVAILABLE") from error
        await self._server.start()

    async def stop(self, grace_s: float = DRAIN_S) -> None:
        """Takes no further calls, lets those in progress end, and ends the rest UNAVAILABLE after ``grace_s``."""
        stopping = asyncio.get_running_loop().create_task(self._server.stop(grace_s + _LAST_WORDS_S))
        await asyncio.wait([stopping], timeout=grace_s)
        await self._stream.close()
        await stopping
        await self._upstream.close()
        listening.remove(self._path)


class _Handlers(grpc.GenericRpcHandler):
    """Finds the way that a call takes."""

    def __init__(self, upstream: Upstream, stream: RelayStream) -> None:
        self._upstream = upstream
        self._stream = stream
        self._relayed = {method: self._relaying(method, field) for method, field in RELAYED.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Returns the handler of a method; None for what is not passed on, which is UNIMPLEMENTED then."""
        method = str(handler_call_details.method)
        if method in self._relayed:
            return self._relayed[method]
        return None if method.startswith(_BOTH_WAYS) else self._passing(method)

    def _passing(self, method: str) -> Any:
        # A unary call is a stream of one message on the wire, so this does for both.
        async def pass_on(payload: bytes, context: Context) -> AsyncIterator[bytes]:
            async for message in self._upstream.pass_on(method, payload, context):
                yield message

        return grpc.unary_stream_rpc_method_handler(pass_on)

    def _relaying(self, method: str, field: str) -> Any:
        async def relay(payload: bytes, context: Context) -> bytes:
            call = _read(field, payload, context)
            if call is not None and self._stream.takes_more:
                try:
                    answer = await self._stream.ask(call, context.time_remaining())
                except NotRelayedError:
                    pass
                except AwayError as away:
                    await context.abort(away.code, away.details)
                else:
                    return await _told(answer, field, context)
            # The server says what is wrong with it, if anything is.
            return b"".join([message async for message in self._upstream.pass_on(method, payload, context)])

        return grpc.unary_unary_rpc_method_handler(relay)


def _read(field: str, payload: bytes, context: Context) -> pb.RelayedCall | None:
    """Returns a call as it travels; None for one that has to go by itself."""
    if len(payload) > _MOST_BYTES:
        return None
    sent = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    call = pb.RelayedCall(
        request_id=sent.get(_REQUEST_ID_KEY, ""),
        # The caller's own, or none: a relay lends nobody its credentials.
        authorization=sent.get(_AUTHORIZATION_KEY, ""),
    )
    request = getattr(call, field)
    # An empty message would else leave no trace of what is called.
    request.SetInParent()
    try:
        request.MergeFromString(payload)
    except DecodeError:
        return None
    return call


async def _told(answer: pb.RelayedAnswer, field: str, context: Context) -> bytes:
    """Tells a rank what the service answered."""
    own = (_REQUEST_ID_KEY, answer.request_id)
    if answer.WhichOneof("answer") == "status":
        status: Any = rpc_status.to_status(status_pb2.Status.FromString(answer.status))
        await context.abort(status.code, status.details, (*status.trailing_metadata, own))
    context.set_trailing_metadata((own,))
    payload: bytes = getattr(answer, field).SerializeToString()
    return payload


async def serve(server: str, listen: str, ready: Callable[[Relay], None]) -> None:
    """Relays until SIGTERM or SIGINT, then drains.

    Args:
        server: Address of the service; it need not answer yet.
        listen: Where ranks find the relay.
        ready: Called once it listens.

    Raises:
        InvalidArgumentError, UnavailableError: See ``Relay``.
    """
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    relay = Relay(server, listen)
    await relay.start()
    ready(relay)
    await ended.wait()
    await relay.stop()
