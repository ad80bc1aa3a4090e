"""Postgres is away for longer than a lease: who lives is not taken for dead, and who is dead is, once it is back.

With two replicas and leases of a few seconds; stopped where it stands, and crashed and started later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from shardbook import Client
from shardbook.config import ClientConfig
from shardbook.core.manifest import AttemptIdentity
from shardbook.dcp import OnLive, Session, new_session, start_session
from shardbook.dcp.lease import LeaseKeeper
from shardbook.errors import DeadlineExceededError, RunBusyError, UnavailableError
from shardbook.recording import attempt_key
from shardbook.v1 import registration_pb2 as pb
from shardbook.v1 import types_pb2
from shardbook_server.storage import migrate
from tests.behaviour.client.directories import identity
from tests.behaviour.client.saves import register
from tests.faults.processes import await_that
from tests.faults.replicas import CALL_S, Replicas, running_replicas
from tests.faults.validators import p2_no_torn_checkpoint
from tests.postgres import Cluster

LEASE_S = 8.0
OUTAGE_S = 11.0
#: How long a living job is silent after the outage: the reaper has been round several times by then.
SILENT_S = 2.5
#: By then the reaper has been round, and whoever did not renew after the outage has lost the lease.
SETTLED_S = LEASE_S + 4.0
OPEN = types_pb2.CHECKPOINT_STATE_OPEN
EXPIRED = types_pb2.CHECKPOINT_STATE_EXPIRED


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Postgres of the module's own."""
    cluster = Cluster()
    migrate.upgrade(cluster.url)
    yield cluster
    cluster.remove()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Iterator[Replicas]:
    """Two servers over it, with leases that are soon over."""
    settings = {"SHARDBOOK_LEASE_TTL_S": str(LEASE_S), "SHARDBOOK_REAP_INTERVAL_S": "1"}
    with running_replicas(tmp_path_factory.mktemp("replicas"), cluster.url, 2, **settings) as running:
        yield running


class Job:
    """A job of two ranks of which one has registered step 1; its lease is kept by the client's own thread, or not."""

    def __init__(self, client: Client, run: str, folder: Path) -> None:
        self.client = client
        self.run = run
        self._folder = folder
        self._session = _start(client, run)
        who = identity(1, run=run, incarnation=self._session.incarnation, world_size=2)
        self._who: AttemptIdentity = replace(who, session=self._session.number)
        register(client, self._who, folder, [0])

    @property
    def state(self) -> types_pb2.CheckpointState:
        """Where its attempt is in its life."""
        request = pb.GetCheckpointProgressRequest(key=attempt_key(self._who))
        return self.client.get_progress(request).progress.state

    def renew(self) -> None:
        """Gives one sign of life."""
        request = pb.KeepAliveRequest(
            run=str(self._session.run_name), session=self._session.number, incarnation=self._session.incarnation
        )
        self.client.keep_alive(request)

    def stays_open(self, seconds: float) -> None:
        """Looks at the attempt for a while."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            assert OPEN == self.state
            time.sleep(0.1)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Keeps the lease until the block ends, as a trainer's process does."""
        numbers = {self._session.part: self._session.number}
        keeper = LeaseKeeper(self.client, self._session, lambda: numbers, lambda *_: None)
        keeper.keep(LEASE_S)
        try:
            yield
        finally:
            keeper.close()

    def finish(self) -> None:
        """Registers what is missing and commits."""
        register(self.client, self._who, self._folder, [1])
        request = pb.CommitCheckpointRequest(key=attempt_key(self._who))
        assert self.client.commit_when_complete(request, timeout_s=CALL_S).checkpoint.live


def _start(client: Client, run: str) -> Session:
    session = new_session(run, ClientConfig(server=client.target), on_live=OnLive.FAIL, job_id="")
    return start_session(session, client, wait_s=0.0, deadline_s=10.0)


@contextmanager
def _outage(cluster: Cluster, kind: str) -> Iterator[None]:
    """Postgres is away within the block."""
    if kind == "stopped":
        cluster.freeze()
    else:
        cluster.crash()
    try:
        yield
    finally:
        if kind == "stopped":
            cluster.thaw()
        else:
            cluster.start()


@pytest.mark.parametrize("kind", ["stopped", "crashed"])
@pytest.mark.soak_with("crashed")
def test_only_who_is_dead_is_taken_for_dead(
    replicas: Replicas, cluster: Cluster, run: str, tmp_path: Path, kind: str
) -> None:
    """Row 5 and P3: the gap is credited, before another job may have the run and before anything is reaped."""
    first, other = replicas.client_of(0), replicas.client_of(1)
    gone = Job(first, f"{run}-{kind}-gone", tmp_path / "gone")
    await_that("the first lease ends", lambda: gone.state == EXPIRED)
    living = Job(first, f"{run}-{kind}-living", tmp_path / "living")
    dead = Job(other, f"{run}-{kind}-dead", tmp_path / "dead")
    dead.renew()
    living.renew()
    with ThreadPoolExecutor(1) as caller:
        with _outage(cluster, kind):
            time.sleep(OUTAGE_S)
            # It asks while Postgres is away, and is among the first that are heard when it is back.
            stranger = caller.submit(_start_until_answered, other, living.run)
            time.sleep(0.5)
        assert isinstance(stranger.result(), RunBusyError)
    living.stays_open(SILENT_S)
    with living.alive():
        living.stays_open(SETTLED_S)
        # Nobody spoke for this one since, and nobody has to come for it to end.
        await_that("the dead one's lease ends", lambda: dead.state == EXPIRED)
        assert OPEN == living.state
        # Not superseded: its writers come back, and what they had said before still counts.
        assert EXPIRED == gone.state
        gone.finish()
        living.finish()
    for job in (living, gone):
        for client in (first, other):
            (committed,) = p2_no_torn_checkpoint(client, job.run, has_files=False)
            assert 1 == committed.session
    assert 2 == _start(other, dead.run).number


def _start_until_answered(client: Client, run: str) -> Session | RunBusyError:
    """Another job asks for a run until it is told yes or no."""
    end_s = time.monotonic() + 30.0
    while time.monotonic() < end_s:
        with suppress(UnavailableError, DeadlineExceededError):
            try:
                return _start(client, run)
            except RunBusyError as error:
                return error
    raise AssertionError("no answer")
