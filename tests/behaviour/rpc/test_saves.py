"""Saves as ranks make them: many at once, waiting for each other, cut short, repeated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest

from shardbook.errors import RunBusyError
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from shardbook_server.app import Server, running_server
from shardbook_server.failpoints import Failpoints
from shardbook_server.rpc.limits import RECENT_S
from shardbook_server.service.progress import ProgressService
from shardbook_server.service.types import AttemptKey
from shardbook_server.service.views import Progress
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job, api_of, fields, payload, refusal, row, settings_in, wait_until

COMMITTED = types_pb2.CHECKPOINT_STATE_COMMITTED


# ------------------------------------------------------------------ planning and waiting


def test_ranks_that_plan_together_learn_what_to_drop(api: Api, run: str) -> None:
    """Rule: PlanSave waits for the other ranks; a replicated item is kept by exactly one, a shard by its owner."""
    job = replace(Job.start(api, run), world_size=4)
    replicated = row("bias", 0, 1)
    plans = [payload([row("w", rank, 4), replicated]) for rank in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda rank: job.plan(rank, plans[rank], wait_s=10), range(4)))
    assert {pb.PlanSaveResponse.STATE_DECIDED} == {answer.state for answer in answers}
    dropped = [answer.drop or b"\x00" for answer in answers]
    assert [0] * 4 == [bits[0] & 0b1000_0000 for bits in dropped]
    assert 3 == sum(bool(bits[0] & 0b0100_0000) for bits in dropped)
    # Asking again is answered at once, and the same.
    assert answers == [job.plan(rank, plans[rank]) for rank in range(4)]


def test_a_world_of_one_is_decided_at_once(api: Api, run: str) -> None:
    """Rule: nobody else is to come."""
    job = replace(Job.start(api, run), world_size=1)
    answer = job.plan(0, payload([row("w", 0, 1)]))
    assert (pb.PlanSaveResponse.STATE_DECIDED, b"") == (answer.state, answer.drop)


def test_a_wait_ends_in_time_to_answer_before_the_deadline(api: Api, run: str) -> None:
    """Rule: a handler that waits up to the deadline loses its answer; so waits are cut below it, and below 20 s."""
    job = Job.start(api, run)
    what = job.rows()[0]
    job.plan(0, what)
    began = time.monotonic()
    answer = api.registration.PlanSave(job.plan_request(0, what, wait_s=20), timeout=1.5)
    assert (pb.PlanSaveResponse.STATE_WAITING, 1) == (answer.state, answer.planned_count)
    assert time.monotonic() - began > 0.5


def test_a_commit_waits_for_the_last_rank(api: Api, run: str) -> None:
    """Rule: `wait` covers ranks that are still writing; the commit follows the last registration at once."""
    job = Job.start(api, run)
    world = job.rows()
    job.register(0, world[0])
    with ThreadPoolExecutor(1) as pool:
        commit = pool.submit(job.commit, wait_s=15)
        time.sleep(0.2)
        assert not commit.done()
        job.register(1, world[1])
        assert COMMITTED == commit.result(10).state


def test_a_commit_that_waited_in_vain_names_who_is_missing(api: Api, run: str) -> None:
    """Rule: after the wait the answer is RANKS_MISSING as of then."""
    job = Job.start(api, run)
    job.register(0, job.rows()[0])
    began = time.monotonic()
    error = refusal(lambda: job.commit(wait_s=0.4))
    assert ("RANKS_MISSING", "[1]") == (error.reason, error.metadata["ranks"])
    assert time.monotonic() - began >= 0.4


def test_all_ranks_wait_for_the_commit_and_get_the_checkpoint(
    api: Api, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule: GetCheckpointProgress until closed ends with the commit, for every rank, long before its wait is over.

    Progress names missing ranks, so it costs more the larger the world: waiting ranks share a few looks.
    """
    wait_s = 19.0
    looks: list[int] = []
    original = ProgressService.progress

    def counted(self: ProgressService, key: AttemptKey) -> Progress:
        looks.append(1)
        return original(self, key)

    monkeypatch.setattr(ProgressService, "progress", counted)
    job = Job.start(api, run, world_size=16)
    world = job.rows()
    for rank, what in enumerate(world):
        job.register(rank, what)
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        waits = [pool.submit(job.progress, 1, pb.GetCheckpointProgressRequest.UNTIL_CLOSED, wait_s) for _ in world]
        time.sleep(0.3)
        assert not any(wait.done() for wait in waits)
        checkpoint = job.commit()
        assert [checkpoint.name] * 16 == [wait.result(10).checkpoint.name for wait in waits]
    took_s = time.monotonic() - began
    assert took_s < wait_s
    # What was seen serves all for a while; on a slow machine they come, and are answered, over a longer one.
    assert len(looks) < 10 + took_s / RECENT_S


