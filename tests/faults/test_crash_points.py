"""P4, rows 2 and 30: the server ends just before or just after the transaction of a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from shardbook import CheckpointState, Client, UnavailableError
from shardbook.catalog import Checkpoint
from shardbook.core.names import RunName
from shardbook.dcp import SaveState
from shardbook.sync import SyncOutcome, sync_directories
from shardbook.v1 import registration_pb2 as pb
from shardbook_server.failpoints import EXIT_CODE
from tests.behaviour.client.directories import CheckpointDirectory, identity
from tests.behaviour.rpc.api import DEADLINE_S, Api, Job
from tests.faults import hurt
from tests.faults.server import ServerProcess
from tests.faults.validators import (
    p1_durable_acknowledgement,
    p2_no_torn_checkpoint,
    p4_one_effect,
    p9_save_outlives_service,
)
from tests.torch.harness import RankPool


def _crash(server: ServerProcess, api: Api, call: Callable[[], object], failpoints: str = "") -> None:
    """Makes a call that the server does not survive, and starts it again, to end elsewhere."""
    grpc.channel_ready_future(api.channel).result(timeout=DEADLINE_S)
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value  # a Call too, which its types do not say
    assert grpc.StatusCode.UNAVAILABLE == error.code()
    assert EXIT_CODE == server.await_exit()
    server.start(failpoints)
    grpc.channel_ready_future(api.channel).result(timeout=DEADLINE_S)


def _resource(run: str) -> str:
    return str(RunName.parse(run))


@pytest.mark.soak_with("postgres")
def test_crashes_at_start_session(server: ServerProcess, api: Api, run: str) -> None:
    """Just before: there is no run. Just after: there is, and asking again returns the one session."""
    job = Job(api, _resource(run))
    server.restart("session.before_db=exit")
    _crash(server, api, job.start_session, "session.after_db=exit")
    assert run not in {one.ref for one in server.client.list_runs()}
    _crash(server, api, job.start_session)
    assert [("default", 1)] == _sessions(server, run)
    answer = p4_one_effect(lambda: _timeless(job.start_session()), lambda: _sessions(server, run))
    assert 1 == answer.session


def _timeless(answer: pb.StartSessionResponse) -> pb.StartSessionResponse:
    return pb.StartSessionResponse(session=answer.session, latest=answer.latest)


def _sessions(server: ServerProcess, run: str) -> list[tuple[str, int]]:
    return [(part.part, part.session) for part in server.client.get_run(run).parts]


@pytest.mark.soak_with("postgres")
def test_crashes_at_register(server: ServerProcess, api: Api, run: str) -> None:
    """Just before: the rank is not there. Just after: it is, and registering again is the same registration."""
    job = Job.start(api, _resource(run))
    first, second = job.rows()
    job.register(1, second)
    request = job.register_request(0, first)
    request.blobs.extend(first.blobs.values())

    def register() -> pb.RegisterShardsResponse:
        return job.api.registration.RegisterShards(request, timeout=DEADLINE_S)

    server.restart("register.before_db=exit")
    _crash(server, api, register, "register.after_db=exit")
    assert {1} == p1_durable_acknowledgement(server.client, job.key(), {1})
    _crash(server, api, register)
    assert {0, 1} == p1_durable_acknowledgement(server.client, job.key(), {1})
    answer = p4_one_effect(register, lambda: job.progress().progress)
    assert not answer.unknown
    assert CheckpointState.COMMITTED == Checkpoint.of(job.commit()).state
    assert 1 == len(p2_no_torn_checkpoint(server.client, run, has_files=False))


def test_crashes_at_commit(server: ServerProcess, api: Api, run: str) -> None:
    """Just before: nothing is visible. Just after: all is, and committing again returns the one answer."""
    job = Job.start(api, _resource(run))
    for rank, what in enumerate(job.rows()):
        job.register(rank, what)
    client = server.client
    server.restart("commit.before_db=exit")
    _crash(server, api, job.commit, "commit.after_db=exit")
    (seen,) = p2_no_torn_checkpoint(client, run, has_files=False)
    assert (CheckpointState.OPEN, []) == (seen.state, list(client.list_checkpoints(run)))
    _crash(server, api, job.commit)
    listed = p2_no_torn_checkpoint(client, run, has_files=False)
    answer = p4_one_effect(job.commit, lambda: p2_no_torn_checkpoint(client, run, has_files=False))
    assert listed == list(client.list_checkpoints(run))
    assert [answer.name] == [one.name for one in listed]
    assert Checkpoint.of(answer) == client.get_checkpoint(answer.name)
    assert answer.name == client.get_checkpoint(f"{run}@latest").name


@pytest.mark.soak_with("postgres")
def test_crashes_during_sync(server: ServerProcess, run: str, tmp_path: Path) -> None:
    """The next ``sync`` goes on where it was; the step is recorded once."""
    CheckpointDirectory(tmp_path / "step-2").add_records(identity(2, run=run))
    assert [SyncOutcome.RECORDED] == [one.outcome for one in sync_directories(server.client, [tmp_path])]
    # Its structure is known by now, so one call records it.
    CheckpointDirectory(tmp_path / "step-3").add_records(identity(3, run=run))
    impatient = Client(server.address, timeout_s=2.0, outage_s=1.0)
    server.restart("record.before_db=exit")
    attempts: list[Checkpoint] = []
    for failpoints in ("record.after_db=exit", ""):
        with pytest.raises(UnavailableError):
            list(sync_directories(impatient, [tmp_path]))
        assert EXIT_CODE == server.await_exit()
        server.start(failpoints)
        attempts = p2_no_torn_checkpoint(server.client, run, has_files=False)
        assert ([2] if failpoints else [3, 2]) == [one.step for one in attempts]
    outcomes = [one.outcome for _ in range(2) for one in sync_directories(server.client, [tmp_path])]
    assert [SyncOutcome.PRESENT] * 4 == outcomes
    assert attempts == list(server.client.list_checkpoints(run, show_all=True))
    assert {(True, CheckpointState.COMMITTED)} == {(one.recovered, one.state) for one in attempts}


@pytest.mark.parametrize("point", ["register.after_db", "commit.after_db"])
@pytest.mark.soak_with("postgres")
def test_a_crash_in_the_middle_of_a_save(
    pool: RankPool, server: ServerProcess, run: str, tmp_path: Path, point: str
) -> None:
    """Real ranks go on without it; ``sync`` brings the step in after a later session has saved later ones."""
    server.restart(f"{point}=exit")
    start = {"run": run, "server": server.address, "job_id": run}
    patience = {"SHARDBOOK_OUTAGE_FIRST_S": "2"}
    lost = tmp_path / "step-1"
    saved = pool.run(hurt.save_steps, start, [str(lost)], world_size=2, environment=patience)
    assert [SaveState.UNREGISTERED] * 2 == [one.result.state for (one,) in saved], saved
    assert EXIT_CODE == server.await_exit()
    server.start()
    later = pool.run(hurt.save_steps, start, [str(tmp_path / "step-5")], world_size=2)
    assert [SaveState.COMMITTED] * 2 == [one.result.state for (one,) in later]
    (one,) = p9_save_outlives_service(pool, server.client, run, [lost], latest=later[0][0].result.name)
    expected = SyncOutcome.PRESENT if point == "commit.after_db" else SyncOutcome.RECORDED
    assert (1, expected) == (one.session, one.outcome)
    assert [5, 1] == [one.step for one in server.client.list_checkpoints(run)]


def test_a_commit_that_happened_is_found_again(pool: RankPool, server: ServerProcess, run: str, tmp_path: Path) -> None:
    """The server ends just after the commit and is back before the job gives up: every rank learns COMMITTED."""
    server.restart("commit.after_db=exit")
    start = {"run": run, "server": server.address}
    path = tmp_path / "step-1"
    patience = {"SHARDBOOK_OUTAGE_FIRST_S": "40"}
    running = pool.start(hurt.save_steps, start, [str(path)], world_size=2, environment=patience)
    assert EXIT_CODE == server.await_exit()
    server.start()
    saved = [one.result for (one,) in running.values()]
    assert [SaveState.COMMITTED] * 2 == [one.state for one in saved]
    (one,) = p2_no_torn_checkpoint(server.client, run)
    assert {one.name} == {result.name for result in saved}
    assert [] == list((path / ".shardbook").glob("*/*.record"))
