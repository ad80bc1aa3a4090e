"""Loops that ask again: longer waits than one call may hold, blobs that the server lacks, commits that take long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
import pytest

from shardbook import errors
from shardbook.breaker import CircuitBreaker
from shardbook.client import Client
from shardbook.core.limits import MAX_WAIT_S
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1.types_pb2 import AttemptKey, Blob, BlobKind, BlobRef, CheckpointState
from tests.behaviour.client.scripted import answering, failing_first, refuse, scripted_server, unavailable

KEY = AttemptKey(run="projects/llm/runs/8b", step=1, session=1, incarnation=b"i" * 16, attempt=1, world_size=2)
Plan = pb.PlanSaveResponse
DECIDED = Plan(state=Plan.STATE_DECIDED, drop=b"\x80")
WAITING = Plan(state=Plan.STATE_WAITING, planned_count=1)
COMMITTED = pb.CommitCheckpointResponse(checkpoint={"step": 1})


def blobs_of(refs: Sequence[BlobRef]) -> Iterable[Blob]:
    """Sends every digest as its own payload."""
    return [Blob(kind=ref.kind, payload=ref.digest) for ref in refs]


def test_plan_sends_what_is_unknown_then_waits_for_the_decision() -> None:
    """STRUCTURE_UNKNOWN is answered with the blobs, tables first; WAITING is asked again without them."""
    unknown = Plan(
        state=Plan.STATE_STRUCTURE_UNKNOWN,
        unknown=[
            BlobRef(kind=BlobKind.BLOB_KIND_PLAN, digest=b"p"),
            BlobRef(kind=BlobKind.BLOB_KIND_TABLE, digest=b"t"),
        ],
    )
    with scripted_server(PlanSave=answering(unknown, WAITING, WAITING, DECIDED)) as server:
        request = pb.PlanSaveRequest(key=KEY, rank=1)
        assert DECIDED == Client(server.target).plan_until_decided(request, blobs_of, timeout_s=20)
        assert [[], [b"t", b"p"], [], []] == [[b.payload for b in seen.blobs] for seen in server.of("PlanSave")]
    assert pb.PlanSaveRequest(key=KEY, rank=1) == request


def test_plan_returns_waiting_when_the_time_is_up() -> None:
    """A rank that nobody joins gets WAITING back and writes its whole plan: no error, no endless wait."""

    def handle(request: pb.PlanSaveRequest, _: Any) -> pb.PlanSaveResponse:
        time.sleep(request.wait.ToTimedelta().total_seconds())
        return WAITING

    with scripted_server(PlanSave=handle) as server:
        started = time.monotonic()
        answer = Client(server.target).plan_until_decided(pb.PlanSaveRequest(), blobs_of, timeout_s=0.5)
        assert WAITING == answer
        # Of twenty seconds that one call may take.
        assert 0.4 < time.monotonic() - started < 10


def test_no_call_asks_for_more_than_the_longest_wait() -> None:
    """Whatever the caller's patience, one call holds the server at most 20 s."""
    with scripted_server(PlanSave=lambda *_: DECIDED) as server:
        Client(server.target).plan_until_decided(pb.PlanSaveRequest(), blobs_of, timeout_s=3600)
        assert [MAX_WAIT_S] == [seen.wait.ToTimedelta().total_seconds() for seen in server.of("PlanSave")]


def test_early_not_yet_does_not_become_a_busy_loop() -> None:
    """A server that cannot hold more waiters answers at once; it is not asked a thousand times a second."""
    with scripted_server(PlanSave=lambda *_: WAITING) as server:
        Client(server.target).plan_until_decided(pb.PlanSaveRequest(), blobs_of, timeout_s=1)
        assert 2 <= server.count("PlanSave") <= 10


def test_blobs_too_many_for_one_call_are_sent_in_several() -> None:
    """Each call carries at least one blob and at most what fits; the server asks for the rest."""
    needed = [b"a", b"b", b"c"]
    got: set[bytes] = set()

    def big(refs: Sequence[BlobRef]) -> list[Blob]:
        return [Blob(kind=BlobKind.BLOB_KIND_TABLE, payload=ref.digest * (3 << 20)) for ref in refs]

    def handle(request: pb.RegisterShardsRequest, _: Any) -> pb.RegisterShardsResponse:
        got.update(blob.payload[:1] for blob in request.blobs)
        left = [BlobRef(kind=BlobKind.BLOB_KIND_TABLE, digest=name) for name in needed if name not in got]
        return pb.RegisterShardsResponse(unknown=left)

    with scripted_server(RegisterShards=handle) as server:
        assert not Client(server.target).register_shards(pb.RegisterShardsRequest(key=KEY), big).unknown
        assert [0, 2, 1] == [len(seen.blobs) for seen in server.of("RegisterShards")]


def test_server_that_never_accepts_a_blob_is_called_confused() -> None:
    """A server that asks for the same blob for ever ends in an error, not in a loop."""
    unknown = pb.RegisterShardsResponse(unknown=[BlobRef(kind=BlobKind.BLOB_KIND_TABLE, digest=b"t")])
    with scripted_server(RegisterShards=lambda *_: unknown) as server, pytest.raises(errors.InternalError) as caught:
        Client(server.target).register_shards(pb.RegisterShardsRequest(), blobs_of)
    assert "BLOBS_NOT_ACCEPTED" == caught.value.reason


