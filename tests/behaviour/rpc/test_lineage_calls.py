"""Lineage over gRPC: what arrives, and how refusals are told."""

from __future__ import annotations

from typing import Any

import pytest

from shardbook.v1 import lineage_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, fields, refusal

RESUMED, EVALUATED = types_pb2.LINEAGE_KIND_RESUMED_FROM, types_pb2.LINEAGE_KIND_EVALUATED_BY


@pytest.fixture
def job(api: Api, run: str) -> Job:
    """A job of two ranks with a session."""
    return Job.start(api, run)


def commit(job: Job, step: int, *origins: types_pb2.Origin) -> types_pb2.Checkpoint:
    """A save that says where it comes from."""
    for rank, what in enumerate(job.rows()):
        request = job.register_request(rank, what, step)
        request.blobs.extend(what.blobs.values())
        assert not job.api.registration.RegisterShards(request, timeout=DEADLINE_S).unknown
    said = pb.CommitCheckpointRequest(key=job.key(step), description=types_pb2.Description(origins=origins))
    return job.api.registration.CommitCheckpoint(said, timeout=DEADLINE_S).checkpoint


def test_edges_over_the_wire(job: Job) -> None:
    """Told by a commit and added by hand; listed, walked and removed."""
    base = commit(job, 1)
    made = commit(job, 2, types_pb2.Origin(kind=RESUMED, source=base.ref))
    added = job.api.catalog.AddLineage(
        lineage_pb2.AddLineageRequest(subject=made.name, kind=EVALUATED, object="mmlu"), timeout=DEADLINE_S
    ).edge
    assert (made.name, "", "mmlu", False) == (
        added.subject.checkpoint,
        added.object.checkpoint,
        added.object.ref,
        added.told,
    )
    assert (types_pb2.CHECKPOINT_STATE_COMMITTED, made.create_time) == (added.subject.state, added.subject.create_time)
    found = job.api.catalog.GetLineage(lineage_pb2.GetLineageRequest(name=made.ref), timeout=DEADLINE_S)
    assert [(RESUMED, base.name, True, 1)] == [
        (one.kind, one.object.checkpoint, one.told, one.depth) for one in found.ancestors
    ]
    assert [(added.id, 1)] == [(one.id, one.depth) for one in found.descendants]
    assert (made.ref, False, False) == (found.checkpoint.ref, found.truncated, found.HasField("session_begin"))
    listed = job.api.catalog.ListLineage(
        lineage_pb2.ListLineageRequest(parent=made.ref, page_size=1), timeout=DEADLINE_S
    )
    assert (1, True) == (len(listed.edges), bool(listed.next_page_token))
    for removed in (True, False):
        request = lineage_pb2.RemoveLineageRequest(subject=made.ref, kind=EVALUATED, object="mmlu")
        assert removed == job.api.catalog.RemoveLineage(request, timeout=DEADLINE_S).removed


@pytest.mark.parametrize(
    ("call", "request_", "field"),
    [
        ("AddLineage", lineage_pb2.AddLineageRequest(subject="a/b", kind=RESUMED, object="x"), "subject"),
        ("AddLineage", lineage_pb2.AddLineageRequest(subject="a/b@1", object="x"), "kind"),
        ("AddLineage", lineage_pb2.AddLineageRequest(subject="a/b@1", kind=9, object="x"), "kind"),  # type: ignore[arg-type]
        ("AddLineage", lineage_pb2.AddLineageRequest(subject="a/b@1", kind=RESUMED), "object"),
        ("RemoveLineage", lineage_pb2.RemoveLineageRequest(subject="a/b@1", kind=RESUMED, object="a\0"), "object"),
        ("ListLineage", lineage_pb2.ListLineageRequest(parent="a/b@1", page_size=-1), "page_size"),
        ("ListLineage", lineage_pb2.ListLineageRequest(parent="a/b@1", page_token="x"), "page_token"),
        ("ListLineage", lineage_pb2.ListLineageRequest(parent="", page_size=1), "parent"),
        ("GetLineage", lineage_pb2.GetLineageRequest(name="a/b@1", max_depth=101), "max_depth"),
        ("GetLineage", lineage_pb2.GetLineageRequest(name="a/b@1", max_edges=-1), "max_edges"),
        ("GetLineage", lineage_pb2.GetLineageRequest(name="a/b@1", direction=7), "direction"),  # type: ignore[arg-type]
    ],
)
def test_refusals_name_the_field(api: Api, call: str, request_: Any, field: str) -> None:
    """INVALID_ARGUMENT, whatever the field."""
    error = refusal(getattr(api.catalog, call), request_)
    assert ("INVALID_ARGUMENT", [field]) == (error.status, fields(error))


def test_a_cycle_is_a_precondition_that_fails(job: Job) -> None:
    """With a reason to branch on."""
    one, two = commit(job, 1), commit(job, 2)
    job.api.catalog.AddLineage(
        lineage_pb2.AddLineageRequest(subject=two.name, kind=RESUMED, object=one.name), timeout=DEADLINE_S
    )
    back = lineage_pb2.AddLineageRequest(subject=one.name, kind=RESUMED, object=two.name)
    error = refusal(job.api.catalog.AddLineage, back)
    assert ("FAILED_PRECONDITION", "LINEAGE_CYCLE", ["object"]) == (error.status, error.reason, fields(error))


@pytest.mark.parametrize(
    ("origins", "field"),
    [
        ([types_pb2.Origin(source="x")], "description.origins[0].kind"),
        ([types_pb2.Origin(kind=EVALUATED, source="x")], "description.origins[0].kind"),
        (
            [types_pb2.Origin(kind=RESUMED, source="x"), types_pb2.Origin(kind=RESUMED, source="s3://k:s@bucket")],
            "description.origins[1].source",
        ),
        ([types_pb2.Origin(kind=RESUMED, source=f"{at}") for at in range(17)], "description.origins"),
    ],
)
def test_origins_that_cannot_be_kept(job: Job, origins: list[types_pb2.Origin], field: str) -> None:
    """Refused where they come in; the attempt is committed by a call that says less. The client sends none such."""
    for rank, what in enumerate(job.rows()):
        job.register(rank, what)
    request = pb.CommitCheckpointRequest(key=job.key(), description=types_pb2.Description(origins=origins))
    error = refusal(job.api.registration.CommitCheckpoint, request)
    assert ("INVALID_ARGUMENT", [field]) == (error.status, fields(error))
    assert types_pb2.CHECKPOINT_STATE_COMMITTED == job.commit().state
