"""MetadataService: what loaders ask of a committed checkpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from shardbook.v1 import metadata_pb2 as pb
from shardbook.v1.metadata_pb2_grpc import MetadataServiceServicer
from shardbook_server.rpc import convert
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.times import timestamp
from shardbook_server.service.services import Services

Context = grpc.aio.ServicerContext[Any, Any]


class MetadataHandlers(MetadataServiceServicer):
    """Handlers of four steps: check, convert, call, convert."""

    def __init__(self, services: Services, bridge: Bridge) -> None:
        self._services = services
        self._bridge = bridge

    async def GetMetadata(
        self, request: pb.GetMetadataRequest, context: Context
    ) -> AsyncIterator[pb.GetMetadataResponse]:
        """Streams the metadata of a committed checkpoint; reads on only when the client has taken what was sent."""
        read = self._services.metadata.get_metadata
        async for view in self._bridge.stream(
            read,
            request.name,
            request.fqn_prefix,
            request.held_structure_digest,
            show_deleted=request.show_deleted,
        ):
            yield convert.metadata_response(view)

    async def QueryChunks(self, request: pb.QueryChunksRequest, context: Context) -> pb.QueryChunksResponse:
        """Finds the chunks that meet wanted boxes."""
        view = await self._bridge.read(
            self._services.queries.query_chunks,
            request.name,
            convert.query_payload(request),
            include_head=request.include_head,
            page_token=request.page_token,
            apart=request.apart,
            held_found_digest=request.held_found_digest,
        )
        return convert.query_response(view)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        """Tells who answers."""
        info = await self._bridge.read(self._services.status.server_info)
        return pb.GetServerInfoResponse(version=info.version, database=info.database, time=timestamp(info.time_us))

    async def ListTensors(self, request: pb.ListTensorsRequest, context: Context) -> pb.ListTensorsResponse:
        """Lists the entries of a committed checkpoint, a page at a time."""
        page = await self._bridge.read(
            self._services.metadata.list_tensors,
            request.parent,
            page_size=request.page_size,
            page_token=request.page_token,
            fqn_prefix=request.fqn_prefix,
        )
        return pb.ListTensorsResponse(
            tensors=[convert.tensor(view) for view in page.items],
            next_page_token=page.next_page_token,
            total_size=page.total_size,
        )