def test_wait_until_closed_asks_again_and_survives_a_restart() -> None:
    """Not closed yet, and a server that goes away and comes back, are waited out."""
    open_ = pb.GetCheckpointProgressResponse(
        progress={"state": CheckpointState.CHECKPOINT_STATE_OPEN, "world_size": 2, "registered_count": 1}
    )
    closed = pb.GetCheckpointProgressResponse(
        progress={"state": CheckpointState.CHECKPOINT_STATE_COMMITTED}, checkpoint={"step": 1}
    )
    flaky, answers = failing_first(5, unavailable, None), answering(open_, open_, closed)

    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        flaky(request, context)
        return answers(request, context)

    with scripted_server(GetCheckpointProgress=handle) as server:
        assert closed == Client(server.target).wait_until_closed(KEY, timeout_s=60)
        assert server.count("GetCheckpointProgress") >= 5 + 3


def test_wait_until_closed_returns_the_open_attempt_when_the_time_is_up() -> None:
    """Running out of time is no error: the caller sees which ranks are missing."""
    open_ = pb.GetCheckpointProgressResponse(
        progress={"state": CheckpointState.CHECKPOINT_STATE_OPEN, "missing": [{"rank": 3, "host": "n3"}]}
    )
    with scripted_server(GetCheckpointProgress=lambda *_: open_) as server:
        answer = Client(server.target).wait_until_closed(KEY, timeout_s=0.3)
    assert [3] == [rank.rank for rank in answer.progress.missing]


def test_wait_until_registered_ends_when_all_ranks_are_there() -> None:
    """UNTIL_REGISTERED ends with the last registration, before the commit."""
    answers = [
        pb.GetCheckpointProgressResponse(progress={"world_size": 2, "registered_count": count}) for count in (1, 2)
    ]
    with scripted_server(GetCheckpointProgress=answering(*answers)) as server:
        answer = Client(server.target).wait_until_registered(KEY, timeout_s=20)
    assert 2 == answer.progress.registered_count


def test_commit_waits_for_missing_ranks() -> None:
    """RANKS_MISSING is asked again until the ranks are there."""

    def missing(context: grpc.ServicerContext) -> Any:
        refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "RANKS_MISSING", metadata={"count": "1"})

    with scripted_server(CommitCheckpoint=failing_first(2, missing, COMMITTED)) as server:
        request = pb.CommitCheckpointRequest(key=KEY)
        assert COMMITTED == Client(server.target).commit_when_complete(request, timeout_s=20)


def test_commit_says_which_ranks_are_missing_when_the_time_is_up() -> None:
    """The last answer is raised, with its facts."""

    def missing(_: Any, context: grpc.ServicerContext) -> Any:
        refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "RANKS_MISSING", metadata={"count": "1"})

    with scripted_server(CommitCheckpoint=missing) as server, pytest.raises(errors.RanksMissingError) as caught:
        Client(server.target).commit_when_complete(pb.CommitCheckpointRequest(key=KEY), timeout_s=0.5)
    assert "1" == caught.value.metadata["count"]


def test_early_ranks_missing_does_not_become_a_busy_loop() -> None:
    """A server that does not wait (its own limit, or an attempt whose lease has ended) is asked again with pauses."""

    def handle(_: Any, context: grpc.ServicerContext) -> None:
        refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "RANKS_MISSING")

    with scripted_server(CommitCheckpoint=handle) as server:
        with pytest.raises(errors.RanksMissingError):
            Client(server.target).commit_when_complete(pb.CommitCheckpointRequest(key=KEY), timeout_s=1.5)
        assert 2 <= server.count("CommitCheckpoint") <= 12


def test_commit_that_works_long_is_not_taken_for_dead() -> None:
    """Assembly may be silent for longer than an outage may cost, as long as the server answers other calls."""

    def slow(_: Any, context: grpc.ServicerContext) -> pb.CommitCheckpointResponse:
        time.sleep(1.8)
        return COMMITTED

    breaker = CircuitBreaker(first_s=1.2, later_s=0.1)
    save = breaker.start_save()
    progress = pb.GetCheckpointProgressResponse()
    with scripted_server(CommitCheckpoint=slow, GetCheckpointProgress=lambda *_: progress) as server:
        client = Client(server.target).guarded(save)
        assert COMMITTED == client.commit_when_complete(pb.CommitCheckpointRequest(key=KEY), timeout_s=20)
        assert 1 == server.count("CommitCheckpoint")
        assert server.count("GetCheckpointProgress") >= 3
    assert (None, 0.0) == (save.outage, save.spent_s)


def test_commit_to_a_server_that_fell_silent_ends_within_the_budget() -> None:
    """When nothing answers any more, the commit costs what an outage may cost, not its own patience."""
    release = threading.Event()

    def hang(*_: Any) -> Any:
        release.wait(60)
        return COMMITTED

    save = CircuitBreaker(first_s=0.8, later_s=0.1).start_save()
    with scripted_server(CommitCheckpoint=hang, GetCheckpointProgress=hang) as server:
        started = time.monotonic()
        with pytest.raises(errors.DeadlineExceededError):
            Client(server.target).guarded(save).commit_when_complete(pb.CommitCheckpointRequest(key=KEY), timeout_s=60)
        assert 0.6 < time.monotonic() - started < 20
        release.set()
    assert save.outage is not None
    assert save.spent_s <= 0.8
