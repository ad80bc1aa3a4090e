"""grpc.health.v1: serving while the database answers, until the server drains.

The servicer of grpcio-health-checking keeps a Watch open for ever, so that one watching client would make every
drain take its whole time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardbook_server.rpc.interceptors import Context

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

#: Asked for by probes that restart a process or take it out of a service: a database that is away is no reason to.
PROCESS: Final = "process"


class HealthHandlers(health_pb2_grpc.HealthServicer):
    """Answers for the server as a whole (the empty name), for each service, and for the process alone.

    The first two have the same state, which follows the database; the process serves until it drains.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._names = frozenset(("", PROCESS, *services))
        self._serving = True
        self._draining = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Says whether calls can be answered now, and tells who watches when that is news."""
        if serving != self._serving and not self._draining:
            self._serving = serving
            self._tell()

    def drain(self) -> None:
        """Turns everything NOT_SERVING for good, tells who watches, and ends their calls."""
        self._draining = True
        self._tell()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Any:
        """Answers once; NOT_FOUND for a service that is not here."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> AsyncIterator[Any]:
        """Answers at once and whenever the state changes; draining ends the call."""
        told: Any = None
        while True:
            status = self._status(request.service)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            elif self._draining:
                return
            else:
                await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, name: str) -> Any:
        if name not in self._names:
            return _UNKNOWN
        serves = not self._draining and (self._serving or name == PROCESS)
        return _SERVING if serves else _NOT_SERVING
