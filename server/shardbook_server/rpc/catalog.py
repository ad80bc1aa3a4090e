"""CatalogService: what people and tools ask of the catalogue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from shardbook.v1 import catalog_pb2 as pb
from shardbook.v1 import events_pb2, lineage_pb2, locations_pb2, retention_pb2
from shardbook.v1.catalog_pb2_grpc import CatalogServiceServicer
from shardbook_server.rpc import convert, describing, events, limits, lineage, locating, retaining, times
from shardbook_server.rpc.bridge import Bridge
from shardbook_server.rpc.feed import Feed
from shardbook_server.rpc.once import Writes
from shardbook_server.rpc.times import timestamp
from shardbook_server.service.services import Services

Context = grpc.aio.ServicerContext[Any, Any]


class CatalogHandlers(CatalogServiceServicer):
    """Handlers of four steps: check, convert, call, convert."""

    def __init__(self, services: Services, bridge: Bridge, feed: Feed) -> None:
        self._services = services
        self._feed = feed
        self._catalog = services.catalog
        self._descriptions = services.descriptions
        self._aliases = services.aliases
        self._holds = services.holds
        self._deletions = services.deletions
        self._retention = services.retention
        self._bridge = bridge
        self._once = Writes(bridge, services.requests).once

    async def ListProjects(self, request: pb.ListProjectsRequest, context: Context) -> pb.ListProjectsResponse:
        """Lists projects by name, a page at a time."""
        page = await self._bridge.read(
            self._catalog.list_projects, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListProjectsResponse(
            projects=[pb.Project(name=view.name, run_count=view.run_count) for view in page.items],
            next_page_token=page.next_page_token,
        )

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
        """Lists the checkpoints of one run or of many, a page at a time."""
        page = await self._bridge.read(
            self._catalog.list_checkpoints,
            request.parent,
            page_size=request.page_size,
            page_token=request.page_token,
            show_all=request.show_all,
            filter_text=request.filter,
            order_by=request.order_by,
        )
        return pb.ListCheckpointsResponse(
            checkpoints=[convert.checkpoint(view) for view in page.items], next_page_token=page.next_page_token
        )

    async def UpdateCheckpoint(
        self, request: pb.UpdateCheckpointRequest, context: Context
    ) -> pb.UpdateCheckpointResponse:
        """Changes what is said of a checkpoint."""
        changes, wanted = describing.changes(request), request.checkpoint
        return await self._once(
            "update",
            request,
            lambda found: pb.UpdateCheckpointResponse(checkpoint=convert.checkpoint(found)),
            self._descriptions.update,
            wanted.name,
            changes,
            etag=wanted.etag,
        )

    async def MoveCheckpoints(
        self, request: locations_pb2.MoveCheckpointsRequest, context: Context
    ) -> locations_pb2.MoveCheckpointsResponse:
        """Gives checkpoints other locations."""
        return await self._once(
            "move",
            request,
            lambda moved: locations_pb2.MoveCheckpointsResponse(checkpoints=map(convert.checkpoint, moved)),
            self._services.locations.move,
            locating.moves(request),
        )

    async def ListRanks(self, request: pb.ListRanksRequest, context: Context) -> pb.ListRanksResponse:
        """Lists what the ranks of a committed checkpoint took and wrote."""
        page = await self._bridge.read(
            self._catalog.list_ranks, request.parent, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListRanksResponse(
            ranks=[pb.RankInfo(**vars(view)) for view in page.items],
            next_page_token=page.next_page_token,
            total_size=page.total_size,
        )

    async def ListAliases(self, request: pb.ListAliasesRequest, context: Context) -> pb.ListAliasesResponse:
        """Lists the aliases of a part."""
        page = await self._bridge.read(
            self._aliases.list, request.parent, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListAliasesResponse(
            aliases=[describing.alias(view) for view in page.items], next_page_token=page.next_page_token
        )

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Makes an alias or moves it."""
        return await self._once(
            "alias",
            request,
            lambda alias: pb.SetAliasResponse(alias=describing.alias(alias)),
            self._aliases.set,
            describing.alias_request(request),
        )

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: Context) -> pb.DeleteAliasResponse:
        """Deletes an alias."""
        return await self._once(
            "alias",
            request,
            lambda _: pb.DeleteAliasResponse(),
            self._aliases.delete,
            request.name,
            force=request.force,
            etag=request.etag,
        )

    async def DeleteCheckpoint(
        self, request: retention_pb2.DeleteCheckpointRequest, context: Context
    ) -> retention_pb2.DeleteCheckpointResponse:
        """Deletes a committed checkpoint."""
        return await self._once(
            "delete",
            request,
            retaining.deleted,
            self._deletions.delete,
            request.name,
            force=request.force,
            files=request.delete_files,
            etag=request.etag,
        )

    async def UndeleteCheckpoint(
        self, request: retention_pb2.UndeleteCheckpointRequest, context: Context
    ) -> retention_pb2.UndeleteCheckpointResponse:
        """Brings a deleted checkpoint back."""
        return await self._once(
            "delete",
            request,
            lambda found: retention_pb2.UndeleteCheckpointResponse(checkpoint=convert.checkpoint(found)),
            self._deletions.undelete,
            request.name,
        )

    async def HoldCheckpoint(
        self, request: retention_pb2.HoldCheckpointRequest, context: Context
    ) -> retention_pb2.HoldCheckpointResponse:
        """Keeps a checkpoint from being deleted for a while."""
        ttl_us = retaining.ttl_us(request)
        return await self._once("hold", request, retaining.held, self._holds.hold, request.name, request.holder, ttl_us)

    async def ReleaseCheckpoint(
        self, request: retention_pb2.ReleaseCheckpointRequest, context: Context
    ) -> retention_pb2.ReleaseCheckpointResponse:
        """Ends a hold."""
        return await self._once(
            "hold",
            request,
            lambda found: retention_pb2.ReleaseCheckpointResponse(checkpoint=convert.checkpoint(found)),
            self._holds.release,
            request.name,
            request.holder,
        )

    async def GetRetentionPolicy(
        self, request: retention_pb2.GetRetentionPolicyRequest, context: Context
    ) -> retention_pb2.GetRetentionPolicyResponse:
        """Returns what is kept of a part."""
        view = await self._bridge.read(self._retention.get_policy, request.name)
        return retention_pb2.GetRetentionPolicyResponse(
            policy=retaining.policy_message(view.policy),
            inherited=view.is_inherited,
            update_time=timestamp(view.update_time_us),
            etag=view.etag,
        )

    async def SetRetentionPolicy(
        self, request: retention_pb2.SetRetentionPolicyRequest, context: Context
    ) -> retention_pb2.SetRetentionPolicyResponse:
        """Stores what is kept of a part."""
        policy = retaining.policy(request.policy)
        return await self._once(
            "policy",
            request,
            retaining.policy_set,
            self._retention.set_policy,
            request.name,
            policy,
            etag=request.etag,
        )

    async def PreviewPrune(
        self, request: retention_pb2.PreviewPruneRequest, context: Context
    ) -> retention_pb2.PreviewPruneResponse:
        """Says what a policy keeps and what it would delete."""
        page = await self._bridge.read(
            self._retention.preview,
            request.parent,
            retaining.policy_of(request),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return retention_pb2.PreviewPruneResponse(
            decisions=[retaining.decision(view) for view in page.items], next_page_token=page.next_page_token
        )

    async def Prune(self, request: retention_pb2.PruneRequest, context: Context) -> retention_pb2.PruneResponse:
        """Deletes what a policy does not keep."""
        return await self._once(
            "prune",
            request,
            lambda views: retention_pb2.PruneResponse(decisions=map(retaining.decision, views)),
            self._retention.prune,
            request.parent,
            retaining.policy_of(request),
            list(request.names),
            files=request.delete_files,
        )

    async def ReportMissingData(
        self, request: retention_pb2.ReportMissingDataRequest, context: Context
    ) -> retention_pb2.ReportMissingDataResponse:
        """Notes that data files are lost, or found again."""
        return await self._once(
            "missing",
            request,
            lambda found: retention_pb2.ReportMissingDataResponse(checkpoint=convert.checkpoint(found)),
            self._deletions.report_missing,
            request.name,
            missing=request.missing,
        )

    async def RecordFileDeletion(
        self, request: retention_pb2.RecordFileDeletionRequest, context: Context
    ) -> retention_pb2.RecordFileDeletionResponse:
        """Notes that data files are being deleted, or are gone."""
        checkpoint, sharing = await self._bridge.write(
            "files", self._deletions.record_files, request.name, list(request.locations), done=request.done
        )
        return retention_pb2.RecordFileDeletionResponse(checkpoint=convert.checkpoint(checkpoint), sharing=sharing)

    async def AddLineage(
        self, request: lineage_pb2.AddLineageRequest, context: Context
    ) -> lineage_pb2.AddLineageResponse:
        """Says where a checkpoint comes from, or what evaluated it."""
        return await self._once(
            "lineage",
            request,
            lambda edge: lineage_pb2.AddLineageResponse(edge=lineage.edge(edge)),
            self._services.lineage.add,
            lineage.edge_request(request),
        )

    async def RemoveLineage(
        self, request: lineage_pb2.RemoveLineageRequest, context: Context
    ) -> lineage_pb2.RemoveLineageResponse:
        """Takes an edge back."""
        return await self._once(
            "lineage",
            request,
            lambda removed: lineage_pb2.RemoveLineageResponse(removed=removed),
            self._services.lineage.remove,
            lineage.edge_request(request),
        )

    async def ListLineage(
        self, request: lineage_pb2.ListLineageRequest, context: Context
    ) -> lineage_pb2.ListLineageResponse:
        """Lists the edges of a checkpoint itself."""
        page = await self._bridge.read(
            self._services.lineage.list,
            request.parent,
            direction=lineage.direction(request.direction),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return lineage_pb2.ListLineageResponse(
            edges=[lineage.edge(view) for view in page.items], next_page_token=page.next_page_token
        )

    async def GetLineage(
        self, request: lineage_pb2.GetLineageRequest, context: Context
    ) -> lineage_pb2.GetLineageResponse:
        """Returns all that a checkpoint comes from and all that came of it."""
        found = await self._bridge.read(
            self._services.lineage.get,
            request.name,
            direction=lineage.direction(request.direction),
            max_depth=request.max_depth,
            max_edges=request.max_edges,
        )
        return lineage.response(found)

    async def WatchCheckpoints(
        self, request: events_pb2.WatchCheckpointsRequest, context: Context
    ) -> AsyncIterator[events_pb2.WatchCheckpointsResponse]:
        """Streams what happens."""
        interest = events.interest(request)
        async for response in self._feed.watch(interest, request.cursor):
            yield response

    async def ClaimCheckpoint(
        self, request: events_pb2.ClaimCheckpointRequest, context: Context
    ) -> events_pb2.ClaimCheckpointResponse:
        """Claims the next checkpoint of a subscription."""
        wanted = events.claim_request(request)
        return events.claim_response(await self._feed.claim(wanted, limits.wait_s(request.wait)))

    async def RenewClaim(
        self, request: events_pb2.RenewClaimRequest, context: Context
    ) -> events_pb2.RenewClaimResponse:
        """Keeps a claim."""
        lease_s = times.seconds(request.lease, "lease")
        await self._bridge.write("claim", self._services.claims.renew, request.subscription, request.claim_id, lease_s)
        return events_pb2.RenewClaimResponse()

    async def FinishClaim(
        self, request: events_pb2.FinishClaimRequest, context: Context
    ) -> events_pb2.FinishClaimResponse:
        """Ends a claim."""
        wanted = events.finish_request(request)
        return events.finish_response(await self._bridge.write("claim", self._services.claims.finish, wanted))

    async def GetSubscription(
        self, request: events_pb2.GetSubscriptionRequest, context: Context
    ) -> events_pb2.GetSubscriptionResponse:
        """Returns a subscription."""
        view = await self._bridge.read(self._services.claims.get, request.name)
        return events_pb2.GetSubscriptionResponse(subscription=events.subscription(view))

    async def ListSubscriptions(
        self, request: events_pb2.ListSubscriptionsRequest, context: Context
    ) -> events_pb2.ListSubscriptionsResponse:
        """Lists subscriptions by name, a page at a time."""
        page = await self._bridge.read(
            self._services.claims.list, page_size=request.page_size, page_token=request.page_token
        )
        return events_pb2.ListSubscriptionsResponse(
            subscriptions=map(events.subscription, page.items), next_page_token=page.next_page_token
        )

    async def DeleteSubscription(
        self, request: events_pb2.DeleteSubscriptionRequest, context: Context
    ) -> events_pb2.DeleteSubscriptionResponse:
        """Forgets a subscription."""
        return await self._once(
            "claim",
            request,
            lambda _: events_pb2.DeleteSubscriptionResponse(),
            self._services.claims.delete,
            request.name,
        )
