"""Why an address cannot be listened on: gRPC does not say, the kernel does."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from shardbook.errors import UnavailableError


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
