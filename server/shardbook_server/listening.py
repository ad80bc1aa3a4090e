"""How a server listens, and why an address cannot be listened on: gRPC does not say, the kernel does."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Final

from shardbook.errors import UnavailableError
from shardbook_server.settings import Settings

#: The server asks an idle connection for a sign of life after this long, so that dead clients do not pile up.
_SERVER_PING_MS: Final = 120_000
_SERVER_PING_TIMEOUT_MS: Final = 20_000
#: How long a call may wait before it is picked up, seconds; longer than any deadline that clients set.
_MAX_UNREQUESTED_S: Final = 3600


def bound_socket(listen: str) -> socket.socket:
    """Returns a socket that is bound to ``host:port`` or ``[ipv6]:port``; raises OSError."""
    host, _, port = listen.rpartition(":")
    family, kind, protocol, _, where = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except OSError:
        bound.close()
        raise
    return bound


def reason_of(listen: str) -> OSError | None:
    """Returns what the kernel has against ``listen`` now; None when it has nothing, or that cannot be tried."""
    if listen.startswith("unix:"):
        folder = Path(listen.removeprefix("unix:")).absolute().parent
        return None if folder.is_dir() else FileNotFoundError(errno.ENOENT, f"there is no directory {folder}")
    try:
        bound = bound_socket(listen)
    except OSError as error:
        return error
    bound.close()
    return None


def cannot_listen(where: str, error: OSError | None, advice: str) -> UnavailableError:
    """Returns the refusal to listen on ``where``, ADDRESS_UNAVAILABLE, with a reason for people and ``advice``."""
    return UnavailableError(f"cannot listen on {where}: {_why(error)} {advice}", reason="ADDRESS_UNAVAILABLE")


def _why(error: OSError | None) -> str:
    if error is None or error.errno == errno.EADDRINUSE:
        return "is another server running?"
    if isinstance(error, socket.gaierror):
        return f"its host cannot be looked up ({error.strerror})."
    if error.errno == errno.EADDRNOTAVAIL:
        return "it is not an address of this machine."
    if error.errno in (errno.EACCES, errno.EPERM):
        return "this user may not listen there."
    return f"{error.strerror or error}."


def server_options(settings: Settings) -> list[tuple[str, int]]:
    """Returns gRPC's options for a server: sizes, queues, pings, how old connections get."""
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Calls that nobody has picked up yet wait in gRPC's own queue, and from 1,000 on it cancels some at random:
        # what a world of ranks would meet that saves at the same moment.
        ("grpc.server.max_pending_requests", settings.max_concurrent_rpcs),
        ("grpc.server.max_pending_requests_hard_limit", settings.max_concurrent_rpcs),
        # And it cancels what has waited there for 30 s, though the caller still waits: deadlines are for callers.
        ("grpc.server_max_unrequested_time_in_server", _MAX_UNREQUESTED_S),
        # Two servers on one port would each get half the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _ms(settings.keepalive_permit_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", _SERVER_PING_MS),
        ("grpc.keepalive_timeout_ms", _SERVER_PING_TIMEOUT_MS),
        ("grpc.max_connection_age_ms", _ms(settings.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _ms(settings.max_connection_age_grace_s)),
    ]
    if not settings.compression:
        # A bit for each algorithm; the lowest is "identity".
        options.append(("grpc.compression_enabled_algorithms_bitset", 1))
    return options


def _ms(value_s: float) -> int:
    return min(2**31 - 1, round(value_s * 1000))
