"""Rows 4 and 5: the Postgres behind a server crashes, or stands still."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardbook import Client
from shardbook.catalog import CheckpointState
from shardbook.errors import DeadlineExceededError, ShardbookError, UnavailableError
from shardbook.v1 import catalog_pb2
from shardbook_server.storage import migrate
from tests.behaviour.client.saves import start_session
from tests.behaviour.rpc.api import api_of, refusal
from tests.faults.replicas import Replicas, SavingJob, running_replicas
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.postgres import Cluster

#: Within this time of its return the database is used again.
_RECOVERY_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Postgres of the module's own; tests leave it alive."""
    cluster = Cluster()
    yield cluster
    cluster.remove()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[Replicas]:
    """Two servers over it."""
    migrate.upgrade(cluster.url)
    with running_replicas(tmp_path_factory.mktemp("replicas"), cluster.url, 2) as running:
        yield running


def test_a_crash_under_load_loses_nothing_that_was_acknowledged(
    replicas: Replicas, cluster: Cluster, run: str, tmp_path: Path
) -> None:
    """Row 4: the job's calls ride it out within their deadlines, and every acknowledged checkpoint is there."""
    with SavingJob(replicas.clients, run, tmp_path) as job:
        for _ in range(3):
            job.await_saves(2)
            cluster.crash()
            cluster.start()
        job.await_saves(2)
    assert [] == job.failures
    listed = p2_no_torn_checkpoint(replicas.client_of(0), run, has_files=False)
    assert set(job.committed) <= {one.step for one in listed if one.state is CheckpointState.COMMITTED}


def test_while_it_is_away_calls_say_so_and_when_it_is_back_they_work(replicas: Replicas, cluster: Cluster) -> None:
    """Row 4: UNAVAILABLE with RetryInfo, and no restart of the server is needed."""
    with api_of(replicas.servers[0].address) as api:
        cluster.crash()
        try:
            error = refusal(api.catalog.ListRuns, catalog_pb2.ListRunsRequest(parent="projects/-"))
            assert (UnavailableError, "DATABASE_UNAVAILABLE") == (type(error), error.reason)
            assert error.retry_delay_s
        finally:
            cluster.start()
        _works_again(replicas.client_of(0))


def test_while_it_stands_still_calls_end_with_their_deadlines(replicas: Replicas, cluster: Cluster) -> None:
    """Row 5: a hundred calls, no thread more than before, and all is well once it goes on."""
    client = Client(replicas.servers[0].address, timeout_s=1.5)
    list(client.list_runs())
    threads = _thread_count(replicas)
    cluster.freeze()
    try:
        with ThreadPoolExecutor(20) as callers:
            ended = [callers.submit(lambda: list(client.list_runs())) for _ in range(100)]
            kinds = {type(one.exception()) for one in ended}
        assert {DeadlineExceededError} == kinds
        assert _thread_count(replicas) <= threads + 8  # as many as the pools may grow to
    finally:
        cluster.thaw()
    _works_again(client)


def test_a_server_ends_though_its_database_stands_still(
    replicas: Replicas, cluster: Cluster, run: str, tmp_path: Path
) -> None:
    """A replacement must not wait for ever: statements that are never answered are cut off after the drain."""
    with (
        ServerProcess(tmp_path / "server", cluster.url, SHARDBOOK_DRAIN_S="1") as server,
        ThreadPoolExecutor(2) as callers,
    ):
        client = Client(server.address, timeout_s=10.0)
        cluster.freeze()
        try:
            reading = callers.submit(lambda: list(client.list_runs()))
            writing = callers.submit(start_session, client, run, b"e" * 16)
            time.sleep(0.5)
            began_s = time.monotonic()
            server.stop()
            assert time.monotonic() - began_s < 20.0
        finally:
            cluster.thaw()
        assert isinstance(reading.exception(), ShardbookError)
        assert isinstance(writing.exception(), ShardbookError)
    _works_again(replicas.client_of(0))


def _works_again(client: Client) -> None:
    end_s = time.monotonic() + _RECOVERY_S
    while True:
        try:
            list(client.list_runs())
        except (UnavailableError, DeadlineExceededError):
            assert time.monotonic() < end_s, "it did not recover"
        else:
            return


def _thread_count(replicas: Replicas) -> int:
    status = Path(f"/proc/{replicas.servers[0].pid}/status").read_text()
    return int(status.partition("Threads:")[2].split()[0])
