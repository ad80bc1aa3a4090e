"""A small HTTP server in the event loop that runs gRPC: uvicorn, without its command line, signals and log."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from shardbook_server.listening import bound_socket, cannot_listen

#: Connections at a time; a few scrapers and probes use them.
_CONNECTION_LIMIT: Final = 256
_BACKLOG: Final = 128
#: How long requests in progress may take once the server ends.
_GRACE_S: Final = 2


class _Quiet(uvicorn.Server):
    """Leaves signals to whoever runs the loop, and says when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_begun = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        try:
            await super().startup(sockets)
        finally:
            self.has_begun.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Installs nothing."""
        yield


class HttpServer:
    """Serves routes on one address; belongs to the event loop that starts it.

    Args:
        listen: ``host:port``, where port 0 takes a free one, or ``[ipv6]:port``.
        routes: What to serve.

    Attributes:
        address: Where it listens once it is bound, ``host:port``.
    """

    def __init__(self, listen: str, routes: Sequence[BaseRoute]) -> None:
        self._listen = listen
        config = uvicorn.Config(
            Starlette(routes=routes),
            loop="none",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_CONNECTION_LIMIT,
            timeout_graceful_shutdown=_GRACE_S,
        )
        self._server = _Quiet(config)
        self._serving: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Binds the address and serves.

        Raises:
            UnavailableError: The address cannot be bound; reason ``ADDRESS_UNAVAILABLE``.
        """
        bound = _bind(self._listen)
        self.address = f"{self._listen.rpartition(':')[0]}:{bound.getsockname()[1]}"
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[bound]))
        await self._server.has_begun.wait()

    async def close(self) -> None:
        """Ends: requests in progress are answered, idle connections closed."""
        if self._serving is not None:
            self._server.should_exit = True
            await asyncio.wait([self._serving])


def _bind(listen: str) -> socket.socket:
    try:
        bound = bound_socket(listen)
        try:
            bound.listen(_BACKLOG)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise cannot_listen(
            f"{listen} for HTTP", error, "Choose another address with --http-listen, or none: --http-listen off"
        ) from error
    bound.setblocking(False)
    return bound
