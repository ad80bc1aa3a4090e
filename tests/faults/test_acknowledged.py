"""P1, row 1: the server is killed at random while ranks register."""

from __future__ import annotations

import queue
import random
import threading
from dataclasses import dataclass, field

import grpc
import pytest

from shardbook.catalog import Checkpoint, CheckpointState
from shardbook.core.names import RunName
from shardbook.errors import AlreadyExistsError
from tests.behaviour.rpc.api import DEADLINE_S, Job, Payload, api_of, payload, refusal, row
from tests.faults.server import ServerProcess
from tests.faults.validators import p1_durable_acknowledgement, p2_no_torn_checkpoint, p4_one_effect

_WORLD_SIZE = 48
_THREADS = 6


@dataclass
class _Storm:
    """Ranks that register from several threads until the server is gone."""

    job: Job
    world: list[Payload]
    acknowledged: set[int] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)
    running_count: int = 0

    def start(self, order: list[int]) -> list[threading.Thread]:
        """Starts the threads; each takes ranks in turn."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for rank in order:
            waiting.put(rank)
        threads = [threading.Thread(target=self._register, args=(waiting,)) for _ in range(_THREADS)]
        self.running_count = len(threads)
        for thread in threads:
            thread.start()
        return threads

    def await_acknowledged(self, count: int) -> None:
        """Waits until so many ranks are acknowledged."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.acknowledged) >= count, DEADLINE_S)

    def _register(self, waiting: queue.SimpleQueue[int]) -> None:
        try:
            while True:
                rank = waiting.get_nowait()
                answer = self.job.register(rank, self.world[rank])
                assert not answer.unknown
                with self.changed:
                    self.acknowledged.add(rank)
                    self.changed.notify_all()
        except (grpc.RpcError, queue.Empty):  # the server is gone, or every rank is registered
            return


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_an_acknowledged_registration_survives_a_kill(either_server: ServerProcess, run: str, seed: int) -> None:
    """Acknowledged ranks are there after the restart; the others whole or absent; the attempt can be finished."""
    rng = random.Random(seed)
    kill_at, order = rng.randrange(1, _WORLD_SIZE - _THREADS), rng.sample(range(_WORLD_SIZE), _WORLD_SIZE)
    print(f"seed {seed}: killed after {kill_at} acknowledgements")
    client = either_server.client
    with api_of(either_server.address) as api:
        job = Job.start(api, str(RunName.parse(run)), _WORLD_SIZE)
        storm = _Storm(job, job.rows())
        threads = storm.start(order)
        storm.await_acknowledged(kill_at)
        either_server.restart()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        grpc.channel_ready_future(api.channel).result(timeout=DEADLINE_S)

        there = p1_durable_acknowledgement(client, job.key(), storm.acknowledged)
        assert there != set(range(_WORLD_SIZE)), "the kill came too late to prove anything"
        assert [CheckpointState.OPEN] == [one.state for one in p2_no_torn_checkpoint(client, run, has_files=False)]
        for rank in sorted(there)[:3]:  # what is there is whole: it is compared, and other content is refused
            other = payload([row("w", rank, _WORLD_SIZE, dtype="float64")])
            request = job.register_request(rank, other)
            request.blobs.extend(other.blobs.values())
            assert isinstance(refusal(api.registration.RegisterShards, request), AlreadyExistsError)
        for rank in range(_WORLD_SIZE):
            assert not job.register(rank, storm.world[rank]).unknown
        committed = p4_one_effect(job.commit, lambda: p2_no_torn_checkpoint(client, run, has_files=False))
        assert [committed.name] == [one.name for one in client.list_checkpoints(run)]
        assert Checkpoint.of(committed) == client.get_checkpoint(committed.name)
