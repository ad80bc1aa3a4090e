"""grpc.health.v1: serving while the database answers, until the server drains.

The servicer of grpcio-health-checking keeps a Watch open for ever, so that one watching client would make every
drain take its whole time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardbook_server.rpc.interceptors import Context

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthHandlers(health_pb2_grpc.HealthServicer):
    """Answers for the server as a whole (the empty name) and for each service; all have the same state."""

    def __init__(self, services: Iterable[str]) -> None:
        self._names = frozenset(("", *services))
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
        self._serving = False
        self._tell()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Any:
        """Answers once; NOT_FOUND for a service that is not here."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return self._answer(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> AsyncIterator[Any]:
        """Answers at once and whenever the state changes; draining ends the call."""
        told: bool | None = None
        while True:
            if told != self._serving:
                told = self._serving
                yield self._answer(request.service)
            elif self._draining:
                return
            else:
                await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _answer(self, name: str) -> Any:
        if name not in self._names:
            return health_pb2.HealthCheckResponse(status=_UNKNOWN)
        return health_pb2.HealthCheckResponse(status=_SERVING if self._serving else _NOT_SERVING)
