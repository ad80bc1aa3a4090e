"""Content that ranks share travels once: one is asked for it, the others wait until it has come."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import pytest

from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from shardbook_server.rpc import uploads
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, Payload, payload, row

UNKNOWN = pb.PlanSaveResponse.STATE_STRUCTURE_UNKNOWN
WAITING = pb.PlanSaveResponse.STATE_WAITING
DECIDED = pb.PlanSaveResponse.STATE_DECIDED


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was asked has as long as a slow machine takes: who waits for it waits, and does not give it up."""
    monkeypatch.setattr(uploads, "SENDER_S", 15.0)


@pytest.fixture
def fresh(run: str) -> str:
    """A run in a project of its own, where no content is known."""
    return f"projects/{run.rpartition('/')[2]}/runs/r"


def _kinds(refs: Iterable[types_pb2.BlobRef]) -> set[int]:
    return {ref.kind for ref in refs}


def _send(job: Job, request: pb.PlanSaveRequest, what: Payload) -> pb.PlanSaveResponse:
    """Sends all that the plan needs."""
    del request.blobs[:]
    request.blobs.extend(blob for (kind, _), blob in what.blobs.items() if kind != types_pb2.BLOB_KIND_STRUCTURE)
    return job.api.registration.PlanSave(request, timeout=DEADLINE_S)


def test_of_many_replicas_one_is_asked_for_their_plan(api: Api, fresh: str) -> None:
    """Rule: replicas send a digest; the plan that they share comes from one of them."""
    job = Job.start(api, fresh, world_size=24)
    what = payload([row("w", 0, 1)])
    with ThreadPoolExecutor(24) as pool:
        asked = [
            pool.submit(api.registration.PlanSave, job.plan_request(rank, what, wait_s=15), timeout=DEADLINE_S)
            for rank in range(24)
        ]
        wait(asked, 10, FIRST_COMPLETED)
        time.sleep(0.5)
        told = [call for call in asked if call.done()]
        assert [UNKNOWN] == [call.result().state for call in told]
        sender = asked.index(told[0])
        _send(job, job.plan_request(sender, what), what)
        answers = [call.result(10) for at, call in enumerate(asked) if at != sender]
    assert {DECIDED} == {answer.state for answer in answers}


def test_ranks_with_plans_of_their_own_wait_for_their_common_table(api: Api, fresh: str) -> None:
    """Rule: small plans come unasked, and need not come again when the table has come from another rank."""
    job = Job.start(api, fresh, world_size=3)
    world = job.rows()
    requests = [job.plan_request(rank, what, wait_s=15) for rank, what in enumerate(world)]
    for request, what in zip(requests, world, strict=True):
        request.blobs.extend(what.blobs[kind, digest] for kind, digest in what.blobs if kind == 2)
    first = api.registration.PlanSave(requests[0], timeout=DEADLINE_S)
    assert (UNKNOWN, {1, 2}) == (first.state, _kinds(first.unknown))
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(api.registration.PlanSave, one, timeout=DEADLINE_S) for one in requests[1:]]
        time.sleep(0.3)
        assert not any(call.done() for call in others)
        assert DECIDED == _send(job, requests[0], world[0]).state
        assert [DECIDED, DECIDED] == [call.result(10).state for call in others]


def test_a_sender_that_never_sends_is_replaced(api: Api, fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: a rank that dies after it was asked holds the others up for a moment, no more."""
    monkeypatch.setattr(uploads, "SENDER_S", 1.0)
    job = Job.start(api, fresh, world_size=2)
    what = payload([row("w", 0, 1)])
    assert UNKNOWN == api.registration.PlanSave(job.plan_request(0, what, wait_s=15), timeout=DEADLINE_S).state
    began = time.monotonic()
    answer = api.registration.PlanSave(job.plan_request(1, what, wait_s=15), timeout=DEADLINE_S)
    assert (UNKNOWN, {2}) == (answer.state, _kinds(answer.unknown))
    assert time.monotonic() - began <= 12


def test_a_call_with_little_time_is_asked_at_once(api: Api, fresh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule: an answer that needs another call is better than none."""
    # Twice this is little.
    monkeypatch.setattr(uploads, "ANSWER_S", 6.0)
    job = Job.start(api, fresh, world_size=2)
    what = payload([row("w", 0, 1)])
    for rank in range(2):
        began = time.monotonic()
        assert UNKNOWN == api.registration.PlanSave(job.plan_request(rank, what), timeout=11).state
        assert time.monotonic() - began < 4  # of the 5 s that are left for waiting


def test_projects_do_not_wait_for_each_other(api: Api, fresh: str) -> None:
    """Rule: nothing is known in a project of what another one was asked for."""
    what = payload([row("w", 0, 1)])
    for number in range(3):
        job = Job.start(api, f"{fresh.removesuffix('/runs/r')}-{number}/runs/r", world_size=2)
        began = time.monotonic()
        assert UNKNOWN == api.registration.PlanSave(job.plan_request(0, what, wait_s=15), timeout=DEADLINE_S).state
        assert time.monotonic() - began < 10


def test_structures_that_ranks_share_travel_once_too(api: Api, fresh: str) -> None:
    """Rule: registrations by digest wait like plans do."""
    job = Job.start(api, fresh, world_size=2)
    what = payload([row("w", 0, 1)])
    for rank in range(2):
        job.plan(rank, what)
    first = api.registration.RegisterShards(job.register_request(0, what), timeout=DEADLINE_S)
    assert {3} == _kinds(first.unknown)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(api.registration.RegisterShards, job.register_request(1, what), timeout=DEADLINE_S)
        time.sleep(0.3)
        assert not other.done()
        sent = job.register_request(0, what)
        sent.blobs.extend(what.blobs.values())
        assert not api.registration.RegisterShards(sent, timeout=DEADLINE_S).unknown
        assert not other.result(10).unknown
    assert 2 == job.progress().progress.registered_count
