"""How a server ends: drained, with everything that it acknowledged on disk, and exit code 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from shardbook_server.app import running_server
from shardbook_server.failpoints import Failpoints
from tests.behaviour.rpc.api import DEADLINE_S, Job, Payload, api_of, error_of, refusal, settings_in

SERVER = [sys.executable, "-m", "shardbook_server.cli", "serve", "--listen", "127.0.0.1:0"]


@contextmanager
def _process(folder: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs the real command; yields it and its address, and leaves no process behind."""
    variables = {**os.environ, "SHARDBOOK_DATABASE_URL": f"sqlite:///{folder / 'shardbook.db'}", **environment}
    process = subprocess.Popen(SERVER, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        yield process, lines[1].split()[1]
    finally:
        process.kill()
        process.communicate()


def _ends(process: subprocess.Popen[str]) -> str:
    """Waits for the process; returns what it wrote to its log."""
    _, log = process.communicate(timeout=DEADLINE_S)
    assert 0 == process.returncode, log
    return log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_waits_finishes_writes_and_exits_0(tmp_path: Path, number: signal.Signals) -> None:
    """Rule: waits end UNAVAILABLE, calls in progress get their answer, the database is whole, the exit code 0."""
    slow = {"SHARDBOOK_FAILPOINTS": "register.before_db=sleep(0.5)"}
    with _process(tmp_path, **slow) as (process, address), api_of(address) as api, ThreadPoolExecutor(4) as pool:
        job = Job.start(api, "projects/test/runs/r")
        world = job.rows()
        job.plan(0, world[0])
        waits = [
            pool.submit(refusal, job.plan, 0, world[0], 1, 20),
            pool.submit(refusal, job.progress, 1, pb.GetCheckpointProgressRequest.UNTIL_CLOSED, 20),
        ]
        request = job.register_request(0, world[0])
        request.blobs.extend(world[0].blobs.values())
        writing = pool.submit(api.registration.RegisterShards, request, timeout=DEADLINE_S)
        time.sleep(0.25)
        began = time.monotonic()
        process.send_signal(number)
        assert [("UNAVAILABLE", "DRAINING")] * 2 == [(w.result(10).status, w.result().reason) for w in waits]
        assert not writing.result(10).unknown
        log = _ends(process)
        assert time.monotonic() - began < 8
        assert "draining" in log
        assert "error" not in log
    assert not (tmp_path / "shardbook.db-wal").exists(), "the engine was not closed"
    with _process(tmp_path) as (process, address), api_of(address) as api:
        job = Job(api, job.run, session=job.session, incarnation=job.incarnation)
        assert 1 == job.progress().progress.registered_count
        process.send_signal(signal.SIGTERM)
        _ends(process)


def test_a_second_signal_cuts_what_is_in_progress(tmp_path: Path) -> None:
    """Rule: who asks twice does not wait for calls that take long; two at once are one."""
    stuck = {"SHARDBOOK_FAILPOINTS": "abort.after_db=sleep(3)", "SHARDBOOK_DRAIN_S": "60"}
    with _process(tmp_path, **stuck) as (process, address), api_of(address) as api, ThreadPoolExecutor(1) as pool:
        job = Job.start(api, "projects/test/runs/r")
        job.register(0, job.rows()[0])
        call = pool.submit(api.registration.AbortCheckpoint, pb.AbortCheckpointRequest(key=job.key()))
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.3)
        assert not call.done()
        process.send_signal(signal.SIGTERM)
        error = call.exception(timeout=1.2)
        assert isinstance(error, grpc.RpcError)
        assert "cut" in _ends(process)


