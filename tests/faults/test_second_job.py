"""Row 33: a second job starts on a run that is being written; a lease ends when its process does."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardbook.config import ClientConfig
from shardbook.dcp import OnLive, SaveState, Session, new_session, start_session
from shardbook.errors import RunBusyError, SessionFencedError
from shardbook.v1 import registration_pb2 as pb
from tests.faults import jobs
from tests.faults.processes import await_stop, await_that
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.torch.harness import RankPool


def _start(
    server: ServerProcess, run: str, on_live: OnLive = OnLive.FAIL, job_id: str = "", wait_s: float = 0.0
) -> Session:
    config = ClientConfig(server=server.address)
    session = new_session(run, config, on_live=on_live, job_id=job_id)
    return start_session(session, server.client, wait_s=wait_s, deadline_s=10.0)


def _keep_alive(server: ServerProcess, session: Session, *, release: bool = False) -> None:
    request = pb.KeepAliveRequest(
        run=str(session.run_name),
        part=session.part,
        session=session.number,
        incarnation=session.incarnation,
        release=release,
    )
    server.client.keep_alive(request)


def test_it_is_told_who_writes_the_run(shared_server: ServerProcess, run: str) -> None:
    """FAIL: host, user and last sign of life, and the live job is not touched."""
    first = _start(shared_server, run, job_id="one")
    with pytest.raises(RunBusyError) as caught:
        _start(shared_server, run, job_id="another")
    facts = caught.value.metadata
    assert (socket.gethostname(), getpass.getuser(), "one") == (facts["host"], facts["user"], facts["job_id"])
    assert facts["last_seen"]
    assert getpass.getuser() in str(caught.value)
    _keep_alive(shared_server, first)


def test_jobs_without_an_id_are_not_the_same_job(shared_server: ServerProcess, run: str) -> None:
    """No id is no identity: a copied script does not fence a running job."""
    first = _start(shared_server, run)
    with pytest.raises(RunBusyError):
        _start(shared_server, run)
    _keep_alive(shared_server, first)


def test_it_waits_for_the_lease_to_end(shared_server: ServerProcess, run: str) -> None:
    """WAIT: it starts when the first job is done, without fencing it before."""
    first = _start(shared_server, run)
    began = threading.Event()

    def second() -> Session:
        began.set()
        return _start(shared_server, run, OnLive.WAIT, wait_s=30.0)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        assert began.wait(10)
        _keep_alive(shared_server, first)
        assert not waiting.done()
        _keep_alive(shared_server, first, release=True)
        assert (1, 2) == (first.number, waiting.result(30).number)


def test_a_restarted_job_takes_over_at_once(shared_server: ServerProcess, run: str) -> None:
    """The same job id: no waiting for a lease that nobody holds any more."""
    first = _start(shared_server, run, job_id="slurm-17")
    again = _start(shared_server, run, job_id="slurm-17")
    assert (1, 2) == (first.number, again.number)
    with pytest.raises(SessionFencedError):
        _keep_alive(shared_server, first)


def test_a_takeover_fences_the_live_job(
    pool: RankPool, later_pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """TAKEOVER: every rank of the live job is told so, its data kept; the new job saves."""
    path = tmp_path / "step-1"
    start = {"run": run, "server": shared_server.address, "job_id": "one"}
    running = pool.start(jobs.hang_writing, start, str(path), 1, world_size=2)
    await_stop(running.pids[1])
    second = {**start, "job_id": "another"}
    refused = later_pool.start(jobs.save_once, second, str(path), {}, world_size=2).outcomes()
    assert [RunBusyError] * 2 == [type(one.error) for one in refused]
    taken = later_pool.run(jobs.save_once, {**second, "on_live": "takeover"}, str(path), {}, world_size=2)
    assert [SaveState.COMMITTED] * 2 == [one.state for one in taken]
    os.kill(running.pids[1], signal.SIGCONT)
    assert [SessionFencedError] * 2 == [type(one.error) for one in running.outcomes()]
    (live,) = [one for one in p2_no_torn_checkpoint(shared_server.client, run) if one.live]
    assert taken[0].name == live.name
    assert len(list(path.glob("*-a1/__*_0.distcp"))) == 4


_PROGRAM = """
import os, sys, torch
from shardbook import dcp

run, server, directory, ending = sys.argv[1:]
dcp.init(run=run, server=server, job_id="program")
for step in (1, 2):
    dcp.async_save({"w": torch.full((4,), float(step))}, checkpoint_id=f"{directory}/step-{step}", no_dist=True)
if ending == "dies":
    open(f"{directory}/alive", "w").close()
    sys.stdin.read()
"""


def test_a_process_that_ends_releases_its_lease(shared_server: ServerProcess, run: str, tmp_path: Path) -> None:
    """It first finishes what it saves in the background; one that is killed keeps the lease until that ends."""
    killed_run = f"{run}-killed"
    programs = []
    for name, ending in ((run, "exits"), (killed_run, "dies")):
        (tmp_path / ending).mkdir()
        arguments = [name, shared_server.address, str(tmp_path / ending), ending]
        command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, *arguments]
        programs.append(subprocess.Popen(command, stdin=subprocess.PIPE))
    exiting, dying = programs
    with exiting, dying:
        assert 0 == exiting.wait(60)
        assert [2, 1] == [one.step for one in p2_no_torn_checkpoint(shared_server.client, run)]
        assert 2 == _start(shared_server, run, job_id="another").number
        await_that("the program saves", (tmp_path / "dies" / "alive").exists)
        dying.kill()
        dying.wait()
        with pytest.raises(RunBusyError):
            _start(shared_server, killed_run, job_id="another")
        assert 2 == _start(shared_server, killed_run, job_id="program").number
