"""Lineage, as messages and as the services' dataclasses."""

from __future__ import annotations

from shardbook.core import limits
from shardbook.core.lineage import LineageKind, Origin
from shardbook.errors import InvalidArgumentError
from shardbook.v1 import lineage_pb2, types_pb2
from shardbook_server.rpc.times import timestamp
from shardbook_server.service.lineage import EdgeInfo, EdgeRequest, LineageDirection, LineageInfo, NodeInfo


def origins(message: types_pb2.Description) -> tuple[Origin, ...]:
    """Returns where a checkpoint comes from, as a commit says it."""
    if len(message.origins) > limits.MAX_ORIGINS:
        raise InvalidArgumentError(
            f"{len(message.origins)} origins, the limit is {limits.MAX_ORIGINS}",
            reason="LIMIT_EXCEEDED",
            field="origins",
        )
    found = []
    for at, one in enumerate(message.origins):
        try:
            found.append(Origin(_kind(one.kind), one.source))
        except InvalidArgumentError as error:
            raise error.within(f"origins[{at}]") from error
    return tuple(found)


def edge_request(request: lineage_pb2.AddLineageRequest | lineage_pb2.RemoveLineageRequest) -> EdgeRequest:
    """Returns the edge that AddLineage or RemoveLineage means."""
    return EdgeRequest(request.subject, _kind(request.kind), request.object)


def direction(number: int) -> LineageDirection:
    """Returns which way to look."""
    try:
        return LineageDirection(number)
    except ValueError:
        raise InvalidArgumentError(f"{number} is no direction", field="direction") from None


def edge(view: EdgeInfo) -> lineage_pb2.LineageEdge:
    """Returns an edge."""
    return lineage_pb2.LineageEdge(
        id=view.id,
        kind=types_pb2.LineageKind.Name(view.kind),
        subject=_node(view.subject),
        object=_node(view.object),
        create_time=timestamp(view.create_time_us),
        told=view.told,
        depth=view.depth,
    )


def response(view: LineageInfo) -> lineage_pb2.GetLineageResponse:
    """Returns the answer to GetLineage."""
    return lineage_pb2.GetLineageResponse(
        checkpoint=_node(view.checkpoint),
        ancestors=[edge(one) for one in view.ancestors],
        descendants=[edge(one) for one in view.descendants],
        truncated=view.truncated,
        session_begin=None if view.session_begin is None else _node(view.session_begin),
    )


def _kind(number: int) -> LineageKind:
    try:
        return LineageKind(number)
    except ValueError:
        known = ", ".join(f"{one.value} ({one.name})" for one in LineageKind)
        raise InvalidArgumentError(f"{number} is none of {known}", field="kind") from None


def _node(view: NodeInfo) -> lineage_pb2.LineageNode:
    return lineage_pb2.LineageNode(
        checkpoint=view.checkpoint,
        ref=view.ref,
        state=None if view.state is None else types_pb2.CheckpointState.Name(view.state),
        create_time=timestamp(view.create_time_us),
    )
