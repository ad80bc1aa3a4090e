"""What is kept and what is deleted, as messages and as the services' dataclasses."""

from __future__ import annotations

from shardbook.core import limits
from shardbook.core.retention import KeepBest, RetentionPolicy
from shardbook.errors import InvalidArgumentError
from shardbook.v1 import retention_pb2 as pb
from shardbook_server.rpc import convert
from shardbook_server.rpc.times import microseconds, timestamp
from shardbook_server.service import views


def ttl_us(request: pb.HoldCheckpointRequest) -> int:
    """Returns how long a hold is to last, microseconds."""
    return microseconds(request.ttl, "ttl")


def policy(message: pb.RetentionPolicy) -> RetentionPolicy:
    """Returns a policy; raises InvalidArgumentError."""
    if len(message.keep_best) > limits.MAX_KEEP_BEST:
        raise InvalidArgumentError(
            f"{len(message.keep_best)} metrics to keep the best of, the limit is {limits.MAX_KEEP_BEST}",
            reason="LIMIT_EXCEEDED",
            field="policy.keep_best",
        )
    newer_us = microseconds(message.newer_than, "policy.newer_than")
    if newer_us % 1_000_000:
        raise InvalidArgumentError("newer_than is in whole seconds", field="policy.newer_than")
    return RetentionPolicy(
        keep_last=message.keep_last,
        keep_every=message.keep_every,
        keep_best=tuple(KeepBest(one.metric, one.count, one.largest) for one in message.keep_best),
        newer_than_s=newer_us // 1_000_000,
    )


def policy_of(request: pb.PreviewPruneRequest | pb.PruneRequest) -> RetentionPolicy | None:
    """Returns the policy that a request gives; None when it gives none."""
    return policy(request.policy) if request.HasField("policy") else None


def policy_message(view: RetentionPolicy | None) -> pb.RetentionPolicy | None:
    """Returns a policy; None, which leaves the field unset, when there is none."""
    if view is None:
        return None
    message = pb.RetentionPolicy(
        keep_last=view.keep_last,
        keep_every=view.keep_every,
        keep_best=[pb.KeepBest(**vars(one)) for one in view.keep_best],
    )
    if view.newer_than_s:
        message.newer_than.FromSeconds(view.newer_than_s)
    return message


def policy_set(view: views.PolicyView) -> pb.SetRetentionPolicyResponse:
    """Returns the answer to SetRetentionPolicy."""
    return pb.SetRetentionPolicyResponse(policy=policy_message(view.policy), etag=view.etag)


def deleted(answer: tuple[views.CheckpointInfo, tuple[str, ...]]) -> pb.DeleteCheckpointResponse:
    """Returns the answer to DeleteCheckpoint."""
    checkpoint, aliases = answer
    return pb.DeleteCheckpointResponse(checkpoint=convert.checkpoint(checkpoint), deleted_aliases=aliases)


def held(answer: tuple[views.CheckpointInfo, views.HoldView]) -> pb.HoldCheckpointResponse:
    """Returns the answer to HoldCheckpoint."""
    checkpoint, hold = answer
    return pb.HoldCheckpointResponse(checkpoint=convert.checkpoint(checkpoint), hold=convert.hold(hold))


def decision(view: views.PruneView) -> pb.PruneDecision:
    """Returns what becomes of a checkpoint."""
    return pb.PruneDecision(
        name=view.name,
        ref=view.ref,
        keep=view.keep,
        reasons=view.reasons,
        size_bytes=view.size_bytes,
        create_time=timestamp(view.create_time_us),
    )