def _commit_once_known(job: Job) -> types_pb2.Checkpoint:
    """Commits beside registrations that are on their way; before the first there is nothing to commit."""
    while True:
        try:
            return job.commit(wait_s=15)
        except grpc.RpcError as error:
            assert grpc.StatusCode.NOT_FOUND == error.code()
            time.sleep(0.02)


def test_a_registration_can_wait_for_the_commit(api: Api, run: str) -> None:
    """Rule: with `wait` the answer to a registration brings the checkpoint, so that a rank needs no further call."""
    job = Job.start(api, run)
    requests = [job.register_request(rank, what) for rank, what in enumerate(job.rows())]
    for request, what in zip(requests, job.rows(), strict=True):
        request.blobs.extend(what.blobs.values())
        request.wait.FromSeconds(15)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(api.registration.RegisterShards, one, timeout=DEADLINE_S) for one in requests]
        checkpoint = _commit_once_known(job)
        answers = [call.result(10) for call in calls]
    assert [checkpoint.name] * 2 == [answer.checkpoint.name for answer in answers]
    # Asked once more, as after a lost answer, it says the same.
    assert answers[0] == api.registration.RegisterShards(requests[0], timeout=DEADLINE_S)


def test_a_registration_that_waited_in_vain_is_durable(api: Api, run: str) -> None:
    """Rule: the wait is only a wait: without it, after it and with a failed attempt the registration is answered."""
    job = Job.start(api, run)
    world = job.rows()
    request = job.register_request(0, world[0])
    request.blobs.extend(world[0].blobs.values())
    request.wait.FromMilliseconds(300)
    answer = api.registration.RegisterShards(request, timeout=DEADLINE_S)
    assert ([], False) == (list(answer.unknown), answer.HasField("checkpoint"))
    assert 1 == job.progress().progress.registered_count
    request.wait.FromSeconds(15)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.registration.RegisterShards, request, timeout=DEADLINE_S)
        time.sleep(0.2)
        api.registration.AbortCheckpoint(pb.AbortCheckpointRequest(key=job.key(), reason="x"), timeout=DEADLINE_S)
        assert types_pb2.CHECKPOINT_STATE_FAILED == waiting.result(10).checkpoint.state


def test_progress_until_registered_ends_with_the_last_registration(api: Api, run: str) -> None:
    """Rule: the coordinator can wait for all ranks without committing."""
    job = Job.start(api, run)
    world = job.rows()
    job.plan(1, world[1])
    job.register(0, world[0])
    progress = job.progress(1, pb.GetCheckpointProgressRequest.UNTIL_REGISTERED, 0.2).progress
    assert (1, 1, 2) == (progress.planned_count, progress.registered_count, progress.world_size)
    assert [types_pb2.RankHost(rank=1, host="n1")] == list(progress.missing)
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(job.progress, 1, pb.GetCheckpointProgressRequest.UNTIL_REGISTERED, 15)
        time.sleep(0.1)
        job.register(1, world[1])
        answer = wait.result(10)
    assert (2, []) == (answer.progress.registered_count, list(answer.progress.missing))
    assert not answer.HasField("checkpoint")


