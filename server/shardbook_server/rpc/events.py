"""Events, subscriptions and claims, as messages and as the services' dataclasses."""

from __future__ import annotations

from typing import Final

from shardbook.errors import InvalidArgumentError
from shardbook.v1 import events_pb2 as pb
from shardbook_server.rpc import convert, times
from shardbook_server.rpc.times import timestamp
from shardbook_server.service.claiming import (
    ClaimAnswer,
    ClaimRequest,
    ClaimView,
    FinishRequest,
    Outcome,
    SubscriptionView,
)
from shardbook_server.service.events import EventView, Place
from shardbook_server.service.interest import Interest
from shardbook_server.storage.claims import ClaimState

#: Kinds that one request may name: each of them a few times over.
_MAX_KINDS: Final = 64


def interest(request: pb.WatchCheckpointsRequest) -> Interest:
    """Returns what WatchCheckpoints asks for."""
    if len(request.kinds) > _MAX_KINDS:
        raise InvalidArgumentError(
            f"{len(request.kinds)} kinds, the limit is {_MAX_KINDS}", reason="LIMIT_EXCEEDED", field="kinds"
        )
    return Interest.of(request.parent, request.filter, request.kinds)


def event(view: EventView, epoch: bytes) -> pb.Event:
    """Returns an event."""
    return pb.Event(
        cursor=str(Place(epoch, view.cursor)),
        kind=pb.Event.Kind.Name(view.kind),
        time=timestamp(view.time_us),
        part=str(view.part),
        checkpoint=None if view.checkpoint is None else convert.checkpoint(view.checkpoint),
        alias=view.alias,
    )


def claim_request(request: pb.ClaimCheckpointRequest) -> ClaimRequest:
    """Returns what ClaimCheckpoint asks for."""
    return ClaimRequest(
        subscription=request.subscription,
        parent=request.parent,
        filter_text=request.filter,
        cursor=request.cursor,
        claim_id=request.claim_id,
        holder=request.holder,
        lease_s=times.seconds(request.lease, "lease"),
        max_attempts=request.max_attempts,
    )


def finish_request(request: pb.FinishClaimRequest) -> FinishRequest:
    """Returns what FinishClaim says."""
    try:
        outcome = Outcome(request.outcome)
    except ValueError:
        raise InvalidArgumentError(f"{request.outcome} is no outcome", field="outcome") from None
    return FinishRequest(
        subscription=request.subscription,
        claim_id=request.claim_id,
        checkpoint=request.checkpoint,
        outcome=outcome,
        failure=request.failure,
        retry_delay_s=times.seconds(request.retry_delay, "retry_delay"),
        max_attempts=request.max_attempts,
    )


def claim_response(answer: ClaimAnswer) -> pb.ClaimCheckpointResponse:
    """Returns what was claimed."""
    return pb.ClaimCheckpointResponse(claim=None if answer.claim is None else _claim(answer.claim))


def finish_response(state: ClaimState | None) -> pb.FinishClaimResponse:
    """Returns where the work stands."""
    return pb.FinishClaimResponse(state=pb.Claim.State.Name(0 if state is None else state))


def subscription(view: SubscriptionView) -> pb.Subscription:
    """Returns a subscription."""
    return pb.Subscription(
        name=view.name,
        parent=view.parent,
        filter=view.filter_text,
        cursor=str(view.place),
        behind_count=view.behind_count,
        done_count=view.done_count,
        claims=[_claim(one) for one in view.claims],
        create_time=timestamp(view.create_time_us),
    )


def _claim(view: ClaimView) -> pb.Claim:
    return pb.Claim(
        checkpoint=convert.checkpoint(view.checkpoint),
        state=pb.Claim.State.Name(view.state),
        attempt=view.attempt,
        holder=view.holder,
        due_time=timestamp(view.due_time_us),
        failure=view.failure,
    )
