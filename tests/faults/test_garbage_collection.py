"""Garbage is collected without a pause, nothing is kept for a day, and saves go on: P1, P2 and P5 hold."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from shardbook import Client
from shardbook.recording import attempt_key
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.service.garbage import GarbageService
from shardbook_server.storage import tables
from shardbook_server.storage.database import Connection, Database
from shardbook_server.storage.lists import unpack_ids
from tests.behaviour.client.directories import identity
from tests.behaviour.client.saves import register, start_session
from tests.databases import Databases, opened
from tests.faults.replicas import CALL_S, Replicas, running_replicas
from tests.faults.validators import p2_no_torn_checkpoint

WORKERS = 4
#: Each has a project of its own, where it is sure to meet what was dropped, and saves in those that all share.
SHARED = 6
WORLD = 3


@pytest.fixture
def url(databases: Databases) -> str:
    """A database of the test's own, of either kind."""
    return databases.new()


@pytest.fixture
def replicas(tmp_path: Path, url: str, databases: Databases) -> Iterator[Replicas]:
    """Two servers on Postgres; SQLite has one."""
    with running_replicas(tmp_path / "servers", url, 2 if databases.kind == "postgres" else 1) as running:
        yield running


class Collector:
    """Drops what nobody refers to, again and again, as another process does; nothing is too young."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ended = threading.Event()
        self._turned = threading.Condition()
        self._thread = threading.Thread(target=self._collect_on, name="collector")
        self.dropped: Counter[str] = Counter()
        self.failures: list[Exception] = []
        self._rounds = 0

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the collector hangs"

    def _collect_on(self) -> None:
        with opened(self._url, connections=1) as database:
            while not self._ended.is_set():
                try:
                    self.dropped.update(
                        {one.kind: one.count for one in GarbageService(database).collect(older_than_days=0)}
                    )
                except Exception as error:  # noqa: BLE001 - whatever it was, the test shows it
                    self.failures.append(error)
                    return
                with self._turned:
                    self._rounds += 1
                    self._turned.notify_all()
                self._ended.wait(0.02)

    def await_round(self) -> None:
        """Waits until it has been round once from its beginning."""
        with self._turned:
            target = self._rounds + 2
            assert self._turned.wait_for(lambda: self._rounds >= target or self.failures, 60)


def test_saves_beside_it_lose_nothing(replicas: Replicas, url: str, tmp_path: Path) -> None:
    """Every worker gives up an attempt and saves again what it named, in projects where the others do the same.

    So structures lose their last reference and get another all the time. No save fails, all that was committed loads,
    and no list names what is gone.
    """
    client = replicas.client_of(0)
    with Collector(url) as collector, ThreadPoolExecutor(WORKERS) as workers:
        saving = [workers.submit(_save_on, replicas, worker, collector, tmp_path) for worker in range(WORKERS)]
        for one in saving:
            one.result()
    assert [] == collector.failures
    assert collector.dropped["rank structures"] >= WORLD * WORKERS
    for worker in range(WORKERS):
        for run in _runs(worker):
            (committed,) = client.list_checkpoints(run)
            assert 2 == committed.attempt
            p2_no_torn_checkpoint(client, run, has_files=False)
    with opened(url) as database:
        GarbageService(database).collect(older_than_days=0)
        with database.read() as connection:
            assert [] == list(_dangling(connection))
        left = _rank_structures(database)
    # All workers save the same, and everything that is left is of a committed checkpoint.
    assert [WORLD] * (WORKERS + SHARED) == list(left.values())


def _runs(worker: int) -> list[str]:
    return [f"own-{worker}/run", *(f"shared-{at}/run-{worker}" for at in range(SHARED))]


def _save_on(replicas: Replicas, worker: int, collector: Collector, folder: Path) -> None:
    client: Client = replicas.clients[worker % len(replicas.clients)]
    incarnation = bytes([worker + 1]) * 16
    for run in _runs(worker):
        session = start_session(client, run, incarnation).session
        for attempt in (1, 2):
            who = identity(1, run=run, incarnation=incarnation, attempt=attempt, world_size=WORLD)
            who = replace(who, session=session)
            register(client, who, folder / run)
            key = attempt_key(who)
            if attempt == 1:
                client.abort(pb.AbortCheckpointRequest(key=key, reason="once more"))
                if run.startswith("own"):
                    collector.await_round()
            else:
                client.commit_when_complete(pb.CommitCheckpointRequest(key=key), timeout_s=CALL_S)


def _dangling(connection: Connection) -> Iterator[str]:
    blobs = set(connection.scalars(select(tables.rank_structures.c.id)))
    tensors = set(connection.scalars(select(tables.structure_tensors.c.id)))
    for row in connection.execute(select(tables.checkpoint_structures)):
        if not set(unpack_ids(row.rank_structure_ids).tolist()) <= blobs:
            yield f"structure {row.id}: ranks"
        if not set(unpack_ids(row.tensor_ids).tolist()) <= tensors:
            yield f"structure {row.id}: tensors"


def _rank_structures(database: Database) -> Counter[int]:
    where = tables.rank_structures.c.kind == 3
    with database.read() as connection:
        return Counter(connection.scalars(select(tables.rank_structures.c.project_id).where(where)))