def test_a_failed_rank_ends_every_wait(api: Api, run: str) -> None:
    """Rule: nobody waits for a rank that said it cannot finish, in whatever call."""
    job = Job.start(api, run, world_size=3)
    world = job.rows()
    job.plan(0, world[0])
    job.register(0, world[0])
    failure = types_pb2.RankFailure(rank=2, host="n2", phase="write", reason="No space left on device")
    with ThreadPoolExecutor(3) as pool:
        plan = pool.submit(refusal, lambda: job.plan(0, world[0], wait_s=15))
        commit = pool.submit(refusal, lambda: job.commit(wait_s=15))
        progress = pool.submit(job.progress, 1, pb.GetCheckpointProgressRequest.UNTIL_CLOSED, 15)
        time.sleep(0.2)
        api.registration.ReportFailure(
            pb.ReportFailureRequest(key=job.key(), location=job.location(), failure=failure), timeout=DEADLINE_S
        )
        assert "CHECKPOINT_CLOSED" == plan.result(5).reason
        assert "RANK_FAILED" == commit.result(5).reason
        assert failure == progress.result(5).progress.failure


# ------------------------------------------------------------------ batches


def test_a_crowd_registers_and_one_bad_registration_fails_alone(api: Api, run: str) -> None:
    """Rule: entries of one batch are judged one by one."""
    job = Job.start(api, run, world_size=60)
    world = job.rows()
    for rank in (0, 1):
        job.register(rank, world[rank])
    calls = []
    for rank in range(2, 60):
        request = job.register_request(rank, world[rank])
        request.blobs.extend(world[rank].blobs.values())
        if rank == 30:
            request.registration.extents = b"\xff"
        calls.append((rank, api.registration.RegisterShards.future(request, timeout=DEADLINE_S)))
    for rank, call in calls:
        if rank == 30:
            assert ["registration.extents"] == fields(refusal(call.result))
        else:
            assert not call.result().unknown
    assert "[30]" == refusal(job.commit).metadata["ranks"]
    job.register(30, world[30])
    checkpoint = job.commit()
    assert (COMMITTED, 60, 1) == (checkpoint.state, checkpoint.chunk_count, checkpoint.tensor_count)


def test_the_second_save_sends_digests_only(api: Api, run: str) -> None:
    """Rule: a structure is sent once; later saves of it are answered without asking for blobs."""
    job = Job.start(api, run)
    world = job.rows()
    first = job.save(1, world)
    for rank, what in enumerate(world):
        request = job.register_request(rank, what, step=2)
        assert not api.registration.RegisterShards(request, timeout=DEADLINE_S).unknown
    second = job.commit(2)
    assert first.structure_digest == second.structure_digest
    assert (COMMITTED, True) == (second.state, second.live)


def test_commits_that_race_get_one_answer(api: Api, run: str) -> None:
    """Rule: idempotent by natural key, also at the same time."""
    job = Job.start(api, run)
    for rank, what in enumerate(job.rows()):
        job.register(rank, what)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: job.commit(), range(8)))
    assert [answers[0]] * 8 == answers
    assert answers[0] == job.commit()


