"""Rows 7, 12, 13, 15: replicas over one Postgres, alone responsible for nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from shardbook import Client
from shardbook._address import ServerAddress
from shardbook._channel import Connections
from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.errors import NotFoundError, SessionFencedError
from shardbook.recording import attempt_key
from shardbook.v1 import catalog_pb2, types_pb2
from shardbook.v1 import registration_pb2 as pb
from tests.behaviour.client.directories import identity
from tests.behaviour.client.saves import register, save, start_session
from tests.conftest import MakeDatabases
from tests.faults.replicas import CALL_S, WORLD_SIZE, Replicas, SavingJob, running_replicas
from tests.faults.validators import p2_no_torn_checkpoint


@pytest.fixture(scope="module", params=[2, 3])
def replicas(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_databases: MakeDatabases
) -> Iterator[Replicas]:
    """Replicas that every test of the module leaves alive."""
    url = make_databases("postgres").new()
    with running_replicas(tmp_path_factory.mktemp("replicas"), url, request.param) as running:
        yield running


def test_each_rank_may_talk_to_another_replica(replicas: Replicas, run: str, tmp_path: Path) -> None:
    """Session on one, every rank on the next, the commit on the last: one checkpoint, seen on all of them."""
    clients = [replicas.client_of(at) for at in range(len(replicas.servers))]
    incarnation = b"r" * 16
    session = start_session(clients[0], run, incarnation).session
    who = replace(identity(1, run=run, incarnation=incarnation, world_size=WORLD_SIZE), session=session)
    for rank in range(WORLD_SIZE):
        register(clients[(rank + 1) % len(clients)], who, tmp_path, [rank])
    answer = clients[-1].commit_when_complete(pb.CommitCheckpointRequest(key=attempt_key(who)), timeout_s=CALL_S)
    seen = [p2_no_torn_checkpoint(client, run, has_files=False) for client in clients]
    name = answer.checkpoint.name
    assert [[name]] * len(clients) == [[one.name for one in listed] for listed in seen]
    assert [Checkpoint.of(answer.checkpoint)] * len(clients) == [client.get_checkpoint(name) for client in clients]


def test_clients_spread_over_the_replicas(replicas: Replicas) -> None:
    """Each takes one at random and stays there; forty of them leave none without, but for one time in 100,000."""
    address = ServerAddress.parse(replicas.address)
    answered: Counter[str] = Counter()
    for _ in range(40):
        connection = Connections().get(address)
        for _ in range(2):
            _, call = connection.catalog.ListRuns.with_call(
                catalog_pb2.ListRunsRequest(parent="projects/-"), timeout=CALL_S
            )
            found = {str(key): str(value) for key, value in call.trailing_metadata()}
            answered[found["x-request-id"].partition("-")[0]] += 1  # ids begin with their server's own
        connection.channel.close()
    assert len(replicas.servers) == len(answered), answered
    assert all(count % 2 == 0 and count >= 6 for count in answered.values()), answered


def test_a_wait_on_one_replica_sees_a_commit_on_another(replicas: Replicas, run: str, tmp_path: Path) -> None:
    """Soon after its acknowledgement; the median of five, as a loaded machine may lose its turn once."""
    first, other = replicas.client_of(0), replicas.client_of(1)
    incarnation = b"w" * 16
    session = start_session(first, run, incarnation).session
    late_s = []
    for step in range(5):
        who = replace(identity(step, run=run, incarnation=incarnation, world_size=WORLD_SIZE), session=session)
        key = attempt_key(who)
        register(first, who, tmp_path)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(other.wait_until_closed, key, timeout_s=CALL_S)
            time.sleep(0.3)  # so that it waits by now
            assert not waiting.done()
            first.commit(pb.CommitCheckpointRequest(key=key))
            committed_s = time.monotonic()
            closed = waiting.result()
            late_s.append(time.monotonic() - committed_s)
        assert types_pb2.CHECKPOINT_STATE_COMMITTED == closed.progress.state
    # A replica that did not look would answer when its wait ends, seconds later.
    assert sorted(late_s)[2] <= 2, late_s


def test_of_two_committers_one_commits_and_both_hear_the_same(replicas: Replicas, run: str, tmp_path: Path) -> None:
    """Row 7: a coordinator and its own retry on another replica."""
    clients = [replicas.client_of(at) for at in range(len(replicas.servers))]
    incarnation = b"c" * 16
    session = start_session(clients[0], run, incarnation).session
    for step in range(5):
        who = replace(identity(step, run=run, incarnation=incarnation, world_size=WORLD_SIZE), session=session)
        register(clients[0], who, tmp_path)
        request = pb.CommitCheckpointRequest(key=attempt_key(who))
        barrier = threading.Barrier(len(clients))

        with ThreadPoolExecutor(len(clients)) as threads:
            answers = set(threads.map(_commit, clients, [request] * len(clients), [barrier] * len(clients)))
        assert 1 == len(answers)
    assert list(range(5)) == sorted(one.step for one in p2_no_torn_checkpoint(clients[0], run, has_files=False))


def _commit(client: Client, request: pb.CommitCheckpointRequest, barrier: threading.Barrier) -> bytes:
    barrier.wait(CALL_S)
    return client.commit(request).SerializeToString(deterministic=True)


def test_a_later_session_on_another_replica_fences_at_once(replicas: Replicas, run: str, tmp_path: Path) -> None:
    """What one replica has acknowledged, every other one knows."""
    first, other = replicas.client_of(0), replicas.client_of(1)
    assert save(first, tmp_path, 1, run=run, incarnation=b"1" * 16).live
    later = save(other, tmp_path, 2, run=run, incarnation=b"2" * 16)
    who = replace(identity(3, run=run, incarnation=b"1" * 16, world_size=WORLD_SIZE), session=1)
    with pytest.raises(SessionFencedError, match="session 2 has taken"):
        register(first, who, tmp_path, [0])
    assert later.name == first.get_checkpoint(f"{run}@latest").name


def test_readers_never_see_half_a_commit_nor_go_back(replicas: Replicas, run: str, tmp_path: Path) -> None:
    """Row 12: readers on every replica while a job saves."""
    ended = threading.Event()

    def read(at: int) -> int:
        client, newest, looks = replicas.client_of(at), -1, 0
        while not ended.is_set():
            try:
                step = client.get_checkpoint(f"{run}@latest").step
            except NotFoundError:
                assert -1 == newest
                continue
            stored = client.get_metadata(f"{run}@latest")
            assert WORLD_SIZE == stored.checkpoint.world_size
            assert stored.segments
            assert newest <= step <= stored.checkpoint.step
            newest, looks = stored.checkpoint.step, looks + 1
        return looks

    with ThreadPoolExecutor(len(replicas.servers)) as threads:
        looks = [threads.submit(read, at) for at in range(len(replicas.servers))]
        try:
            with SavingJob(replicas.clients, run, tmp_path) as job:
                job.await_saves(8)
        finally:
            ended.set()
    assert all(one.result() > 0 for one in looks)
    assert [] == job.failures
    p2_no_torn_checkpoint(replicas.client_of(0), run, has_files=False)


@pytest.mark.soak_with("2")
def test_a_killed_replica_costs_no_call(replicas: Replicas, run: str, tmp_path: Path) -> None:
    """Row 13: killed in the middle of saves, each in turn; every call succeeds within its deadline."""
    with SavingJob(replicas.clients, run, tmp_path) as job:
        for server in replicas.servers:
            job.await_saves(1)
            server.kill()
            job.await_saves(3)
            server.start()
    assert [] == job.failures
    _all_there(replicas, run, job)


@pytest.mark.soak_with("2")
def test_a_rolling_restart_costs_no_call(replicas: Replicas, run: str, tmp_path: Path) -> None:
    """Row 15: each drains, ends, and starts again under load."""
    with SavingJob(replicas.clients, run, tmp_path) as job:
        for server in replicas.servers:
            job.await_saves(1)
            server.stop()
            job.await_saves(2)
            server.start()
        job.await_saves(1)
    assert [] == job.failures
    _all_there(replicas, run, job)


def _all_there(replicas: Replicas, run: str, job: SavingJob) -> None:
    """P1, P2: everything that was acknowledged, on every replica, and nothing half."""
    for at in range(len(replicas.servers)):
        listed = p2_no_torn_checkpoint(replicas.client_of(at), run, has_files=False)
        committed = {one.step for one in listed if one.state is CheckpointState.COMMITTED}
        assert set(job.committed) <= committed
