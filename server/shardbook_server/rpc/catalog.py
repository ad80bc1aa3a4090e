"""CatalogService: what people and tools ask of the catalogue."""

from __future__ import annotations

from typing import Any

import grpc.aio

from shardbook.v1 import catalog_pb2 as pb
from shardbook.v1.catalog_pb2_grpc import CatalogServiceServicer
from shardbook_server.rpc import convert
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.service.services import Services

Context = grpc.aio.ServicerContext[Any, Any]


class CatalogHandlers(CatalogServiceServicer):
    """Handlers of four steps: check, convert, call, convert."""

    def __init__(self, services: Services, bridge: Bridge) -> None:
        self._catalog = services.catalog
        self._bridge = bridge

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """Returns one run."""
        run = await self._bridge.read(self._catalog.get_run, request.name)
        return pb.GetRunResponse(run=convert.run(run))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """Lists runs by name, a page at a time."""
        page = await self._bridge.read(
            self._catalog.list_runs, request.parent, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListRunsResponse(
            runs=[convert.run(view) for view in page.items], next_page_token=page.next_page_token
        )

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: Context) -> pb.GetCheckpointResponse:
        """Returns one checkpoint."""
        checkpoint = await self._bridge.read(self._catalog.get_checkpoint, request.name)
        return pb.GetCheckpointResponse(checkpoint=convert.checkpoint(checkpoint))

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Context) -> pb.ListCheckpointsResponse:
        """Lists the checkpoints of a run, newest first, a page at a time."""
        page = await self._bridge.read(
            self._catalog.list_checkpoints,
            request.parent,
            page_size=request.page_size,
            page_token=request.page_token,
            show_all=request.show_all,
        )
        return pb.ListCheckpointsResponse(
            checkpoints=[convert.checkpoint(view) for view in page.items], next_page_token=page.next_page_token
        )
