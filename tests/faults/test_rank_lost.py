"""Ranks that are killed, that hang, whose disk is full: P2, rows 9, 11, 33 and 34 of the matrix."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from shardbook import CheckpointState
from shardbook.core import directory as names
from shardbook.dcp import SaveState
from shardbook.errors import (
    CheckpointClosedError,
    RankFailedError,
    RanksMissingError,
    RunBusyError,
)
from tests.faults import jobs
from tests.faults.processes import await_stop
from tests.faults.server import ServerProcess
from tests.faults.validators import p2_no_torn_checkpoint
from tests.torch.harness import RankPool, files_below


def test_a_full_disk_on_one_rank(pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path) -> None:
    """The rank raises its own error; all others learn at once which rank failed, where and why."""
    path = tmp_path / "step-1"
    pool.run(jobs.nothing, world_size=3)
    began_s = time.monotonic()
    start = {"run": run, "server": shared_server.address}
    outcomes = pool.start(jobs.full_disk, start, str(path), 2, world_size=3).outcomes()
    assert time.monotonic() - began_s < 30  # far from the 30 minutes that it would wait otherwise
    errors = [one.error for one in outcomes]
    assert isinstance(errors[2], OSError)
    assert errno.ENOSPC == errors[2].errno
    for error in errors[:2]:
        assert isinstance(error, RankFailedError)
        assert ("2", "write") == (error.metadata["rank"], error.metadata["phase"])
    (failed,) = p2_no_torn_checkpoint(shared_server.client, run)
    assert CheckpointState.FAILED == failed.state
    assert "No space left" in failed.failure


@pytest.mark.parametrize("is_async", [False, True])
def test_a_state_that_cannot_be_had_on_one_rank(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path, is_async: bool
) -> None:
    """It fails before it has planned anything; the others learn so at once all the same."""
    pool.run(jobs.nothing, world_size=2)
    began_s = time.monotonic()
    start = {"run": run, "server": shared_server.address}
    outcomes = pool.start(jobs.broken_state, start, str(tmp_path / "step-1"), 1, is_async, world_size=2).outcomes()
    assert time.monotonic() - began_s < 30
    assert isinstance(outcomes[1].error, ValueError)
    assert isinstance(outcomes[0].error, RankFailedError), outcomes[0].traceback
    assert "no state today" in str(outcomes[0].error)


def test_a_full_disk_on_one_rank_offline(pool: RankPool, run: str, tmp_path: Path) -> None:
    """Word of the failure travels over storage: the coordinator does not wait for a record that will not come."""
    start = {"run": run, "mode": "offline"}
    outcomes = pool.start(jobs.full_disk, start, str(tmp_path / "step-1"), 1, world_size=2).outcomes()
    assert isinstance(outcomes[0].error, RankFailedError)
    assert "No space left" in str(outcomes[0].error)
    assert isinstance(outcomes[1].error, OSError)


def test_a_rank_is_killed_in_the_middle_of_its_data(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """The others say which rank is missing; a new session saves the step again beside the torn files."""
    path = tmp_path / "step-1"
    start = {"run": run, "server": shared_server.address, "job_id": run}
    outcomes = pool.start(jobs.die_writing, start, str(path), 1, {"timeout_s": 4.0}, world_size=3).outcomes()
    assert isinstance(outcomes[1].error, EOFError)
    for rank in (0, 2):
        assert isinstance(outcomes[rank].error, RanksMissingError), outcomes[rank].traceback
        assert "1" in str(outcomes[rank].error)
    (torn_attempt,) = p2_no_torn_checkpoint(shared_server.client, run)
    assert CheckpointState.COMMITTED != torn_attempt.state
    torn = set(files_below(path))
    again = pool.run(jobs.save_once, start, str(path), {}, world_size=2)
    assert [SaveState.COMMITTED] * 2 == [one.state for one in again]
    assert [2] == [one.session for one in p2_no_torn_checkpoint(shared_server.client, run) if one.live]
    assert torn <= set(files_below(path))
    environment = {"SHARDBOOK_SERVER": shared_server.address}
    for target in (f"{run}@1", str(path)):
        assert [[]] * 3 == pool.run(jobs.load_once, target, world_size=3, environment=environment)


def test_a_rank_is_killed_offline(pool: RankPool, run: str, tmp_path: Path) -> None:
    """The coordinator waits for a bounded time, then says who is missing; nothing is taken for a checkpoint."""
    path = tmp_path / "step-1"
    start = {"run": run, "mode": "offline"}
    outcomes = pool.start(jobs.die_writing, start, str(path), 1, {"timeout_s": 2.0}, world_size=2).outcomes()
    assert SaveState.UNREGISTERED == outcomes[0].value.state
    assert "1 ranks left no record: 1" in outcomes[0].value.reason
    assert not (path / names.DCP_METADATA).exists()
    loaded = pool.start(jobs.load_once, str(path), world_size=1).outcomes()
    assert "1 ranks" in str(loaded[0].error)


def test_a_restarted_job_saves_the_step_with_another_world_size(
    pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """The later session's checkpoint counts; the older one still loads its own bytes by its full name."""
    path = str(tmp_path / "step-1")
    start = {"run": run, "server": shared_server.address}
    first = pool.run(jobs.save_once, start, path, {}, world_size=3)
    second = pool.run(jobs.save_other_values, start, path, world_size=2)
    assert first[0].prefix != second[0].prefix
    environment = {"SHARDBOOK_SERVER": shared_server.address}
    for target in (f"{run}@1", path):
        assert [True] == pool.run(jobs.load_other_values, target, world_size=1, environment=environment)
    attempts = p2_no_torn_checkpoint(shared_server.client, run)
    assert [(2, True), (1, False)] == [(one.session, one.live) for one in attempts]
    for target in (first[0].name, f"{run}@1.s1"):
        assert [[]] * 2 == pool.run(jobs.load_once, target, world_size=2, environment=environment)


