"""``/healthz``, ``/readyz`` and ``/metrics``: no page needs the database to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

#: Methods of every page here.
_METHODS: Final = ("GET", "HEAD")


class OpsPages:
    """Pages for probes and for Prometheus.

    Args:
        not_ready: Why calls cannot be answered now; empty when they can.
        metrics: Renders the metrics; may take milliseconds, so it runs in a thread.
        content_type: Of what it renders.
    """

    def __init__(self, not_ready: Callable[[], str], metrics: Callable[[], bytes], content_type: str) -> None:
        self._not_ready = not_ready
        self._metrics = metrics
        self._content_type = content_type

    def routes(self) -> list[Route]:
        """Returns the routes."""
        pages = {"/healthz": self.healthz, "/readyz": self.readyz, "/metrics": self.metrics}
        return [Route(path, page, methods=_METHODS) for path, page in pages.items()]

    async def healthz(self, request: Request) -> Response:
        """The process is alive and its loop turns, or nobody would answer. Restart it when this fails."""
        del request
        return PlainTextResponse("ok\n")

    async def readyz(self, request: Request) -> Response:
        """200 while calls can be answered, else 503 and why. Send no traffic when this fails; do not restart."""
        del request
        why = self._not_ready()
        return PlainTextResponse(f"not ready: {why}\n" if why else "ok\n", 503 if why else 200)

    async def metrics(self, request: Request) -> Response:
        """The metrics as Prometheus reads them."""
        del request
        return Response(await asyncio.to_thread(self._metrics), media_type=self._content_type)