def test_a_draining_server_says_so_to_health_checks(tmp_path: Path) -> None:
    """Rule: NOT_SERVING from the first moment of the drain, while calls in progress still finish."""
    points = Failpoints.parse("abort.after_db=sleep(0.5)")
    with ThreadPoolExecutor(2) as pool:
        with ExitStack() as connection, running_server(settings_in(tmp_path), failpoints=points) as server:
            api = connection.enter_context(api_of(server.address))
            watch = api.health.Watch(health_pb2.HealthCheckRequest(service=""))
            assert health_pb2.HealthCheckResponse.SERVING == next(watch).status
            job = Job.start(api, "projects/test/runs/r")
            job.register(0, job.rows()[0])
            last = pool.submit(_statuses, watch)
            call = pool.submit(api.registration.AbortCheckpoint, pb.AbortCheckpointRequest(key=job.key()))
            time.sleep(0.2)
            # Leaving the block begins the drain.
        assert types_pb2.CHECKPOINT_STATE_FAILED == call.result(5).checkpoint.state
        assert [health_pb2.HealthCheckResponse.NOT_SERVING] == last.result(5)


def _statuses(watch: object) -> list[int]:
    """Returns what a health watch says until it ends."""
    found: list[int] = []
    with suppress(grpc.RpcError):
        found.extend(answer.status for answer in watch)  # type: ignore[attr-defined]
    return found


def test_a_killed_server_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    """Rule: an OK survives SIGKILL; the same calls again get the same answers."""
    with _process(tmp_path) as (process, address), api_of(address) as api:
        job = Job.start(api, "projects/test/runs/r")
        world = job.rows()
        checkpoint = job.save(1, world)
        job.register(0, world[0], step=2)
        process.kill()
        process.wait()
        with pytest.raises(grpc.RpcError):
            job.commit(2)
    with _process(tmp_path) as (process, address), api_of(address) as api:
        job = Job(api, job.run, session=job.session, incarnation=job.incarnation)
        assert checkpoint == job.commit(1)
        assert 1 == job.progress(2).progress.registered_count
        job.register(1, world[1], step=2)
        assert job.commit(2).live


@pytest.mark.parametrize("point", ["register.before_db", "commit.before_db", "commit.after_db", "plan.after_db"])
def test_a_server_that_dies_in_mid_write_leaves_it_whole_or_absent(tmp_path: Path, point: str) -> None:
    """Rule: before the transaction nothing is visible, after it everything; a retry has one effect either way."""
    with _process(tmp_path, SHARDBOOK_FAILPOINTS=f"{point}=exit") as (process, address), api_of(address) as api:
        job = Job.start(api, "projects/test/runs/r")
        world = job.rows()
        with pytest.raises(grpc.RpcError) as died:
            _plan_and_save(job, world)
        failed: Any = died.value
        assert grpc.StatusCode.UNAVAILABLE == failed.code()
        assert 137 == process.wait(10)
    with _process(tmp_path) as (process, address), api_of(address) as api:
        job = Job(api, job.run, session=job.session, incarnation=job.incarnation)
        if point == "commit.after_db":
            assert types_pb2.CHECKPOINT_STATE_COMMITTED == job.progress().progress.state
        elif point == "commit.before_db":
            assert (types_pb2.CHECKPOINT_STATE_OPEN, 2) == _standing(job)
        elif point == "register.before_db":
            assert (types_pb2.CHECKPOINT_STATE_OPEN, 0) == _standing(job)
        else:
            # The plan asked for its blobs first; that answer was written, so the attempt may be open, with nothing in.
            assert "NOT_FOUND" == _refused_or_empty(job)
        assert job.save(1, world).live


def _plan_and_save(job: Job, world: Sequence[Payload]) -> None:
    job.plan(0, world[0])
    job.save(1, world)


def _standing(job: Job) -> tuple[int, int]:
    progress = job.progress().progress
    return progress.state, progress.registered_count


def _refused_or_empty(job: Job) -> str:
    try:
        progress = job.progress().progress
    except grpc.RpcError as error:
        return error_of(error).status
    assert (0, 0) == (progress.registered_count, progress.planned_count)
    return "NOT_FOUND"
