"""Every write of the catalogue over gRPC: made again under the same id it has one effect and one answer."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from shardbook.v1 import catalog_pb2 as catalog
from shardbook.v1 import events_pb2, locations_pb2, types_pb2
from shardbook.v1 import lineage_pb2 as lineage
from shardbook.v1 import retention_pb2 as retention
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, fields, refusal

RESUMED = types_pb2.LINEAGE_KIND_RESUMED_FROM
#: What can be called again under the same id.
WRITES = [
    method.name
    for method in catalog.DESCRIPTOR.services_by_name["CatalogService"].methods
    if "request_id" in method.input_type.fields_by_name
]


@pytest.fixture
def job(api: Api, run: str) -> Job:
    """A job of two ranks with checkpoints of three steps."""
    job = Job.start(api, run)
    for step in (1, 2, 3):
        job.save(step)
    return job


def requests(job: Job) -> dict[str, tuple[Any, Any]]:
    """A request of each kind, and one that undoes what it did, or does it otherwise."""
    part = f"{job.run}/parts/default"
    one, two = (f"{part}/checkpoints/{step}.s{job.session}.a1" for step in (1, 2))
    golden, keep = f"{part}/aliases/golden", retention.RetentionPolicy(keep_last=1)
    edge: dict[str, Any] = {"subject": two, "kind": RESUMED, "object": one}
    place = job.api.catalog.GetCheckpoint(catalog.GetCheckpointRequest(name=one), timeout=DEADLINE_S)
    here, there = place.checkpoint.location.location, "/elsewhere/1"
    moved = locations_pb2.CheckpointMove(name=one, from_location=here, to_location=there)
    back = locations_pb2.CheckpointMove(name=one, from_location=there, to_location=here)
    set_golden = catalog.SetAliasRequest(alias=catalog.Alias(name=golden, checkpoint=one))
    return {
        "UpdateCheckpoint": (update(one, "a"), update(one, "b")),
        "MoveCheckpoints": (
            locations_pb2.MoveCheckpointsRequest(moves=[moved]),
            locations_pb2.MoveCheckpointsRequest(moves=[back]),
        ),
        "SetAlias": (set_golden, catalog.SetAliasRequest(alias=catalog.Alias(name=golden, checkpoint=two))),
        "DeleteAlias": (catalog.DeleteAliasRequest(name=golden), set_golden),
        "DeleteCheckpoint": (
            retention.DeleteCheckpointRequest(name=f"{part}/checkpoints/latest", force=True),
            retention.UndeleteCheckpointRequest(name=f"{part}/checkpoints/3"),
        ),
        "UndeleteCheckpoint": (
            retention.UndeleteCheckpointRequest(name=two),
            retention.DeleteCheckpointRequest(name=two),
        ),
        "HoldCheckpoint": (
            retention.HoldCheckpointRequest(name=one, holder="eval", ttl=Duration(seconds=60)),
            retention.ReleaseCheckpointRequest(name=one, holder="eval"),
        ),
        "ReleaseCheckpoint": (
            retention.ReleaseCheckpointRequest(name=one, holder="eval"),
            retention.HoldCheckpointRequest(name=one, holder="eval", ttl=Duration(seconds=60)),
        ),
        "SetRetentionPolicy": (
            retention.SetRetentionPolicyRequest(name=part, policy=keep),
            retention.SetRetentionPolicyRequest(name=part),
        ),
        "Prune": (
            retention.PruneRequest(parent=part, policy=keep, names=[one]),
            retention.UndeleteCheckpointRequest(name=one),
        ),
        "ReportMissingData": (
            retention.ReportMissingDataRequest(name=one, missing=True),
            retention.ReportMissingDataRequest(name=one),
        ),
        "AddLineage": (lineage.AddLineageRequest(**edge), lineage.RemoveLineageRequest(**edge)),
        "RemoveLineage": (lineage.RemoveLineageRequest(**edge), lineage.AddLineageRequest(**edge)),
        "DeleteSubscription": (
            events_pb2.DeleteSubscriptionRequest(name=subscription(job)),
            claim(job),
        ),
    }


def update(name: str, stage: str) -> catalog.UpdateCheckpointRequest:
    """Sets a label."""
    return catalog.UpdateCheckpointRequest(
        checkpoint=types_pb2.Checkpoint(name=name, labels={"stage": stage}), update_mask=FieldMask(paths=["labels"])
    )


def subscription(job: Job) -> str:
    """One of the test's own."""
    return f"subscriptions/{job.run.rpartition('/')[2]}"


def claim(job: Job) -> events_pb2.ClaimCheckpointRequest:
    """Makes a subscription to what comes."""
    return events_pb2.ClaimCheckpointRequest(
        subscription=subscription(job),
        parent=f"{job.run}/parts/-",
        claim_id=uuid.uuid4().bytes,
        holder="node1",
        lease=Duration(seconds=60),
        max_attempts=3,
    )


def call(job: Job, request: Any) -> Message:
    """Makes a call, by the class of its request."""
    name = type(request).__name__.removesuffix("Request")
    answer: Message = getattr(job.api.catalog, name)(request, timeout=DEADLINE_S)
    return answer


