"""What is said of checkpoints, as messages and as the services' dataclasses."""

from __future__ import annotations

import dataclasses

from shardbook.core import limits
from shardbook.errors import InvalidArgumentError
from shardbook.v1 import catalog_pb2, types_pb2
from shardbook_server.rpc import lineage
from shardbook_server.rpc.times import timestamp
from shardbook_server.service import aliases, views
from shardbook_server.service.describing import Changes, Description, Writer

#: Most paths of an update mask: every label, every metric, and the note.
_MAX_PATHS = limits.MAX_LABELS + limits.MAX_METRICS + 1
_WRITER = tuple(one.name for one in dataclasses.fields(Writer))


def description(message: types_pb2.Description) -> Description:
    """Returns what a coordinator says of a checkpoint."""
    writer = Writer(**{name: getattr(message.writer, name) for name in _WRITER})
    labels, metrics = dict(message.labels), dict(message.metrics)
    return Description(labels, metrics, message.note, writer, lineage.origins(message))


def changes(request: catalog_pb2.UpdateCheckpointRequest) -> Changes:
    """Returns what UpdateCheckpoint changes."""
    checkpoint, paths = request.checkpoint, tuple(request.update_mask.paths)
    if len(paths) > _MAX_PATHS:
        raise InvalidArgumentError(
            f"{len(paths)} paths, the limit is {_MAX_PATHS}", reason="LIMIT_EXCEEDED", field="update_mask"
        )
    return Changes(dict(checkpoint.labels), dict(checkpoint.metrics), checkpoint.note, paths)


def alias_request(request: catalog_pb2.SetAliasRequest) -> aliases.AliasRequest:
    """Returns what SetAlias asks."""
    wanted = request.alias
    try:
        direction = aliases.Direction(wanted.direction)
    except ValueError:
        raise InvalidArgumentError(f"{wanted.direction} is no direction", field="alias.direction") from None
    return aliases.AliasRequest(
        wanted.name, wanted.checkpoint, wanted.metric, direction, wanted.protected, request.force, wanted.etag
    )


def alias(view: views.AliasInfo) -> catalog_pb2.Alias:
    """Returns an alias."""
    return catalog_pb2.Alias(
        name=view.name,
        checkpoint=view.checkpoint,
        metric=view.metric,
        direction=catalog_pb2.Alias.Direction.Name(view.direction),
        protected=view.protected,
        update_time=timestamp(view.update_time_us),
        etag=view.etag,
    )


def writer(view: Writer) -> types_pb2.Writer | None:
    """Returns who wrote a checkpoint; None, which leaves the field unset, when nobody knows."""
    return types_pb2.Writer(**vars(view)) if any(vars(view).values()) else None


def timing(view: views.SaveTiming | None) -> types_pb2.SaveTiming | None:
    """Returns how long a save took; None when it is not known."""
    if view is None:
        return None
    message = types_pb2.SaveTiming(
        largest_rank_bytes=view.largest_rank_bytes,
        largest_rank=view.largest_rank,
        median_rank_bytes=view.median_rank_bytes,
    )
    message.commit.FromMilliseconds(view.commit_ms)
    for phase in view.phases:
        told = message.phases.add(phase=phase.phase, slowest_rank=phase.slowest_rank, slowest_host=phase.slowest_host)
        told.slowest.FromMilliseconds(phase.slowest_ms)
        told.median.FromMilliseconds(phase.median_ms)
    return message
