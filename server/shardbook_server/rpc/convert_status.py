"""Where the saves of a run stand, as a message."""

from __future__ import annotations

from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from shardbook_server.rpc import convert, describing
from shardbook_server.rpc.times import timestamp
from shardbook_server.service import status as views
from shardbook_server.service.views import Progress, RankHost


def run_status(view: views.RunStatus) -> pb.GetRunStatusResponse:
    """Returns where the saves of a run stand."""
    return pb.GetRunStatusResponse(parts=[_part(part) for part in view.parts], read_time=timestamp(view.read_time_us))


def _part(view: views.PartStatus) -> pb.PartStatus:
    return pb.PartStatus(
        part=convert.run_part(view.part),
        last_commit=None if view.last_commit is None else convert.checkpoint(view.last_commit),
        last_failure=None if view.last_failure is None else convert.checkpoint(view.last_failure),
        open=[_attempt(attempt) for attempt in view.open],
        open_count=view.open_count,
    )


def _attempt(view: views.AttemptStatus) -> pb.AttemptStatus:
    return pb.AttemptStatus(
        checkpoint=convert.checkpoint(view.checkpoint),
        progress=convert.progress(Progress(view.checkpoint.checkpoint_id, view.counts, view.missing, None)),
        registration_count=view.counts.registration_count,
        registered=list(map(_rank, view.registered)),
        unplanned=view.unplanned,
        plan_time=None if view.plan_time_us is None else timestamp(view.plan_time_us),
        timing=describing.timing(view.timing),
        missing_hosts=[
            pb.HostRanks(host=one.host, rank_count=one.rank_count, bounds=one.bounds) for one in view.missing_hosts
        ],
        missing_host_count=view.missing_host_count,
        unplanned_bounds=view.unplanned_bounds,
    )


def _rank(rank: RankHost) -> types_pb2.RankHost:
    return types_pb2.RankHost(rank=rank.rank, host=rank.host)
