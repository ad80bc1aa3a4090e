"""Finding, describing and naming checkpoints over gRPC: what arrives, and how refusals are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from shardbook.v1 import catalog_pb2 as catalog
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, fields, refusal

SAID = types_pb2.Description(
    labels={"stage": "eval"},
    metrics={"loss": 1.5},
    note='{"a": 1}',
    writer=types_pb2.Writer(host="node7", user="grace", torch_version="2.10.0", git_commit="abc"),
)


@pytest.fixture
def job(api: Api, run: str) -> Job:
    """A job of two ranks with a session."""
    return Job.start(api, run)


def save(job: Job, step: int, said: types_pb2.Description = SAID) -> types_pb2.Checkpoint:
    """A save in which each rank says what it took."""
    for rank, what in enumerate(job.rows()):
        request = job.register_request(rank, what, step)
        request.registration.phase_ms.extend([10 + rank, 2000 - rank, 3])
        request.blobs.extend(what.blobs.values())
        assert not job.api.registration.RegisterShards(request, timeout=DEADLINE_S).unknown
    commit = pb.CommitCheckpointRequest(key=job.key(step), description=said)
    return job.api.registration.CommitCheckpoint(commit, timeout=DEADLINE_S).checkpoint


def test_a_commit_brings_what_is_said(job: Job) -> None:
    """And GetCheckpoint tells it, with what the ranks took; ranks that registered are told nothing of it."""
    committed = save(job, 1)
    name = f"{job.run}/parts/default/checkpoints/latest"
    found = job.api.catalog.GetCheckpoint(catalog.GetCheckpointRequest(name=name), timeout=DEADLINE_S).checkpoint
    assert committed == found
    assert ({"stage": "eval"}, {"loss": 1.5}, ["latest"]) == (
        dict(found.labels),
        dict(found.metrics),
        list(found.aliases),
    )
    assert ('{"a":1}', "node7", "abc") == (found.note, found.writer.host, found.writer.git_commit)
    slowest = {one.phase: (one.slowest.ToMilliseconds(), one.slowest_rank) for one in found.timing.phases}
    assert {"plan": (11, 1), "write": (2000, 0), "register": (3, 0)} == slowest
    ranks = job.api.catalog.ListRanks(catalog.ListRanksRequest(parent=name, page_size=1), timeout=DEADLINE_S)
    assert [(0, 10, 2000, 3)] == [(one.rank, one.plan_ms, one.write_ms, one.register_ms) for one in ranks.ranks]
    assert (2, True) == (ranks.total_size, bool(ranks.next_page_token))
    answer = job.api.registration.GetCheckpointProgress(
        pb.GetCheckpointProgressRequest(key=job.key(1)), timeout=DEADLINE_S
    )
    assert {} == dict(answer.checkpoint.labels)


def test_an_update_changes_what_its_mask_says(job: Job) -> None:
    """One key of a map, and the note."""
    saved = save(job, 1)
    changed = types_pb2.Checkpoint(name=saved.name, labels={"stage": "final", "x": "y"}, note="[]")
    request = catalog.UpdateCheckpointRequest(
        checkpoint=changed, update_mask=FieldMask(paths=["labels.stage", "metrics.loss", "note"])
    )
    for _ in range(2):
        told = job.api.catalog.UpdateCheckpoint(request, timeout=DEADLINE_S).checkpoint
        assert ({"stage": "final"}, {}, "[]") == (dict(told.labels), dict(told.metrics), told.note)


def test_aliases_over_the_wire(job: Job) -> None:
    """Set, followed, listed, deleted."""
    for step in (1, 2):
        save(job, step)
    part = f"{job.run}/parts/default"

    def put(name: str, **more: Any) -> catalog.Alias:
        request = catalog.SetAliasRequest(alias=catalog.Alias(name=f"{part}/aliases/{name}", **more))
        return job.api.catalog.SetAlias(request, timeout=DEADLINE_S).alias

    assert (
        f"{part}/checkpoints/1.s{job.session}.a1"
        == put("golden", checkpoint=f"{part}/checkpoints/1", protected=True).checkpoint
    )
    best = put("best", metric="loss", direction=catalog.Alias.DIRECTION_MIN)
    assert (f"{part}/checkpoints/2.s{job.session}.a1", "loss") == (best.checkpoint, best.metric)
    listed = job.api.catalog.ListAliases(catalog.ListAliasesRequest(parent=part), timeout=DEADLINE_S).aliases
    assert ["best", "golden", "latest"] == [one.name.rpartition("/")[2] for one in listed]
    assert [True, True, False] == [one.HasField("update_time") for one in listed]
    error = refusal(job.api.catalog.DeleteAlias, catalog.DeleteAliasRequest(name=f"{part}/aliases/golden"))
    assert ("FAILED_PRECONDITION", "ALIAS_PROTECTED") == (error.status, error.reason)
    job.api.catalog.DeleteAlias(
        catalog.DeleteAliasRequest(name=f"{part}/aliases/golden", force=True), timeout=DEADLINE_S
    )


def test_listings_across_runs(job: Job) -> None:
    """By a parent with wildcards, a filter and an order, page by page."""
    for step in (1, 2, 3):
        save(job, step, types_pb2.Description(labels={"run": job.run.rpartition("/")[2]}, metrics={"loss": -step}))
    request = catalog.ListCheckpointsRequest(
        parent="projects/-/runs/-/parts/-",
        filter=f'labels.run = "{job.run.rpartition("/")[2]}" AND step > 1',
        order_by="metrics.loss",
        page_size=1,
    )
    first = job.api.catalog.ListCheckpoints(request, timeout=DEADLINE_S)
    request.page_token = first.next_page_token
    second = job.api.catalog.ListCheckpoints(request, timeout=DEADLINE_S)
    assert ([3], [2], "") == (
        [one.step for one in first.checkpoints],
        [one.step for one in second.checkpoints],
        second.next_page_token,
    )
    request.filter = ""
    assert "INVALID_PAGE_TOKEN" == refusal(job.api.catalog.ListCheckpoints, request).reason


def test_projects_are_listed_page_by_page(job: Job) -> None:
    """With the number of their runs."""
    for name in ("zoo", "zebra"):
        Job.start(job.api, f"projects/{name}/runs/a")
    found: dict[str, int] = {}
    token = ""
    while True:
        request = catalog.ListProjectsRequest(page_size=1, page_token=token)
        page = job.api.catalog.ListProjects(request, timeout=DEADLINE_S)
        found |= {one.name: one.run_count for one in page.projects}
        token = page.next_page_token
        if not token:
            break
    assert sorted(found) == list(found)
    assert (1, 1) == (found["projects/zebra"], found["projects/zoo"])


def test_a_filter_that_cannot_be_read_names_field_and_position(api: Api) -> None:
    """BadRequest about ``filter``, and where, for those who underline it."""
    request = catalog.ListCheckpointsRequest(parent="projects/-/runs/-/parts/-", filter="step = 1 AND color = red")
    error = refusal(api.catalog.ListCheckpoints, request)
    assert (["filter"], "INVALID_FILTER", "14") == (fields(error), error.reason, error.metadata["position"])


def _list(**asked: Any) -> Callable[[Api], tuple[Callable[..., object], object]]:
    return lambda api: (api.catalog.ListCheckpoints, catalog.ListCheckpointsRequest(**asked))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (_list(parent="projects/-/runs/-"), "parent"),
        (_list(parent="projects/-/runs/../parts/-"), "parent"),
        (_list(parent="projects/-/runs/-/parts/-", order_by="color"), "order_by"),
        (_list(parent="projects/-/runs/-/parts/-", filter="(" * 3000), "filter"),
        (_list(parent="projects/-/runs/-/parts/-", filter="metrics.m = nan"), "filter"),
        (_list(parent="projects/-/runs/-/parts/-", page_size=-1), "page_size"),
        (
            lambda api: (
                api.catalog.UpdateCheckpoint,
                catalog.UpdateCheckpointRequest(checkpoint={"name": "a/b@1"}, update_mask=FieldMask(paths=["step"])),
            ),
            "update_mask",
        ),
        (
            lambda api: (
                api.catalog.UpdateCheckpoint,
                catalog.UpdateCheckpointRequest(
                    checkpoint={"name": "a/b@1", "metrics": {"m": float("inf")}},
                    update_mask=FieldMask(paths=["metrics"]),
                ),
            ),
            "checkpoint.metrics.m",
        ),
        (
            lambda api: (
                api.catalog.UpdateCheckpoint,
                catalog.UpdateCheckpointRequest(checkpoint={"name": "a"}, update_mask=FieldMask(paths=["note"])),
            ),
            "checkpoint.name",
        ),
        (
            lambda api: (
                api.catalog.SetAlias,
                catalog.SetAliasRequest(alias={"name": "a/b@1500", "checkpoint": "a/b@1"}),
            ),
            "alias.name",
        ),
        (
            lambda api: (
                api.catalog.SetAlias,
                catalog.SetAliasRequest(alias={"name": "a/b@x", "metric": "m", "direction": 9}),
            ),
            "alias.direction",
        ),
        (lambda api: (api.catalog.ListRanks, catalog.ListRanksRequest(parent="")), "parent"),
        (
            lambda api: (api.catalog.ListAliases, catalog.ListAliasesRequest(parent="projects/-/runs/-/parts/-")),
            "parent",
        ),
    ],
)
def test_refusals_name_the_field(api: Api, call: Callable[[Api], tuple[Any, object]], field: str) -> None:
    """INVALID_ARGUMENT, whatever the field."""
    error = refusal(*call(api))
    assert ("INVALID_ARGUMENT", [field]) == (error.status, fields(error))


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (types_pb2.Description(labels={"a b": "x"}), "description.labels"),
        (types_pb2.Description(metrics={"loss": float("nan")}), "description.metrics.loss"),
        (types_pb2.Description(note="{"), "description.note"),
        (types_pb2.Description(writer=types_pb2.Writer(host="x" * 300)), "description.writer.host"),
    ],
)
def test_a_commit_that_says_what_cannot_be_kept_is_refused_whole(
    job: Job, said: types_pb2.Description, field: str
) -> None:
    """The attempt stays as it was, and is committed by a call that says less."""
    for rank, what in enumerate(job.rows()):
        job.register(rank, what)
    error = refusal(job.api.registration.CommitCheckpoint, pb.CommitCheckpointRequest(key=job.key(), description=said))
    assert ("INVALID_ARGUMENT", [field]) == (error.status, fields(error))
    assert types_pb2.CHECKPOINT_STATE_COMMITTED == job.commit().state


def test_phases_that_are_none(job: Job) -> None:
    """Three, or not told."""
    request = job.register_request(0, job.rows()[0])
    request.registration.phase_ms.extend([1, 2])
    error = refusal(job.api.registration.RegisterShards, request)
    assert ["registration.phase_ms"] == fields(error)