def test_the_coordinator_is_killed_before_its_commit(pool: RankPool, run: str, tmp_path: Path) -> None:
    """The attempt never becomes ``latest``; the lease ends, the others wait a while in vain, and a new session wins.

    It has left its record, so it would have committed by then, or left word: three times what an outage may cost.
    """
    path = str(tmp_path / "step-1")
    with ServerProcess(tmp_path / "server", SHARDBOOK_LEASE_TTL_S="3", SHARDBOOK_REAP_INTERVAL_S="0.5") as server:
        start = {"run": run, "server": server.address}
        patience = {"SHARDBOOK_OUTAGE_FIRST_S": "2"}
        outcomes = pool.start(jobs.kill_coordinator, start, path, world_size=2, environment=patience).outcomes(60)
        assert isinstance(outcomes[0].error, EOFError)
        assert isinstance(outcomes[1].error, CheckpointClosedError), outcomes[1].traceback
        assert "EXPIRED" == outcomes[1].error.metadata["state"]
        assert "rank 0" in str(outcomes[1].error)
        assert [CheckpointState.EXPIRED] == [one.state for one in p2_no_torn_checkpoint(server.client, run)]
        again = pool.run(jobs.save_once, start, path, {}, world_size=2)
        assert [SaveState.COMMITTED] * 2 == [one.state for one in again]


def test_a_second_job_waits_in_vain_for_a_run_that_is_written(
    pool: RankPool, later_pool: RankPool, shared_server: ServerProcess, run: str, tmp_path: Path
) -> None:
    """Every rank of it learns who holds the run, and the live job is not fenced by accident."""
    path = str(tmp_path / "step-1")
    start = {"run": run, "server": shared_server.address}
    running = pool.start(jobs.hang_writing, start, path, 1, world_size=2)
    await_stop(running.pids[1])
    second = {**start, "on_live": "wait", "live_wait_s": 1.0}
    outcomes = later_pool.start(jobs.save_once, second, path, {}, world_size=2).outcomes()
    for one in outcomes:
        assert isinstance(one.error, RunBusyError), one.traceback
        assert one.error.metadata["host"]
    os.kill(running.pids[1], signal.SIGCONT)
    assert [SaveState.COMMITTED] * 2 == [one.state for one in running.values()]