# ------------------------------------------------------------------ cut short


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on which a commit takes half a second, before and after its transaction."""
    points = Failpoints.parse(
        "commit.before_db=sleep(0.25); commit.after_db=sleep(0.25); register.before_db=sleep(0.2)"
    )
    with running_server(settings_in(tmp_path_factory.mktemp("slow")), failpoints=points) as server:
        yield server
        assert 0 == server.database.checked_out()


@pytest.mark.parametrize("patience_s", [0.1, 0.4], ids=["before-the-transaction", "after-the-transaction"])
def test_a_client_that_leaves_in_mid_commit_leaves_a_whole_checkpoint(
    slow: Server, run: str, patience_s: float
) -> None:
    """Rule: a commit that began ends; the client that asks again gets the same answer, and no connection is lost."""
    with api_of(slow.address) as api:
        job = Job.start(api, run)
        for rank, what in enumerate(job.rows()):
            job.register(rank, what)
        with pytest.raises(grpc.RpcError) as late:
            api.registration.CommitCheckpoint(pb.CommitCheckpointRequest(key=job.key()), timeout=patience_s)
        assert grpc.StatusCode.DEADLINE_EXCEEDED == late.value.code()
        wait_until(lambda: job.progress().progress.state == COMMITTED)
        checkpoint = job.commit()
        assert (COMMITTED, 2) == (checkpoint.state, checkpoint.chunk_count)
        wait_until(lambda: slow.database.checked_out() == 0)


def test_a_client_that_leaves_in_mid_registration_leaves_it_whole_or_absent(slow: Server, run: str) -> None:
    """Rule: cancelling one rank's call leaves its neighbours' alone; repeating it is fine either way."""
    with api_of(slow.address) as api:
        job = Job.start(api, run)
        world = job.rows()
        requests = []
        for rank, what in enumerate(world):
            request = job.register_request(rank, what)
            request.blobs.extend(what.blobs.values())
            requests.append(request)
        calls = [api.registration.RegisterShards.future(request, timeout=DEADLINE_S) for request in requests]
        time.sleep(0.05)
        assert calls[0].cancel()
        assert not calls[1].result().unknown
        registered = job.progress().progress.registered_count
        assert registered in (1, 2)
        assert COMMITTED == job.save(1, world).state


# ------------------------------------------------------------------ sessions


def test_a_job_waits_for_another_job_s_lease(api: Api, run: str) -> None:
    """Rule: WAIT starts as soon as the live job releases its lease, and says RUN_BUSY when it does not."""
    live = Job.start(api, run, job_id="1", host="n1", user="ada")
    other = Job(api, run)
    wait = {"on_live": pb.ON_LIVE_WAIT, "job_id": "2"}
    request = pb.StartSessionRequest(run=run, incarnation=other.incarnation, on_live=pb.ON_LIVE_WAIT, job_id="2")
    request.wait.FromMilliseconds(300)
    began = time.monotonic()
    busy = refusal(lambda: api.registration.StartSession(request, timeout=DEADLINE_S))
    assert isinstance(busy, RunBusyError)
    assert {"host": "n1", "user": "ada", "job_id": "1"}.items() <= busy.metadata.items()
    assert busy.retry_delay_s is not None
    assert time.monotonic() - began >= 0.3
    assert "RUN_BUSY" == refusal(lambda: other.start_session(**(wait | {"on_live": pb.ON_LIVE_FAIL}))).reason
    with ThreadPoolExecutor(1) as pool:
        request.wait.FromSeconds(15)
        waiting = pool.submit(api.registration.StartSession, request, timeout=DEADLINE_S)
        time.sleep(0.2)
        assert not waiting.done()
        api.registration.KeepAlive(
            pb.KeepAliveRequest(run=run, session=live.session, incarnation=live.incarnation, release=True)
        )
        assert live.session + 1 == waiting.result(10).session


def test_a_session_is_started_once_whoever_asks_again(api: Api, run: str) -> None:
    """Rule: idempotent by incarnation; the same job takes over at once, and the answer says who is current."""
    first = Job.start(api, run, on_live=pb.ON_LIVE_FAIL, job_id="1")
    assert first.session == first.start_session(on_live=pb.ON_LIVE_FAIL, job_id="1").session
    checkpoint = first.save(7)
    second = Job.start(api, run, on_live=pb.ON_LIVE_FAIL, job_id="1")
    assert second.session > first.session
    again = first.start_session(job_id="1")
    assert (first.session, False, checkpoint.name) == (again.session, again.current, again.latest)


def test_an_attempt_whose_writers_are_gone_expires_and_revives_when_they_return(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Rule: the reaper ends what outlived its lease, who waits learns of it, and nobody superseded may come back."""
    settings = settings_in(tmp_path_factory.mktemp("leases"), lease_ttl_s=0.6, reap_interval_s=0.1)
    with running_server(settings) as server, api_of(server.address) as api:
        job = Job.start(api, "projects/test/runs/r")
        world = job.rows()
        job.register(0, world[0])
        answer = job.progress(1, pb.GetCheckpointProgressRequest.UNTIL_CLOSED, 15)
        assert types_pb2.CHECKPOINT_STATE_EXPIRED == answer.checkpoint.state
        # Nobody is there to complete it, so a wait for the missing rank is not held open.
        assert "RANKS_MISSING" == refusal(job.commit, 1, 0.2).reason
        job.register(1, world[1])
        assert COMMITTED == job.commit().state