def seen(job: Job) -> list[Any]:
    """What there is to see of the run."""
    parent, ask = f"{job.run}/parts/default", job.api.catalog
    listed = ask.ListCheckpoints(catalog.ListCheckpointsRequest(parent=parent, show_all=True), timeout=DEADLINE_S)
    names = [one.name for one in listed.checkpoints]
    every = [
        ask.GetCheckpoint(catalog.GetCheckpointRequest(name=name), timeout=DEADLINE_S).checkpoint for name in names
    ]
    edges = [ask.ListLineage(lineage.ListLineageRequest(parent=name), timeout=DEADLINE_S) for name in names]
    aliases = ask.ListAliases(catalog.ListAliasesRequest(parent=parent), timeout=DEADLINE_S)
    policy = ask.GetRetentionPolicy(retention.GetRetentionPolicyRequest(name=parent), timeout=DEADLINE_S)
    return [every, edges, aliases, policy]


def differently(request: Any) -> Any:
    """The same request with another content."""
    changed = type(request)()
    changed.CopyFrom(request)
    match changed:
        case catalog.UpdateCheckpointRequest():
            changed.checkpoint.labels["stage"] = "z"
        case catalog.SetAliasRequest():
            changed.force = True
        case locations_pb2.MoveCheckpointsRequest():
            changed.moves[0].keep = True
        case retention.PruneRequest():
            changed.delete_files = True
        case lineage.AddLineageRequest() | lineage.RemoveLineageRequest():
            changed.object = "mmlu"
        case _:
            changed.name += "x"
    return changed


def prepare(job: Job, name: str, otherwise: Any) -> None:
    """Makes what is to be undone, removed or forgotten."""
    if name in ("DeleteAlias", "UndeleteCheckpoint", "ReleaseCheckpoint", "RemoveLineage", "DeleteSubscription"):
        call(job, otherwise)


def test_every_write_is_among_them(job: Job) -> None:
    """So that what follows is about all of them."""
    assert sorted(requests(job)) == sorted(WRITES)
    assert 14 == len(WRITES)


@pytest.mark.parametrize("name", WRITES)
def test_made_again_it_changes_nothing_and_answers_the_same(job: Job, name: str) -> None:
    """Though it was undone meanwhile, or would not be possible any more."""
    request, otherwise = requests(job)[name]
    prepare(job, name, otherwise)
    request.request_id = str(uuid.uuid4())
    first = call(job, request)
    call(job, otherwise)
    between = seen(job)
    assert first == call(job, request)
    assert between == seen(job)
    # Under another id it is another request.
    request.request_id = str(uuid.uuid4())
    call(job, request)


@pytest.mark.parametrize("name", WRITES)
def test_ids_that_are_none_and_ids_of_something_else_are_refused(job: Job, name: str) -> None:
    """INVALID_ARGUMENT names the field, and nothing is done."""
    request, otherwise = requests(job)[name]
    prepare(job, name, otherwise)
    before = seen(job)
    method: Callable[..., Any] = getattr(job.api.catalog, name)
    request.request_id = "not-a-uuid"
    assert ["request_id"] == fields(refusal(method, request))
    assert before == seen(job)
    request.request_id = str(uuid.uuid4())
    call(job, request)
    after = seen(job)
    error = refusal(method, differently(request))
    assert ("INVALID_ARGUMENT", "REQUEST_ID_REUSED", ["request_id"]) == (error.status, error.reason, fields(error))
    assert after == seen(job)


def test_two_callers_may_draw_the_same_id_for_different_calls(job: Job) -> None:
    """The call is part of the key."""
    some = str(uuid.uuid4())
    one = f"{job.run}/parts/default/checkpoints/1"
    hold = retention.HoldCheckpointRequest(name=one, holder="eval", ttl=Duration(seconds=60), request_id=some)
    call(job, hold)
    call(job, retention.ReleaseCheckpointRequest(name=one, holder="eval", request_id=some))
    found = job.api.catalog.GetCheckpoint(catalog.GetCheckpointRequest(name=one), timeout=DEADLINE_S)
    assert [] == list(found.checkpoint.holds)


def test_an_etag_of_before_is_aborted(job: Job) -> None:
    """ABORTED, and the same request with the same id is still one that was never made."""
    name = f"{job.run}/parts/default/checkpoints/1"
    old = job.api.catalog.GetCheckpoint(catalog.GetCheckpointRequest(name=name), timeout=DEADLINE_S).checkpoint.etag
    call(job, update(name, "a"))
    request = update(name, "b")
    request.checkpoint.etag, request.request_id = old, str(uuid.uuid4())
    error = refusal(job.api.catalog.UpdateCheckpoint, request)
    assert ("ABORTED", "ETAG_MISMATCH", ["checkpoint.etag"]) == (error.status, error.reason, fields(error))
    error = refusal(job.api.catalog.DeleteCheckpoint, retention.DeleteCheckpointRequest(name=name, etag=old))
    assert ("ABORTED", ["etag"]) == (error.status, fields(error))
    found = job.api.catalog.GetCheckpoint(catalog.GetCheckpointRequest(name=name), timeout=DEADLINE_S).checkpoint
    assert "a" == found.labels["stage"]
    request.checkpoint.etag = found.etag
    call(job, request)
